"""The autoencoder with the quantizer (images <-> indices), and the quantizer alone."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from tokenbridge_jax.autoencoder import init_params
from tokenbridge_jax.benchmark.inputs import random_codes
from tokenbridge_jax.benchmark.measure import Call, Case
from tokenbridge_jax.codec import Codec
from tokenbridge_jax.config import autoencoder_config, check_batches
from tokenbridge_jax.data.tokenizing import make_quantizer, quantizer_of
from tokenbridge_jax.flops import decode_flops, encode_flops
from tokenbridge_jax.runtime import meshes


def autoencoder_cases(config: ConfigDict, batches: Sequence[int], precision: str) -> list[Case]:
    """Cases of `Codec`, for uint8 images and for latents, which are already on the devices.

    Args:
      config: the experiment: autoencoder, image size, quantizer.
      batches: batch sizes, each over all devices of this process.
      precision: one of `precision.PRECISIONS`.

    Raises:
      UserError: a batch does not divide over the devices, or the config makes no sense.
    """
    mesh = meshes.make_mesh(devices=jax.local_devices())
    check_batches(batches, mesh)
    autoencoder = autoencoder_config(config)
    quantizer = quantizer_of(config, autoencoder, random_codes(autoencoder))
    side, grid = autoencoder.image_size, autoencoder.grid

    def case(batch: int, direction: str, flops: int) -> Case:
        def prepare(stack: contextlib.ExitStack) -> Call:
            params = init_params(autoencoder, jax.random.key(0))
            codec = Codec(autoencoder, params, quantizer, mesh, precision)
            rng = np.random.default_rng(0)
            if direction == "encode":
                shape = (batch, side, side, autoencoder.image_channels)
                images = rng.integers(256, size=shape, dtype=np.uint8)
                on_devices = meshes.to_global(images, mesh)
                return lambda: codec.encode(on_devices)
            shape = (batch, grid, grid, autoencoder.latent_channels)
            latents = meshes.to_global(rng.standard_normal(shape, np.float32), mesh)
            return lambda: codec.decode_latents(latents)

        return Case(
            name=f"autoencoder_{direction}_batch{batch}",
            settings={
                "direction": direction,
                "batch": batch,
                "precision": precision,
                "mesh": dict(mesh.shape),
                "autoencoder": autoencoder.to_json(),
            },
            prepare=prepare,
            work={"images": batch},
            flops=batch * flops,
            devices=mesh.size,
        )

    return [
        case(batch, direction, flops)
        for batch in batches
        for direction, flops in (
            ("encode", encode_flops(autoencoder)),
            ("decode", decode_flops(autoencoder)),
        )
    ]


def quantize_cases(config: ConfigDict, values: int) -> list[Case]:
    """Cases of latents -> indices, and of indices -> latents, on one device.

    Args:
      config: the experiment.
      values: float32 latents at once.

    Raises:
      UserError: the quantizer makes no sense.
    """
    quantizer = make_quantizer(config)

    def latents() -> jax.Array:
        return quantizer.maximum / 3 * jax.random.normal(jax.random.key(0), (values,))

    def indices() -> jax.Array:
        random = jax.random.randint(jax.random.key(0), (values,), 0, quantizer.levels)
        return random.astype(quantizer.index_dtype)

    def case(name: str, function: Callable[..., Any], make: Callable[[], jax.Array]) -> Case:
        def prepare(stack: contextlib.ExitStack) -> Call:
            stack.enter_context(jax.default_device(jax.local_devices()[0]))
            jitted, x = jax.jit(function), jax.jit(make)()
            return lambda: jitted(x)

        bytes_a_value = 4 + quantizer.index_dtype.itemsize
        return Case(
            name=f"quantize_{name}",
            settings={"direction": name, "values": values, "levels": quantizer.levels},
            prepare=prepare,
            work={"values": values, "bytes": bytes_a_value * values},
        )

    return [
        case("quantize", quantizer.quantize, latents),
        case("dequantize", quantizer.dequantize, indices),
    ]
