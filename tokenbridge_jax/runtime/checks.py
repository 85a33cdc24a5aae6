"""Checks of what the Python interface is given: a mistake is one line that names it and its mend.

Arrays may be numpy's or jax's, or anything that numpy makes one of: lists of equally shaped arrays,
tensors, pictures. Nothing is converted from one kind of number to another: floats are not images,
and no index is clipped. What is checked here is annotated `... | Any`: the first part says what it
should be.
"""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Integer, Shaped, UInt8

from tokenbridge_jax.runtime.errors import UserError

if TYPE_CHECKING:
    from tokenbridge_jax.autoencoder import AutoencoderConfig
    from tokenbridge_jax.quantizer import Quantizer

MAX_SEED = 2**32 - 1

_KINDS: dict[str, Any] = {"integers": jnp.integer, "floats": jnp.floating, "bool": jnp.bool_}


def to_array(name: str, value: Any) -> Shaped[np.ndarray | Array, "..."]:
    """An array as it is; numpy's of anything else.

    Raises:
      UserError: there is none, as for a list of arrays whose shapes differ.
    """
    if isinstance(value, np.ndarray | jax.Array):
        return value
    try:
        return np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{name} must be one array, or a list of equal shapes ({reason})") from None


def array(
    name: str, value: Any, kind: str, shape: tuple[int | str, ...]
) -> Shaped[np.ndarray | Array, "..."]:
    """An array of a kind and shape, not empty.

    Args:
      name: of the argument.
      value: what was given.
      kind: "integers", "floats" or "bool".
      shape: of every axis its size, or a letter where any will do.

    Raises:
      UserError: it has another dtype or shape, or is empty.
    """
    found = to_array(name, value)
    fits = len(shape) == found.ndim and all(
        isinstance(size, str) or size == there
        for size, there in zip(shape, found.shape, strict=True)
    )
    if not fits or not jnp.issubdtype(found.dtype, _KINDS[kind]):
        raise UserError(
            f"{name} must be {kind} of shape [{', '.join(map(str, shape))}], not "
            f"{found.dtype} {list(found.shape)}"
        )
    if not found.size:
        raise UserError(f"{name} of shape {list(found.shape)} are none; give one at least")
    return found


def images(
    value: Any, config: "AutoencoderConfig", *, single: bool = False, side: int | None = None
) -> UInt8[np.ndarray | Array, "*B H W I"]:
    """Images that an autoencoder takes.

    Args:
      value: what was given.
      config: of the autoencoder.
      single: whether one image without a batch axis will do.
      side: height and width that they must have; any by default.

    Raises:
      UserError: they are not uint8, do not have the autoencoder's channels or a size that it
        divides, or the given one, or there are none.
    """
    found = to_array("images", value)
    shapes = "[B, H, W, channels]" + " or [H, W, channels]" * single
    if found.dtype != np.uint8 or found.ndim not in (3, 4)[not single :]:
        mend = ""
        if jnp.issubdtype(found.dtype, jnp.floating):
            mend = "; scale them to 0..255, round, and take .astype(np.uint8)"
        elif found.dtype == np.uint8 and found.ndim == 3:
            mend = "; images[None] is a batch of one"
        raise UserError(
            f"images must be uint8 of shape {shapes}, not {found.dtype} {list(found.shape)}{mend}"
        )
    if not found.size:
        raise UserError(f"images of shape {list(found.shape)} are none; give one at least")
    if found.shape[-1] != config.image_channels:
        raise UserError(
            f"images have {found.shape[-1]} channels, the autoencoder takes "
            f"{config.image_channels}; set --config.data.image_channels"
        )
    height, width = found.shape[-3:-1]
    config.check_image_size(height, width)
    if side not in (None, height) or side not in (None, width):
        raise UserError(
            f"images are {height}x{width}, the model draws {side}x{side} pixels; "
            "tokenbridge_jax.data.images.prepare cuts a picture to a size, outpaint takes others"
        )
    return found


def indices(
    value: Any, shape: tuple[int | str, ...], quantizer: "Quantizer"
) -> Integer[np.ndarray | Array, "..."]:
    """A quantizer's indices, in its `index_dtype`.

    Raises:
      UserError: they are no integers of this shape, there are none, or one is not from 0 to V - 1.
    """
    found = array("indices", value, "integers", shape)
    index_range(found, quantizer.levels)
    return found.astype(quantizer.index_dtype)


def index_range(values: Integer[np.ndarray | Array, "..."], levels: int) -> None:
    """Raises `UserError` unless all are from 0 to V - 1."""
    values = np.asarray(values)
    if values.size and (values.min() < 0 or values.max() >= levels):
        raise UserError(
            f"indices must be from 0 to {levels - 1}, not from {values.min()} to {values.max()}"
        )


def labels(value: Any, classes: int) -> Integer[np.ndarray, " N"] | Float[np.ndarray, "N classes"]:
    """Labels as int32, or weights of the classes as float32.

    Raises:
      UserError: they are neither, out of range, or none.
    """
    found = np.asarray(to_array("labels", value))
    if not found.size or found.dtype.kind not in {1: "iu", 2: "iuf"}.get(found.ndim, ""):
        raise UserError(
            "labels must be whole numbers [N], or weights [N, classes], of one image at least, not "
            f"{found.dtype} {list(found.shape)}"
        )
    if found.ndim == 1:
        if found.min() < 0 or found.max() >= classes:
            raise UserError(f"labels must be from 0 to {classes - 1}, the model's classes")
        return found.astype(np.int32)
    if found.shape[1] != classes:
        raise UserError(f"there are weights of {found.shape[1]} classes, the model has {classes}")
    sums = found[found.any(axis=1)].sum(axis=1, dtype=np.float64)
    if not np.allclose(sums, 1, rtol=0, atol=1e-4):
        worst = sums[np.argmax(np.abs(sums - 1))]
        raise UserError(f"the weights of an image's classes must sum to 1, not to {worst:g}")
    return found.astype(np.float32)


def whole(name: str, value: Any) -> int:
    """A whole number: Python's, numpy's, or that of an array without axes.

    Raises:
      UserError: it is none.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    found = to_array(name, value)
    if found.ndim or not jnp.issubdtype(found.dtype, jnp.integer):
        raise UserError(f"{name}={value!r} must be a whole number")
    return int(found)


def number(name: str, value: Any) -> float:
    """As `whole`, of any real number, NaN and infinity included.

    Raises:
      UserError: it is none.
    """
    found = to_array(name, value)
    if found.ndim or not (
        jnp.issubdtype(found.dtype, jnp.integer) or jnp.issubdtype(found.dtype, jnp.floating)
    ):
        raise UserError(f"{name}={value!r} must be a number")
    return float(found)


def at_least(name: str, value: Any, least: int) -> int:
    """A whole number.

    Raises:
      UserError: it is none, or too small.
    """
    found = whole(name, value)
    if found < least:
        raise UserError(f"{name}={found} must be at least {least}")
    return found


def seed(value: Any) -> int:
    """A seed of sampling.

    Raises:
      UserError: it is no whole number from 0 to 2**32 - 1.
    """
    found = whole("seed", value)
    if not 0 <= found <= MAX_SEED:
        raise UserError(f"seed={found} must be from 0 to 2**32 - 1")
    return found


def preview(value: Any) -> None:
    """Raises `UserError` unless it can be called, or is None."""
    if value is not None and not callable(value):
        raise UserError(f"preview={value!r} must be a function (done, steps, images), or None")


def path(name: str, value: Any) -> None:
    """Raises `UserError` unless it can be a path."""
    if not isinstance(value, str | os.PathLike):
        raise UserError(f"{name}={value!r} must be a path")


def mesh(value: Any) -> None:
    """Raises `UserError` unless it is a mesh, or None."""
    if value is not None and not isinstance(value, Mesh):
        raise UserError(f"mesh={value!r} must be a mesh, as parallel.make_mesh gives it")


def items(value: Any) -> Sequence[Any] | None:
    """A list's, tuple's or array's items, Python's where they are numpy's or jax's numbers.

    None for what is one thing: a number, a text, a mapping, None, an array without axes.
    """
    if isinstance(value, np.ndarray | jax.Array):
        return np.asarray(value).tolist() if value.ndim else None
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        return None
    return [item(x) for x in value]


def item(value: Any) -> Any:
    """Python's own number or text for numpy's or jax's; anything else as it is."""
    if isinstance(value, np.ndarray | np.generic | jax.Array) and value.ndim == 0:
        return value.item()
    return value
