"""Trains an autoencoder on the user's images: config.data -> WORKDIR/autoencoder.

For users without KL-16 weights, or with other data. WORKDIR/autoencoder/training holds the run:
checkpoints, metrics.jsonl, tensorboard, pictures of reconstructions. Started again, it continues
from the latest checkpoint there. Status 75: it was told to stop and has saved its state.
"""

import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from tokenbridge_jax.autoencoder import autoencoder_exists, read_description, save_autoencoder
from tokenbridge_jax.commands import runner
from tokenbridge_jax.config import (
    autoencoder_config,
    check_training,
    flat_fields,
    make_mesh,
    recipe,
)
from tokenbridge_jax.data.loader import make_image_loader
from tokenbridge_jax.data.shards import INFO_FILE, PARTIAL_INFO_FILE
from tokenbridge_jax.data.sources import Subset, make_subsets
from tokenbridge_jax.evaluation import lpips, networks
from tokenbridge_jax.evaluation.features import THUMBNAIL, Extractor
from tokenbridge_jax.evaluation.networks import (
    FOLDER_VARIABLE,
    Network,
    default_folder,
    load_network,
    make_extractor,
)
from tokenbridge_jax.evaluation.reconstruction_scores import make_scores
from tokenbridge_jax.ops.precision import compute_dtype
from tokenbridge_jax.pipeline.description import MODEL_FILE
from tokenbridge_jax.runtime import meshes, pictures, processes, storage
from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.runtime.progress import say
from tokenbridge_jax.training import autoencoder_task
from tokenbridge_jax.training.autoencoder_task import (
    AutoencoderTask,
    Perceptual,
    picture_batches,
    without_discriminator,
)
from tokenbridge_jax.training.discriminator import Adversary
from tokenbridge_jax.training.loop import EXIT_INTERRUPTED, Hook, Interrupted, Run, fit
from tokenbridge_jax.training.metric_writer import MetricWriter
from tokenbridge_jax.training.state import TrainState

# Images that are measured; more would change the figures little.
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
    mesh = make_mesh(config)
    check_training(config, "vae_training", mesh)
    network = _lpips(config)
    task = make_task(config, network)
    training = _Training(config, directory, task, network, make_subsets(config), mesh)
    run = training.make_run()
    if _finished_step(directory) != run.total_steps:
        _check_unused(epath.Path(args.workdir), run.total_steps)

    def begin() -> None:
        if jax.process_index() == 0:
            runner.remember_config(args)

    with runner.locked(args.workdir):
        try:
            state = fit(dataclasses.replace(run, begin=begin), mesh)
        except Interrupted:
            return EXIT_INTERRUPTED
        if _finished_step(directory) == run.total_steps:
            print(f"{directory} already holds the finished autoencoder: nothing to do")
            return 0
        extra = training.write_autoencoder(state)
    numbers = ", ".join(f"{name} {value:.4g}" for name, value in extra.items())
    print(f"wrote {directory} ({numbers})")
    return 0


def make_task(config: ConfigDict, network: Network | None = None) -> AutoencoderTask:
    """The autoencoder of `config.autoencoder` and its loss, with LPIPS if there is its network.

    Raises:
      UserError: a value makes no sense.
    """
    section = config.vae_training
    perceptual = adversary = None
    if network and section.perceptual_weight:
        distance = _distance(network, compute_dtype(section.dtype))
        perceptual = Perceptual(section.perceptual_weight, distance)
    if section.adversarial_weight:
        if section.steps is not None and section.adversarial_start >= section.steps:
            raise UserError(
                f"vae_training.adversarial_start={section.adversarial_start} is not below "
                f"vae_training.steps={section.steps}, so there would be no discriminator; set it "
                "lower, or adversarial_weight=0"
            )
        adversary = Adversary(
            section.adversarial_weight,
            section.adversarial_start,
            section.discriminator_channels,
            section.discriminator_layers,
        )
    return AutoencoderTask(
        dataclasses.replace(autoencoder_config(config), scale=1.0),
        section.dtype,
        section.kl_weight,
        section.reconstruction,
        commitment_weight=section.commitment_weight,
        entropy_weight=section.entropy_weight,
        perceptual=perceptual,
        adversary=adversary,
    )


def _distance(network: Network, dtype: Any = jnp.float32) -> Callable[[Any, Any], Any]:
    """LPIPS of float images."""
    return functools.partial(lpips.training_distance, network.params, dtype=dtype)


def _lpips(config: ConfigDict) -> Network | None:
    """LPIPS's network by VGG if it was imported, the same on every process.

    Raises:
      UserError: its files are damaged, or not all processes have it.
    """
    side, folder = config.data.image_size, default_folder()
    network = load_network("lpips_vgg", folder) if side >= lpips.SMALLEST["vgg"] else None
    found = processes.gather(json.dumps(network and network.facts, sort_keys=True))
    if len(set(found)) > 1:
        raise UserError(
            f"not all processes have the same LPIPS network in {folder}; run `tokenbridge "
            f"import-metrics` on every host, or set ${FOLDER_VARIABLE} to a folder they share"
        )
    if config.vae_training.perceptual_weight and not network:
        reason = (
            f"{folder} holds no VGG network of LPIPS, `tokenbridge import-metrics --help` says how "
            "to import it"
            if side >= lpips.SMALLEST["vgg"]
            else f"LPIPS needs images of {lpips.SMALLEST['vgg']} pixels or more"
        )
        say(f"train-vae: trains without vae_training.perceptual_weight: {reason}")
    return network


@dataclasses.dataclass(frozen=True)
class _Training:
    """What to train, with which images and devices, and where to write."""

    config: ConfigDict
    directory: epath.Path
    task: AutoencoderTask
    lpips_network: Network | None
    subsets: dict[str, Subset]
    mesh: Mesh

    def make_run(self) -> Run:
        """The training run: data, a hook, and the fields that identify it."""
        config, train, mesh = self.config, self.subsets["train"], self.mesh
        data, section = config.data, config.vae_training
        batch_size = section.batch_size
        fields = flat_fields(config, ["seed", "autoencoder", "vae_training"])
        fields |= {f"data.{name}": data[name] for name in ("image_size", "image_channels", "flip")}
        described = train.source.describe() | {"chosen": len(train.images)}
        fields |= {f"images.{name}": value for name, value in described.items() if name != "path"}
        free = {name for name in fields if name.startswith("vae_training.")}
        adversary = self.task.adversary
        fields["discriminator"] = (
            f"{adversary.channels} channels, {adversary.layers} layers" if adversary else "none"
        )
        network = self.lpips_network if section.perceptual_weight else None
        fields["lpips"] = f"VGG {network.facts['vgg16_sha256'][:8]}" if network else "none"
        return Run(
            name="train-vae",
            directory=self.directory / "training",
            task=self.task,
            recipe=recipe(config, "vae_training", len(train.images)),
            seed=config.seed,
            batches=lambda start: make_image_loader(
                train,
                data.image_size,
                data.image_channels,
                batch_size,
                config.seed,
                flip=data.flip,
                start_step=start,
                rows=meshes.local_rows(mesh, batch_size),
                workers=data.workers,
            ),
            flops_per_image=autoencoder_task.training_flops(self.task.module.config),
            fields=fields,
            fixed=(fields.keys() - free) | {"vae_training.batch_size"},
            draw=self.task.draw,
            hooks=[self._validation_hook()],
        )

    def write_autoencoder(self, state: TrainState) -> dict[str, Any]:
        """Measures the latents and writes the EMA parameters; returns the figures it adds."""
        measured, mesh = self.subsets["train"].spread(SCALE_IMAGES), self.mesh
        with meshes.use_mesh(mesh):
            batches = self._batches(measured, self.config.vae_training.batch_size)
            params = without_discriminator(state.ema_params)
            std = autoencoder_task.latent_std(self.task.module, params, batches, mesh)
            gather = jax.jit(lambda params: params, out_shardings=meshes.replicated(mesh))
            params = jax.tree.map(np.asarray, gather(params))
        sizes = self.task.module.config
        if sizes.codebook is None:  # A codebook's latents have their scale by construction.
            sizes = dataclasses.replace(sizes, scale=1 / std)
        extra = {"step": int(state.step), "latent_std": std}
        if jax.process_index() == 0:
            save_autoencoder(self.directory, sizes, params, extra)
        return extra

    def _validation_hook(self) -> Hook:
        """Scores of the EMA's reconstructions, and pictures of some beside their originals."""
        split = "validation" if "validation" in self.subsets else "train"
        if (count := len(self.subsets[split].images)) < 2:
            raise UserError(
                f"the {split} split has {count} of the 2 pictures that its statistics need at "
                "least: add pictures, or raise tokenize.validation_fraction"
            )
        measured, shown = map(self.subsets[split].spread, (VALIDATION_IMAGES, IN_PICTURE))
        reconstruct = autoencoder_task.make_reconstruction(self.task.module, self.mesh)
        distance = _distance(self.lpips_network) if self.lpips_network else None
        scores = make_scores(reconstruct, self.mesh, self._extractor(), distance)
        copy = jax.jit(lambda images: images, out_shardings=meshes.replicated(self.mesh))
        section, folder = self.config.vae_training, self.directory / "training" / "reconstructions"

        def run(state: TrainState, step: int, writer: MetricWriter) -> dict[str, float]:
            batch = next(self._batches(shown, IN_PICTURE))
            originals = np.asarray(copy(batch["images"]))
            decoded = np.asarray(reconstruct(state.ema_params, batch["images"]))
            pairs = np.stack([originals, decoded], axis=1).reshape(-1, *originals.shape[1:])
            picture = pictures.grid(pairs[: 2 * len(shown.images)], columns=8)
            if jax.process_index() == 0:
                pictures.write_png(folder / f"step_{step:07d}.png", picture)
            writer.image(step, "reconstructions", picture)
            batches = self._batches(measured, section.batch_size)
            found = scores(state.ema_params, batches)
            return {f"{split}_{name}": value for name, value in found.items()}

        return Hook(section.checkpoint_every, run)

    def _extractor(self) -> Extractor | None:
        """Of the features of `config.evaluation`, in process 0, if their network was imported."""
        features, folder = self.config.evaluation.features, default_folder()
        if features not in networks.FEATURES:
            make_extractor(features, folder)  # Raises an error, on every process.
        if jax.process_index():
            return None
        if features == "thumbnails" and self.config.data.image_size < THUMBNAIL:
            return None
        if features in networks.PARTS and not (folder and networks.is_imported(features, folder)):
            return None
        return make_extractor(features, folder)

    def _batches(self, subset: Subset, batch_size: int) -> Iterator[dict[str, jax.Array]]:
        data = self.config.data
        sizes = data.image_size, data.image_channels
        return picture_batches(
            subset.source, subset.images, *sizes, self.mesh, batch_size, data.workers
        )


def _check_directory(directory: epath.Path) -> None:
    """Refuses to overwrite an autoencoder that was not trained here."""
    if autoencoder_exists(directory) and _finished_step(directory) is None:
        raise UserError(
            f"{directory} holds an autoencoder that was not trained here; use another --workdir "
            "or remove it"
        )


def _check_unused(workdir: epath.Path, steps: int) -> None:
    """Refuses to train to `steps` the autoencoder that shards or a model in this workdir use."""
    if not autoencoder_exists(workdir / "autoencoder"):
        return
    present = read_description(workdir / "autoencoder")["hash"]
    tokens = workdir / "tokens"
    for user in (tokens / INFO_FILE, tokens / PARTIAL_INFO_FILE, workdir / MODEL_FILE):
        if user.exists() and storage.read_json(user).get("autoencoder_hash") == present:
            done = _finished_step(workdir / "autoencoder")
            raise UserError(
                f"{user} depends on the present autoencoder, and training would replace it: it has "
                f"had {done} updates, and now vae_training.steps={steps}; give the flags of the "
                f"first start, use another --workdir, or remove {tokens} and {workdir / MODEL_FILE}"
            )


def _finished_step(directory: epath.Path) -> int | None:
    """Number of updates of the autoencoder in `directory`, if one was trained there."""
    if not autoencoder_exists(directory) or not (directory / "training").exists():
        return None
    return read_description(directory)["extra"].get("step")


if __name__ == "__main__":
    sys.exit(runner.main(["train-vae", *sys.argv[1:]]))
