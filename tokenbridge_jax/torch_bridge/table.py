"""Two-way name tables between PyTorch state dicts and parameter trees.

A network's table is a list of `Entry`, one per PyTorch tensor; `from_torch` and `to_torch` read the
same table in either direction, so a round trip is bit-identical by construction. Everything here
is numpy: neither PyTorch nor a device is touched.
"""

import collections
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from tokenbridge_jax.runtime.errors import UserError

# How a PyTorch tensor's axes are permuted to become ours.
_PERMUTATIONS = {
    "same": None,
    "linear": (1, 0),  # [out, in] -> [in, out]
    "conv": (2, 3, 1, 0),  # [out, in, h, w] -> [h, w, in, out]
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One PyTorch tensor and the place of its numbers in our parameter tree.

    Attributes:
      torch_name: name in the state dict, `encoder.down.0.block.1.conv1.weight`.
      path: path of our leaf, `("encoder", "down_0", ...)`.
      kind: "linear", "conv" or "same": how the axes are permuted.
      index: place along the leaf's leading (stacked) axis; None when the tensor is the whole leaf.
      torch_shape: the tensor's shape, needed only where ours is more than a permutation of it: the
        permuted tensor is then reshaped (row-major) to our leaf, such as "linear" `[3HK, D]` to
        `[D, 3, H, K]`.
    """

    torch_name: str
    path: tuple[str, ...]
    kind: str = "same"
    index: int | None = None
    torch_shape: tuple[int, ...] | None = None

    def our_shape(self, leaf_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of this entry's part of the leaf."""
        return leaf_shape if self.index is None else leaf_shape[1:]

    def expected_shape(self, leaf_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the PyTorch tensor, given the shape of our whole leaf."""
        if self.torch_shape is not None:
            return self.torch_shape
        ours, axes = self.our_shape(leaf_shape), _PERMUTATIONS[self.kind]
        return ours if axes is None else tuple(ours[i] for i in np.argsort(axes))

    def to_ours(self, tensor: np.ndarray, leaf_shape: tuple[int, ...]) -> np.ndarray:
        """PyTorch layout -> this entry's part of our leaf."""
        return np.transpose(tensor, self._axes(tensor.ndim)).reshape(self.our_shape(leaf_shape))

    def to_theirs(self, part: np.ndarray, leaf_shape: tuple[int, ...]) -> np.ndarray:
        """This entry's part of our leaf -> PyTorch layout, contiguous."""
        shape = self.expected_shape(leaf_shape)
        axes = self._axes(len(shape))
        permuted = part.reshape([shape[i] for i in axes])
        return np.ascontiguousarray(np.transpose(permuted, np.argsort(axes)))

    def _axes(self, ndim: int) -> tuple[int, ...]:
        return _PERMUTATIONS[self.kind] or tuple(range(ndim))


def linear(
    name: str,
    path: tuple[str, ...],
    index: int | None = None,
    torch_shape: tuple[int, ...] | None = None,
) -> list[Entry]:
    """The entries of a linear layer; `torch_shape` of its weight, where `Entry` needs it."""
    bias_shape = torch_shape and torch_shape[:1]
    return [
        Entry(f"{name}.weight", (*path, "kernel"), "linear", index, torch_shape),
        Entry(f"{name}.bias", (*path, "bias"), index=index, torch_shape=bias_shape),
    ]


def norm(name: str, path: tuple[str, ...], index: int | None = None) -> list[Entry]:
    """The entries of a normalisation."""
    return [
        Entry(f"{name}.weight", (*path, "scale"), index=index),
        Entry(f"{name}.bias", (*path, "bias"), index=index),
    ]


def problems(
    entries: Iterable[Entry], state_dict: Mapping[str, Any], target: Mapping[str, Any]
) -> list[str]:
    """Names every tensor of a state dict that is missing, unexpected or misshapen.

    The arguments are those of `from_torch`; of the arrays only the shapes are looked at.
    """
    leaves: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(dict(target))
    expected = {e.torch_name: e.expected_shape(tuple(leaves[e.path].shape)) for e in entries}
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
      state_dict: PyTorch names to numpy arrays; must hold exactly the table's names.
      target: our parameter tree (unboxed) as arrays or `jax.ShapeDtypeStruct`s: shapes, dtypes.

    Returns:
      Nested dict of numpy arrays with the shapes and dtypes of `target`.

    Raises:
      UserError: naming every missing, unexpected and misshapen tensor at once.
    """
    entries = list(entries)
    if found := problems(entries, state_dict, target):
        raise UserError("; ".join(found))
    leaves: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(dict(target))
    params = {path: np.empty(leaf.shape, leaf.dtype) for path, leaf in leaves.items()}
    for entry, part in _parts(entries, params):
        part[...] = entry.to_ours(
            np.asarray(state_dict[entry.torch_name]), params[entry.path].shape
        )
    return traverse_util.unflatten_dict(params)


def to_torch(entries: Iterable[Entry], params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Inverse of `from_torch`: our parameter tree (unboxed) -> state dict, in table order."""
    leaves = {k: np.asarray(v) for k, v in traverse_util.flatten_dict(dict(params)).items()}
    return {
        entry.torch_name: entry.to_theirs(part, leaves[entry.path].shape)
        for entry, part in _parts(list(entries), leaves)
    }


def size(state_dict: Mapping[str, Any], *places: tuple[str, int]) -> int | None:
    """A size that several tensors share, by their majority; None if all of them are missing.

    Args:
      state_dict: anything with shapes, by name.
      *places: where to read it, a tensor's name and axis.
    """
    votes = [
        state_dict[name].shape[axis]
        for name, axis in places
        if name in state_dict and axis < len(state_dict[name].shape)
    ]
    return collections.Counter(votes).most_common(1)[0][0] if votes else None


def _parts(
    entries: list[Entry], leaves: Mapping[tuple[str, ...], np.ndarray]
) -> list[tuple[Entry, np.ndarray]]:
    """Pairs every entry with the view it addresses; the table must cover every number once."""
    parts = []
    left = {path: leaf.size for path, leaf in leaves.items()}
    for entry in entries:
        leaf = leaves[entry.path]
        part = leaf[...] if entry.index is None else leaf[entry.index, ...]
        parts.append((entry, part))
        left[entry.path] -= part.size
    twice = len(entries) - len({(entry.path, entry.index) for entry in entries})
    if twice or any(left.values()):
        uneven = {path: count for path, count in left.items() if count}
        raise ValueError(f"name table: {twice} places named twice, numbers not covered: {uneven}")
    return parts
