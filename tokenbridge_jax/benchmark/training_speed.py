"""Cases of the training step: loss and gradients with dropout, clipping, AdamW and EMA.

The number of hidden positions decides which program a step runs (see `training/masking.py`). Each
program is a case. The default case is the program for the expected number. With the cases of all
programs, `expectations` computes the average step of training.
"""

import contextlib
import itertools
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from tokenbridge_jax.benchmark import inputs
from tokenbridge_jax.benchmark.measure import Call, Case, Line
from tokenbridge_jax.config import (
    check_batches,
    check_ranges,
    filled,
    mask_sampler,
    model_task,
    recipe,
)
from tokenbridge_jax.loss import MaskDraw
from tokenbridge_jax.runtime import meshes
from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.training.masking import MaskSampler
from tokenbridge_jax.training.model_task import abstract_batch
from tokenbridge_jax.training.program import Program
from tokenbridge_jax.training.state import create_state


class Trainer:
    """The training step of a config, and its state, which every step replaces."""

    def __init__(self, config: ConfigDict, mesh: Mesh):
        check_ranges(config, "training")
        self.model = inputs.make_model(config)
        self.masks = mask_sampler(config, self.model.positions)
        task = model_task(config, self.model)
        # The length of an epoch affects only the learning rate.
        how = recipe(config, "training", 1000 * config.training.batch_size)
        self._program = Program.make(task, how, config.seed, mesh)
        self.abstract = self._program.abstract
        self._init = inputs.random_init(task.init)
        self._state: Any = None

    def prepare(self, stack: contextlib.ExitStack) -> None:
        """Makes the state, unless an earlier case has made it."""
        stack.push(self._on_exit)
        if self._state is None:
            self._state = create_state(self._init, self._program.optimizer, self.abstract, seed=0)

    def trace(self, batch: int, draw: MaskDraw) -> jax.stages.Traced:
        """Traces the step for a batch over all devices of the mesh, which need not exist."""
        return self._program.trace(abstract_batch(self.model, batch, self._program.mesh), draw)

    def _on_exit(self, error: Any, *_: Any) -> None:
        """Drops the state after an error, because a step that fails destroys it."""
        if error is not None:
            self._state = None

    def step(self, batch: Any, draw: MaskDraw) -> Any:
        """Starts one update; returns its metrics, which are ready when the update has ended."""
        self._state, metrics = self._program.run(self._state, batch, draw)
        return metrics


def cases(
    config: ConfigDict,
    mesh: Mesh,
    batches: Sequence[int],
    *,
    hidden: int | None = None,
    all_buckets: bool = False,
) -> list[Case]:
    """Makes a case for every batch size and program.

    Args:
      config: the experiment.
      mesh: the devices.
      batches: batch sizes, each over all devices.
      hidden: number of hidden positions; by default the expected number, rounded.
      all_buckets: make a case for every program instead.

    Raises:
      UserError: a batch does not divide over the mesh, or training never hides this many positions.
    """
    config = filled(config)
    check_batches(batches, mesh, config.training.accumulation)
    trainer = Trainer(config, mesh)
    chances = trainer.masks.probabilities()
    if all_buckets:
        chosen = _buckets(trainer.masks)
    else:
        expected = sum(number * chance for number, chance in chances.items())
        chosen = [{round(expected) if hidden is None else hidden: 1.0}]
    for number in chosen[0]:
        if number not in chances:
            raise UserError(
                f"--hidden={number} never occurs; a batch hides {min(chances)} to {max(chances)} "
                "positions"
            )
    return [_case(config, mesh, trainer, batch, bucket) for batch in batches for bucket in chosen]


def _buckets(masks: MaskSampler) -> list[dict[int, float]]:
    """Groups numbers of hidden positions that share a program, with their probabilities."""
    buckets: dict[tuple[int, int], dict[int, float]] = defaultdict(dict)
    for number, chance in masks.probabilities().items():
        draw = masks.slots(number)
        buckets[draw.hidden_slots, draw.visible_slots][number] = chance
    return list(buckets.values())


def _case(
    config: ConfigDict, mesh: Mesh, trainer: Trainer, batch: int, bucket: dict[int, float]
) -> Case:
    """The step for the mean number of a bucket; its FLOPs are the mean over the bucket."""
    total = sum(bucket.values())
    hidden = round(sum(number * chance for number, chance in bucket.items()) / total)
    draw = trainer.masks.slots(hidden)
    fraction = config.training.head_fraction
    forward = sum(
        chance * trainer.model.forward_flops(number, fraction * number)
        for number, chance in bucket.items()
    )

    def prepare(stack: contextlib.ExitStack) -> Call:
        stack.enter_context(meshes.use_mesh(mesh))
        trainer.prepare(stack)
        images = inputs.random_batch(trainer.model, batch, mesh)
        return lambda: trainer.step(images, draw)

    return Case(
        name=f"train_batch{batch}_hidden{hidden}",
        settings={
            **inputs.describe_model(config),
            "batch": batch,
            "accumulation": config.training.accumulation,
            "head_fraction": fraction,
            "mesh": dict(mesh.shape),
            "hidden": hidden,
            "hidden_slots": draw.hidden_slots,
            "visible_slots": draw.visible_slots,
            "probability": total,
        },
        prepare=prepare,
        work={"images": batch},
        flops=3 * batch * forward / total,
        devices=mesh.size,
        overlapped=True,
    )


def expectations(lines: Sequence[Line]) -> list[Line]:
    """One line for each batch size: the mean of its programs, weighted by their probabilities."""
    groups = itertools.groupby(lines, key=lambda line: line["settings"]["batch"])
    return [_expectation(list(group)) for _, group in groups]


def _expectation(lines: list[Line]) -> Line:
    one_program = ("hidden", "hidden_slots", "visible_slots", "probability", "calls_per_timing")
    settings = {k: v for k, v in lines[0]["settings"].items() if k not in one_program}
    line: Line = {"what": "train", "settings": settings | {"hidden": "as drawn in training"}}
    if any("error" in other for other in lines):
        return line | {"error": "not every program could be measured"}

    chances = np.array([other["settings"]["probability"] for other in lines])
    flops = np.array([other["flops_by_hand"] for other in lines])
    seconds = {
        name: float(chances @ [other["seconds"][name] for other in lines])
        for name in ("median", "min", "max")
    }
    # The FLOP/s that share_of_peak refers to; they are the same for all programs.
    peak = flops[0] / lines[0]["seconds"]["median"] / lines[0]["share_of_peak"]
    return line | {
        "seconds": seconds | {"repeats": lines[0]["seconds"]["repeats"]},
        "images_per_second": settings["batch"] / seconds["median"],
        "flops_by_hand": float(chances @ flops),
        "share_of_peak": float(chances @ flops / seconds["median"] / peak),
        "programs": [
            {
                name: other["settings"][name]
                for name in ("hidden_slots", "visible_slots", "probability")
            }
            | {name: other[name] for name in ("seconds", "compile_seconds")}
            for other in lines
        ],
    }
