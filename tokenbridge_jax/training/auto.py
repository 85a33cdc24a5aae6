"""`auto`: picks the settings that change only memory and speed, for the devices at hand.

`needed_bytes` estimates the memory of a training step, `overhead` the time that settings add to it.
`choices` lists the settings worth trying, and `pick` compiles them in this order until one fits.

The bytes below are fitted to compiled steps in bfloat16: those of TPUs to the table of
`launch/README.md` (layers scanned) and to size L on one v5e chip, those of GPUs to three figures of
`docs/performance.md` (layers unrolled). Since then kernels save memory on TPUs: the estimates are 1
to 12 % above what the compiler needs, and up to 23 % where the whole head is one chunk (compare
`launch/README.md`).
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from etils import epath

from tokenbridge_jax.loss import head_chunks
from tokenbridge_jax.model import abstract_params
from tokenbridge_jax.model_config import TokenBridgeConfig
from tokenbridge_jax.runtime import processes, storage
from tokenbridge_jax.runtime.compiled import Trial
from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.runtime.hardware import Devices
from tokenbridge_jax.runtime.progress import say
from tokenbridge_jax.training.masking import MaskSampler

FILE = "auto.json"
GIB = 2**30

HEAD_CHUNKS = (4096, 2048, 1024, 512, 256)
MAX_FSDP = 64

# Deeper backbones are scanned on TPUs, where unrolled layers take very long to compile.
MAX_UNROLLED = 8

# Bytes of a device that stay free, for sample grids, batches and what a program does not count.
HEADROOM = GIB // 2

# `train` believes an estimate of less than this share of the memory. The compiler never wanted more
# than 1.1 times an estimate.
TRUST = 0.5

# The factor by which all estimates are raised if a program does not fit and the compiler does not
# say by how much.
UNKNOWN = 1.25

# Bytes that the backward pass keeps of a token, in units of its layer's width; and of the channels
# of a position in the head's layers and logits, likewise.
_BACKBONE = {
    "tpu": {"none": 57.0, "dots": 20.5, "full": 2.7},
    "gpu": {"none": 34.0, "dots": 20.5, "full": 2.7},
}
_HEAD = {"tpu": 70.5, "gpu": 56.0}
_LOGIT = 12
_FIXED = 0.35 * GIB

# The share of a step that rematerialisation adds. Where layers are unrolled, its barriers break
# fusions, too.
_REMAT = {True: {"none": 0, "dots": 0.05, "full": 0.10}, False: {"none": 0, "dots": 0.5, "full": 1}}


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings that `auto` picks; they stand in a config under `KEYS`."""

    fsdp: int = 1
    remat: str = "none"
    head_chunk: int = 4096
    accumulation: int = 1
    scan_layers: bool = False

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(self).items())


KEYS = {
    "fsdp": "mesh.fsdp",
    "remat": "model.remat",
    "head_chunk": "model.head_chunk",
    "accumulation": "training.accumulation",
    "scan_layers": "model.scan_layers",
}


@dataclasses.dataclass(frozen=True)
class Step:
    """A training step: `batch` images over all devices, in a mesh with this axis `tensor`.

    The model's own remat, head_chunk and scan_layers do not matter.
    """

    model: TokenBridgeConfig
    masks: MaskSampler
    head_fraction: float
    batch: int
    tensor: int = 1

    def chunk(self, settings: Settings, shards: int) -> int:
        """Positions of a device that go through the head at once."""
        micro = self.batch // settings.accumulation
        slots = max(1, round(self.head_fraction * self.model.positions))
        return head_chunks(settings.head_chunk, slots, micro, shards)[1] * micro // shards


def needed_bytes(
    step: Step, settings: Settings, devices: Devices, parameters: int, of_head: int
) -> float:
    """Estimates the bytes that a training step needs, from the numbers of parameters."""
    model, kind = step.model, "tpu" if devices.platform == "tpu" else "gpu"
    shards = devices.number // step.tensor
    images = step.batch // settings.accumulation / shards
    # float32: parameters, their average, two moments, gradients; of their sum a half is seen.
    copies = 5.5 if settings.accumulation > 1 else 5
    state = 4 * parameters * copies / (settings.fsdp * step.tensor)
    if step.tensor == 1:  # Each device has the whole head and its gradients; see `loss.py`.
        state += 8 * of_head * (1 - 1 / settings.fsdp)
    decoded = model.buffer + model.positions
    encoded = decoded - step.masks.fewest_hidden
    backbone = encoded * model.encoder_width * model.encoder_layers
    backbone += decoded * model.decoder_width * model.decoder_layers
    head = model.head_activations
    activations = images * backbone * _BACKBONE[kind][settings.remat]
    of_position = _HEAD[kind] * head.hidden + _LOGIT * head.outputs
    activations += step.chunk(settings, shards) * of_position
    return state + activations * (1 if model.dtype == "bfloat16" else 2) + _FIXED


def overhead(step: Step, settings: Settings, devices: Devices) -> float:
    """Estimates the time that settings add to a step, as a share of it; it only orders them.

    A chunk of the head adds its gradients to a sum, which takes as long as 30 positions. A
    micro-batch does this with all gradients: as long as half an image, and longer where several
    devices reduce them, or gather parameters.
    """
    shards = devices.number // step.tensor
    images = step.batch / settings.accumulation / shards
    joint = 1.5 * (shards > 1) + 0.2 * math.log2(settings.fsdp)
    chunks = 30 / step.chunk(settings, shards)
    # Without a second part of the axis `data`, TPUs were seen to pass parameters from chip to chip.
    passing = float(settings.fsdp == shards > 1)
    remat = _REMAT[settings.scan_layers][settings.remat]
    return remat + chunks + (0.5 + joint) / images + passing


class DoesNotFit(UserError):
    """No settings make a training step fit."""


class Choice(NamedTuple):
    """Settings, the bytes they need on a device, and their overhead."""

    settings: Settings
    bytes: float
    overhead: float


def choices(step: Step, devices: Devices, given: Mapping[str, Any]) -> list[Choice]:
    """Lists settings, the fastest first; each needs less memory than all before it.

    `given` holds the fields of `Settings` that the config fixes.
    """
    model, shards = step.model, devices.number // step.tensor
    inside, rows = shards // devices.slices, step.batch // shards
    deep = model.encoder_layers + model.decoder_layers > MAX_UNROLLED
    free: dict[str, Sequence[Any]] = {
        "fsdp": [size for size in _divisors(inside) if size <= MAX_FSDP],
        "remat": ("none", "dots", "full"),
        "head_chunk": HEAD_CHUNKS,
        "accumulation": _divisors(rows),
        "scan_layers": [deep and devices.platform == "tpu"],
    }
    options = free | {name: [value] for name, value in given.items()}
    tree = abstract_params(model)
    counts = [sum(leaf.size for leaf in jax.tree.leaves(part)) for part in (tree, tree["head"])]
    listed = [
        Choice(s, needed_bytes(step, s, devices, *counts), overhead(step, s, devices))
        for s in itertools.starmap(Settings, itertools.product(*(options[name] for name in KEYS)))
    ]
    # `sorted` keeps the order of equals, so that a larger head_chunk comes first.
    frontier: list[Choice] = []
    for choice in sorted(listed, key=lambda choice: (choice.overhead, choice.bytes)):
        if not frontier or choice.bytes < frontier[-1].bytes:
            frontier.append(choice)
    return frontier


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0] or [1]


def pick(
    listed: Sequence[Choice],
    devices: Devices,
    attempt: Callable[[Settings], Trial],
    trust: float = 0,
) -> Settings:
    """Returns the first choice that fits. `attempt` compiles its step.

    The first choice is not tried if its estimate is below the share `trust` of the memory. A choice
    that cannot fit by its estimate is not tried either. After a failure the estimates of the rest
    are scaled by what the compiler wanted, or by a guess if it does not say.

    Raises:
      DoesNotFit: none fits.
    """
    assert devices.memory is not None
    memory, scale = devices.memory - HEADROOM, 1.0
    first = listed[0]
    if first.bytes < trust * memory:
        say(
            f"auto: {devices}: {first.settings}: {first.bytes / GIB:.1f} GiB estimated, "
            f"{memory / GIB:.1f} available: picked without trying"
        )
        return first.settings
    for choice in listed:
        if choice.bytes * scale > memory and choice is not listed[-1]:
            continue
        compiled, needed = attempt(choice.settings)
        # The last resort may take all of the memory.
        limit = devices.memory if choice is listed[-1] else memory
        fits = compiled and (needed is None or needed <= limit)
        wants = "compiled" if compiled else "not compiled"
        if needed is not None:
            wants = f"{needed / GIB:.1f} GiB {wants}"
        say(
            f"auto: {devices}: {choice.settings}: {choice.bytes * scale / GIB:.1f} GiB estimated, "
            f"{wants}, {limit / GIB:.1f} available: {'picked' if fits else 'does not fit'}"
        )
        if fits:
            return choice.settings
        scale = scale * UNKNOWN if needed is None else max(scale, needed / choice.bytes)
    raise DoesNotFit(
        f"no settings of {', '.join(KEYS.values())} make a training step fit {devices}; use more "
        "devices, a smaller batch or a smaller model"
    )


def recall(
    workdir: epath.Path, devices: Devices, question: Mapping[str, Any], find: Callable[[], Settings]
) -> Settings:
    """Returns what was picked in this workdir for such devices, or picks and remembers it.

    All processes must call this, and get what process 0 has.

    Args:
      workdir: the folder of the run; its file `FILE` has the last pick for each kind and number.
      devices: the devices.
      question: what else the pick depends on, JSON values; if they change, it is made anew.
      find: picks; every process calls it, or none.
    """
    path, first = workdir / FILE, jax.process_index() == 0
    question = {**question, "slices": devices.slices}
    known = storage.read_json(path) if first and storage.exists(path) else {}
    known = known if isinstance(known, dict) else {}
    entry = known.get(str(devices))
    entry = entry if isinstance(entry, dict) else {}
    found = entry.get("picked") if entry.get("question") == question else None
    # A file of another version, or one that somebody changed, may have other fields.
    if not isinstance(found, dict) or found.keys() != KEYS.keys():
        found = None
    found = json.loads(processes.gather(json.dumps(found))[0])
    if found:
        say(f"auto: {devices}: {Settings(**found)} ({path})")
        return Settings(**found)
    picked = find()
    if first:
        entry = {"picked": dataclasses.asdict(picked), "question": question}
        storage.write_json(path, known | {str(devices): entry})
    return picked
