"""Compares heads on one backbone: the same data, and the same time of training for every head.

It needs a finished run of launch/cifar10.sh, whose autoencoder, settings, features and classifier
it uses. Rows with a trained codebook get an autoencoder of their own, as launch/codebooks.py trains
it. First the speed of each head is measured. Then each is trained for as many updates as it makes
in `--minutes` minutes, with `--seeds` seeds. Guidance and temperature are chosen for each head by
the Frechet distance of a few samples. If the script is stopped, the same command continues.

  python launch/heads.py --workdir runs/heads --minutes 5 --seeds 2
  python launch/heads.py --workdir runs/two --heads channel_ar,diffusion --run runs/other

It prints a table and writes WORKDIR/heads.md, heads.json and heads.png, of the rows of this start
alone; docs/heads.md explains the columns. `--config.section.key=value` changes the settings of all
heads.
"""

import argparse
import contextlib
import dataclasses
import itertools
import math
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ablations import (
    checked_settings,
    link,
    mean_and_error,
    mean_log2_cell,
    once,
    row_names,
    run_logged,
)
from cifar10_options import SUBSET, Scorer, draw_samples
from codebooks import AUTOENCODERS, make_autoencoder, run_config, start_folder
from ml_collections import ConfigDict
from scripts import run_script

from tokenbridge_jax import Pipeline
from tokenbridge_jax.autoencoder import autoencoder_exists, load_autoencoder
from tokenbridge_jax.benchmark.measure import Case
from tokenbridge_jax.benchmark.sampling_speed import head_cases, sample_cases
from tokenbridge_jax.benchmark.timing import time_calls
from tokenbridge_jax.config import filled, make_mesh, sampling_settings
from tokenbridge_jax.data import shards
from tokenbridge_jax.data.loader import validation_batches
from tokenbridge_jax.evaluation import figures
from tokenbridge_jax.quantizer import Quantizer
from tokenbridge_jax.runtime import compilation_cache, storage
from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.training.metric_writer import read_metrics

# Name -> the settings in which a row differs from the run.
ROWS: dict[str, tuple[str, ...]] = {
    "channel_ar": ("model.head=channel_ar",),
    "channel_ar_reverse": ("model.head=channel_ar", "model.channel_order=reverse"),
    "channel_ar_16_levels": ("model.head=channel_ar", "quantizer.levels=16"),
    "parallel": ("model.head=parallel",),
    "masked_2_steps": ("model.head=masked", "model.reveal_steps=2"),
    "masked_confidence": (
        "model.head=masked",
        "model.reveal_steps=2",
        "model.reveal_order=confidence",
    ),
    # Without clipping, the draws of models that were trained for minutes grow without bound.
    "diffusion": ("model.head=diffusion", "model.head_clip=5"),
    "flow": ("model.head=flow", "model.head_steps=25"),
    "mixture": ("model.head=mixture",),
    "channel_ar_quarter": ("model.head=channel_ar", "training.head_fraction=0.25"),
    "channel_ar_float8": ("model.head=channel_ar", "model.float8=True"),
    "vq": ("model.head=parallel", "sampling.order=confidence", *AUTOENCODERS["vq"]),
    "fsq": ("model.head=channel_ar", *AUTOENCODERS["fsq"]),
}
# Rows that change these sections have shards of their own; see `make_autoencoder`.
OF_TOKENS = "quantizer.", "autoencoder."
# Choices for each head, by samples of CHOOSING_STEPS steps.
GUIDANCE, TEMPERATURE, CHOOSING_STEPS = (1.5, 4.0, 10.0), (0.9, 1.0), 16
STEPS = (16, 64)
# Updates that measure the speed of training, and how many rates they give. Their median counts,
# because some wait for the compiler.
SPEED_UPDATES, SPEED_LOGS = 200, 20
REPEATS = 5  # Of the speeds of sampling and of the head.
NEVER = 10**9
WARMUP = 0.025  # Of the updates.
# Validation runs once, at the end. No previews are drawn.
QUIET = (f"training.eval_every={NEVER}", "training.sample_every=0")
# Of the speeds of sampling and of the head.
SPEED_GUIDANCE, POSITIONS = 3.0, 256

MEASURES = {
    "frechet_distance_64": ("Frechet distance", 2),
    "kid_64": ("KID", 4),
    "accuracy_64": ("class accuracy", 3),
    "frechet_distance_16": ("16 steps: distance", 2),
    "density_bits": ("density, bits", 3),
    "image_bits": ("bits an image", 1),
    "train_images_per_second": ("training, img/s", 0),
    "sample_images_per_second_16": ("sampling, img/s, 16 steps", 0),
    "sample_images_per_second_64": ("64 steps", 0),
    "head_ms": (f"head, ms for {POSITIONS} positions", 2),
    "parameters": ("parameters", 0),
}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What all rows share.

    Attributes:
      run: the folder of the finished run.
      workdir: of the comparison.
      minutes: of training, without compiling.
      samples: pictures of every score.
      tuning: pictures for each choice of guidance and temperature.
      flags: changes of the config.
    """

    run: Path
    workdir: Path
    minutes: float
    samples: int
    tuning: int
    flags: tuple[str, ...]

    def command(self, name: str, folder: Path, *arguments: str) -> None:
        """Runs a command on a folder that has the run's config; its output goes to log.txt."""
        run_logged(name, folder, *arguments, *self.flags)

    def folder(self, name: str, tokens: Path) -> Path:
        """Makes a workdir with the run's config, and the autoencoder and the shards of another."""
        folder = self.workdir / name
        start_folder(self.run, folder)
        for part in ("autoencoder", "tokens"):
            link(folder / part, tokens / part)
        return folder


def main() -> int:
    """Runs what has no result yet; prints and writes the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--run",
        type=storage.local_path,
        default="runs/cifar10",
        help="workdir of launch/cifar10.sh (%(default)s)",
    )
    parser.add_argument(
        "--workdir", type=storage.local_path, required=True, help="of the comparison"
    )
    parser.add_argument(
        "--heads", default=",".join(ROWS), help=f"rows: {', '.join(ROWS)}; default all"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=5.0,
        help="of training, for each head and seed (%(default)s)",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        default=2,
        help="runs of each head (%(default)s); 0 measures only speed",
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=10_000,
        help=f"pictures of every score, at least {SUBSET} (%(default)s)",
    )
    parser.add_argument(
        "--tuning", type=int, default=2000, help="pictures to choose guidance by (%(default)s)"
    )
    args, flags = parser.parse_known_args()
    names = row_names(parser, args.heads, flags, ROWS)
    if args.seeds < 0:
        parser.error(f"--seeds={args.seeds} must be 0 or more")
    if not 0 < args.minutes < math.inf:
        parser.error(f"--minutes={args.minutes} must be above 0")
    for name, least in (("samples", SUBSET), ("tuning", 2)):
        if getattr(args, name) < least:
            parser.error(f"--{name}={getattr(args, name)} must be {least} or more")
    if args.run.resolve() == args.workdir.resolve():
        parser.error("--workdir must be another folder than --run")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory too.
    compilation_cache.enable()
    comparison = Comparison(
        args.run.resolve(), args.workdir, args.minutes, args.samples, args.tuning, tuple(flags)
    )
    rows = compare(comparison, names, args.seeds)
    if not rows:
        return 0
    text = table(rows)
    storage.write_json(args.workdir / "heads.json", rows)
    storage.write_bytes(args.workdir / "heads.md", text.encode())
    draw(args.workdir, rows)
    print(text, end="")
    return 0


def compare(comparison: Comparison, names: Sequence[str], seeds: int) -> list[dict[str, Any]]:
    """The results of all rows, each with its runs; none without a seed.

    Raises:
      UserError: the run is not finished, the folder has results of other settings, or a command
        failed.
    """
    config = run_config(comparison.run)
    run_config(comparison.run, *comparison.flags)  # Its errors come before anything is written.
    if not autoencoder_exists(comparison.run / "autoencoder"):
        raise UserError(f"{comparison.run} has no autoencoder: finish launch/cifar10.sh first")
    kept = comparison.workdir / "comparison.json"
    choices = {"guidance": GUIDANCE, "temperature": TEMPERATURE, "speed_guidance": SPEED_GUIDANCE}
    given = dataclasses.asdict(comparison) | choices | {"rows": ROWS}
    settings = checked_settings(kept, given)
    scorer = Scorer.of(comparison.run, config) if seeds else None  # Its errors come first.
    storage.write_json(kept, settings)
    for name in names:
        measure_speed(comparison, name)
    if scorer is None:
        return []
    runs = [one_run(comparison, scorer, *run) for run in itertools.product(range(seeds), names)]
    return [{"name": n, "runs": [run for run in runs if run["name"] == n]} for n in names]


def one_run(comparison: Comparison, scorer: Scorer, seed: int, name: str) -> dict[str, Any]:
    """Trains and measures a row with one seed."""
    speed = measure_speed(comparison, name)
    folder = comparison.folder(f"{name}-seed{seed}", tokenize(comparison, name))
    training = [f"--config.{flag}" for flag in (*ROWS[name], f"seed={seed}", *QUIET)]

    def make() -> dict[str, Any]:
        images = comparison.minutes * 60 * speed["train_images_per_second"]
        updates = max(1, round(images / speed["batch_size"]))
        lengths = {
            "steps": updates,
            "warmup_steps": max(1, round(WARMUP * updates)),
            "checkpoint_every": NEVER,
        }
        training.extend(f"--config.training.{key}={value}" for key, value in lengths.items())
        comparison.command("train", folder, *training)
        pipeline = Pipeline.load(folder)
        found = draw_and_score(comparison, scorer, pipeline, folder)
        return {
            "name": name,
            "seed": seed,
            "updates": updates,
            **speed,
            "parameters": sum(x.size for x in jax.tree.leaves(pipeline.params)),
            **likelihood(folder),
            **found,
        }

    return once(folder / "result.json", make)


def tokenize(comparison: Comparison, name: str) -> Path:
    """The workdir of shards for a row, with their autoencoder; rows of the same shards share it."""
    settings = [setting for setting in ROWS[name] if setting.startswith(OF_TOKENS)]
    words = [setting.partition(".")[2] for setting in settings]
    folder = comparison.workdir / "-".join(["tokens", *words])
    if not (folder / "tokens" / "dataset.json").exists():
        flags = [f"--config.{setting}" for setting in settings]
        make_autoencoder(comparison.run, folder, *flags, *comparison.flags)
        autoencoder, _ = load_autoencoder(folder / "autoencoder")
        store = "both" if autoencoder.codebook is None else "indices"
        comparison.command("tokenize", folder, f"--config.tokenize.store={store}", *flags)
    return folder


def measure_speed(comparison: Comparison, name: str) -> dict[str, Any]:
    """How fast a row is: training, by a short run; sampling and the head, with random weights."""
    tokens = tokenize(comparison, name)
    folder = comparison.folder(f"{name}-speed", tokens)
    flags = [f"--config.{flag}" for flag in ROWS[name]]

    def make() -> dict[str, Any]:
        short = {
            "steps": SPEED_UPDATES,
            "warmup_steps": 1,
            "log_every": SPEED_UPDATES // SPEED_LOGS,
            "checkpoint_every": NEVER,
        }
        changes = [f"--config.training.{key}={value}" for key, value in short.items()]
        quiet = [f"--config.{flag}" for flag in QUIET]
        comparison.command("train", folder, *flags, *quiet, *changes)
        shutil.rmtree(folder / "checkpoints")
        logged = read_metrics(folder / "metrics.jsonl")
        rates = [row["images_per_second"] for row in logged if "images_per_second" in row]

        config = filled(run_config(folder, *flags, *comparison.flags))
        batch, mesh = config.sampling.batch_size, make_mesh(config)
        sampling = sample_cases(config, mesh, [batch], STEPS, SPEED_GUIDANCE)
        (head,) = head_cases(config, [POSITIONS], SPEED_GUIDANCE)
        return {
            "batch_size": config.training.batch_size,
            "train_images_per_second": float(np.median(rates)),
            **{
                f"sample_images_per_second_{steps}": batch / seconds(case)
                for steps, case in zip(STEPS, sampling, strict=True)
            },
            "head_ms": 1000 * seconds(head),
        }

    return once(folder / "speed.json", make)


def seconds(case: Case) -> float:
    """The median time of a case."""
    with contextlib.ExitStack() as stack:
        return time_calls(case.prepare(stack), REPEATS).median


def likelihood(folder: Path) -> dict[str, float | None]:
    """Negative log-likelihood of held-out pictures; None if the head has none.

    Returns:
      `density_bits`: as a density of the latents of the run's autoencoder, in bits a latent. That
        of indices is constant within the interval of latents that becomes the same index. Codes
        that were trained stand for no interval.
      `image_bits`: of indices, in bits an image.
    """
    last = read_metrics(folder / "metrics.jsonl")[-1]
    if "val_nll_bits_per_index" not in last:
        return {"density_bits": last.get("val_nll_bits_per_latent"), "image_bits": None}
    info, bits = shards.read_info(folder / "tokens"), float(last["val_nll_bits_per_index"])
    found = {"density_bits": None, "image_bits": bits * info.positions * info.channels}
    if info.autoencoder.codebook is None:
        assert isinstance(info.quantizer, Quantizer)
        batches = validation_batches(folder / "tokens", 250, split="validation")
        indices = [batch["indices"][batch["weights"] > 0] for batch in batches]
        found["density_bits"] = bits + mean_log2_cell(info.quantizer, np.concatenate(indices))
    return found


def draw_and_score(
    comparison: Comparison, scorer: Scorer, pipeline: Pipeline, folder: Path
) -> dict[str, Any]:
    """The scores of samples with the guidance and temperature that a few samples choose."""
    section = ConfigDict(pipeline.facts["config"]).sampling
    own = sampling_settings(section).to_json() | {"batch_size": section.batch_size}
    choices = [
        {"guidance": guidance, "temperature": temperature}
        for guidance, temperature in itertools.product(GUIDANCE, TEMPERATURE)
    ]
    found = []
    for choice in choices:
        settings = own | choice | {"num_iter": CHOOSING_STEPS}
        images, _ = draw_samples(pipeline, comparison.tuning, settings)
        found.append(scorer.distance(scorer.extract(images)))
    best = choices[int(np.argmin(found))]
    result: dict[str, Any] = dict(best)
    for steps in STEPS:
        settings = own | best | {"num_iter": steps}
        images, labels = draw_samples(pipeline, comparison.samples, settings)
        result |= {f"{key}_{steps}": value for key, value in scorer(images, labels).items()}
    shown = np.concatenate([images[labels == label][:2] for label in np.unique(labels)])
    storage.write_npz(folder / "shown.npz", {"images": shown})
    return result


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The results in Markdown: means over the seeds, with standard errors."""
    headings = [heading for heading, _ in MEASURES.values()]
    lines = [f"| head | guidance, temperature | {' | '.join(headings)} |"]
    lines.append("|---" * (2 + len(headings)) + "|")
    for row in rows:
        chosen = (f"{run['guidance']:g}, {run['temperature']:g}" for run in row["runs"])
        cells = [f"`{row['name']}`", "; ".join(dict.fromkeys(chosen))]
        for measure, (_, decimals) in MEASURES.items():
            if row["runs"][0].get(measure) is None:
                cells.append("-")
                continue
            mean, error = mean_and_error(row, measure)
            spread = "" if np.isnan(error) or not decimals else f" ± {error:.{decimals}f}"
            cells.append(f"{mean:,.{decimals}f}{spread}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(workdir: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Draws two samples of each class, one class a row, for every head, from the first seed."""
    axes = figures.make_axes(len(rows), width=1.3, height=6.5)
    for axis, row in zip(axes, rows, strict=True):
        images = storage.read_npz(workdir / f"{row['name']}-seed0" / "shown.npz")["images"]
        columns = [np.concatenate(list(images[start::2])) for start in (0, 1)]
        axis.imshow(np.concatenate(columns, axis=1), interpolation="nearest")
        axis.set_title(row["name"], fontsize=6)
        axis.axis("off")
    figures.save(axes[0], workdir / "heads.png")


if __name__ == "__main__":
    sys.exit(run_script(main))
