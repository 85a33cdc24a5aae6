"""DINOv2's ViT-L/14 (Oquab et al., 2023), the network of FD_DINOv2 (Stein et al., 2023).

Its features are the class token after the last LayerNorm. The parameters are those of
facebookresearch's `dinov2_vitl14_pretrain.pth`, which Hugging Face publishes under other names as
`facebook/dinov2-large`.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from tokenbridge_jax.evaluation.inception import check_tensors
from tokenbridge_jax.layers import add_bias
from tokenbridge_jax.ops.norm import normalize
from tokenbridge_jax.runtime.errors import UserError

NAME = "DINOv2's ViT-L/14"
# The side of its input, in pixels.
SIZE = 224
# Mean and deviation of ImageNet's pixels, which are in [0, 1].
_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
_DEVIATION = np.array([0.229, 0.224, 0.225], np.float32)

# The number of channels of an attention head in DINOv2's networks of all sizes.
HEAD_WIDTH = 64

# Pillow's weights are multiples of 2^-22, and its sums are integers.
_WEIGHT_BITS = 22
# The parameter of the cubic kernel (Keys, 1981): in Pillow, and in PyTorch's `interpolate`.
_PILLOWS, _PYTORCHS = -0.5, -0.75


class Sizes(NamedTuple):
    """Sizes of a network.

    Attributes:
      width: D, the number of features.
      layers: the number of blocks.
      patch: the side of a patch, in pixels.
      grid: the side of the grid of position embeddings, in patches.
    """

    width: int
    layers: int
    patch: int
    grid: int


# It was trained with 518 x 518 pixels at last: 37 x 37 patches.
VIT_L = Sizes(width=1024, layers=24, patch=14, grid=37)

Params = Mapping[str, Mapping[str, Any]]


def features(
    params: Params, images: UInt8[Array, "N H W 3"], precision: str = "high"
) -> tuple[Float[Array, "N D"]]:
    """The network's features of images, float32; to be jitted.

    Args:
      params: from `import_dinov2`.
      images: uint8 RGB. They are resized as Pillow does, to uint8; see `resize`.
      precision: of the products, one of `inception.PRECISIONS`.
    """
    pixels = resize(images).astype(jnp.float32) / 255
    pixels = (pixels - _MEAN[None, None, None]) / _DEVIATION[None, None, None]
    return (class_tokens(params, pixels, precision),)


def class_tokens(
    params: Params, pixels: Float[Array, "N H W 3"], precision: str = "high"
) -> Float[Array, "N D"]:
    """The class tokens after the last LayerNorm.

    Args:
      params: from `import_dinov2`.
      pixels: normalised; the side of a patch divides H and W.
      precision: of the products, one of `inception.PRECISIONS`.
    """
    low = precision == "bfloat16"
    product = functools.partial(
        _product, dtype=jnp.bfloat16 if low else jnp.float32, precision=None if low else precision
    )
    embed = params["embed"]
    count, height, width, _ = pixels.shape
    side = embed["kernel"].shape[0]
    patches = pixels.reshape(count, height // side, side, width // side, side, 3)
    x = add_bias(product("nhpwqc,pqcd->nhwd", patches, embed["kernel"]), embed["bias"])
    x = add_bias(x, resize_positions(embed["positions"], x.shape[1], x.shape[2]))
    first = jnp.broadcast_to(embed["class"], (count, 1, x.shape[-1]))
    x = jnp.concatenate([first, x.reshape(count, -1, x.shape[-1])], axis=1)

    def block(x: jax.Array, of: Mapping[str, jax.Array]) -> tuple[jax.Array, None]:
        y = normalize(x, of["norm1_scale"], of["norm1_bias"])
        qkv = add_bias(product("ntd,dshk->ntshk", y, of["qkv_kernel"]), of["qkv_bias"])
        q, k, v = (qkv[:, :, i] for i in range(3))
        weights = jax.nn.softmax(product("nqhk,nthk->nhqt", q, k) * HEAD_WIDTH**-0.5)
        y = product("nhqt,nthk->nqhk", weights, v)
        y = add_bias(product("nqhk,hkd->nqd", y, of["proj_kernel"]), of["proj_bias"])
        x += y * jnp.broadcast_to(of["scale1"], y.shape)
        y = normalize(x, of["norm2_scale"], of["norm2_bias"])
        y = add_bias(product("ntd,df->ntf", y, of["fc1_kernel"]), of["fc1_bias"])
        y = product("ntf,fd->ntd", jax.nn.gelu(y, approximate=False), of["fc2_kernel"])
        y = add_bias(y, of["fc2_bias"])
        return x + y * jnp.broadcast_to(of["scale2"], y.shape), None

    x, _ = jax.lax.scan(block, x, dict(params["blocks"]))
    return normalize(x[:, 0], params["norm"]["scale"], params["norm"]["bias"])


def _product(
    equation: str, one: jax.Array, other: jax.Array, *, dtype: Any, precision: str | None
) -> jax.Array:
    """An einsum of operands in `dtype`; sums and the result are float32."""
    one, other = one.astype(dtype), jnp.asarray(other, dtype)
    return jnp.einsum(equation, one, other, precision=precision, preferred_element_type=jnp.float32)


def resize(images: UInt8[Array, "N H W C"], size: int = SIZE) -> UInt8[Array, "N S S C"]:
    """Pillow's bicubic resizing to a square, to the last bit.

    Shrinking widens the kernel, so that it smooths. The width is changed before the height, and
    each pass rounds to uint8. (Only of images over a hundred times as high as wide, Pillow changes
    the height first.)
    """
    x = images.astype(jnp.int32)
    for axis in (2, 1):
        places, weights = _taps(x.shape[axis], size)
        total = jnp.full(1, 1 << (_WEIGHT_BITS - 1), jnp.int32).reshape(1, 1, 1, 1)
        for place, weight in zip(places.T, weights.T, strict=True):
            shape = [size if i == axis else 1 for i in range(4)]
            total = total + jnp.take(x, place, axis=axis) * weight.reshape(shape)
        x = jnp.clip(total >> _WEIGHT_BITS, 0, 255)
    return x.astype(jnp.uint8)


def _taps(length: int, size: int) -> tuple[Int[np.ndarray, "S T"], Int[np.ndarray, "S T"]]:
    """For each of `size` results of a line of pixels: places, and weights in units of 2^-22."""
    scale = length / size
    stretch = max(scale, 1.0)
    centres = (np.arange(size) + 0.5) * scale
    first = np.maximum(np.floor(centres - 2 * stretch + 0.5), 0).astype(int)
    last = np.minimum(np.floor(centres + 2 * stretch + 0.5), length).astype(int)
    places = first[:, None] + np.arange((last - first).max())
    values = _cubic((places + 0.5 - centres[:, None]) / stretch, _PILLOWS)
    values = np.where(places < last[:, None], values, 0)
    values *= (1 << _WEIGHT_BITS) / values.sum(axis=1, keepdims=True)
    weights = np.trunc(values + np.copysign(0.5, values)).astype(np.int32)
    return np.minimum(places, length - 1), weights


def resize_positions(
    positions: Float[Array | np.ndarray, "G G D"], height: int, width: int
) -> Float[Array, "h w D"]:
    """Position embeddings for another grid, as `transformers`' Dinov2 computes them.

    This is PyTorch's bicubic `interpolate` with a size: no smoothing, edges repeated.
    """
    grid = positions.shape[0]

    def weights(size: int) -> np.ndarray:
        centres = (np.arange(size) + 0.5) * grid / size - 0.5
        places = np.floor(centres).astype(int)[:, None] + np.arange(-1, 3)
        matrix = np.zeros((size, grid))
        values = _cubic(places - centres[:, None], _PYTORCHS)
        np.add.at(matrix, (np.arange(size)[:, None], np.clip(places, 0, grid - 1)), values)
        return matrix.astype(np.float32)

    return jnp.einsum(
        "hg,gkd,wk->hwd", weights(height), positions, weights(width), precision="highest"
    )


def _cubic(x: Float[np.ndarray, "..."], a: float) -> Float[np.ndarray, "..."]:
    """The kernel of bicubic interpolation (Keys, 1981, eq. 15 for a = -1/2)."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0))


# Names in facebookresearch's file, and in Hugging Face's.
_NAMES = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
# The same within a block; there, a file has one tensor or three for queries, keys and values.
_BLOCK_NAMES = {
    "norm1": "norm1",
    "attn.qkv": "attention.attention",
    "attn.proj": "attention.output.dense",
    "ls1.gamma": "layer_scale1.lambda1",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "ls2.gamma": "layer_scale2.lambda1",
}
# Both files have it; only pre-training uses it.
_UNUSED = {"mask_token", "embeddings.mask_token"}


def tensor_shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that are used of facebookresearch's file."""
    width, layers, patch, grid = sizes
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, grid * grid + 1, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
    }
    for block in (f"blocks.{i}" for i in range(layers)):
        for name, outputs, inputs in (
            ("attn.qkv", 3 * width, width),
            ("attn.proj", width, width),
            ("mlp.fc1", 4 * width, width),
            ("mlp.fc2", width, 4 * width),
        ):
            shapes[f"{block}.{name}.weight"] = (outputs, inputs)
            shapes[f"{block}.{name}.bias"] = (outputs,)
        for name in ("norm1.weight", "norm1.bias", "ls1.gamma"):
            shapes[f"{block}.{name}"] = (width,)
        for name in ("norm2.weight", "norm2.bias", "ls2.gamma"):
            shapes[f"{block}.{name}"] = (width,)
    return shapes | {"norm.weight": (width,), "norm.bias": (width,)}


def hugging_face_names(name: str) -> tuple[str, ...]:
    """The tensors of Hugging Face's file that, one below another, are facebookresearch's `name`."""
    head, _, kind = name.rpartition(".")
    if name in _NAMES:
        return (_NAMES[name],)
    if head in _NAMES:
        return (f"{_NAMES[head]}.{kind}",)
    _, block, inner = name.split(".", 2)
    prefix = f"encoder.layer.{block}."
    if inner in _BLOCK_NAMES:
        return (prefix + _BLOCK_NAMES[inner],)
    module = prefix + _BLOCK_NAMES[inner.removesuffix(f".{kind}")]
    parts = [".query", ".key", ".value"] if ".qkv." in name else [""]
    return tuple(f"{module}{part}.{kind}" for part in parts)


def import_dinov2(
    state_dict: Mapping[str, np.ndarray], sizes: Sizes
) -> dict[str, dict[str, np.ndarray]]:
    """Parameters from a public state dict; those of all blocks are stacked.

    Args:
      state_dict: arrays by facebookresearch's names or Hugging Face's. `mask_token` is ignored.
      sizes: of the network.

    Raises:
      UserError: tensors are missing, have other shapes or do not belong to this network, such as
        the `register_tokens` of the networks with registers; it names three of them.
    """
    shapes = tensor_shapes(sizes)
    original = "pos_embed" in state_dict
    parts = {name: (name,) if original else hugging_face_names(name) for name in shapes}
    expected = {
        part: (shape[0] // len(parts[name]), *shape[1:])
        for name, shape in shapes.items()
        for part in parts[name]
    }
    check_tensors(NAME, state_dict, expected)
    if others := sorted(state_dict.keys() - expected.keys() - _UNUSED):
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise UserError(f"these are not the weights of {NAME}: {', '.join(others[:3])}{more} too")

    def tensor(name: str) -> np.ndarray:
        return np.concatenate([np.asarray(state_dict[part], np.float32) for part in parts[name]])

    heads = sizes.width // HEAD_WIDTH
    # By name: the tensor of a block, and the shape of its transpose here.
    in_block: dict[str, tuple[str, tuple[int, ...]]] = {
        "norm1_scale": ("norm1.weight", (-1,)),
        "norm1_bias": ("norm1.bias", (-1,)),
        "qkv_kernel": ("attn.qkv.weight", (sizes.width, 3, heads, HEAD_WIDTH)),
        "qkv_bias": ("attn.qkv.bias", (3, heads, HEAD_WIDTH)),
        "proj_kernel": ("attn.proj.weight", (heads, HEAD_WIDTH, sizes.width)),
        "proj_bias": ("attn.proj.bias", (-1,)),
        "scale1": ("ls1.gamma", (-1,)),
        "norm2_scale": ("norm2.weight", (-1,)),
        "norm2_bias": ("norm2.bias", (-1,)),
        "fc1_kernel": ("mlp.fc1.weight", (sizes.width, -1)),
        "fc1_bias": ("mlp.fc1.bias", (-1,)),
        "fc2_kernel": ("mlp.fc2.weight", (-1, sizes.width)),
        "fc2_bias": ("mlp.fc2.bias", (-1,)),
        "scale2": ("ls2.gamma", (-1,)),
    }
    blocks = {
        name: np.stack(
            [tensor(f"blocks.{i}.{inner}").T.reshape(shape) for i in range(sizes.layers)]
        )
        for name, (inner, shape) in in_block.items()
    }
    positions = tensor("pos_embed")[0]
    embed = {
        "kernel": np.ascontiguousarray(tensor("patch_embed.proj.weight").transpose(2, 3, 1, 0)),
        "bias": tensor("patch_embed.proj.bias"),
        "class": tensor("cls_token")[0, 0] + positions[0],
        "positions": positions[1:].reshape(sizes.grid, sizes.grid, sizes.width),
    }
    norm = {"scale": tensor("norm.weight"), "bias": tensor("norm.bias")}
    return {"embed": embed, "blocks": blocks, "norm": norm}
