"""Trains every row of `configs/ablations.py` at a small scale and compares them.

All rows share one autoencoder, and rows with the same number of levels share token shards. Every
row is trained with `--seeds` seeds. Rows that are the same experiment are trained once. If the
script is stopped, the same command continues.

  python launch/ablations.py --workdir runs/ablations --jobs 4
  python launch/ablations.py --workdir runs/flowers --data /data/flowers --config.data.image_size=32

It prints the tables of docs/ablations.md, which explains the columns, and writes them to
WORKDIR/ablations.md. WORKDIR/ablations.json has all numbers. `--config.section.key=value` changes
all rows: `--config.training.steps=100` gives quick results.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import os
import runpy
import sys
import time
from collections.abc import Callable, Collection
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from scripts import run_script

from tokenbridge_jax import Pipeline
from tokenbridge_jax.autoencoder import load_autoencoder
from tokenbridge_jax.codec import Codec, in_batches
from tokenbridge_jax.commands import runner
from tokenbridge_jax.commands.arguments import config_from
from tokenbridge_jax.config import experiments, sampling_settings
from tokenbridge_jax.data import shards
from tokenbridge_jax.data.loader import validation_batches
from tokenbridge_jax.data.sources import load_prepared, make_source, make_subsets
from tokenbridge_jax.evaluation.features import thumbnails
from tokenbridge_jax.evaluation.metrics import frechet_distance
from tokenbridge_jax.evaluation.moments import gaussian
from tokenbridge_jax.quantizer import Quantizer
from tokenbridge_jax.runtime import meshes, storage
from tokenbridge_jax.runtime.differences import first_difference
from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.runtime.hardware import host_cores
from tokenbridge_jax.training.metric_writer import read_metrics

CONFIG = runpy.run_path(str(experiments()["ablations"]))
ROWS, get_config = CONFIG["ROWS"], CONFIG["get_config"]
BATCH = 250

# Validation runs once, at the end. No sample grids are drawn.
TRAINING = ("eval_every=1000000000", "sample_every=0", "checkpoint_every=1000000000")

# Measures of a row: name in the results -> heading and decimals.
MEASURES = {
    "bits_per_index": ("bits an index", 3),
    "density_bits": ("density, bits", 3),
    "frechet_distance": ("Frechet distance", 5),
}


@dataclasses.dataclass(frozen=True)
class Study:
    """The folder of the study, and the settings that all rows share."""

    workdir: Path
    flags: tuple[str, ...]
    samples: int

    def config(self, name: str) -> ConfigDict:
        """The config of a row, with the flags."""
        return config_from([f"--config=ablations:{name},on=digits", *self.flags])

    def run(self, command: str, name: str, folder: Path, *flags: str) -> None:
        """Runs a command with the config of a row; its output goes to `folder`/log.txt."""
        config = f"--config=ablations:{name},on=digits"
        run_logged(command, folder, config, *self.flags, *flags)

    def tokens(self, name: str) -> Path:
        """The workdir of a row's token shards."""
        return self.workdir / f"levels_{self.config(name).quantizer.levels}"

    def frechet_distance(self, images: np.ndarray) -> float:
        """The distance between images and all real ones."""
        real = np.load(self.workdir / "real.npz")["features"]
        return frechet_distance(gaussian(thumbnails(images)), gaussian(real))


def main() -> int:
    """Runs what has no result yet; prints and writes the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=storage.local_path, required=True)
    parser.add_argument("--data", default="digits", help="digits, or a folder of class folders")
    parser.add_argument("--rows", default=",".join(ROWS), help="names of rows; the default is all")
    parser.add_argument("--seeds", type=int, default=3, help="runs of every row (%(default)s)")
    parser.add_argument(
        "--samples", type=int, default=2000, help="images drawn from every run (%(default)s)"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, help="runs at a time, each in a process (%(default)s)"
    )
    args, flags = parser.parse_known_args()
    names = sorted(row_names(parser, args.rows, flags, ROWS), key=list(ROWS).index)
    # For the worker processes: runs of a row share all compiled programs except the training step.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(args.workdir.resolve() / "programs"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    study = Study(args.workdir, (*_data_flags(args.data), *flags), args.samples)
    results = run_all(study, names, args.seeds, args.jobs)
    text = tables(results)
    storage.write_json(study.workdir / "ablations.json", results)
    storage.write_bytes(study.workdir / "ablations.md", text.encode())
    print(text)
    return 0


def row_names(
    parser: argparse.ArgumentParser, given: str, flags: list[str], rows: Collection[str]
) -> list[str]:
    """The rows that are given with commas between them, each once.

    Ends the script if there is no such row, or if another argument is no setting of the config.
    """
    if wrong := [flag for flag in flags if not (flag.startswith("--config.") and "=" in flag)]:
        parser.error(
            f"{wrong[0]} is no argument of this script; settings are --config.section.key=value"
        )
    names = list(dict.fromkeys(name.strip() for name in given.split(",")))
    if wrong := [name for name in names if name not in rows]:
        parser.error(f"there is no row '{wrong[0]}'; the rows are {', '.join(rows)}")
    return names


def checked_settings(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of all results of a folder as JSON, for the file that keeps them.

    Raises:
      UserError: the folder has results of other settings.
    """
    settings = json.loads(json.dumps(settings, default=str))
    found = path.exists() and first_difference(storage.read_json(path), settings)
    if found:
        name, kept, ours = found
        raise UserError(
            f"{path} has other settings: {name} = {kept}, and now it is {ours}; use another "
            "--workdir, or remove this one"
        )
    return settings


def _data_flags(data: str) -> list[str]:
    if data == "digits":
        return []
    values: dict[str, Any] = dict(
        source="folder", path=data, validation_split="", image_size=32, image_channels=3
    )
    section = get_config("head_channel_ar,on=digits").data
    section.update(values, num_classes=sys.maxsize)
    values["num_classes"] = len(make_source(section).class_names)
    flags = [f"--config.data.{name}={value}" for name, value in values.items()]
    return [*flags, "--config.tokenize.validation_fraction=0.1"]


def run_all(study: Study, names: list[str], seeds: int, jobs: int) -> dict[str, Any]:
    """Runs what has no result yet; returns all measurements.

    Raises:
      UserError: the folder has results of other settings, or a command failed.
    """
    study.workdir.mkdir(parents=True, exist_ok=True)
    settings = {"flags": list(study.flags), "samples": study.samples}
    kept = study.workdir / "study.json"
    storage.write_json(kept, checked_settings(kept, settings))

    # Row -> the first row that is the same experiment.
    first: dict[str, str] = {}
    same = {name: first.setdefault(study.config(name).to_json(), name) for name in ROWS}
    runs = list(dict.fromkeys(same[name] for name in names))
    tokens = {study.tokens(name): name for name in runs}
    with processes(jobs) as pool:
        (real,) = _do(pool, _real_images, [(study,)])
        _do(pool, _autoencoder, [(study,)])
        levels = _do(pool, _tokenize, [(study, name) for name in tokens.values()])
        found = _do(pool, _row, [(study, name, seed) for seed in range(seeds) for name in runs])
    return {
        **settings,
        "real": real,
        "levels": sorted(levels, key=lambda x: x["levels"]),
        "rows": [
            {"name": name, "table": ROWS[name].table, "paper_fid": ROWS[name].fid}
            | {"runs": [run for run in found if run["name"] == same[name]]}
            for name in names
        ],
    }


def processes(jobs: int) -> ProcessPoolExecutor:
    """Makes processes that share the cores.

    OpenBLAS starts a thread for every core in each process, and they wait by spinning. With 16
    threads each, four processes that computed Frechet distances of 1,280 features on two cores took
    15 times as long as with one thread each.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", str(max(1, host_cores() // jobs)))
    return ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"))


def _do(pool: Executor, task: Callable[..., Any], arguments: list[tuple[Any, ...]]) -> list[Any]:
    """Returns the results of a task, in the order of its arguments. A failure cancels the rest."""
    futures = [pool.submit(task, *a) for a in arguments]
    try:
        for future in as_completed(futures):
            future.result()
    finally:
        for future in futures:
            future.cancel()
    return [future.result() for future in futures]


def run_logged(command: str, folder: Path, *arguments: str) -> None:
    """Runs a command on a workdir; its output goes to `folder`/log.txt.

    Raises:
      UserError: it failed.
    """
    with (
        (folder / "log.txt").open("a") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        status = runner.run(command, [*arguments, f"--workdir={folder}"])
    if status in runner.STOPPED:
        raise UserError("stopped; the same command continues")
    if status:
        raise UserError(f"{command} ended with {status}; {folder / 'log.txt'} says why")


def once(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Returns the result of an earlier run in `path`, or that of `make`, which is written there."""
    if path.exists():
        return storage.read_json(path)
    started = time.monotonic()
    result = make()
    result["seconds"] = round(time.monotonic() - started, 1)
    storage.write_json(path, result)
    print(json.dumps(result), flush=True)
    return result


def _real_images(study: Study) -> dict[str, Any]:
    def make() -> dict[str, Any]:
        config = study.config("head_channel_ar")
        data = config.data
        images, labels = zip(
            *(
                load_prepared(subset.source, int(i), data.image_size, data.image_channels)
                for subset in make_subsets(config).values()
                for i in subset.images
            ),
            strict=True,
        )
        features, order = thumbnails(np.stack(images)), np.argsort(labels, kind="stable")
        np.savez(
            study.workdir / "real.npz", features=features[order], labels=np.array(labels)[order]
        )
        halves = (gaussian(features[order][start::2]) for start in (0, 1))
        return {"images": len(images), "frechet_distance_of_halves": frechet_distance(*halves)}

    return once(study.workdir / "real.json", make)


def _autoencoder(study: Study) -> dict[str, Any]:
    folder = study.workdir / "base"
    folder.mkdir(exist_ok=True)

    def make() -> dict[str, Any]:
        study.run("train-vae", "head_channel_ar", folder)
        rows = read_metrics(folder / "autoencoder" / "training" / "metrics.jsonl")
        return {"psnr": [v for row in rows for k, v in row.items() if k.endswith("psnr")][-1]}

    return once(folder / "result.json", make)


def _tokenize(study: Study, name: str) -> dict[str, Any]:
    folder = study.tokens(name)
    folder.mkdir(exist_ok=True)

    def make() -> dict[str, Any]:
        link(folder / "autoencoder", study.workdir / "base" / "autoencoder")
        study.run("tokenize", name, folder)
        info = shards.read_info(folder / "tokens")
        indices = {
            split: np.concatenate(
                [
                    batch["indices"][batch["weights"] > 0]
                    for batch in validation_batches(folder / "tokens", BATCH, split=split)
                ]
            )
            for split in info.splits
        }
        assert isinstance(info.quantizer, Quantizer)
        mesh = meshes.make_mesh(devices=jax.local_devices())
        codec = Codec(*load_autoencoder(folder / "autoencoder"), info.quantizer, mesh)
        everything = np.concatenate(list(indices.values()))
        images = in_batches(lambda x: np.asarray(codec.decode(x)), everything, BATCH)
        return {
            "levels": info.quantizer.levels,
            "log2_cell": mean_log2_cell(info.quantizer, indices["validation"]),
            "frechet_distance": study.frechet_distance(images),
        }

    return once(folder / "result.json", make)


def mean_log2_cell(quantizer: Quantizer, indices: np.ndarray) -> float:
    """Mean over indices of log2 of the width of a level's cell, in latent units.

    A cell is the interval of latents that are quantized to the level. The outermost cells end where
    the quantizer's range ends.
    """
    edges = [quantizer.minimum, *quantizer.thresholds, quantizer.maximum]
    return float(np.log2(np.diff(np.array(edges, np.float64)))[indices].mean())


def _row(study: Study, name: str, seed: int) -> dict[str, Any]:
    folder = study.workdir / "rows" / f"{name}-seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)

    def make() -> dict[str, Any]:
        tokens = study.tokens(name)
        for part in ("tokens", "autoencoder"):
            link(folder / part, tokens / part)
        flags = [f"--config.training.{setting}" for setting in TRAINING]
        study.run("train", name, folder, *flags, f"--config.seed={seed}")
        metrics = read_metrics(folder / "metrics.jsonl")
        nll = [row["val_nll_bits_per_index"] for row in metrics if "val_nll_bits_per_index" in row]

        pipeline = Pipeline.load(folder)
        labels = np.load(study.workdir / "real.npz")["labels"]
        drawn = labels[np.linspace(0, len(labels) - 1, study.samples).astype(int)]
        settings = sampling_settings(study.config(name).sampling)
        images = pipeline.generate(
            drawn.tolist(), seed=seed, batch_size=BATCH, **dataclasses.asdict(settings)
        )
        config = pipeline.config
        return {
            "name": name,
            "seed": seed,
            "levels": config.levels,
            "head": f"{config.head_width}x{config.head_layers}",
            "head_parameters": sum(x.size for x in jax.tree.leaves(pipeline.params["head"])),
            "bits_per_index": nll[-1],
            "density_bits": nll[-1] + storage.read_json(tokens / "result.json")["log2_cell"],
            "frechet_distance": study.frechet_distance(images),
        }

    return once(folder / "result.json", make)


def link(path: Path, target: Path) -> None:
    if not path.is_symlink():
        path.symlink_to(target.resolve())


def tables(results: dict[str, Any]) -> str:
    """Formats the tables in Markdown, each with the number of row pairs in the paper's order."""
    lines = []
    for table, group in itertools.groupby(results["rows"], key=lambda row: row["table"]):
        rows = list(group)
        headings = [heading for heading, _ in MEASURES.values()]
        lines += [
            "",
            f"| {table} | V | head | parameters | {' | '.join(headings)} | FID of the paper |",
            "|---" * (5 + len(headings)) + "|",
        ]
        for row in rows:
            run = row["runs"][0]
            cells = [f"`{row['name']}`", run["levels"], run["head"], f"{run['head_parameters']:,}"]
            for measure, (_, decimals) in MEASURES.items():
                mean, error = mean_and_error(row, measure)
                spread = "" if np.isnan(error) else f" ± {error:.{decimals}f}"
                cells.append(f"{mean:.{decimals}f}{spread}")
            cells.append("-" if row["paper_fid"] is None else row["paper_fid"])
            lines.append(f"| {' | '.join(map(str, cells))} |")
        lines.append("")
        for measure in ("density_bits", "frechet_distance"):
            counts = pairs(rows, measure)
            told = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
            lines.append(f"Pairs by {MEASURES[measure][0]}: {told or 'none with two figures'}.  ")
    floor = results["real"]["frechet_distance_of_halves"]
    decoded = (f"{x['frechet_distance']:.5f} ({x['levels']})" for x in results["levels"])
    lines += [
        "",
        f"Frechet distance of one half of the {results['real']['images']} real images to the other:"
        f" {floor:.5f}. Of all, decoded from their indices, to themselves, by levels: "
        f"{', '.join(decoded)}.",
    ]
    return "\n".join(lines).strip() + "\n"


def mean_and_error(row: dict[str, Any], measure: str) -> tuple[float, float]:
    """Mean over the seeds and its standard error, which is NaN for one seed."""
    values = [run[measure] for run in row["runs"]]
    if len(values) < 2:
        return values[0], float("nan")
    return float(np.mean(values)), float(np.std(values, ddof=1) / len(values) ** 0.5)


def pairs(rows: list[dict[str, Any]], measure: str) -> dict[str, int]:
    """Counts pairs of rows in the paper's order, in the opposite order, and undecided ones.

    A pair is undecided if its difference is less than two standard errors of the difference.
    """
    counts = {"as in the paper": 0, "the other way round": 0, "undecided": 0}
    with_figure = [row for row in rows if row["paper_fid"] is not None]
    for one, other in itertools.combinations(with_figure, 2):
        (mean, error), (other_mean, other_error) = (
            mean_and_error(row, measure) for row in (one, other)
        )
        difference = other_mean - mean
        if not abs(difference) > 2 * np.hypot(error, other_error):
            counts["undecided"] += 1
        elif (difference > 0) == (other["paper_fid"] > one["paper_fid"]):
            counts["as in the paper"] += 1
        else:
            counts["the other way round"] += 1
    return counts


if __name__ == "__main__":
    sys.exit(run_script(main))
