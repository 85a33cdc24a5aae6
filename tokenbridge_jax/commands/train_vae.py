"""Trains an autoencoder on the user's images: config.data -> WORKDIR/autoencoder.

For people who have no KL-16 weights, or other data. Its own run (checkpoints, metrics.jsonl,
tensorboard, pictures of reconstructions) lies in WORKDIR/autoencoder/training; started again, it
goes on from the latest checkpoint there. Status 75 means: told to stop, and saved.
"""

import dataclasses
import sys
from typing import Any

import jax
import numpy as np
from absl import flags
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from tokenbridge_jax.autoencoder import AutoencoderConfig, read_description, save_autoencoder
from tokenbridge_jax.commands import runner
from tokenbridge_jax.data.loader import make_image_loader
from tokenbridge_jax.data.shards import INFO_FILE, PARTIAL_INFO_FILE
from tokenbridge_jax.data.sources import Subset, make_subsets
from tokenbridge_jax.pipeline.description import MODEL_FILE
from tokenbridge_jax.runtime import meshes, pictures, storage
from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.training import autoencoder_task
from tokenbridge_jax.training.autoencoder_task import AutoencoderTask, Pictures
from tokenbridge_jax.training.loop import EXIT_INTERRUPTED, Hook, Interrupted, Run, fit, flat_fields
from tokenbridge_jax.training.metric_writer import MetricWriter
from tokenbridge_jax.training.settings import check_training
from tokenbridge_jax.training.state import TrainState

# Enough images to measure on; a pass over all of a large data set would tell no more.
SCALE_IMAGES = 50_000
VALIDATION_IMAGES = 2_000
IN_PICTURE = 16


def define_flags(flag_values: flags.FlagValues) -> None:
    """This command has no flags of its own."""
    del flag_values


def main(args: flags.FlagValues) -> int:
    """Trains, measures the latents' scale and writes the autoencoder."""
    config, directory = args.config, epath.Path(args.workdir) / "autoencoder"
    _check_directory(directory)
    mesh = meshes.make_mesh(**config.mesh)
    check_training(config, "vae_training", mesh)
    subsets = make_subsets(config)
    task = make_task(config)
    run = make_run(config, directory, task, subsets, mesh)
    if _finished_step(directory) != run.total_steps:
        _check_unused(epath.Path(args.workdir))

    def begin() -> None:
        if jax.process_index() == 0:
            runner.remember_config(args)

    with runner.locked(args.workdir):
        try:
            state = fit(dataclasses.replace(run, begin=begin), mesh)
        except Interrupted:
            return EXIT_INTERRUPTED
        if _finished_step(directory) == run.total_steps:
            print(f"{directory} holds the finished autoencoder already: nothing to do")
            return 0
        extra = write_autoencoder(config, directory, task, state, subsets, mesh)
    numbers = ", ".join(f"{name} {value:.4g}" for name, value in extra.items())
    print(f"wrote {directory} ({numbers})")
    return 0


def make_task(config: ConfigDict) -> AutoencoderTask:
    """The autoencoder of `config.autoencoder` and its loss."""
    sizes = {**config.autoencoder, "scale": 1.0}
    sizes |= {name: config.data[name] for name in ("image_size", "image_channels")}
    section = config.vae_training
    return AutoencoderTask(
        AutoencoderConfig.from_json(sizes),
        section.dtype,
        section.kl_weight,
        section.get("reconstruction", "l1"),
    )


def make_run(
    config: ConfigDict,
    directory: epath.Path,
    task: AutoencoderTask,
    subsets: dict[str, Subset],
    mesh: Mesh,
) -> Run:
    """The training run: data, hooks, and what identifies it."""
    data, section, train = config.data, config.vae_training, subsets["train"]
    fields = flat_fields(config, ["seed", "autoencoder", "vae_training"])
    fields |= {f"data.{name}": data[name] for name in ("image_size", "image_channels", "flip")}
    described = train.source.describe() | {"chosen": len(train.images)}
    fields |= {f"images.{name}": value for name, value in described.items() if name != "path"}
    free = {name for name in fields if name.startswith("vae_training.")}
    return Run(
        name="train-vae",
        directory=directory / "training",
        task=task,
        section=section,
        section_name="vae_training",
        seed=config.seed,
        steps_per_epoch=len(train.images) // section.batch_size,
        batches=lambda start: make_image_loader(
            train.source,
            data.image_size,
            data.image_channels,
            section.batch_size,
            config.seed,
            subset=train.images,
            flip=data.flip,
            start_step=start,
            rows=meshes.local_rows(mesh, section.batch_size),
        ),
        flops_per_image=autoencoder_task.training_flops(task.module.config),
        fields=fields,
        fixed=(fields.keys() - free) | {"vae_training.batch_size"},
        hooks=[_validation_hook(config, directory, task, subsets, mesh)],
    )


def write_autoencoder(
    config: ConfigDict,
    directory: epath.Path,
    task: AutoencoderTask,
    state: TrainState,
    subsets: dict[str, Subset],
    mesh: Mesh,
) -> dict[str, Any]:
    """Measures the latents and writes the EMA parameters; returns what it wrote beside them."""
    measured = _pictures(config, subsets["train"].spread(SCALE_IMAGES), mesh)
    with meshes.use_mesh(mesh):
        batches = measured.batches(config.vae_training.batch_size)
        std = autoencoder_task.latent_std(task.module, state.ema_params, batches, mesh)
        gather = jax.jit(lambda params: params, out_shardings=meshes.replicated(mesh))
        params = jax.tree.map(np.asarray, gather(state.ema_params))
    sizes = task.module.config.to_json() | {"scale": 1 / std}
    extra = {"step": int(state.step), "latent_std": std}
    if jax.process_index() == 0:
        save_autoencoder(directory, AutoencoderConfig.from_json(sizes), params, extra)
    return extra


def _validation_hook(
    config: ConfigDict,
    directory: epath.Path,
    task: AutoencoderTask,
    subsets: dict[str, Subset],
    mesh: Mesh,
) -> Hook:
    """PSNR of the EMA's reconstructions, and a picture of some: original beside reconstruction."""
    split = "validation" if "validation" in subsets else "train"
    measured = _pictures(config, subsets[split].spread(VALIDATION_IMAGES), mesh)
    in_picture = subsets[split].spread(IN_PICTURE)
    shown = _pictures(config, in_picture, mesh)
    reconstruct = autoencoder_task.make_reconstruction(task.module, mesh)
    psnr = autoencoder_task.make_psnr(reconstruct, mesh)
    copy = jax.jit(lambda images: images, out_shardings=meshes.replicated(mesh))

    def run(state: TrainState, step: int, writer: MetricWriter) -> dict[str, float]:
        batch = next(shown.batches(IN_PICTURE))
        originals = np.asarray(copy(batch["images"]))
        decoded = np.asarray(reconstruct(state.ema_params, batch["images"]))
        pairs = np.stack([originals, decoded], axis=1).reshape(-1, *originals.shape[1:])
        picture = pictures.grid(pairs[: 2 * len(in_picture.images)], columns=8)
        if jax.process_index() == 0:
            folder = directory / "training" / "reconstructions"
            pictures.write_png(folder / f"step_{step:07d}.png", picture)
        writer.image(step, "reconstructions", picture)
        batches = measured.batches(config.vae_training.batch_size)
        return {f"{split}_psnr": psnr(state.ema_params, batches)}

    return Hook(config.vae_training.checkpoint_every, run)


def _pictures(config: ConfigDict, subset: Subset, mesh: Mesh) -> Pictures:
    data = config.data
    return Pictures(subset.source, subset.images, data.image_size, data.image_channels, mesh)


def _check_directory(directory: epath.Path) -> None:
    """Refuses to overwrite an autoencoder that came from elsewhere."""
    if (directory / "config.json").exists() and _finished_step(directory) is None:
        raise UserError(
            f"{directory} holds an autoencoder that was not trained here; use another --workdir "
            "or remove it"
        )


def _check_unused(workdir: epath.Path) -> None:
    """Refuses to replace the autoencoder that shards or a model in this workdir depend on."""
    if not (workdir / "autoencoder" / "config.json").exists():
        return
    present = read_description(workdir / "autoencoder")["hash"]
    tokens = workdir / "tokens"
    for user in (tokens / INFO_FILE, tokens / PARTIAL_INFO_FILE, workdir / MODEL_FILE):
        if user.exists() and storage.read_json(user).get("autoencoder_hash") == present:
            raise UserError(
                f"{user} depends on the autoencoder that is there, and training would replace it; "
                f"use another --workdir, or remove {tokens} and {workdir / MODEL_FILE}"
            )


def _finished_step(directory: epath.Path) -> int | None:
    """Updates behind the autoencoder in `directory`, if there is one and it was trained here."""
    if not (directory / "config.json").exists() or not (directory / "training").exists():
        return None
    return read_description(directory)["extra"].get("step")


if __name__ == "__main__":
    sys.exit(runner.run("train-vae", sys.argv[1:]))
