"""What the values of `config.training`, `config.vae_training` and `config.model` may be."""

import math
from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from tokenbridge_jax.model import DTYPES
from tokenbridge_jax.runtime import meshes
from tokenbridge_jax.runtime.errors import UserError

# What a value must be: in words, and as a test (which NaN fails).
_Rule = tuple[str, Callable[[Any], bool]]
_POSITIVE: _Rule = ("at least 1", lambda value: value >= 1)
_COUNT: _Rule = ("0 (never) or more", lambda value: value >= 0)
_FINITE: _Rule = ("a finite number, 0 or more", lambda value: 0 <= value < math.inf)
_SHARE: _Rule = ("0 or more and below 1", lambda value: 0 <= value < 1)
_SCHEDULE: _Rule = ("cosine or constant", lambda value: value in ("cosine", "constant"))
_DTYPE: _Rule = (" or ".join(DTYPES), lambda value: value in DTYPES)

RULES: dict[str, _Rule] = {
    "batch_size": _POSITIVE,
    "accumulation": _POSITIVE,
    "hidden_bucket": _POSITIVE,
    "head_fraction": ("above 0 and at most 1", lambda value: 0 < value <= 1),
    "log_every": _POSITIVE,
    "checkpoint_every": _POSITIVE,
    "keep": _POSITIVE,
    "keep_every": _COUNT,
    "eval_every": _COUNT,
    "sample_every": _COUNT,
    "every": _COUNT,
    "num_images": ("at least 2", lambda value: value >= 2),
    "epochs": _FINITE,
    "warmup_epochs": _FINITE,
    "schedule": _SCHEDULE,
    "learning_rate": _FINITE,
    "weight_decay": _FINITE,
    "clip": _FINITE,
    "kl_weight": _FINITE,
    "beta1": _SHARE,
    "beta2": _SHARE,
    "ema_decay": _SHARE,
    "class_dropout": _SHARE,
    "dtype": _DTYPE,
}


def check_ranges(config: ConfigDict, name: str) -> None:
    """Looks at every value of section `name` that there is a rule for.

    Raises:
      UserError: one of them makes no sense; the message names it and says what it may be.
    """
    for key, value in config[name].items():
        words, is_right = RULES.get(key, ("", lambda _: True))
        try:
            right = value is None or is_right(value)
        except TypeError:  # Of a value that was not set, no type is known.
            right = False
        if not right:
            raise UserError(f"{name}.{key} is {value}; it must be {words}")


def check_training(config: ConfigDict, name: str, mesh: Mesh) -> None:
    """Looks at a section of training settings, before anything is made of it.

    Raises:
      UserError: a value makes no sense, or the batch does not divide over the mesh.
    """
    check_ranges(config, name)
    section, shards = config[name], meshes.batch_shards(mesh)
    accumulation = section.get("accumulation", 1)
    if section.batch_size % (accumulation * shards):
        raise UserError(
            f"{name}.batch_size {section.batch_size} does not divide into {accumulation} "
            f"micro-batches over {shards} batch shards; make it a multiple of "
            f"{accumulation * shards}"
        )
