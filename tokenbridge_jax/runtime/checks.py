"""Checks of the arguments of the Python interface: each reports a mistake in one line.

An argument may be an array of numpy or jax, or anything that numpy converts to an array: lists of
arrays of one shape, tensors, pictures. No number is converted to another kind: floats are not
accepted as images, and no index is clipped. Arguments that are checked here are annotated
`... | Any`; the part before `Any` says what they should be.
"""

import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Integer, Shaped

from tokenbridge_jax.runtime.errors import UserError

MAX_SEED = 2**32 - 1

_KINDS: dict[str, Any] = {"integers": jnp.integer, "floats": jnp.floating, "bool": jnp.bool_}


def to_array(name: str, value: Any) -> Shaped[np.ndarray | Array, "..."]:
    """Returns an array unchanged, and makes a numpy array of anything else.

    Raises:
      UserError: this is not possible, as for a list of arrays whose shapes differ.
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
    """Checks an array's kind and shape, and that it is not empty.

    Args:
      name: the argument's name.
      value: the argument.
      kind: "integers", "floats" or "bool".
      shape: the size of every axis, or a letter for an axis of any size.

    Raises:
      UserError: the dtype or shape differs, or the array is empty.
    """
    found = to_array(name, value)
    fits = len(shape) == found.ndim and all(
        isinstance(size, str) or size == actual
        for size, actual in zip(shape, found.shape, strict=True)
    )
    if not fits or not jnp.issubdtype(found.dtype, _KINDS[kind]):
        raise UserError(
            f"{name} must be {kind} of shape [{', '.join(map(str, shape))}], not "
            f"{found.dtype} {list(found.shape)}"
        )
    if not found.size:
        raise UserError(f"{name} of shape {list(found.shape)} are empty; give at least one")
    return found


def labels(value: Any, classes: int) -> Integer[np.ndarray, " N"] | Float[np.ndarray, "N classes"]:
    """Returns labels as int32, or weights of the classes as float32.

    Raises:
      UserError: the values are neither, or out of range, or there are none.
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
    """Converts a whole number of Python or numpy, or an array without axes, to Python's int.

    Raises:
      UserError: it is not a whole number.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    found = to_array(name, value)
    if found.ndim or not jnp.issubdtype(found.dtype, jnp.integer):
        raise UserError(f"{name}={value!r} must be a whole number")
    return int(found)


def number(name: str, value: Any) -> float:
    """Like `whole`, for real numbers, including NaN and infinity.

    Raises:
      UserError: it is not a number.
    """
    found = to_array(name, value)
    if found.ndim or not (
        jnp.issubdtype(found.dtype, jnp.integer) or jnp.issubdtype(found.dtype, jnp.floating)
    ):
        raise UserError(f"{name}={value!r} must be a number")
    return float(found)


def at_least(name: str, value: Any, least: int) -> int:
    """Returns a whole number of at least `least`.

    Raises:
      UserError: it is not a whole number, or is smaller.
    """
    found = whole(name, value)
    if found < least:
        raise UserError(f"{name}={found} must be at least {least}")
    return found


def seed(value: Any, name: str = "seed") -> int:
    """Returns a seed for sampling.

    Raises:
      UserError: it is not a whole number from 0 to 2**32 - 1.
    """
    found = whole(name, value)
    if not 0 <= found <= MAX_SEED:
        raise UserError(f"{name}={found} must be from 0 to 2**32 - 1")
    return found


def preview(value: Any) -> None:
    """Raises `UserError` if the value is neither a function nor None."""
    if value is not None and not callable(value):
        raise UserError(f"preview={value!r} must be a function (done, steps, images), or None")


def path(name: str, value: Any) -> None:
    """Raises `UserError` if the value is neither a text nor a path."""
    if not isinstance(value, str | os.PathLike):
        raise UserError(f"{name}={value!r} must be a path")


def mesh(value: Any) -> None:
    """Raises `UserError` if the value is neither a mesh nor None."""
    if value is not None and not isinstance(value, Mesh):
        raise UserError(f"mesh={value!r} must be a mesh, such as runtime.meshes.make_mesh returns")


def items(value: Any) -> Sequence[Any] | None:
    """Returns the items of a list, tuple or array; numpy's and jax's numbers become Python's.

    Returns None for a single value: a number, a text, a mapping, None, an array without axes.
    """
    if isinstance(value, np.ndarray | jax.Array):
        return np.asarray(value).tolist() if value.ndim else None
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        return None
    return [item(x) for x in value]


def item(value: Any) -> Any:
    """Returns Python's number or text for numpy's or jax's, and anything else unchanged."""
    if isinstance(value, np.ndarray | np.generic | jax.Array) and value.ndim == 0:
        return value.item()
    return value
