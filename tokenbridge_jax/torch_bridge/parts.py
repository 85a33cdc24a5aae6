"""Finds a network's tensors in a file, under any prefix.

Training scripts save state dicts in dicts (`model`, `state_dict`, `ema`), beside an optimizer's
state. LDM saves networks within others (`first_stage_model.`). Both put a prefix before the names.
Wrapped modules in PyTorch (DDP, FSDP, torch.compile) have an extra word inside the names.
"""

import collections
import itertools
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from tokenbridge_jax.runtime.errors import UserError

# Names of the modules that wrap a module. They stand before its name.
_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module"
    r"|_forward_module)(?:\.|$)"
)
# The number of updates in PyTorch's AveragedModel.
_COUNTER = "n_averaged"
# Words in the prefix of averaged parameters.
_AVERAGED = {"ema", "average", "averaged", "avg"}


class Network(NamedTuple):
    """The names that identify a network in a file.

    Attributes:
      marks: names of tensors that the network has; some of them may be missing.
      extras: first words of the names of other tensors under the same prefix, which are left out.
    """

    marks: tuple[str, ...]
    extras: tuple[str, ...] = ()


class Found(NamedTuple):
    """The result of `find`.

    Attributes:
      parts: "model", and "model_ema" if both are there: all tensors under the prefix of each, by
        their names without it. If the network is not in the file, "model" is the whole file.
      places: the prefix of each part.
      notes: lines for the user about what was taken and what was left out, if this is not obvious.
    """

    parts: dict[str, dict[str, Any]]
    places: tuple[str, ...]
    notes: tuple[str, ...]


def find(tensors: Mapping[str, Any], network: Network, prefixes: Collection[str] = ()) -> Found:
    """Finds the tensors of a network, and of its average if there is one.

    Args:
      tensors: all tensors of a file by name; the keys of nested dicts are joined by dots.
      network: the network to find.
      prefixes: the prefixes to choose if the file holds several copies. Prefixes that are not in
        the file are ignored.

    Raises:
      UserError: the file holds several copies of the network, or two tensors of one name.
    """
    tensors = _unwrap_all(tensors)
    places = _places(tensors, network.marks)
    wanted = {unwrapped(prefix) for prefix in prefixes}
    chosen = [place for place in places if place in wanted] or places
    averages = [place for place in chosen if _is_average(place)]
    plain = [place for place in chosen if place not in averages]
    if len(plain) > 1 or len(averages) > 1:
        raise UserError(_which(plain, averages))
    if not chosen:
        return Found({"model": tensors}, (), ())

    owned, left = _split(tensors, places)
    taken = {"model": (plain or averages)[0]}
    if plain and averages:
        taken["model_ema"] = averages[0]
    parts = {part: owned.pop(place) for part, place in taken.items()}
    for part, place in taken.items():
        for name in list(parts[part]):
            word = name.split(".")[0]
            if word in network.extras:
                del parts[part][name]
                left[f"{place}.{word}" if place else word] += 1
    left.update({place: len(state) for place, state in owned.items()})
    notes = []
    if not plain:
        notes.append(f"took {_shown(averages[0])}, an average, as the parameters too")
    elif taken["model"] not in ("", "model"):
        notes.append(f"took {_shown(taken['model'])}")
    if left:
        listed = [f"{_shown(place)} ({count})" for place, count in left.most_common(8)]
        notes.append(f"left out {', '.join(listed + ['...'] * (len(left) > 8))}")
    return Found(parts, tuple(taken.values()), tuple(notes))


def unwrapped(name: str) -> str:
    """Returns a name or prefix without the names of wrappers, and without dots at its end."""
    return _WRAPPERS.sub("", name.rstrip(".")).rstrip(".")


def _unwrap_all(tensors: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, tensor in tensors.items():
        bare = unwrapped(name)
        if bare.rpartition(".")[2] == _COUNTER:
            continue
        if bare in found:
            raise UserError(f"it holds two tensors {bare}, one of them as {name}")
        found[bare] = tensor
    return found


def _places(tensors: Iterable[str], marks: Sequence[str]) -> list[str]:
    """Returns the prefix of every copy of a network; "" if its names have none."""
    pairs = [(name, mark) for name in tensors for mark in marks]
    places = [n.removesuffix(m).rstrip(".") for n, m in pairs if n == m or n.endswith(f".{m}")]
    return list(dict.fromkeys(places))


def _split(
    tensors: Mapping[str, Any], places: Sequence[str]
) -> tuple[dict[str, dict[str, Any]], collections.Counter[str]]:
    """Returns the tensors under every prefix, and counts the others by the first word of a name."""
    owned: dict[str, dict[str, Any]] = {place: {} for place in places}
    left: collections.Counter[str] = collections.Counter()
    longest_first = sorted(places, key=len, reverse=True)
    for name, tensor in tensors.items():
        for place in longest_first:
            if not place or name.startswith(f"{place}."):
                owned[place][name[len(place) :].lstrip(".")] = tensor
                break
        else:
            left[name.split(".")[0]] += 1
    return owned, left


def _is_average(place: str) -> bool:
    return not _AVERAGED.isdisjoint(re.split(r"[._]", place.lower()))


def _which(plain: Sequence[str], averages: Sequence[str]) -> str:
    """Returns the error message for several copies, with the --prefix that chooses each."""
    copies = [*plain, *averages]
    choices: Iterable[Sequence[str]] = [[copy] for copy in copies]
    if plain and averages:
        choices = itertools.product(plain, averages)
    flags = " or ".join("--prefix=" + ",".join(place or "." for place in c) for c in choices)
    places = ", ".join(map(_shown, copies))
    return f"it holds the network several times ({places}); say which: {flags}"


def _shown(place: str) -> str:
    return f"{place}.*" if place else "the names without a prefix"
