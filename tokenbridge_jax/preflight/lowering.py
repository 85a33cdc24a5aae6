"""Compiles a config's training step or sampler for a slice, and counts its memory and FLOPs.

The training step has a program for every bucket of hidden positions (`training/masking.py`). Only
the program that needs the most memory is compiled: if it fits, all of them fit. Its time is scaled
to the mean of all programs by the FLOPs of their products.
"""

import dataclasses
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import jaxprs_in_params
from jax.sharding import Mesh
from ml_collections import ConfigDict

from tokenbridge_jax.benchmark.inputs import make_model
from tokenbridge_jax.benchmark.training_speed import Trainer
from tokenbridge_jax.config import check_batches, check_training, filled, sampling_settings
from tokenbridge_jax.flops import sampling_flops
from tokenbridge_jax.loss import MaskDraw
from tokenbridge_jax.model import abstract_params
from tokenbridge_jax.preflight.hlo import Program, read_program
from tokenbridge_jax.runtime import meshes
from tokenbridge_jax.runtime.compiled import program_bytes, wanted_bytes
from tokenbridge_jax.sampling.sampler import Request, generate
from tokenbridge_jax.training.model_task import largest_draw, training_flops


@dataclasses.dataclass(frozen=True)
class Work:
    """A traced program, and what is known about it before it is compiled.

    Attributes:
      traced: the program.
      batch: images of one run, over all devices.
      state: name of an input -> its bytes on a device.
      model_flops: FLOPs of the mathematics over all devices, without padding and recomputation.
      mean: time of the mean program divided by the time of this one.
      about: description of the program.
    """

    traced: jax.stages.Traced
    batch: int
    state: dict[str, int]
    model_flops: int | float
    mean: int | float
    about: str


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The result of compiling a program.

    Attributes:
      needed: bytes that the program needs at once on a device.
      code: bytes of the program itself; 0 if it does not fit.
      flops: FLOPs of the products of a device, with padding and recomputation.
      program: its instructions; None if it does not fit into the memory of a device.
      text: the compiled program; empty if it does not fit.
      seconds: time of compiling.
    """

    needed: int
    code: int
    flops: int
    program: Program | None
    text: str
    seconds: float


def training_work(config: ConfigDict, mesh: Mesh) -> Work:
    """Traces the training step of a config.

    Raises:
      UserError: a value makes no sense, or the batch does not divide over the mesh.
    """
    config = filled(config)
    section = config.training
    check_training(config, "training", mesh)
    trainer = Trainer(config, mesh)
    model, masks, batch = trainer.model, trainer.masks, section.batch_size
    chances = masks.probabilities()
    micro_batch, shards = batch // section.accumulation, meshes.batch_shards(mesh)

    def padded_flops(draw: MaskDraw) -> int | float:
        slots = draw.share(section.head_fraction).hidden_slots
        return model.forward_flops(model.positions - draw.visible_slots, slots)

    chosen = largest_draw(model, masks, section.head_fraction, micro_batch, shards)
    mean = sum(chance * padded_flops(masks.slots(n)) for n, chance in chances.items())
    state, images = trainer.abstract, batch * model.positions * model.channels
    return Work(
        trainer.trace(batch, chosen),
        batch,
        {
            "parameters": _bytes_on_device(state.params),
            "EMA": _bytes_on_device(state.ema_params),
            "optimizer": _bytes_on_device(state.opt_state),
            "batch": images * model.quantizer.index_dtype.itemsize // shards,
        },
        batch * training_flops(model, masks, section.head_fraction),
        mean / padded_flops(chosen),
        f"{chosen.hidden_slots} of {model.positions} positions hidden, the training step that needs"
        " the most memory; its time is scaled to the mean of all by their products",
    )


def sampling_work(config: ConfigDict, mesh: Mesh) -> Work:
    """Traces the sampler with the settings of `config.sampling`, without decoding.

    Raises:
      UserError: a value makes no sense, or the batch does not divide over the mesh.
    """
    model, batch = make_model(config), config.sampling.batch_size
    settings = sampling_settings(config.sampling)
    check_batches([batch], mesh, given="sampling.batch_size ")
    params = abstract_params(model, mesh)

    @jax.jit
    def sample(params: Any, labels: jax.Array, sample_indices: jax.Array) -> jax.Array:
        return generate(model, params, Request(labels, sample_indices), settings)

    numbers = jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=meshes.batch_sharding(mesh))
    with meshes.use_mesh(mesh):
        traced = sample.trace(params, numbers, numbers)
    return Work(
        traced,
        batch,
        {"parameters": _bytes_on_device(params)},
        batch * sampling_flops(model, settings),
        1.0,
        f"{settings.num_iter} steps, guidance {settings.guidance}; indices, without decoding them",
    )


def compile_work(work: Work, devices: int) -> Compiled:
    """Compiles a program for the devices of its shardings.

    Raises:
      jax.errors.JaxRuntimeError: it cannot be compiled, for a reason other than memory.
    """
    start = time.monotonic()
    flops = matmul_flops(work.traced.jaxpr.jaxpr) // devices
    try:
        compiled = work.traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if (wanted := wanted_bytes(error)) is None:
            raise
        return Compiled(wanted, 0, flops, None, "", time.monotonic() - start)
    needed, code = program_bytes(compiled)
    text = compiled.as_text()
    return Compiled(needed, code, flops, read_program(text), text, time.monotonic() - start)


def matmul_flops(jaxpr: Any) -> int:
    """FLOPs of the products in a traced program, on all devices; a sum of n products has 2n."""
    total = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            terms = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * equation.outvars[0].aval.size * terms
        inner = list(jaxprs_in_params(params))
        if params.get("branches_platforms"):
            inner = inner[-1:]  # The default branch; all branches do the same products.
        runs = params["length"] if name == "scan" else 1
        if name == "shard_map":  # The shapes inside are those of one device.
            runs = math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
        total += runs * sum(map(matmul_flops, inner))
    return total


def _bytes_on_device(tree: Any) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
