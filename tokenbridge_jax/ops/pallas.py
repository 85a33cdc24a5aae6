"""What the kernels share, and the decision whether to use them.

Pallas compiles those for GPUs through Triton, a backend that JAX plans to remove, and those for
TPUs through Mosaic. If a backend is missing, has changed or does not support the device, plain
operations replace the kernels, and one line on stderr says so.
"""

import concurrent.futures
import functools
import importlib
import math
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, UInt32

from tokenbridge_jax.ops.precision import of_products
from tokenbridge_jax.runtime.meshes import RULES, axis_size, batch_shard, in_shard

_import_errors: dict[str, Exception] = {}


def _imported(platform: str, module: str) -> Any:
    try:
        return importlib.import_module(module)
    except Exception as error:  # A later JAX may raise anything here.
        _import_errors.setdefault(platform, error)
        return None


if TYPE_CHECKING:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pl_tpu
    from jax.experimental.pallas import triton as pl_triton
else:
    for _platform in ("cuda", "tpu"):
        pl = _imported(_platform, "jax.experimental.pallas")
    pl_triton = _imported("cuda", "jax.experimental.pallas.triton")
    pl_tpu = _imported("tpu", "jax.experimental.pallas.tpu")

# Kernels compute exp(x) as 2^(x LOG2_E), because GPUs only have an instruction for powers of two.
LOG2_E = math.log2(math.e)

# The logical axes (see `meshes.RULES`) of queries, keys and values `[N, T, 3, H, K]`, of the heads'
# results `[N, T, H, K]`, and of a number for every query `[N, H, T]`.
QKV_AXES = ("batch", None, None, "heads", None)
HEADS_AXES = ("batch", None, "heads", None)
QUERY_AXES = ("batch", "heads", None)

# The score of a masked key: exp of it is 0, and it is far from float32's limit.
MASKED = -1e30


def gpu_call(
    kernel: Callable[..., None], *, warps: int, stages: int = 2, interpret: bool, **arguments: Any
) -> Any:
    """Calls `pl.pallas_call` through Triton; `interpret` runs the kernel's Python on any platform.

    A program has `warps` warps, and its loops load `stages` - 1 steps ahead.
    """
    parameters = pl_triton.CompilerParams(num_warps=warps, num_stages=stages)
    return pl.pallas_call(
        kernel, interpret=interpret, compiler_params=None if interpret else parameters, **arguments
    )


def has_kernel(qkv: Float[Array, "N T 3 H K"]) -> bool:
    """Whether the attention kernels take these arrays.

    Float32 models, which only tests and the quickstart use, keep XLA's exact products.
    """
    return qkv.dtype == jnp.bfloat16 and qkv.shape[-1] >= 16


def by_platform(
    plain: Callable[..., Any],
    kernels: Mapping[str, Callable[..., Any]],
    *arguments: Any,
    **others: Callable[..., Any],
) -> Any:
    """Runs the kernel of the platform that a program is for, or `plain` where there is none.

    If one kernel of a platform cannot be built, none of them is used any more, because a backward
    kernel needs the output of its forward kernel.

    Args:
      plain: the function for any platform.
      kernels: the same function by platform: "cuda" (NVIDIA GPUs), "tpu". They take arguments of
        these shapes and dtypes.
      arguments: trees of arrays.
      others: replace `plain` on some platforms, by name.
    """
    branches = others | {
        platform: functools.partial(_or_plain, platform, kernel, others.get(platform, plain))
        for platform, kernel in kernels.items()
        if _kernels_work(platform)
    }
    return jax.lax.platform_dependent(*arguments, **branches, default=plain)


def _or_plain(
    platform: str, kernel: Callable[..., Any], plain: Callable[..., Any], *arguments: Any
) -> Any:
    """Runs a platform's kernel, or `plain` if it cannot be built."""
    try:
        return kernel(*arguments)
    except Exception as error:  # A changed interface can raise anything.
        _give_up(platform, error)
        return plain(*arguments)


# Why a platform's kernels are not used: the first reason, by platform.
_given_up: dict[str, str] = {}


def _give_up(platform: str, error: Exception) -> None:
    """Stops using a platform's kernels in this process and says why, once."""
    if platform not in _given_up:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        _given_up[platform] = reason
        here = jax.default_backend()
        if here not in ("cpu", "gpu" if platform == "cuda" else platform):
            return  # Programs are traced for all platforms; this one is not here.
        what = f"the fast kernels for {_PLATFORMS[platform]} cannot be used, plain operations take"
        print(f"{what} their place (jax {jax.__version__}, {reason})", file=sys.stderr)


_PLATFORMS = {"cuda": "GPUs", "tpu": "TPUs"}


def _kernels_work(platform: str) -> bool:
    if platform in _import_errors:
        _give_up(platform, _import_errors[platform])
    elif platform == "cuda" and jax.default_backend() == "gpu":
        _try_gpu()
    return platform not in _given_up


@functools.cache
def _try_gpu() -> None:
    """Compiles a small kernel for this process's GPU, and stops using kernels if that fails."""
    device = jax.local_devices()[0]
    capability = str(getattr(device, "compute_capability", ""))
    try:
        if "rocm" in device.client.platform_version.lower():
            raise NotImplementedError(f"{device.device_kind} is from AMD, they are for NVIDIA")
        if capability.partition(".")[0] in {"5", "6", "7"}:
            raise NotImplementedError(f"{device.device_kind} is {capability}, they need 8.0")
        # In another thread, because this one may be tracing a program on some mesh.
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            thread.submit(lambda: _small_kernel().lower().compile()).result()
    except Exception as error:
        _give_up("cuda", error)


def _small_kernel() -> jax.stages.Traced:
    def square(x_ref: Any, out_ref: Any) -> None:
        x = pl_triton.load(x_ref.at[:, :], mask=jnp.ones(x_ref.shape, bool), other=0.0)
        pl_triton.store(out_ref.at[:, :], product(x, x).astype(x.dtype))

    x = jax.ShapeDtypeStruct((16, 16), jnp.bfloat16)
    return jax.jit(gpu_call(square, out_shape=x, warps=1, interpret=False)).trace(x)


def product(
    a: jax.Array, b: jax.Array, *, transpose_a: bool = False, transpose_b: bool = False
) -> jax.Array:
    """A matrix product with float32 accumulation, inside a kernel."""
    contracted = ((0 if transpose_a else 1,), (1 if transpose_b else 0,))
    return jax.lax.dot_general(
        a,
        b,
        (contracted, ((), ())),
        precision=of_products(a.dtype),
        preferred_element_type=jnp.float32,
    )


def on_shards(
    function: Callable[..., Any],
    inputs: tuple[tuple[str | None, ...], ...],
    outputs: Any,
    seed: UInt32[Array, "2"],
    *arrays: jax.Array,
    numbered: tuple[str, str] = ("batch", "heads"),
) -> Any:
    """Runs `function(seed, *arrays)` on each device's part of the arrays.

    The compiler cannot partition a kernel, so without this every device would get whole arrays.
    Inside `meshes.on_batch_shards` the arrays are already one device's part.
    Two numbers are appended to the seed: where the device's part starts along the two `numbered`
    axes. With them, random draws are the same as on one device.

    Args:
      function: works on any part of the partitioned axes.
      inputs: the logical axes (see `meshes.RULES`) of every array. Axes of size 1 are copied.
      outputs: the logical axes of the result, or a tuple of them for every result.
      seed: two words of a random key.
      arrays: the inputs.
      numbered: the logical axes whose offsets are appended to the seed.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function(jnp.append(seed, jnp.zeros(2, jnp.uint32)), *arrays)
    if in_shard():
        rows = max(
            array.shape[names.index(numbered[0])]
            for names, array in zip(inputs, arrays, strict=True)
            if numbered[0] in names
        )
        first = jnp.array([batch_shard() * rows, 0], jnp.uint32)
        return function(jnp.append(seed, first), *arrays)
    sizes = {
        name: size
        for names, array in zip(inputs, arrays, strict=True)
        for name, size in zip(names, array.shape, strict=True)
        if size > 1
    }
    divided = {
        name: axes
        for name, axes in RULES
        if axes and name in sizes and sizes[name] % axis_size(mesh, axes) == 0
    }

    def spec(names: tuple[str | None, ...], shape: tuple[int, ...] | None = None) -> PartitionSpec:
        whole = shape or (2,) * len(names)
        return PartitionSpec(
            *(
                divided.get(name) if name and n > 1 else None
                for name, n in zip(names, whole, strict=True)
            )
        )

    def on_shard(seed: jax.Array, *parts: jax.Array) -> Any:
        first = [
            jax.lax.axis_index(divided[name]) * (sizes[name] // axis_size(mesh, divided[name]))
            if name in divided
            else jnp.int32(0)
            for name in numbered
        ]
        return function(jnp.append(seed, jnp.stack(first).astype(jnp.uint32)), *parts)

    several = isinstance(outputs[0], tuple)
    return jax.shard_map(
        on_shard,
        in_specs=(PartitionSpec(), *map(spec, inputs, (array.shape for array in arrays))),
        out_specs=tuple(map(spec, outputs)) if several else spec(outputs),
        check_vma=False,
    )(seed, *arrays)
