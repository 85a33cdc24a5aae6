"""The host alone: pictures from disk, decoded and cropped, without a device."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from tokenbridge_jax.benchmark.measure import Call, Case, Line
from tokenbridge_jax.data.batches import ShardPlan, prepared_batches
from tokenbridge_jax.data.sources import make_source

# Batches of each worker in a call.
BATCHES_PER_CALL = 4
# The pictures are repeated up to this number, more than are read while a case is timed.
_PICTURES = 2_000_000


def cases(config: ConfigDict, batches: Sequence[int], workers: Sequence[int]) -> list[Case]:
    """Cases that prepare the pictures of `config.data`, as `tokenize` does.

    Args:
      config: the experiment; `data` says which pictures, and their size.
      batches: batch sizes of this process.
      workers: numbers of processes; 1 is a thread of this process.

    Raises:
      UserError: there are no pictures.
    """
    source = make_source(config.data)
    size, channels = config.data.image_size, config.data.image_channels
    plan = ShardPlan(Path(), "", source, np.resize(np.arange(len(source)), _PICTURES))

    def case(batch: int, count: int) -> Case:
        taken = BATCHES_PER_CALL * count

        def prepare(stack: contextlib.ExitStack) -> Call:
            prepared = prepared_batches([plan], batch, size, channels, workers=count)
            stack.callback(prepared.close)

            def call() -> None:
                for _ in range(taken):
                    next(prepared)

            return call

        return Case(
            name=f"images_batch{batch}_workers{count}",
            settings={
                "batch": batch,
                "workers": count,
                "batches_per_call": taken,
                "images": len(source),
                "image_size": size,
            },
            prepare=prepare,
            work={"images": taken * batch},
        )

    return [case(batch, count) for batch in batches for count in workers]


def efficiencies(lines: Sequence[Line]) -> Line:
    """Images a second of each worker, relative to the case of this batch with the fewest."""
    found = [line for line in lines if "error" not in line]
    rates = {
        (line["settings"]["batch"], line["settings"]["workers"]): line["images_per_second"]
        for line in found
    }
    fewest = {batch: min(count for other, count in rates if other == batch) for batch, _ in rates}
    return {
        "what": "images",
        "parallel_efficiency": [
            {
                "batch": batch,
                "workers": count,
                "efficiency": rate / count / (rates[batch, fewest[batch]] / fewest[batch]),
            }
            for (batch, count), rate in rates.items()
        ],
    }
