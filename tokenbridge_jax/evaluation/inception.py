"""The Inception network of FID, IS and sFID: Szegedy et al. (2015) as ported from TensorFlow's
`inception-2015-12-05` graph, whose pooling and 1008 classes are not those of torchvision's.

Parameters are those of the public PyTorch port, `pt_inception-2015-12-05-6726825d.pth`, every batch
normalisation folded into the convolution before it (`import_inception`).
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped, UInt8

from tokenbridge_jax.runtime.errors import UserError

SIZE = 299
POOL_FEATURES, CLASSES = 2048, 1008
# sFID looks at this many channels of the 17 x 17 cells of one convolution.
SPATIAL_CHANNELS, SPATIAL_CELLS = 7, 17 * 17
BATCH_NORM_EPSILON = 1e-3


class Conv(NamedTuple):
    """A convolution, its normalisation and a ReLU.

    `padding` is that of both sides; kernels are `[height, width]`.
    """

    name: str
    outputs: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: tuple[int, int] = (0, 0)


# A branch of a block: convolutions one after another, or a pooling; a tuple within forks.
Branch = tuple[Any, ...]


def _square(name: str, outputs: int, size: int, stride: int = 1, padding: int = 0) -> Conv:
    return Conv(name, outputs, (size, size), stride, (padding, padding))


def _mixed_5(pooled: int) -> tuple[Branch, ...]:
    return (
        (Conv("branch1x1", 64),),
        (Conv("branch5x5_1", 48), _square("branch5x5_2", 64, 5, padding=2)),
        (
            Conv("branch3x3dbl_1", 64),
            _square("branch3x3dbl_2", 96, 3, padding=1),
            _square("branch3x3dbl_3", 96, 3, padding=1),
        ),
        ("average", Conv("branch_pool", pooled)),
    )


def _mixed_6(width: int) -> tuple[Branch, ...]:
    def row(name: str, outputs: int) -> Conv:
        return Conv(name, outputs, (1, 7), padding=(0, 3))

    def column(name: str, outputs: int) -> Conv:
        return Conv(name, outputs, (7, 1), padding=(3, 0))

    return (
        (Conv("branch1x1", 192),),
        (Conv("branch7x7_1", width), row("branch7x7_2", width), column("branch7x7_3", 192)),
        (
            Conv("branch7x7dbl_1", width),
            column("branch7x7dbl_2", width),
            row("branch7x7dbl_3", width),
            column("branch7x7dbl_4", width),
            row("branch7x7dbl_5", 192),
        ),
        ("average", Conv("branch_pool", 192)),
    )


def _mixed_7(pooling: str) -> tuple[Branch, ...]:
    def fork(name: str) -> tuple[Conv, Conv]:
        return (
            Conv(f"{name}a", 384, (1, 3), padding=(0, 1)),
            Conv(f"{name}b", 384, (3, 1), padding=(1, 0)),
        )

    return (
        (Conv("branch1x1", 320),),
        (Conv("branch3x3_1", 384), fork("branch3x3_2")),
        (
            Conv("branch3x3dbl_1", 448),
            _square("branch3x3dbl_2", 384, 3, padding=1),
            fork("branch3x3dbl_3"),
        ),
        (pooling, Conv("branch_pool", 192)),
    )


STEM = (
    _square("Conv2d_1a_3x3", 32, 3, stride=2),
    _square("Conv2d_2a_3x3", 32, 3),
    _square("Conv2d_2b_3x3", 64, 3, padding=1),
    "shrink",
    Conv("Conv2d_3b_1x1", 80),
    _square("Conv2d_4a_3x3", 192, 3),
    "shrink",
)
BLOCKS: dict[str, tuple[Branch, ...]] = {
    "Mixed_5b": _mixed_5(32),
    "Mixed_5c": _mixed_5(64),
    "Mixed_5d": _mixed_5(64),
    "Mixed_6a": (
        (_square("branch3x3", 384, 3, stride=2),),
        (
            Conv("branch3x3dbl_1", 64),
            _square("branch3x3dbl_2", 96, 3, padding=1),
            _square("branch3x3dbl_3", 96, 3, stride=2),
        ),
        ("shrink",),
    ),
    "Mixed_6b": _mixed_6(128),
    "Mixed_6c": _mixed_6(160),
    "Mixed_6d": _mixed_6(160),
    "Mixed_6e": _mixed_6(192),
    "Mixed_7a": (
        (Conv("branch3x3_1", 192), _square("branch3x3_2", 320, 3, stride=2)),
        (
            Conv("branch7x7x3_1", 192),
            Conv("branch7x7x3_2", 192, (1, 7), padding=(0, 3)),
            Conv("branch7x7x3_3", 192, (7, 1), padding=(3, 0)),
            _square("branch7x7x3_4", 192, 3, stride=2),
        ),
        ("shrink",),
    ),
    "Mixed_7b": _mixed_7("average"),
    # TensorFlow's graph takes the maximum here, and only here.
    "Mixed_7c": _mixed_7("maximum"),
}
# How convolutions multiply. "highest": float32. "high": as fast as float32 gets with little loss:
# TF32 on GPUs, as PyTorch does by default, three bfloat16 products on TPUs, float32 on CPUs.
# "bfloat16": an approximation.
PRECISIONS = ("highest", "high", "bfloat16")

# What TensorFlow calls `mixed_6/conv`.
SPATIAL = "Mixed_6d.branch1x1"

Params = Mapping[str, Mapping[str, Float[Array | np.ndarray, "..."]]]


def features(
    params: Params, images: UInt8[Array, "N H W 3"], precision: str = "high"
) -> tuple[Float[Array, "N 2048"], Float[Array, "N 2023"], Float[Array, "N 1008"]]:
    """The network's features of images of one size, float32; to be jitted.

    Args:
      params: from `import_inception`.
      images: uint8 RGB. They are resized as TensorFlow 1 does, without rounding to uint8 after it.
      precision: of convolutions, one of `PRECISIONS`.

    Returns:
      The mean over the last layer's cells, for FID, KID, precision and recall; the first channels
      of one convolution, cells row-major and channels last, for sFID; logits without bias, for IS.
    """
    results = dict(activations(params, images, precision))
    spatial = results[SPATIAL][..., :SPATIAL_CHANNELS].reshape(len(images), -1)
    pool = results[list(BLOCKS)[-1]].astype(jnp.float32).mean(axis=(1, 2))
    logits = jnp.dot(pool, params["fc"]["kernel"], precision="highest")
    return pool, spatial.astype(jnp.float32), logits


def activations(
    params: Params, images: UInt8[Array, "N H W 3"], precision: str = "high"
) -> Iterator[tuple[str, Float[Array, "N h w c"]]]:
    """What comes out of every convolution, by its name, and of every block. See `features`."""
    low = precision == "bfloat16"
    dtype = jnp.bfloat16 if low else jnp.float32

    def convolve(x: jax.Array, name: str, conv: Conv) -> jax.Array:
        weights = params[name]
        x = jax.lax.conv_general_dilated(
            x.astype(dtype),
            jnp.asarray(weights["kernel"], dtype),
            window_strides=(conv.stride, conv.stride),
            padding=[(side, side) for side in conv.padding],
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=None if low else precision,
        )
        return jax.nn.relu(x + jnp.asarray(weights["bias"], dtype)[None, None, None])

    def run(
        x: jax.Array, steps: Branch, prefix: str = ""
    ) -> Iterator[tuple[str, Float[Array, "N h w c"]]]:
        """Step by step; what comes last is the result."""
        for step in steps:
            if isinstance(step, str):
                name, x = step, _POOLINGS[step](x)
            elif isinstance(step, Conv):
                name, x = prefix + step.name, convolve(x, prefix + step.name, step)
            else:
                forks = [[*run(x, (fork,), prefix)] for fork in step]
                yield from itertools.chain(*forks)
                name, x = "forks", jnp.concatenate([fork[-1][1] for fork in forks], axis=-1)
            yield name, x

    x = (resize(images) - 128) / 128
    stem = [*run(x, STEM)]
    yield from stem
    x = stem[-1][1]
    for block, branches in BLOCKS.items():
        results = [[*run(x, branch, f"{block}.")] for branch in branches]
        yield from itertools.chain(*results)
        x = jnp.concatenate([branch[-1][1] for branch in results], axis=-1)
        yield block, x


def resize(images: Shaped[Array, "N H W C"], size: int = SIZE) -> Float[Array, "N S S C"]:
    """TensorFlow 1's bilinear resizing to a square: pixel i looks at place i * H / size.

    Neither are pixels' centres half a pixel in, nor is anything smoothed where it shrinks.
    """

    def weights(length: int) -> np.ndarray:
        places = np.arange(size, dtype=np.float32) * np.float32(length / size)
        low = np.floor(places).astype(int)
        share = places - low
        matrix = np.zeros((size, length), np.float32)
        np.add.at(matrix, (np.arange(size), low), 1 - share)
        np.add.at(matrix, (np.arange(size), np.minimum(low + 1, length - 1)), share)
        return matrix

    rows, columns = (weights(length) for length in images.shape[1:3])
    return jnp.einsum(
        "sh,nhwc,tw->nstc", rows, images.astype(jnp.float32), columns, precision="highest"
    )


def _shrink(x: jax.Array) -> jax.Array:
    """The maximum of 3 x 3, every second."""
    return _pool(x, -jnp.inf, jax.lax.max, stride=2, padding="VALID")


def _maximum(x: jax.Array) -> jax.Array:
    return _pool(x, -jnp.inf, jax.lax.max)


def _average(x: jax.Array) -> jax.Array:
    """The mean of 3 x 3, at borders of those that there are."""
    count = _pool(jnp.ones((1, *x.shape[1:3], 1), x.dtype), 0.0, jax.lax.add)
    return _pool(x, 0.0, jax.lax.add) / count


def _pool(
    x: jax.Array, start: float, combine: Callable[..., Any], stride: int = 1, padding: str = "SAME"
) -> jax.Array:
    strides = (1, stride, stride, 1)
    return jax.lax.reduce_window(
        x, np.asarray(start, x.dtype), combine, (1, 3, 3, 1), strides, padding
    )


_POOLINGS = {"shrink": _shrink, "maximum": _maximum, "average": _average}


def convolutions() -> Iterator[tuple[str, Conv, int]]:
    """Every convolution with its name in the state dict and its number of inputs."""

    def walk(steps: Branch, prefix: str, inputs: int) -> Iterator[tuple[str, Conv, int]]:
        for step in steps:
            if isinstance(step, Conv):
                yield prefix + step.name, step, inputs
                inputs = step.outputs
            elif isinstance(step, tuple):
                for fork in step:
                    yield from walk((fork,), prefix, inputs)

    yield from walk(STEM, "", 3)
    inputs = STEM[-2].outputs
    for name, branches in BLOCKS.items():
        outputs = 0
        for branch in branches:
            yield from walk(branch, f"{name}.", inputs)
            last = branch[-1]
            outputs += (
                last.outputs
                if isinstance(last, Conv)
                else inputs
                if last == "shrink"
                else sum(fork.outputs for fork in last)
            )
        inputs = outputs


def tensor_shapes() -> dict[str, tuple[int, ...]]:
    """The tensors of the public port's state dict that are used here, by name."""
    shapes: dict[str, tuple[int, ...]] = {"fc.weight": (CLASSES, POOL_FEATURES)}
    for name, conv, inputs in convolutions():
        shapes[f"{name}.conv.weight"] = (conv.outputs, inputs, *conv.kernel)
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.bn.{part}"] = (conv.outputs,)
    return shapes


def check_tensors(
    network: str, state_dict: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Raises `UserError` unless all tensors are there in these shapes; it names three others."""
    problems = [
        f"{name}: {state_dict[name].shape} instead of {shape}"
        if name in state_dict
        else f"{name}: missing"
        for name, shape in shapes.items()
        if name not in state_dict or state_dict[name].shape != shape
    ]
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(
            f"these are not the weights of {network} ({len(problems)} of {len(shapes)} tensors "
            f"differ): {'; '.join(problems[:3])}{more}"
        )


def import_inception(state_dict: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """Parameters from the public port's state dict.

    Args:
      state_dict: arrays by name, `Conv2d_1a_3x3.conv.weight` and so on. `fc.bias` and counters of
        batches are not looked at.

    Raises:
      UserError: tensors are missing or misshapen; three are named.
    """
    check_tensors("FID's Inception network", state_dict, tensor_shapes())
    params: dict[str, dict[str, np.ndarray]] = {}
    for name, _, _ in convolutions():
        kernel, scale, bias, mean, variance = (
            np.asarray(state_dict[f"{name}.{part}"], np.float64)
            for part in (
                "conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var",
            )
        )  # fmt: skip
        factor = scale / np.sqrt(variance + BATCH_NORM_EPSILON)
        params[name] = {
            "kernel": (kernel.transpose(2, 3, 1, 0) * factor).astype(np.float32),
            "bias": (bias - mean * factor).astype(np.float32),
        }
    params["fc"] = {"kernel": np.ascontiguousarray(state_dict["fc.weight"].T, np.float32)}
    return params
