"""Two-way name tables between PyTorch state dicts and parameter trees.

The table of a network is a list of `Entry`, one per PyTorch tensor. `from_torch` and `to_torch` use
the same table, so a round trip is bit-identical. This module uses only numpy, neither PyTorch nor a
device.
"""

import collections
import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from tokenbridge_jax.runtime.errors import UserError

# How a tensor in our layout is viewed in PyTorch's layout. No view copies.
_LAYOUTS = {
    "same": lambda x: x,
    "batched": lambda x: x[None],
    "flat": lambda x: x.reshape(-1),
    "linear": lambda x: x.reshape(len(x), -1).T,  # [in, *out] -> [out, in]
    "projection": lambda x: x.reshape(-1, x.shape[-1]).T,  # [*in, out] -> [out, in]
    "conv": lambda x: x.transpose(3, 2, 0, 1),  # [h, w, in, out] -> [out, in, h, w]
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One PyTorch tensor and the place of its numbers in our parameter tree.

    Attributes:
      torch_name: name in the state dict, `encoder.down.0.block.1.conv1.weight`.
      path: path of our leaf, `encoder.level_0_block_1.conv1.kernel`.
      layout: how PyTorch arranges the numbers: "same" as here; "batched", with a first axis of
        length 1; "flat", in one axis; "linear", `[out, in]` from our `[in, *out]`; "projection",
        `[out, in]` from our `[*in, out]`; "conv", `[out, in, h, w]` from our `[h, w, in, out]`.
      index: index into the first axis of a leaf that stacks layers; None if the tensor is the whole
        leaf.
    """

    torch_name: str
    path: str
    layout: str = "same"
    index: int | None = None

    def view(self, leaf: np.ndarray) -> np.ndarray:
        """Returns the tensor's numbers in our whole, contiguous leaf: a view in PyTorch's shape."""
        return _LAYOUTS[self.layout](leaf if self.index is None else leaf[self.index, ...])

    def expected_shape(self, leaf_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of the PyTorch tensor, given the shape of our whole leaf."""
        return self.view(np.broadcast_to(np.float32(0), leaf_shape)).shape


def linear(name: str, path: str, index: int | None = None, layout: str = "linear") -> list[Entry]:
    """Returns the entries of a linear or convolutional layer; `layout` is that of its weight."""
    return [
        Entry(f"{name}.weight", f"{path}.kernel", layout, index),
        Entry(f"{name}.bias", f"{path}.bias", "flat", index),
    ]


def norm(name: str, path: str, index: int | None = None) -> list[Entry]:
    """Returns the entries of a normalisation layer."""
    return [
        Entry(f"{name}.weight", f"{path}.scale", index=index),
        Entry(f"{name}.bias", f"{path}.bias", index=index),
    ]


def problems(
    entries: Iterable[Entry], state_dict: Mapping[str, Any], target: Mapping[str, Any]
) -> list[str]:
    """Returns one line for every tensor of a state dict that is missing, unexpected or misshapen.

    The arguments are those of `from_torch`. Only the shapes of the arrays are used.
    """
    leaves = traverse_util.flatten_dict(dict(target), sep=".")
    expected = {e.torch_name: e.expected_shape(leaves[e.path].shape) for e in entries}
    found = [f"missing {name}" for name in expected if name not in state_dict]
    found += [f"unexpected {name}" for name in state_dict if name not in expected]
    found += [
        f"{name} has shape {list(state_dict[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in state_dict and tuple(state_dict[name].shape) != shape
    ]
    return found


def from_torch(
    entries: Iterable[Entry], state_dict: Mapping[str, np.ndarray], target: Mapping[str, Any]
) -> dict[str, Any]:
    """Builds our parameter tree from a PyTorch state dict.

    Args:
      entries: the network's table.
      state_dict: numpy arrays by PyTorch name. The names must be exactly those of the table.
      target: our parameter tree (unboxed) of arrays or `jax.ShapeDtypeStruct`s, for their shapes
        and dtypes.

    Returns:
      Nested dict of numpy arrays with the shapes and dtypes of `target`.

    Raises:
      UserError: tensors are missing, unexpected or misshapen; the message names all of them.
    """
    entries = list(entries)
    if found := problems(entries, state_dict, target):
        raise UserError("; ".join(found))
    leaves = traverse_util.flatten_dict(dict(target), sep=".")
    params = {path: np.empty(leaf.shape, leaf.dtype) for path, leaf in leaves.items()}
    for name, view in _views(entries, params).items():
        view[...] = state_dict[name]
    return traverse_util.unflatten_dict(params, sep=".")


def to_torch(entries: Iterable[Entry], params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Inverse of `from_torch`: our parameter tree (unboxed) -> state dict, in table order."""
    leaves = traverse_util.flatten_dict(dict(params), sep=".")
    views = _views(list(entries), {path: np.asarray(leaf) for path, leaf in leaves.items()})
    return {name: np.ascontiguousarray(view) for name, view in views.items()}


def size(state_dict: Mapping[str, Any], *places: tuple[str, int]) -> int | None:
    """Returns the size that most of several axes have, or None if none of the tensors is there.

    Args:
      state_dict: anything with shapes, by name.
      *places: names of tensors and the axes of them that should have the same size.
    """
    votes = [
        state_dict[name].shape[axis]
        for name, axis in places
        if name in state_dict and axis < len(state_dict[name].shape)
    ]
    return collections.Counter(votes).most_common(1)[0][0] if votes else None


def count(state_dict: Mapping[str, Any], prefix: str) -> int | None:
    """Returns the number of layers whose names are `prefix.0.*` and so on, or None."""
    found = [re.match(rf"{re.escape(prefix)}\.(\d+)\.", name) for name in state_dict]
    return max((int(match[1]) + 1 for match in found if match), default=None)


def _views(entries: list[Entry], leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the view of every entry by name; together they must cover every number once."""
    views = {entry.torch_name: entry.view(leaves[entry.path]) for entry in entries}
    left = {path: leaf.size for path, leaf in leaves.items()}
    for entry in entries:
        left[entry.path] -= views[entry.torch_name].size
    twice = len(entries) - len({(entry.path, entry.index) for entry in entries})
    if twice or any(left.values()):
        uneven = {path: count for path, count in left.items() if count}
        raise ValueError(f"name table: {twice} places named twice, numbers not covered: {uneven}")
    return views
