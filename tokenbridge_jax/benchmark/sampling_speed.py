"""Cases that sample whole images, and cases of the channel head alone."""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from tokenbridge_jax.benchmark import inputs
from tokenbridge_jax.benchmark.measure import Call, Case
from tokenbridge_jax.config import check_batches, sampling_settings
from tokenbridge_jax.flops import head_flops, sampling_flops
from tokenbridge_jax.heads.head import Guidance
from tokenbridge_jax.model import TokenBridge, prepare_params
from tokenbridge_jax.runtime import meshes
from tokenbridge_jax.sampling.sampler import Request, SamplingSettings, generate


def sample_cases(
    config: ConfigDict,
    mesh: Mesh,
    batches: Sequence[int],
    steps: Sequence[int],
    guidance: float | None = None,
) -> list[Case]:
    """Cases of `generate`, for every batch size and number of reveal steps, without decoding.

    Args:
      config: the experiment; its section `sampling` has the other settings.
      mesh: the devices.
      batches: batch sizes, each over all devices.
      steps: numbers of reveal steps.
      guidance: scale; by default that of the config.

    Raises:
      UserError: a batch does not divide over the mesh, or a setting makes no sense.
    """
    check_batches(batches, mesh)
    model = inputs.make_model(config)
    changes = {} if guidance is None else {"guidance": guidance}
    make_params = functools.cache(lambda: inputs.random_params(model, mesh))

    def case(batch: int, settings: SamplingSettings) -> Case:
        def prepare(stack: contextlib.ExitStack) -> Call:
            stack.enter_context(meshes.use_mesh(mesh))
            params = make_params()
            labels = inputs.random_batch(model, batch, mesh)["labels"]
            sample_indices = jax.device_put(np.arange(batch, dtype=np.int32), labels.sharding)
            request = Request(labels, sample_indices)
            return lambda: generate(model, params, request, settings)

        return Case(
            name=f"sample_batch{batch}_steps{settings.num_iter}",
            settings={
                **inputs.describe_model(config),
                "batch": batch,
                "mesh": dict(mesh.shape),
                **dataclasses.asdict(settings),
            },
            prepare=prepare,
            work={"images": batch},
            flops=batch * sampling_flops(model, settings),
            devices=mesh.size,
        )

    chosen = [sampling_settings(config.sampling, num_iter=n, **changes) for n in steps]
    return [case(batch, settings) for batch, settings in itertools.product(batches, chosen)]


def head_cases(config: ConfigDict, positions: Sequence[int], guidance: float = 1.0) -> list[Case]:
    """Cases in which the head draws all channels of some positions, on one device.

    Args:
      config: the experiment.
      positions: numbers of positions.
      guidance: scale; 1 is none, and then the head gets one feature a position, not two.

    Raises:
      UserError: guidance is not finite.
    """
    sampling_settings(config.sampling, guidance=guidance)  # Checks it.
    model = inputs.make_model(config)
    mesh = meshes.make_mesh(devices=jax.local_devices()[:1])
    module = TokenBridge(model, sampling=True)
    branches = 1 if guidance == 1 else 2

    @functools.cache
    def make_params():
        prepare = jax.jit(functools.partial(prepare_params, config=model))
        return prepare(inputs.random_params(model, mesh))

    @jax.jit
    def draw(params, feature, null, keys):
        mixed = None if null is None else Guidance(null, jnp.float32(guidance))
        values, _ = module.apply(
            {"params": params},
            feature,
            keys,
            jnp.float32(1),
            mixed,
            method=TokenBridge.sample_positions,
        )
        return values

    def case(count: int) -> Case:
        def prepare(stack: contextlib.ExitStack) -> Call:
            stack.enter_context(meshes.use_mesh(mesh))
            params = make_params()
            key, null_key, keys_key = jax.random.split(jax.random.key(1), 3)
            shape = count, 1, model.decoder_width
            feature = jax.random.normal(key, shape)
            null = jax.random.normal(null_key, shape) if branches == 2 else None
            keys = jax.random.split(keys_key, (count, 1))
            return lambda: draw(params, feature, null, keys)

        return Case(
            name=f"head_positions{count}",
            settings={
                **inputs.describe_model(config),
                "positions": count,
                "guidance": guidance,
            },
            prepare=prepare,
            work={"positions": count},
            flops=count * head_flops(model, branches),
        )

    return [case(count) for count in positions]
