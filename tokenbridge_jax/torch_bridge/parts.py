"""Finds a network's tensors in a file, wherever they lie in it.

Training scripts keep state dicts in dicts (`model`, `state_dict`, `ema`), beside an optimizer's,
and networks within others (`first_stage_model.` of LDM). Both only put something before a tensor's
name. What PyTorch wraps modules in (DDP, FSDP, torch.compile) puts a word into it.
"""

import collections
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from tokenbridge_jax.runtime.errors import UserError

# Modules around a module, which has its name after theirs.
_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module"
    r"|_forward_module)(?:\.|$)"
)
# How many updates PyTorch's AveragedModel has had.
_COUNTER = "n_averaged"
# Words of the prefix of averaged parameters.
_AVERAGED = {"ema", "average", "averaged", "avg"}


class Network(NamedTuple):
    """What a network is known by.

    Attributes:
      marks: names that any such network has; a few may be missing.
      extras: what else may lie among its tensors, and is left out: words that names begin with.
    """

    marks: tuple[str, ...]
    extras: tuple[str, ...] = ()


class Found(NamedTuple):
    """What `find` found.

    Attributes:
      parts: "model", and "model_ema" if both are there: tensors by their names within the network,
        with whatever else lies among them. All tensors, where the network is nowhere.
      places: what stood before the names of each part.
      notes: lines that say what was taken and what was left, where that is not plain.
    """

    parts: dict[str, dict[str, Any]]
    places: tuple[str, ...]
    notes: tuple[str, ...]


def find(tensors: Mapping[str, Any], network: Network, prefixes: Collection[str] = ()) -> Found:
    """The tensors of a network, and of its average if there is one.

    Args:
      tensors: all that a file holds, by name; of nested dicts, keys are joined by dots.
      network: to look for.
      prefixes: where to look, of several places; those not in the file are ignored.

    Raises:
      UserError: the network is there several times, or a name is.
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
    parts: dict[str, dict[str, Any]] = {}
    for part, place in taken.items():
        parts[part] = {}
        for name, tensor in owned.pop(place).items():
            word = name.split(".")[0]
            if word in network.extras:
                left[_join(place, word)] += 1
            else:
                parts[part][name] = tensor
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
    """A name or prefix without the words of wrappers and dots at its end."""
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
    """What stands before the names of a network, once for every copy; "" where nothing does."""
    places: dict[str, None] = {}
    for name in tensors:
        for mark in marks:
            if name == mark or name.endswith(f".{mark}"):
                places[name.removesuffix(mark).rstrip(".")] = None
    return list(places)


def _split(
    tensors: Mapping[str, Any], places: Sequence[str]
) -> tuple[dict[str, dict[str, Any]], collections.Counter[str]]:
    """Tensors by place, under their names there, and how many begin with what other words."""
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
    if len(plain) > 1 and len(averages) == 1:
        choices = [[place, averages[0]] for place in plain]
    elif plain and len(averages) > 1:
        choices = [[place, average] for place in plain for average in averages]
    else:
        choices = [[place] for place in (*plain, *averages)]
    flags = " or ".join("--prefix=" + ",".join(place or "." for place in c) for c in choices)
    places = ", ".join(map(_shown, (*plain, *averages)))
    return f"it holds the network several times ({places}); say which: {flags}"


def _join(place: str, name: str) -> str:
    return f"{place}.{name}" if place else name


def _shown(place: str) -> str:
    return f"{place}.*" if place else "the names without a prefix"
