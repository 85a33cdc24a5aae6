"""Configs: the settings that may be `auto`, the checks of values, and the typed parts made of them.

Commands turn a config into typed parts for the modules below: the config of a model, a training
recipe. `data/`, which makes images and shards, reads the sections `data`, `tokenize`, `quantizer`.
"""

import copy
import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh
from ml_collections import ConfigDict

from tokenbridge_jax.autoencoder import AutoencoderConfig

# The files of experiments import some of these from here.
from tokenbridge_jax.experiments import (  # noqa: F401
    AUTO,
    experiment,
    experiment_file,
    experiments,
    parse_arg,
    settable,
)
from tokenbridge_jax.model_config import DTYPES, HEADS, TokenBridgeConfig
from tokenbridge_jax.quantizer import AnyQuantizer, Unquantized
from tokenbridge_jax.runtime import checks, meshes
from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.runtime.hardware import Devices
from tokenbridge_jax.sampling.schedule import SamplingSettings, make_settings
from tokenbridge_jax.training import auto
from tokenbridge_jax.training.autoencoder_task import RECONSTRUCTION_ERRORS
from tokenbridge_jax.training.masking import MaskSampler
from tokenbridge_jax.training.model_task import ModelTask
from tokenbridge_jax.training.optimizer import OptimizerConfig
from tokenbridge_jax.training.program import Recipe
from tokenbridge_jax.transformer import REMAT_POLICIES

# --- Settings that may be `auto` ------------------------------------------------------------------


def given_settings(config: ConfigDict, devices: int) -> dict[str, Any]:
    """The fields of `auto.Settings` that a config fixes, for this number of devices.

    A fixed `mesh.data` leaves one size for `mesh.fsdp`.

    Raises:
      UserError: the mesh does not fit the devices.
    """
    values = {name: _value(config, key) for name, key in auto.KEYS.items()}
    given = {name: value for name, value in values.items() if value != AUTO}
    if "fsdp" in given or config.mesh.data != -1:
        given["fsdp"] = mesh_sizes(config, devices)[1]
    return given


def auto_choices(
    config: ConfigDict, model: TokenBridgeConfig, devices: Devices
) -> list[auto.Choice]:
    """The settings that training may have on some devices; see `auto.choices`.

    `check_training` must accept the config.
    """
    section, tensor = config.training, mesh_sizes(config, devices.number)[2]
    masks = mask_sampler(config, model.positions)
    step = auto.Step(model, masks, section.head_fraction, section.batch_size, tensor)
    return auto.choices(step, devices, given_settings(config, devices.number))


def filled(config: ConfigDict, settings: auto.Settings = auto.Settings()) -> ConfigDict:  # noqa: B008
    """A copy of a config whose `auto` values are those of `settings`, by default the plain ones.

    The plain ones suit everything but training: nothing is rematerialised or split.
    """
    values = {auto.KEYS[name]: value for name, value in dataclasses.asdict(settings).items()}
    here = {k: v for k, v in values.items() if k.split(".")[0] in config}
    return with_changes(config, {k: v for k, v in here.items() if _value(config, k) == AUTO})


def with_changes(config: ConfigDict, changes: Mapping[str, Any]) -> ConfigDict:
    """A copy of a config with some values, `section.key` -> value, changed."""
    changed = copy.deepcopy(config)
    with changed.unlocked():  # A config may be older than a key.
        for name, value in changes.items():
            section, key = name.split(".")
            if name in auto.KEYS.values() and key in changed[section]:
                del changed[section][key]  # In a user's own file it may have the type of a number.
                value = settable(value)
            changed[section][key] = value
    return changed


def mesh_sizes(config: ConfigDict, devices: int) -> list[int]:
    """The sizes of data, fsdp and tensor. An `auto` fsdp is 1, or what a fixed `data` leaves.

    Raises:
      UserError: they do not fit the number of devices.
    """
    data, fsdp, tensor = config.mesh.data, _value(config, "mesh.fsdp"), config.mesh.tensor
    if fsdp == AUTO:
        fsdp = 1 if -1 in (data, tensor) else -1
    return meshes.axis_sizes(devices, data, fsdp, tensor)


def make_mesh(config: ConfigDict, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of `config.mesh`, of all devices of the job by default; see `mesh_sizes`.

    Raises:
      UserError: the sizes do not fit the devices or their slices.
    """
    devices = jax.devices() if devices is None else devices
    data, fsdp, tensor = mesh_sizes(config, len(devices))
    return meshes.make_mesh(data, fsdp, tensor, config.mesh.slices, devices)


def _value(config: ConfigDict, name: str) -> Any:
    """The value of `section.key`; `auto` if the config has none."""
    section, key = name.split(".")
    return config[section].get(key, AUTO)


# --- Checks ---------------------------------------------------------------------------------------


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1


# Values that may be `auto` have no fixed type, so their rules are complete.
_AUTO_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "mesh.fsdp": ("auto, -1 or a whole number", lambda value: value == -1 or _is_count(value)),
    "model.remat": (" or ".join((AUTO, *REMAT_POLICIES)), REMAT_POLICIES.__contains__),
    "model.head_chunk": ("auto, or a whole number, at least 1", _is_count),
    "model.scan_layers": ("auto, True or False", lambda value: type(value) is bool),
    "training.accumulation": ("auto, or a whole number, at least 1", _is_count),
}

# Rules for values that the typed parts do not check themselves: keys, what a value must be, and a
# test of that, which NaN fails.
_RULES: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
    (
        "batch_size accumulation hidden_bucket log_every checkpoint_every keep",
        "at least 1",
        lambda value: value >= 1,
    ),
    ("keep_every eval_every sample_every every", "0 (never) or more", lambda value: value >= 0),
    (
        "epochs warmup_epochs learning_rate weight_decay clip kl_weight commitment_weight "
        "entropy_weight perceptual_weight adversarial_weight discriminator_rate",
        "a finite number, 0 or more",
        lambda value: 0 <= value < math.inf,
    ),
    ("beta1 beta2 ema_decay class_dropout", "0 or more and below 1", lambda value: 0 <= value < 1),
    ("head_fraction", "above 0 and at most 1", lambda value: 0 < value <= 1),
    ("num_images", "at least 2", lambda value: value >= 2),
    ("schedule", "cosine or constant", lambda value: value in ("cosine", "constant")),
    ("reconstruction", " or ".join(RECONSTRUCTION_ERRORS), RECONSTRUCTION_ERRORS.__contains__),
    ("dtype", " or ".join(DTYPES), DTYPES.__contains__),
)


def add_new_keys(values: dict[str, Any]) -> list[str]:
    """Adds keys that an earlier version did not have to the sections of a config, in place.

    Their defaults in `configs/base.py` are what earlier versions did.

    Returns:
      `section.key=value` of each.
    """
    base = {name: part for name, part in experiment("base").items() if isinstance(part, ConfigDict)}
    given = {section: values.get(section) for section in base}
    if any(isinstance(part, dict) and set(part) - set(base[s]) for s, part in given.items()):
        return []  # Keys were renamed or moved, which `check_config` explains.
    added = []
    for section, defaults in base.items():
        if isinstance(given[section], dict):
            new = {key: defaults[key] for key in defaults if key not in values[section]}
            values[section].update(new)
            added += [f"{section}.{key}={value}" for key, value in new.items()]
    return added


def check_config(config: ConfigDict) -> None:
    """Checks the parts that every command needs: the sections, their keys, and the seed.

    Raises:
      UserError: a section or key is missing, the seed is wrong, or `model` has an unknown key.
    """
    known = experiment("base")
    if missing := [section for section in known if section not in config]:
        raise UserError(
            f"the config has no {', '.join(missing)}; give a whole one: --config NAME or FILE.py "
            "(a damaged WORKDIR/config.json can be removed)"
        )
    checks.seed(config.seed, "config.seed")
    if (head := config.model.get("head", "")) not in (*HEADS, ""):
        raise UserError(f"model.head='{head}' is not one of {', '.join(HEADS)}")
    if unknown := [key for key in config.model if key not in known.model]:
        moved = [key for key in unknown if key in known.training]
        advice = f"; move {', '.join(moved)} to config.training, in the file it is read from"
        raise UserError(f"config.model has no key {', '.join(unknown)}{advice if moved else ''}")
    sections = [name for name in known if isinstance(known[name], ConfigDict)]
    pairs = [(section, key) for section in sections for key in known[section]]
    if absent := [f"{name}.{key}" for name, key in pairs if key not in config[name]]:
        more = f" and {len(absent) - 5} more" if len(absent) > 5 else ""
        old = [
            f"{name}.{key}" for name in sections for key in config[name] if key not in known[name]
        ]
        more += f" (renamed from {', '.join(old)}?)" if old else ""
        raise UserError(
            f"the config has no {', '.join(absent[:5])}{more}, so it is from another version; add "
            "what is missing in the file it is read from (configs/base.py has the defaults)"
        )
    for section in ("mesh", "model", "training"):
        _check_auto(config, section)


def _check_auto(config: ConfigDict, section: str) -> None:
    for name, (text, is_right) in _AUTO_RULES.items():
        if name.startswith(f"{section}."):
            value = _value(config, name)
            if not (value == AUTO or is_right(value)):
                raise UserError(f"{name} is {value}; it must be {text}")


def check_ranges(config: ConfigDict, name: str) -> None:
    """Checks every value of section `name` that has a rule.

    Raises:
      UserError: a value makes no sense; the message names it and says what it may be.
    """
    _check_auto(config, name)
    for keys, text, is_right in _RULES:
        for key in (key for key in keys.split() if f"{name}.{key}" not in _AUTO_RULES):
            value = config[name].get(key)
            try:
                right = value is None or is_right(value)
            except TypeError:  # A key without a default value accepts a value of any type.
                right = False
            if not right:
                raise UserError(f"{name}.{key} is {value}; it must be {text}")


def check_training(config: ConfigDict, name: str, mesh: Mesh | AbstractMesh) -> None:
    """Checks a section of training settings, before anything is made from it.

    Raises:
      UserError: a value is missing or makes no sense, or the batch does not divide over the mesh.
    """
    section = config[name]
    for key, value in experiment("base")[name].items():
        if key not in section or (section[key] is None and value is not None):
            raise UserError(f"the config has no value {name}.{key}; configs/base.py has every key")
    check_ranges(config, name)
    count = 1 if section.accumulation == AUTO else section.accumulation
    check_batches([section.batch_size], mesh, count, given=f"{name}.batch_size ")


def check_batches(
    sizes: Sequence[int],
    mesh: Mesh | AbstractMesh,
    accumulation: int = 1,
    given: str = "--batch=",
) -> None:
    """Raises `UserError` unless every batch divides over the mesh and into micro-batches."""
    shards = meshes.batch_shards(mesh)
    for size in sizes:
        if size % (accumulation * shards):
            parts = f" into {accumulation} micro-batches" if accumulation > 1 else ""
            raise UserError(
                f"{given}{size} does not divide{parts} over {shards} batch shards; make it a "
                f"multiple of {accumulation * shards}"
            )


# --- Typed parts ----------------------------------------------------------------------------------


def autoencoder_config(config: ConfigDict) -> AutoencoderConfig:
    """The autoencoder of `config.autoencoder`, for images of `config.data`.

    Raises:
      UserError: a key is unknown or a value makes no sense.
    """
    sizes = {name: config.data[name] for name in ("image_size", "image_channels")}
    return AutoencoderConfig.from_json({**config.autoencoder, **sizes})


def of_latents(config: ConfigDict) -> bool:
    """Whether the head of `config.model` predicts latents and not indices."""
    head = HEADS.get(config.model.get("head"))
    return head is not None and head.of_latents


def check_values(config: ConfigDict, autoencoder: AutoencoderConfig) -> None:
    """Raises `UserError` if the head needs latents, and the autoencoder has a trained codebook."""
    if of_latents(config):
        user = f"model.head='{config.model.head}'"
        autoencoder.check_posterior(user, "set a head of indices, such as model.head=parallel")


def model_config(
    config: ConfigDict,
    quantizer: AnyQuantizer,
    channel_order: tuple[int, ...],
    positions: int,
) -> TokenBridgeConfig:
    """The model of `config.model`, for indices of this quantizer, channel order and number.

    `channel_order` is that of the shards: `config.model.channel_order` uses it ("tokens"), reverses
    it ("reverse"), or ignores it ("identity"). A head of latents has no quantizer and the order
    "identity". Settings that are still `auto` are the plain ones.

    Raises:
      UserError: a value makes no sense.
    """
    check_ranges(config, "model")
    config = filled(config)
    if of_latents(config):
        quantizer, channel_order = Unquantized(), tuple(range(len(channel_order)))
    orders = {
        "tokens": channel_order,
        "reverse": channel_order[::-1],
        "identity": tuple(range(len(channel_order))),
    }
    rule = config.model.get("channel_order", "tokens")
    if rule not in orders:
        raise UserError(f"model.channel_order='{rule}' is not one of {', '.join(orders)}")
    if rule == "reverse" and of_latents(config):
        raise UserError(
            f"model.head='{config.model.head}' predicts no channel after another; "
            "leave model.channel_order='tokens'"
        )
    given = {
        "quantizer": quantizer,
        "channel_order": orders[rule],
        "positions": positions,
        "classes": config.data.num_classes,
    }
    return TokenBridgeConfig(**{**config.model, **given})


def mask_sampler(config: ConfigDict, positions: int) -> MaskSampler:
    """The numbers of hidden positions in training.

    Raises:
      UserError: a value makes no sense.
    """
    section = config.training
    return MaskSampler(
        positions, section.mask_mean, section.mask_std, section.mask_min, section.hidden_bucket
    )


def model_task(config: ConfigDict, model: TokenBridgeConfig) -> ModelTask:
    """The training task of a model."""
    return ModelTask(model, config.training.class_dropout, config.training.head_fraction)


def sampling_settings(section: ConfigDict, **changes: Any) -> SamplingSettings:
    """The settings of `config.sampling`, with some changed; its batch size is not one of them.

    Raises:
      UserError: a value makes no sense.
    """
    settings = {**section, **changes}
    settings.pop("batch_size", None)
    return make_settings(settings)


def optimizer_config(config: ConfigDict, name: str, steps_per_epoch: int) -> OptimizerConfig:
    """The optimizer of section `name`, `training` or `vae_training`, with lengths in updates.

    Lengths are given as `steps` or `epochs`, `warmup_steps` or `warmup_epochs`; steps win.

    Raises:
      UserError: a length is missing or makes no sense.
    """
    section = config[name]

    def length(steps: str, epochs: str) -> int | None:
        if section.get(steps) is not None:
            return int(section[steps])
        return None if section.get(epochs) is None else round(section[epochs] * steps_per_epoch)

    total = length("steps", "epochs")
    warmup = length("warmup_steps", "warmup_epochs") or 0
    if total is None:
        raise UserError(f"neither {name}.steps nor {name}.epochs is set")
    if total < 1:
        raise UserError(
            f"the run has {total} steps; set {name}.steps or {name}.epochs higher, "
            f"or {name}.batch_size lower"
        )
    if not 0 <= warmup <= total:
        raise UserError(
            f"warm-up of {warmup} steps does not fit a run of {total}; "
            f"change {name}.warmup_steps or {name}.warmup_epochs"
        )
    # A user may write a float as a whole number.
    numbers = ("learning_rate", "beta1", "beta2", "weight_decay", "clip")
    return OptimizerConfig(
        total_steps=total,
        warmup_steps=warmup,
        schedule=section.schedule,
        decay_head=section.get("decay_head", True),
        # Only if there is one.
        discriminator_rate=float(
            section.discriminator_rate if section.get("adversarial_weight") else 1
        ),
        **{key: float(section[key]) for key in numbers},
    )


def recipe(config: ConfigDict, name: str, images: int) -> Recipe:
    """How section `name`, `training` or `vae_training`, trains on this number of images.

    Raises:
      UserError: a length is missing or makes no sense.
    """
    section = filled(config)[name]
    optimizer = optimizer_config(config, name, images // section.batch_size)
    names = [field.name for field in dataclasses.fields(Recipe) if field.name != "optimizer"]
    return Recipe(optimizer, **{name: section[name] for name in names})


def flat_fields(config: ConfigDict, sections: Sequence[str]) -> dict[str, Any]:
    """Sections of a config as {"section.name": JSON value}; a scalar is a section of its own."""
    flat: dict[str, Any] = {}
    for section in sections:
        value = config[section]
        if isinstance(value, ConfigDict):
            flat |= {f"{section}.{name}": entry for name, entry in value.items()}
        else:
            flat[section] = value
    return json.loads(json.dumps(flat))
