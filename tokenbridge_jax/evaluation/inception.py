"""The Inception network of FID, IS and sFID (Szegedy et al., 2015).

It is TensorFlow's `inception-2015-12-05` graph, whose pooling and 1008 classes differ from
torchvision's. The parameters are those of the public PyTorch port,
`pt_inception-2015-12-05-6726825d.pth`; `import_inception` folds every batch normalisation into the
convolution before it.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Shaped, UInt8

from tokenbridge_jax.runtime.errors import UserError

SIZE = 299
POOL_FEATURES, CLASSES = 2048, 1008
# sFID uses the first 7 channels of one convolution, at all 17 x 17 cells.
SPATIAL_CHANNELS, SPATIAL_CELLS = 7, 17 * 17
BATCH_NORM_EPSILON = 1e-3
# Tensors of every convolution in the public port's state dict.
_TENSORS = ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")


class Conv(NamedTuple):
    """A convolution, its normalisation and a ReLU.

    `kernel` and `padding` are height and width; both sides have the same padding.
    """

    name: str
    outputs: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: tuple[int, int] = (0, 0)


# A branch of a block is a sequence of `Conv`, names of poolings, and forks. A fork is a tuple of
# `Conv`: all take the same input, and their results are concatenated.
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
# Precision of the convolutions. "highest": float32. "high": faster with little loss: TF32 on GPUs,
# as in PyTorch by default, three bfloat16 products on TPUs, float32 on CPUs. "bfloat16": an
# approximation.
PRECISIONS = ("highest", "high", "bfloat16")

# `mixed_6/conv` in TensorFlow's graph.
SPATIAL = "Mixed_6d.branch1x1"

Params = Mapping[str, Mapping[str, Float[Array | np.ndarray, "..."]]]


def features(
    params: Params, images: UInt8[Array, "N H W 3"], precision: str = "high"
) -> tuple[Float[Array, "N 2048"], Float[Array, "N 2023"], Float[Array, "N 1008"]]:
    """The network's features of images, float32; to be jitted.

    Args:
      params: from `import_inception`.
      images: uint8 RGB. They are resized as in TensorFlow 1, and not rounded to uint8 afterwards.
      precision: of the convolutions, one of `PRECISIONS`.

    Returns:
      For FID, KID, precision and recall, the mean over the cells of the last layer; for sFID, the
      first channels of one convolution, cells row-major and channels last; for IS, logits without
      bias.
    """
    results = dict(activations(params, images, precision))
    spatial = results[SPATIAL][..., :SPATIAL_CHANNELS].reshape(len(images), -1)
    pool = results[list(BLOCKS)[-1]].astype(jnp.float32).mean(axis=(1, 2))
    logits = jnp.dot(pool, params["fc"]["kernel"], precision="highest")
    return pool, spatial.astype(jnp.float32), logits


def activations(
    params: Params, images: UInt8[Array, "N H W 3"], precision: str = "high"
) -> Iterator[tuple[str, Float[Array, "N h w c"]]]:
    """Names and outputs of all convolutions and blocks. For the arguments, see `features`."""
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
        """Outputs of all steps; the last one is the result."""
        for step in steps:
            if isinstance(step, str):
                name, x = step, _POOLINGS[step](x)
            elif isinstance(step, Conv):
                name, x = prefix + step.name, convolve(x, prefix + step.name, step)
            else:
                forks = {prefix + c.name: convolve(x, prefix + c.name, c) for c in step}
                yield from forks.items()
                name, x = "forks", jnp.concatenate([*forks.values()], axis=-1)
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
    """TensorFlow 1's bilinear resizing to a square: pixel i takes the value at i * H / size.

    Pixel centres have no half-pixel offset, and shrinking does not smooth.
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


# 3 x 3 poolings. An average at the border is over the pixels within the image.
_POOLINGS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "shrink": functools.partial(nn.max_pool, window_shape=(3, 3), strides=(2, 2)),
    "maximum": functools.partial(nn.max_pool, window_shape=(3, 3), padding="SAME"),
    "average": functools.partial(
        nn.avg_pool, window_shape=(3, 3), padding="SAME", count_include_pad=False
    ),
}


def convolutions() -> Iterator[tuple[str, Conv, int]]:
    """Every convolution, with its name in the state dict and its number of input channels."""

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
            if last == "shrink":
                outputs += inputs
            else:
                outputs += sum(conv.outputs for conv in (last if type(last) is tuple else [last]))
        inputs = outputs


def tensor_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that are used of the public port's state dict."""
    shapes: dict[str, tuple[int, ...]] = {"fc.weight": (CLASSES, POOL_FEATURES)}
    for name, conv, inputs in convolutions():
        shapes[f"{name}.conv.weight"] = (conv.outputs, inputs, *conv.kernel)
        shapes |= {f"{name}.{part}": (conv.outputs,) for part in _TENSORS[1:]}
    return shapes


def check_tensors(
    network: str, state_dict: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Raises `UserError` unless all tensors exist with these shapes; it names three that do not."""
    problems = []
    for name, shape in shapes.items():
        if name not in state_dict:
            problems.append(f"{name}: missing")
        elif state_dict[name].shape != shape:
            problems.append(f"{name}: {state_dict[name].shape} instead of {shape}")
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
        batches are ignored.

    Raises:
      UserError: tensors are missing or have other shapes; it names three of them.
    """
    check_tensors("FID's Inception network", state_dict, tensor_shapes())
    params: dict[str, dict[str, np.ndarray]] = {}
    for name, _, _ in convolutions():
        kernel, scale, bias, mean, variance = (
            np.asarray(state_dict[f"{name}.{part}"], np.float64) for part in _TENSORS
        )
        factor = scale / np.sqrt(variance + BATCH_NORM_EPSILON)
        params[name] = {
            "kernel": (kernel.transpose(2, 3, 1, 0) * factor).astype(np.float32),
            "bias": (bias - mean * factor).astype(np.float32),
        }
    params["fc"] = {"kernel": np.ascontiguousarray(state_dict["fc.weight"].T, np.float32)}
    return params
