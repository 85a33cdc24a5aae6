"""Trains the model on token shards: WORKDIR/tokens -> WORKDIR/checkpoints.

Also writes model.json, metrics.jsonl, tensorboard/ and, if WORKDIR/autoencoder exists to decode
them, samples/step_*.png. Started again, it continues from the latest checkpoint as if it had never
stopped: bit for bit, on GPUs if it finds its compiled programs on disk (docs/training.md). Status
75: it was told to stop (SIGTERM, Ctrl-C) and has saved its state.
"""

import dataclasses
import sys
from collections.abc import Iterator

import jax
import numpy as np
from absl import flags
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from tokenbridge_jax.autoencoder import autoencoder_exists, load_autoencoder, read_description
from tokenbridge_jax.channels import resolve_channel_order
from tokenbridge_jax.codec import Codec
from tokenbridge_jax.commands import failures, runner
from tokenbridge_jax.config import (
    auto_choices,
    check_ranges,
    check_training,
    check_values,
    filled,
    flat_fields,
    given_settings,
    make_mesh,
    mask_sampler,
    model_config,
    model_task,
    of_latents,
    recipe,
    sampling_settings,
)
from tokenbridge_jax.data import class_names, shards
from tokenbridge_jax.data.loader import make_loader, validation_batches
from tokenbridge_jax.data.local_copy import local_copy
from tokenbridge_jax.data.shards import DatasetInfo
from tokenbridge_jax.data.tokenizing import make_quantizer
from tokenbridge_jax.evaluation.features import extract
from tokenbridge_jax.evaluation.generation import decoded_images, make_labels
from tokenbridge_jax.evaluation.networks import default_folder, make_extractor
from tokenbridge_jax.evaluation.scores import find_reference, generation_scores
from tokenbridge_jax.model_config import FIXED_FIELDS, TokenBridgeConfig
from tokenbridge_jax.pipeline.description import MODEL_FILE, ModelDescription
from tokenbridge_jax.pipeline.pretrained import WEIGHTS_FILE
from tokenbridge_jax.runtime import meshes, pictures, storage
from tokenbridge_jax.runtime.compiled import Trial, try_to_compile
from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.runtime.hardware import Devices
from tokenbridge_jax.runtime.progress import say
from tokenbridge_jax.sampling.batches import generate_in_batches
from tokenbridge_jax.sampling.sampler import check_order
from tokenbridge_jax.training import auto
from tokenbridge_jax.training.checkpoints import Checkpoints
from tokenbridge_jax.training.loop import EXIT_INTERRUPTED, Hook, Interrupted, Run, fit
from tokenbridge_jax.training.metric_writer import MetricWriter
from tokenbridge_jax.training.model_task import (
    abstract_batch,
    bits,
    largest_draw,
    make_validation,
    training_flops,
)
from tokenbridge_jax.training.program import Program
from tokenbridge_jax.training.state import TrainState

# Images of a sample grid, ten in a row. They cycle through the classes, or evenly spaced ones.
IN_GRID = 40


def define_flags(flag_values: flags.FlagValues) -> None:
    """This command has no flags of its own."""
    del flag_values


def main(args: flags.FlagValues) -> int:
    """Trains to the end, from the latest checkpoint if there is one."""
    config, workdir = args.config, epath.Path(args.workdir)
    if (workdir / WEIGHTS_FILE).exists():
        raise UserError(
            f"{workdir} is a saved pipeline, not a run: `export-torch --ema` from it, then "
            "`import-torch` to the --workdir to train in"
        )
    check_ranges(config, "evaluation")
    check_training(config, "training", make_mesh(config))
    info = read_tokens(config, workdir)
    names, notes = agree_on_classes(config, workdir, info)
    if len(names) < config.data.num_classes:
        notes.append(
            f"the shards have {len(names)} classes and data.num_classes is "
            f"{config.data.num_classes}: the last ones are not trained"
        )

    def begin() -> None:
        if jax.process_index() == 0:
            for note in [*notes, *_left_out(config, workdir, info)]:
                say(f"train: {note}")
            ModelDescription(model, names, info.autoencoder_hash).save(workdir)
            runner.remember_config(args)

    with runner.locked(args.workdir):
        config, program = settle(config, workdir, info)
        model = model_config(config, info.quantizer, info.channel_order, info.positions)
        run = make_run(config, workdir, info, model, program.mesh)
        try:
            fit(dataclasses.replace(run, begin=begin), program.mesh, program)
        except Interrupted:
            return EXIT_INTERRUPTED
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise UserError(_out_of_memory(config, workdir, error)) from error
    print(f"{workdir} holds the model after {run.total_steps} steps: `tokenbridge sample` uses it")
    return 0


def _out_of_memory(config: ConfigDict, workdir: epath.Path, error: Exception) -> str:
    settings = auto.Settings(**given_settings(config, jax.device_count()))
    file = workdir / auto.FILE
    remembered = f", which {file} remembers" if storage.exists(file) else ""
    return (
        f"the devices ran out of memory with {settings}{remembered} "
        f"({failures.describe(error)[0]}); if the step needs it, start again with "
        "--config.model.remat=full, a smaller --config.model.head_chunk or a larger "
        "--config.training.accumulation; if samples or scores do, with a smaller "
        "--config.sampling.batch_size"
    )


def read_tokens(config: ConfigDict, workdir: epath.Path) -> DatasetInfo:
    """The description of the token shards, which must be those that the config asks for.

    Raises:
      UserError: there are none, or they differ; the message names the field.
    """
    if not storage.exists(workdir):
        raise UserError(f"workdir {workdir} does not exist; check --workdir")
    info = shards.read_info(workdir / "tokens")
    check_values(config, info.autoencoder)
    needed = "latents" if of_latents(config) else "indices"
    info.check_holds(needed, f"model.head='{config.model.head}'")
    info.check(image_size=config.data.image_size)
    if not of_latents(config):
        if info.autoencoder.codebook is None:
            info.check(quantizer=make_quantizer(config))
        _check_channel_order(config, info)
    if len(info.class_names) > config.data.num_classes:
        raise UserError(
            f"the token shards have {len(info.class_names)} classes but config.data.num_classes "
            f"is {config.data.num_classes}"
        )
    if autoencoder_exists(workdir / "autoencoder"):
        info.check(autoencoder_hash=read_description(workdir / "autoencoder")["hash"])
    return info


def _check_channel_order(config: ConfigDict, info: DatasetInfo) -> None:
    rule = config.quantizer.channel_order
    if rule not in ("frequency", "kl16", "identity"):
        info.check(channel_order=resolve_channel_order(rule, info.channels))
    elif rule != info.channel_order_rule.split(",")[0]:
        info.check(channel_order_rule=rule)


def settle(
    config: ConfigDict, workdir: epath.Path, info: DatasetInfo
) -> tuple[ConfigDict, Program]:
    """Replaces the `auto` values of a config by those for the devices at hand.

    The compiler decides what fits, if the memory of the devices is known and there is a choice.
    What was picked before for such devices is taken without trying.

    Returns:
      The config, and the program of its training step.

    Raises:
      UserError: nothing fits.
    """

    def model_of(config: ConfigDict) -> TokenBridgeConfig:
        return model_config(config, info.quantizer, info.channel_order, info.positions)

    def program_of(config: ConfigDict) -> Program:
        how = recipe(config, "training", info.splits["train"]["images"])
        task = model_task(config, model_of(config))
        return Program.make(task, how, config.seed, make_mesh(config))

    made: dict[auto.Settings, Program] = {}

    def attempt(settings: auto.Settings) -> Trial:
        settled = filled(config, settings)
        model, how = model_of(settled), settled.training
        made.clear()
        made[settings] = program = program_of(settled)
        images, shards = how.batch_size // how.accumulation, meshes.batch_shards(program.mesh)
        masks = mask_sampler(settled, model.positions)
        draw = largest_draw(model, masks, how.head_fraction, images, shards)
        batch = abstract_batch(model, how.batch_size, program.mesh)
        say(f"train: compiling with {settings}")
        return try_to_compile(lambda: program.compile(batch, draw))

    slices = len(meshes.devices_by_slice(jax.devices()))
    devices = Devices.at_hand(1 if config.mesh.slices == 1 else slices)
    listed = auto_choices(config, model_of(config), devices)
    settings = listed[0].settings
    if len(listed) > 1 and devices.memory is None and devices.platform != "cpu":
        say(f"auto: the memory of {devices} is not known: {settings}, without trying")
    if len(listed) > 1 and devices.memory is not None:
        question = flat_fields(config, ["model", "mesh"]) | {
            name: config.training[name]
            for name in ("batch_size", "accumulation", "head_fraction", "mask_min")
        }
        shape = {"positions": info.positions, "channels": info.channels}
        question |= shape | {"jax": jax.__version__}
        settings = auto.recall(
            workdir, devices, question, lambda: auto.pick(listed, devices, attempt, auto.TRUST)
        )
    settled = filled(config, settings)
    return settled, made.get(settings) or program_of(settled)


def agree_on_classes(
    config: ConfigDict, workdir: epath.Path, info: DatasetInfo
) -> tuple[tuple[str, ...], list[str]]:
    """The names of the classes: those of the model that training continues, if there is one.

    Returns:
      Names by label, and notes for the user.

    Raises:
      UserError: the shards have the model's classes in another order, or more or fewer.
    """
    latest = Checkpoints(workdir / "checkpoints").latest
    if latest is None or not storage.exists(workdir / MODEL_FILE):
        return info.class_names, []
    model = ModelDescription.load(workdir)
    before, now = model.config.classes, config.data.num_classes
    if before != now:
        return info.class_names, [f"{now} classes instead of {before}: a new class table"]
    names, remark = class_names.match(model.class_names, info.class_names)
    return names, [remark] if remark else []


def make_run(
    config: ConfigDict, workdir: epath.Path, info: DatasetInfo, model: TokenBridgeConfig, mesh: Mesh
) -> Run:
    """The training run: data, masks, hooks, and what identifies it."""
    how, seed, images = config.training, config.seed, info.splits["train"]["images"]
    tokens = local_copy(workdir / "tokens")
    masks = mask_sampler(config, model.positions)
    fields = flat_fields(config, ["seed", "model", "training"])
    fields["data.num_classes"] = config.data.num_classes
    fields["tokens_sha256"] = info.sha256
    fixed = {f"model.{name}" for name in FIXED_FIELDS}

    def validation_hook() -> Hook:
        """Negative log-likelihood of the validation split under the EMA, in bits a value.

        If the head has no probabilities, the loss of the validation split.
        """
        validate = make_validation(model, masks, mesh)
        count = info.splits["validation"]["images"]
        batch_size = min(how.batch_size, meshes.round_up_batch(count, mesh))

        def run(state: TrainState, step: int, writer: MetricWriter) -> dict[str, float]:
            rows = meshes.local_rows(mesh, batch_size)
            batches = validation_batches(tokens, batch_size, latents=model.of_latents, rows=rows)
            found = validate(state.ema_params, batches)
            if not model.has_probabilities:
                return {"val_loss": found}
            value = "latent" if model.of_latents else "index"
            return {f"val_nll_bits_per_{value}": bits(found)}

        return Hook(how.eval_every, run)

    hooks = [validation_hook()] if "validation" in info.splits else []
    if autoencoder_exists(workdir / "autoencoder"):
        hooks += _sampling_hooks(config, workdir, info, model, mesh)
    return Run(
        name="train",
        directory=workdir,
        task=model_task(config, model),
        recipe=recipe(config, "training", images),
        seed=seed,
        batches=lambda start: make_loader(
            tokens,
            how.batch_size,
            seed,
            latents=model.of_latents,
            start_step=start,
            rows=meshes.local_rows(mesh, how.batch_size),
        ),
        draw=lambda step: masks.draw(seed, step),
        flops_per_image=training_flops(model, masks, how.head_fraction),
        fields=fields,
        fixed={"seed", "training.batch_size", "tokens_sha256"} | fixed,
        hooks=hooks,
        redrawn={"class_embedding"},
    )


def _sampling_hooks(
    config: ConfigDict, workdir: epath.Path, info: DatasetInfo, model: TokenBridgeConfig, mesh: Mesh
) -> list[Hook]:
    """A grid and scores of samples of the EMA, always with the same classes and seed."""
    autoencoder, params = load_autoencoder(workdir / "autoencoder")
    local_mesh = meshes.make_mesh(devices=jax.local_devices())
    codec = Codec(autoencoder, params, model.quantizer, local_mesh, model.dtype)
    settings, batch_size = sampling_settings(config.sampling), config.sampling.batch_size
    if config.training.sample_every or config.evaluation.every:
        check_order(model, settings)

    def sample(state: TrainState, labels: np.ndarray) -> np.ndarray:
        return generate_in_batches(
            model, state.ema_params, labels, settings, mesh, seed=config.seed, batch_size=batch_size
        )

    classes = len(info.class_names)
    spread = np.linspace(0, classes - 1, min(classes, IN_GRID)).astype(np.int32)

    def write_grid(state: TrainState, step: int, writer: MetricWriter) -> dict[str, float]:
        indices = sample(state, np.resize(spread, IN_GRID))
        if jax.process_index() == 0:
            picture = pictures.grid(np.asarray(codec.decode(indices)), columns=10)
            pictures.write_png(workdir / "samples" / f"step_{step:07d}.png", picture)
            writer.image(step, "samples", picture)
        return {}

    grid, section = Hook(config.training.sample_every, write_grid), config.evaluation
    if not section.every:
        return [grid]
    extractor = make_extractor(section.features, default_folder())
    if not section.reference:
        raise UserError("config.evaluation.reference is not set: name a file of statistics, images")
    first, tokens = jax.process_index() == 0, workdir / "tokens"
    reference = find_reference(section.reference, config, extractor, tokens=tokens, progress=first)
    scored = make_labels("balanced", section.num_images, classes, config.seed)

    def score(state: TrainState, step: int, writer: MetricWriter) -> dict[str, float]:
        found = extract(decoded_images(codec, sample(state, scored), workdir), extractor)
        scores = generation_scores(found, reference, extractor.distance)
        return {f"eval_{name}": value for name, value in scores.items()}

    return [grid, Hook(section.every, score)]


def _left_out(config: ConfigDict, workdir: epath.Path, info: DatasetInfo) -> Iterator[str]:
    """Lines about the settings that this workdir does not allow."""
    if config.training.eval_every and "validation" not in info.splits:
        yield f"{workdir / 'tokens'} has no validation split: no validation"
    lacks_autoencoder = not autoencoder_exists(workdir / "autoencoder")
    if config.evaluation.every and lacks_autoencoder:
        yield f"{workdir / 'autoencoder'} does not exist: no scores of samples"
    if config.training.sample_every and lacks_autoencoder:
        yield f"{workdir / 'autoencoder'} does not exist: no sample grids"


if __name__ == "__main__":
    sys.exit(runner.main(["train", *sys.argv[1:]]))
