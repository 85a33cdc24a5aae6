"""Profiles small programs for a TPU: prints their totals as JSON. One process for one topology."""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from tokenbridge_jax.ops.attention import attend
from tokenbridge_jax.ops.channel_attention import attend_channels
from tokenbridge_jax.ops.precision import convolution
from tokenbridge_jax.preflight import chips
from tokenbridge_jax.preflight.profile import read_profile


def product(x, w):
    """[2048, 1024] x [1024, 1024]."""
    return x @ w


def exact(x, kernel):
    """A convolution of 3 x 3 that must be as exact as float32: six products of bfloat16 parts."""
    return convolution(x, kernel, (1, 1), "SAME", "float32")


def double(x):
    """Reads 64 MiB and writes 64 MiB."""
    return x * 2


def cubes(x):
    """100 runs of a loop with 3 operations on every element of [512, 128]: 64 registers."""

    def body(_, x):
        return x * x * x + 1.5

    return jax.lax.fori_loop(0, 100, body, x)


def attention(qkv, bias, visible, seed):
    """Attention with dropout of 4 heads over 136 tokens of 2 images, and its gradient."""
    out, backward = jax.vjp(lambda qkv, bias: attend(qkv, bias, visible, seed, 0.1), qkv, bias)
    return backward(out)


def channels(qkv, bias, norms, seed):
    """Attention with dropout over the 16 channels of 20 positions, 8 heads of 80; its gradient."""

    def run(qkv, norms):
        return attend_channels(qkv, bias, norms, seed, 0.1, True)

    out, backward = jax.vjp(run, qkv, norms)
    return out, backward(out)


HEADS = (3, 4, 64)
PROGRAMS = {
    "channels": (
        channels,
        ((20, 16, 3, 8, 80), jnp.bfloat16),
        ((3, 8, 80), jnp.bfloat16),
        ((4, 80), jnp.float32),
        ((2,), jnp.uint32),
    ),
    "attention": (
        attention,
        ((2, 136, *HEADS), jnp.bfloat16),
        (HEADS, jnp.bfloat16),
        ((2, 136), jnp.bool_),
        ((2,), jnp.uint32),
    ),
    "product": (product, ((2048, 1024), jnp.bfloat16), ((1024, 1024), jnp.bfloat16)),
    "exact": (exact, ((1, 16, 16, 256), jnp.float32), ((3, 3, 256, 256), jnp.float32)),
    "double": (double, ((4096, 4096), jnp.float32)),
    "cubes": (cubes, ((512, 128), jnp.float32)),
}


def main(topology: str, folder: Path) -> None:
    """Compiles every program into a folder of its own."""
    where = chips.parse_slice(topology)
    jax.config.update("jax_platforms", "cpu")
    device = chips.slice_devices(where, dump=folder)[0]
    clock = where.figures.clock(chips.peak_flops(device))
    totals = {}
    for name, (function, *arguments) in PROGRAMS.items():
        sharding = SingleDeviceSharding(device)
        traced = jax.jit(function).trace(
            *(jax.ShapeDtypeStruct(*argument, sharding=sharding) for argument in arguments)
        )
        text = traced.lower().compile().as_text()
        files = [path for path in folder.iterdir() if path.is_file()]
        own = folder / name
        own.mkdir()
        for path in files:
            path.rename(own / path.name)
        operations = read_profile(text, own, where, clock)
        totals[name] = {
            "cycles": sum(one.cycles for one in operations),
            "bytes": sum(one.hbm_bytes for one in operations),
            "seconds": sum(one.seconds for one in operations),
            "bounds": sorted({one.bound for one in operations}),
            "kernels": text.count('custom_call_target="tpu_custom_call"'),
            "scores": "136,136]" in text,
        }
    print(json.dumps(totals))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
