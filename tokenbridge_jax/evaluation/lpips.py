"""LPIPS, a learned distance of two images (Zhang et al., 2018), version 0.1.

Weights come in two files: the backbone's from torchvision (`vgg16-397923af.pth` or
`alexnet-owt-7be5be79.pth`) and those of the layers' channels, which the `lpips` package holds
(`lpips/weights/v0.1/vgg.pth`, `alex.pth`).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from tokenbridge_jax.evaluation.inception import check_tensors


class Conv(NamedTuple):
    """A convolution with ReLU; `place` is its number in torchvision's `features`."""

    place: int
    outputs: int
    size: int = 3
    stride: int = 1
    padding: int = 1


class Pool(NamedTuple):
    """A maximum over `size` x `size`, every second."""

    size: int


# The networks, part by part; the result of every part is compared.
NETWORKS: dict[str, tuple[tuple[Conv | Pool, ...], ...]] = {
    "vgg": (
        (Conv(0, 64), Conv(2, 64)),
        (Pool(2), Conv(5, 128), Conv(7, 128)),
        (Pool(2), Conv(10, 256), Conv(12, 256), Conv(14, 256)),
        (Pool(2), Conv(17, 512), Conv(19, 512), Conv(21, 512)),
        (Pool(2), Conv(24, 512), Conv(26, 512), Conv(28, 512)),
    ),
    "alex": (
        (Conv(0, 64, size=11, stride=4, padding=2),),
        (Pool(3), Conv(3, 192, size=5, padding=2)),
        (Pool(3), Conv(6, 384)),
        (Conv(8, 256),),
        (Conv(10, 256),),
    ),
}
# Pixels a side below which nothing is left after the poolings.
SMALLEST = {"vgg": 16, "alex": 31}

# Of ImageNet's pixels, in [-1, 1].
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
      other: as many, of the same size.
      network: "vgg" or "alex".
    """
    x = jnp.concatenate([one, other]).astype(jnp.float32) / 127.5 - 1
    x = (x - _MEAN[None, None, None]) / _DEVIATION[None, None, None]
    total = jnp.zeros(len(one), jnp.float32)
    for part, steps in enumerate(NETWORKS[network]):
        for step in steps:
            x = _maximum(x, step.size) if isinstance(step, Pool) else _convolve(x, params, step)
        unit = x / (jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True)) + 1e-10)
        first, second = jnp.split(unit, 2)
        weights = params[f"lin{part}"]["weight"]
        difference = jnp.sum((first - second) ** 2 * weights[None, None, None], axis=-1)
        total += difference.mean(axis=(1, 2))
    return total


def _convolve(x: jax.Array, params: Params, conv: Conv) -> jax.Array:
    weights = params[f"conv{conv.place}"]
    x = jax.lax.conv_general_dilated(
        x,
        weights["kernel"],
        window_strides=(conv.stride, conv.stride),
        padding=[(conv.padding, conv.padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision="highest",
    )
    return jax.nn.relu(x + weights["bias"][None, None, None])


def _maximum(x: jax.Array, size: int) -> jax.Array:
    return jax.lax.reduce_window(
        x, np.float32(-np.inf), jax.lax.max, (1, size, size, 1), (1, 2, 2, 1), "VALID"
    )


def import_lpips(
    backbone: Mapping[str, np.ndarray], linear: Mapping[str, np.ndarray], network: str = "vgg"
) -> dict[str, dict[str, np.ndarray]]:
    """Parameters from the public state dicts.

    Args:
      backbone: torchvision's, `features.0.weight` and so on; its classifier is not looked at.
      linear: the `lpips` package's, `lin0.model.1.weight` and so on.
      network: "vgg" or "alex".

    Raises:
      UserError: tensors are missing or misshapen; three are named.
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
