"""LPIPS, a learned distance of two images (Zhang et al., 2018), version 0.1.

The weights are in two files: torchvision's weights of the backbone (`vgg16-397923af.pth` or
`alexnet-owt-7be5be79.pth`), and a weight for every channel of the compared layers, from the `lpips`
package (`lpips/weights/v0.1/vgg.pth`, `alex.pth`).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, UInt8

from tokenbridge_jax.evaluation.inception import check_tensors
from tokenbridge_jax.ops.precision import of_products


class Conv(NamedTuple):
    """A convolution with a ReLU; `place` is its number in torchvision's `features`."""

    place: int
    outputs: int
    size: int = 3
    stride: int = 1
    padding: int = 1


# The networks in parts; LPIPS compares the output of every part. A number is a maximum pooling of
# this size, with stride 2.
NETWORKS: dict[str, tuple[tuple[Conv | int, ...], ...]] = {
    "vgg": (
        (Conv(0, 64), Conv(2, 64)),
        (2, Conv(5, 128), Conv(7, 128)),
        (2, Conv(10, 256), Conv(12, 256), Conv(14, 256)),
        (2, Conv(17, 512), Conv(19, 512), Conv(21, 512)),
        (2, Conv(24, 512), Conv(26, 512), Conv(28, 512)),
    ),
    "alex": (
        (Conv(0, 64, size=11, stride=4, padding=2),),
        (3, Conv(3, 192, size=5, padding=2)),
        (3, Conv(6, 384)),
        (Conv(8, 256),),
        (Conv(10, 256),),
    ),
}
# The smallest side of an image, in pixels: after the poolings, at least one cell must remain.
SMALLEST = {"vgg": 16, "alex": 31}

# Mean and deviation of ImageNet's pixels, which are in [-1, 1].
_MEAN = np.array([-0.030, -0.088, -0.188], np.float32)
_DEVIATION = np.array([0.458, 0.448, 0.450], np.float32)

Params = Mapping[str, Mapping[str, Any]]


def distance(
    params: Params,
    one: UInt8[Array, "N H W 3"],
    other: UInt8[Array, "N H W 3"],
    network: str = "vgg",
) -> Float[Array, " N"]:
    """LPIPS of every pair of images, in float32; to be jitted.

    Args:
      params: from `import_lpips`.
      one: uint8 RGB images.
      other: the images to compare them with, of the same shape.
      network: "vgg" or "alex".
    """
    pairs = jnp.stack([one, other], axis=1)
    return _distance(params, pairs.astype(jnp.float32) / 127.5 - 1, network)


def training_distance(
    params: Params,
    one: Float[Array, "N H W C"],
    other: Float[Array, "N H W C"],
    dtype: Any = jnp.float32,
) -> Float[Array, " N"]:
    """LPIPS by VGG of float images in [-1, 1], RGB or grey, for a loss: it can be differentiated.

    Args:
      params: from `import_lpips`.
      one: the images.
      other: those to compare them with.
      dtype: of the network's products; features are compared in float32.
    """
    pairs = jnp.stack([one, other], axis=1)
    return _distance(params, jnp.broadcast_to(pairs, (*pairs.shape[:4], 3)), "vgg", dtype)


def _distance(
    params: Params, pairs: Float[Array, "N 2 H W 3"], network: str, dtype: Any = jnp.float32
) -> Float[Array, " N"]:
    """LPIPS of pairs of images in [-1, 1], which stay side by side: on the same device."""
    x = pairs.reshape(-1, *pairs.shape[2:])
    x = ((x - _MEAN[None, None, None]) / _DEVIATION[None, None, None]).astype(dtype)
    total = jnp.zeros(len(pairs), jnp.float32)
    for part, steps in enumerate(NETWORKS[network]):
        for step in steps:
            if isinstance(step, Conv):
                x = _convolve(x, params, step)
            else:
                x = nn.max_pool(x, (step, step), (2, 2))
        unit = _unit(x.astype(jnp.float32))
        unit = unit.reshape(-1, 2, *unit.shape[1:])
        weights = params[f"lin{part}"]["weight"]
        square = (unit[:, 0] - unit[:, 1]) ** 2
        difference = jnp.sum(square * weights[None, None, None], axis=-1)
        total += difference.mean(axis=(1, 2))
    return total


def _unit(x: Float[Array, "N h w D"]) -> Float[Array, "N h w D"]:
    """Every place's features, with length 1; places without features have no gradient."""
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    length = jnp.sqrt(jnp.where(square > 0, square, 1))
    return x / (jnp.where(square > 0, length, 0) + 1e-10)


def _convolve(x: jax.Array, params: Params, conv: Conv) -> jax.Array:
    weights = params[f"conv{conv.place}"]
    x = jax.lax.conv_general_dilated(
        x,
        jnp.asarray(weights["kernel"], x.dtype),
        window_strides=(conv.stride, conv.stride),
        padding=[(conv.padding, conv.padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=of_products(x.dtype),
    )
    return jax.nn.relu(x + jnp.asarray(weights["bias"], x.dtype)[None, None, None])


def import_lpips(
    backbone: Mapping[str, np.ndarray], linear: Mapping[str, np.ndarray], network: str = "vgg"
) -> dict[str, dict[str, np.ndarray]]:
    """Parameters from the public state dicts.

    Args:
      backbone: torchvision's, `features.0.weight` and so on; its classifier is ignored.
      linear: the `lpips` package's, `lin0.model.1.weight` and so on.
      network: "vgg" or "alex".

    Raises:
      UserError: tensors are missing or have other shapes; it names three of them.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    inputs = 3
    for part, steps in enumerate(NETWORKS[network]):
        for conv in (step for step in steps if isinstance(step, Conv)):
            kernel = conv.outputs, inputs, conv.size, conv.size
            shapes[f"features.{conv.place}.weight"] = kernel
            shapes[f"features.{conv.place}.bias"] = (conv.outputs,)
            inputs = conv.outputs
        shapes[f"lin{part}.model.1.weight"] = (1, inputs, 1, 1)
    arrays = {**backbone, **linear}
    check_tensors(f"LPIPS's {network}", arrays, shapes)
    params: dict[str, dict[str, np.ndarray]] = {}
    for name in shapes:
        array = np.asarray(arrays[name], np.float32)
        if name.startswith("lin"):
            params[name.split(".")[0]] = {"weight": array[0, :, 0, 0]}
            continue
        _, place, kind = name.split(".")
        conv_params = params.setdefault(f"conv{place}", {})
        if kind == "weight":
            conv_params["kernel"] = np.ascontiguousarray(array.transpose(2, 3, 1, 0))
        else:
            conv_params["bias"] = array
    return params
