"""Compiles the training step or the sampler for TPUs, on a machine without one, and counts.

  python launch/compile_for_tpu.py --config=configs/imagenet256.py:size=H --topology=v5p:2x2x1
  python launch/compile_for_tpu.py --batch=64 --what=sample --config.sampling.num_iter=64

Needs `pip install 'jax[tpu]'`. Prints one JSON line: what a chip does in a step of the median mask
ratio, or for a batch of samples. Loops' bodies count as often as they run, in `compiler` once.

  matmul_flops  of the traced program's products, recomputation included
  cycles        the compiler's estimate for the instructions one after the other; collectives are 0
  compiler      its analysis: FLOPs, bytes read and written
  memory        bytes; what must fit is argument + output - alias + temp + generated_code
  collectives   of each kind how many, how often they run, the bytes they move
  error         instead of all these: why the program cannot be compiled
"""

import collections
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator
from typing import Any

# This machine only traces. Several processes may load libtpu; it is told what it would ask for.
os.environ.update(JAX_PLATFORMS="cpu", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
os.environ.update(TPU_ACCELERATOR_TYPE="v5litepod-4", TPU_WORKER_HOSTNAMES="localhost")

import jax
import jax.numpy as jnp
from absl import app, flags
from jax.experimental import topologies
from jax.extend.core import jaxprs_in_params
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags

from tokenbridge_jax import parallel
from tokenbridge_jax.benchmark.inputs import make_model
from tokenbridge_jax.errors import UserError
from tokenbridge_jax.pipeline import abstract_sharded_params
from tokenbridge_jax.sampling import SamplingSettings, generate
from tokenbridge_jax.training.masking import MaskSampler
from tokenbridge_jax.training.model_task import ModelTask
from tokenbridge_jax.training.optimizer import OptimizerConfig, make_optimizer
from tokenbridge_jax.training.state import abstract_state
from tokenbridge_jax.training.step import make_train_step

CONFIG = config_flags.DEFINE_config_file("config", "configs/imagenet256.py:size=L", "Experiment.")
TOPOLOGY = flags.DEFINE_string("topology", "v5e:2x2", "Generation and shape of the slice.")
BATCH = flags.DEFINE_integer("batch", 64, "Images at once, over all chips.")
WHAT = flags.DEFINE_enum("what", "train", ["train", "sample"], "The program.")

COLLECTIVE = re.compile(
    r"%(\S+) = (.*) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?"
    r"\(.* channel_id=(\d+)"
)


def trace_train(config: ConfigDict, batch_size: int, mesh: Mesh) -> jax.stages.Traced:
    """The training step."""
    model, section = make_model(config), config.training
    task = ModelTask(model, config.model.class_dropout, config.training.head_fraction)
    # The length of an epoch moves the schedule's constants only.
    optimizer, schedule = make_optimizer(OptimizerConfig.from_section(section, 1000, "training"))
    state = abstract_state(task.init, optimizer, mesh)
    options = {name: section[name] for name in ("ema_decay", "accumulation")}
    step: Any = make_train_step(task, optimizer, schedule, state, mesh, seed=config.seed, **options)
    sharding = parallel.batch_sharding(mesh)
    shape = (batch_size, model.positions, model.channels)
    batch = {
        "indices": jax.ShapeDtypeStruct(shape, model.quantizer.index_dtype, sharding=sharding),
        "labels": jax.ShapeDtypeStruct(shape[:1], jnp.int32, sharding=sharding),
    }
    masks = MaskSampler.from_config(config, model.positions)
    with parallel.use_mesh(mesh):
        return step.trace(state, batch, masks.slots(masks.quantiles(1)[0]))


def trace_sample(config: ConfigDict, batch_size: int, mesh: Mesh) -> jax.stages.Traced:
    """The sampler as `config.sampling` sets it."""
    model = make_model(config)
    settings = SamplingSettings(**{k: v for k, v in config.sampling.items() if k != "batch_size"})

    @jax.jit
    def sample(params: Any, labels: jax.Array, sample_indices: jax.Array) -> jax.Array:
        return generate(model, params, labels, sample_indices, settings)

    numbers = jax.ShapeDtypeStruct((batch_size,), jnp.int32, sharding=parallel.batch_sharding(mesh))
    with parallel.use_mesh(mesh):
        return sample.trace(abstract_sharded_params(model, mesh), numbers, numbers)


def matmul_flops(jaxpr: Any) -> int:
    """FLOPs of the products in a traced program, on all devices: a sum of n products is 2n."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            terms = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * equation.outvars[0].aval.size * terms
        inner = list(jaxprs_in_params(equation.params))
        if equation.params.get("branches_platforms"):
            inner = inner[-1:]  # What platforms run that have no branch of their own, like TPUs.
        runs = equation.params["length"] if equation.primitive.name == "scan" else 1
        total += runs * sum(map(matmul_flops, inner))
    return total


def instructions(hlo: str) -> Iterator[tuple[str, int, str]]:
    """The instructions of a compiled program: the line, how often it runs, the fusion it is in."""
    found = re.findall(r"^(?:ENTRY )?%(\S+) \(.*{\n((?:  .*\n)*)", hlo, re.MULTILINE)
    bodies = {name: body.splitlines() for name, body in found}

    def visit(name: str, runs: int, fusion: str) -> Iterator[tuple[str, int, str]]:
        for line in bodies[name]:
            yield line, runs, fusion
            if loop := re.search(r" while\(.* condition=%([^\s,]+), body=%([^\s,]+)", line):
                # A scan's condition compares its counter with a constant.
                bounds = re.findall(r" constant\((\d+)\)", "\n".join(bodies[loop[1]]))
                yield from visit(loop[2], runs * max(map(int, bounds), default=1), fusion)
            elif fused := re.search(r" fusion\(.* calls=%([^\s,]+)", line):
                yield from visit(fused[1], runs, fusion or fused[1])

    return visit(found[-1][0], 1, "")  # The entry comes last.


def count(hlo: str) -> dict[str, Any]:
    """The cycles and collectives of a compiled program (see the top of this file)."""
    cycles, distinct = 0, dict[str, tuple[str, int, int]]()
    for line, runs, fusion in instructions(hlo):
        if (estimate := re.search(r'"estimated_cycles":"(\d+)"', line)) and not fusion:
            cycles += runs * int(estimate[1])
        if match := COLLECTIVE.search(line):
            name, arrays, kind, start, channel = match.groups()
            dims = re.findall(r"\b(?:pred|[a-z]+(\d+))\[([\d,]*)\]", arrays)
            sizes = [math.prod(map(int, re.findall(r"\d+", n))) * int(b or 8) // 8 for b, n in dims]
            size = max(sizes) if start else sum(sizes)  # A start's result holds the operand too.
            if fusion.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"
            elif fusion:
                name = channel  # Spread over several fusions, of which the first starts it.
            distinct.setdefault(name, (kind, runs, size))
    totals: dict[str, Any] = collections.defaultdict(collections.Counter)
    for kind, runs, size in sorted(distinct.values()):
        totals[kind].update(count=1, runs=runs, bytes=runs * size)
    return {"cycles": cycles, "collectives": totals}


def describe(traced: jax.stages.Traced, chips: int) -> dict[str, Any]:
    """Compiles a program and says what it costs, or why it cannot be compiled."""
    start = time.time()
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        return {"error": str(error).splitlines()[0]}
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    parts = ("argument", "output", "alias", "temp", "generated_code")
    return {
        "compile_seconds": round(time.time() - start),
        "matmul_flops": matmul_flops(traced.jaxpr.jaxpr) // chips,
        **count(compiled.as_text()),
        "compiler": {"flops": cost["flops"], "bytes": cost["bytes accessed"]},
        "memory": {part: getattr(memory, f"{part}_size_in_bytes") for part in parts},
    }


def main(_: list[str]) -> None:
    """Prints the JSON line."""
    try:
        devices: list[Any] = topologies.get_topology_desc(TOPOLOGY.value, "tpu").devices
        mesh = parallel.make_mesh(**CONFIG.value.mesh, devices=devices)
        a_chip, rest = divmod(BATCH.value, parallel.batch_shards(mesh))
        if rest:
            raise UserError(f"--batch={BATCH.value} does not divide over the mesh {mesh.shape}")
        trace = {"train": trace_train, "sample": trace_sample}[WHAT.value]
        traced = trace(CONFIG.value, BATCH.value, mesh)
    except (UserError, RuntimeError) as error:
        sys.exit(f"error: {str(error).splitlines()[0]}")
    described = {"what": WHAT.value, "topology": TOPOLOGY.value, "device": devices[0].device_kind}
    described |= {"chips": len(devices), "batch": BATCH.value, "batch_a_chip": a_chip}
    print(json.dumps(described | describe(traced, len(devices))))


if __name__ == "__main__":
    app.run(main)
