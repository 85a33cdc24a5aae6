"""The page of a CIFAR-10 run: one HTML file and the PNGs that it shows, all in the workdir."""

import html
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from cifar10_features import neighbours

from tokenbridge_jax import Pipeline
from tokenbridge_jax.evaluation import figures
from tokenbridge_jax.runtime import pictures, storage
from tokenbridge_jax.training.metric_writer import read_metrics

NEIGHBOURS = 5
# What training measures with held-out pictures: of heads of indices, of latents, and without
# probabilities.
HELD_OUT = {
    "val_nll_bits_per_index": "held-out bits an index",
    "val_nll_bits_per_latent": "held-out bits a latent",
    "val_loss": "held-out loss",
}
COLUMNS = 15

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; margin: 1em 0; }
td, th { border-bottom: 1px solid #ddd; padding: 0.25em 1em 0.25em 0; text-align: left; }
figure { margin: 0.5em 0; } figcaption { color: #555; }
img { max-width: 100%; } pre { background: #f5f5f5; padding: 1em; overflow: auto; }
"""


class Section(NamedTuple):
    """A part of the page.

    Attributes:
      heading: of the part.
      text: paragraphs under the heading.
      table: rows of cells; the first row is the heading.
      pictures: caption -> file, in the folder of the page or below it.
      code: text that is shown as it is.
    """

    heading: str
    text: Sequence[str] = ()
    table: Sequence[Sequence[str]] = ()
    pictures: Mapping[str, Path] = {}
    code: str = ""


def write(path: Path, title: str, sections: Sequence[Section]) -> None:
    """Writes the page, completely or not at all. It requests nothing from other servers."""
    parts = [f"<h1>{html.escape(title)}</h1>"]
    for section in sections:
        parts.append(f"<h2>{html.escape(section.heading)}</h2>")
        parts += [f"<p>{html.escape(text)}</p>" for text in section.text]
        if section.table:
            parts.append(_table(section.table))
        for caption, picture in section.pictures.items():
            source = html.escape(picture.relative_to(path.parent).as_posix())
            text = html.escape(caption)
            parts.append(
                f'<figure><figcaption>{text}</figcaption><img src="{source}" alt="{text}"></figure>'
            )
        if section.code:
            parts.append(f"<pre>{html.escape(section.code)}</pre>")
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style>"
    )
    whole = f'<!doctype html>\n<html lang="en">\n<head>{head}</head>\n<body>\n'
    storage.write_bytes(path, (whole + "\n".join(parts) + "\n</body>\n</html>\n").encode())


def _table(rows: Sequence[Sequence[str]]) -> str:
    kinds = ["th"] + ["td"] * (len(rows) - 1)
    lines = [
        "<tr>" + "".join(f"<{kind}>{html.escape(cell)}</{kind}>" for cell in row) + "</tr>"
        for kind, row in zip(kinds, rows, strict=True)
    ]
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def draw_curves(
    path: Path, rows: Sequence[Mapping[str, Any]], batch_size: int, plots: Mapping[str, str]
) -> None:
    """Draws metrics of a training run, against its updates and the time they took.

    Args:
      path: of the PNG.
      rows: of `metrics.jsonl`.
      batch_size: images of an update, which gives the time from the images a second.
      plots: metric -> what it is; each has its own plot.
    """
    steps, minutes = training_minutes(rows, batch_size)
    last = steps[-1]
    # The axis of minutes also places ticks that are beyond the end, and then hides them.
    steps, minutes = (np.append(values, 2 * values[-1]) for values in (steps, minutes))
    axes = figures.make_axes(len(plots))
    for ax, (name, label) in zip(axes, plots.items(), strict=True):
        points = [(row["step"], row[name]) for row in rows if name in row]
        few = len(points) < 50
        ax.plot(*zip(*points, strict=True), color=figures.BLUE, marker="o" if few else "", ms=3)
        ax.set_xlim(0, last)
        ax.set_xlabel("updates")
        ax.set_ylabel(label)
        if minutes[-1]:
            functions = (
                lambda x: np.interp(x, steps, minutes),
                lambda x: np.interp(x, minutes, steps),
            )
            ax.secondary_xaxis("top", functions=functions).set_xlabel("minutes of training")
    figures.save(axes[0], path)


def training_minutes(
    rows: Sequence[Mapping[str, Any]], batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Updates, and the minutes of training until each, both from 0 on.

    The time of validations, checkpoints and the first compilation is not in it.
    """
    steps = np.array([0, *(row["step"] for row in rows)], np.float64)
    rates = np.array([row.get("images_per_second", np.inf) for row in rows], np.float64)
    return steps, np.concatenate([[0], np.cumsum(np.diff(steps) * batch_size / rates / 60)])


def write_page(
    workdir: Path,
    pipeline: Pipeline,
    sets: Mapping[str, tuple[np.ndarray, np.ndarray]],
    features: Mapping[str, np.ndarray],
    scores: Mapping[str, float],
    rows: Sequence[Sequence[str]],
    remarks: Sequence[str],
) -> None:
    """Writes `WORKDIR/index.html` and its pictures, in `WORKDIR/page`.

    Args:
      workdir: of the run.
      pipeline: of the run.
      sets: name -> pictures uint8 `[N, H, W, 3]` and their classes, of train, test, reconstructions
        and samples.
      features: `[N, D]` of the same sets.
      scores: numbers by name.
      rows: the table of scores.
      remarks: what a reader of the scores must know.
    """
    folder, config = workdir / "page", pipeline.facts["config"]
    names, (samples, labels) = pipeline.description.class_names, sets["samples"]
    classes = np.unique(labels)

    def draw(name: str, images: np.ndarray, columns: int = COLUMNS) -> Path:
        pictures.write_png(folder / f"{name}.png", pictures.grid(images, columns))
        return folder / f"{name}.png"

    by_class = {
        names[label]: draw(f"samples_{label}", samples[labels == label][:COLUMNS])
        for label in classes
    }
    places = np.linspace(0, len(sets["test"][0]) - 1, COLUMNS).astype(int)
    pairs = np.concatenate([sets[name][0][places] for name in ("test", "reconstructions")])

    first = np.array([np.flatnonzero(labels == label)[0] for label in classes])
    near = sets["train"][0][neighbours(features["samples"][first], features["train"], NEIGHBOURS)]
    near = np.concatenate([samples[first][:, None], near], axis=1).reshape(-1, *samples.shape[1:])

    curves = {
        "autoencoder": (
            workdir / "autoencoder" / "training",
            config["vae_training"],
            {
                "reconstruction": f"{config['vae_training']['reconstruction']} error of a value",
                "validation_psnr": "held-out PSNR, dB",
            },
        ),
        "model": (
            workdir,
            config["training"],
            {"loss": "loss, nats an index" if "val_nll_bits_per_index" in scores else "loss"}
            | {key: text for key, text in HELD_OUT.items() if key in scores},
        ),
    }
    for name, (where, section, plots) in curves.items():
        metrics = read_metrics(where / "metrics.jsonl")
        draw_curves(folder / f"{name}.png", metrics, section["batch_size"], plots)

    explained = (
        f"{scores['pictures']:,} pictures of each set against {scores['train_pictures']:,} "
        "training pictures, in the features of EfficientNet-Lite0. Reconstructions are test "
        "pictures that went through the autoencoder and the quantizer. A classifier trained on "
        "the real training pictures gives the class accuracy."
    )
    others = f"PSNR of the reconstructions: {scores['psnr']:.2f} dB."
    for key, text in HELD_OUT.items():
        others += f" {text.capitalize()}: {scores[key]:.3f}." if key in scores else ""
    machine = f"{jax.device_count()} x {jax.devices()[0].device_kind}, {platform.platform()}"
    sections = [
        Section("Samples, by class", pictures=by_class),
        Section("Scores", [explained, others, *remarks], rows),
        Section(
            "Test pictures and their reconstructions",
            pictures={"test pictures above, reconstructions below": draw("pairs", pairs)},
        ),
        Section(
            "Samples and their nearest training pictures",
            ["The first of each row is a sample; its neighbours follow, the nearest first."],
            pictures={"by features": draw("neighbours", near, NEIGHBOURS + 1)},
        ),
        Section(
            "Training",
            [
                "The minutes count the updates and what is compiled between them, without the "
                "first compilation, validation and checkpoints."
            ],
            pictures={name: folder / f"{name}.png" for name in curves},
        ),
        Section(
            "Settings",
            [f"Scored with jax {jax.__version__} on {machine}."],
            code=json.dumps(config, indent=1),
        ),
    ]
    write(workdir / "index.html", f"CIFAR-10 after {pipeline.step:,} updates", sections)
