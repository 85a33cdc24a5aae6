"""Images <-> indices in batches on a mesh: autoencoder and quantizer, jitted for inference."""

import functools
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Integer, Shaped, UInt8

from tokenbridge_jax.autoencoder import (
    Autoencoder,
    AutoencoderConfig,
    flatten_positions,
    images_to_float,
    images_to_uint8,
    unflatten_positions,
)
from tokenbridge_jax.ops.precision import check_precision
from tokenbridge_jax.quantizer import AnyQuantizer, Unquantized
from tokenbridge_jax.runtime import checks, meshes
from tokenbridge_jax.runtime.compilation_cache import compile_beside_others
from tokenbridge_jax.runtime.errors import UserError


class Encoded(NamedTuple):
    """Latents and indices of a batch. They are on the device until `np.asarray`.

    Attributes:
      latents: scaled, float32; of D channels.
      indices: in the quantizer's `index_dtype`; channels are in the autoencoder's order.
      clipped: how many of an image's positions were outside the quantizer's range, per channel.
      broken: which images have a NaN among their latents; their indices mean nothing.
      deviation: of the posterior of the scaled latents, float32, if it was asked for.
    """

    latents: Float[Array | np.ndarray, "B h w D"]
    indices: Shaped[Array | np.ndarray, "B L C"]
    clipped: Integer[Array | np.ndarray, "B C"]
    broken: Bool[Array | np.ndarray, " B"]
    deviation: Float[Array | np.ndarray, "B h w D"] | None = None


class Codec:
    """Encodes and decodes batches of any size, split over the data and fsdp axes of a mesh.

    A batch is padded to the next of a few fixed sizes, so that a last, partial batch compiles at
    most one more program. The result of an image does not depend on the other images of its batch,
    nor on the padding. With another number of devices, a device gets batches of another size, and
    results may differ by rounding.
    """

    def __init__(
        self,
        config: AutoencoderConfig,
        params: Mapping[str, Any],
        quantizer: AnyQuantizer,
        mesh: Mesh,
        precision: str = "float32",
    ):
        """Copies the parameters to every device of the mesh.

        Args:
          config: the autoencoder's.
          params: the autoencoder's, unboxed.
          quantizer: turns latents into indices. With `Unquantized`, latents take the place of
            indices everywhere.
          mesh: this process's devices only, because processes encode different images:
            `meshes.make_mesh(devices=jax.local_devices())`.
          precision: the autoencoder's, one of `precision.PRECISIONS`. It means the same on every
            platform. Compared with float32 on a CPU, tensorfloat32 changes 2 indices in 100 and
            bfloat16 17; docs/performance.md says how that was measured.

        Raises:
          UserError: there is no such precision.
        """
        self.config, self.quantizer, self.mesh = config, quantizer, mesh
        self.params = jax.device_put(dict(params), meshes.replicated(mesh))
        check_precision(precision, "precision")
        self.precision = precision
        module = Autoencoder(config, precision)
        jit = functools.partial(jax.jit, out_shardings=meshes.batch_sharding(mesh))
        self._encode, self._encode_posterior = (
            jit(functools.partial(_encode, module, quantizer, with_deviation))
            for with_deviation in (False, True)
        )
        self._decode = jit(functools.partial(_decode, module))
        self._dequantize = jax.jit(quantizer.dequantize)
        # The decoder's programs that a thread compiles, or has compiled, by the latents' shape.
        self._compiled: dict[tuple[int, ...], Future[None]] = {}

    def encode(
        self,
        images: UInt8[np.ndarray | Array, "B H W I"] | Any,
        noise_ids: Integer[np.ndarray, " B"] | Any = None,
        seed: int | Any = 0,
        stream: int = 0,
        side: int | None = None,
        *,
        deviation: bool = False,
    ) -> Encoded:
        """Encodes images. It does not wait for the device: reading a field of the result does.

        Args:
          images: uint8; height and width are multiples of the autoencoder's downsampling.
          noise_ids: a number for the draw from each image's posterior. The same (seed, stream, id)
            draws the same noise in any batch. With None, latents are the posterior's mean.
          seed: of the noise.
          stream: distinguishes images with the same ids; below 2^32.
          side: as for `check_images`.
          deviation: also return the posterior's deviation.

        Raises:
          UserError: as `check_images`; or `noise_ids` or `seed` is not integers.
        """
        images = check_images(images, self.config, side=side)
        keys = None
        if noise_ids is not None:
            ids = checks.array("noise_ids", noise_ids, "integers", (len(images),))
            key = jax.random.key(checks.whole("seed", seed))
            if stream:
                key = jax.random.fold_in(key, np.uint32(stream))
            fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
            keys = fold(key, jnp.asarray(ids, jnp.uint32))
        return self._run(self._encode_posterior if deviation else self._encode, images, keys)

    def compile_decoder(self, size: int, height: int, width: int) -> None:
        """Starts to compile, in a thread, the decoder for a batch of images that come later.

        A call that decodes such a batch waits for it. If compiling fails, that call compiles again,
        and raises the error. A process that ends also waits for it. JAX uses the program only in
        its default context, such as without `jax.default_matmul_precision`.

        Args:
          size: number of images.
          height: of an image in positions.
          width: likewise.
        """
        shape = padded_size(size, self.mesh), height, width, self.config.latent_channels
        if shape not in self._compiled:
            thread = ThreadPoolExecutor(1)
            self._compiled[shape] = thread.submit(self._compile_decoder, shape)
            thread.shutdown(wait=False)  # It ends with its work.

    def _compile_decoder(self, shape: tuple[int, ...]) -> None:
        batch = meshes.batch_sharding(self.mesh)
        with meshes.use_mesh(self.mesh):
            latents = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=batch)
            # JAX keeps it for later calls, which test_compiling_ahead.py checks.
            compile_beside_others(lambda: self._decode.lower(self.params, latents))

    def decode(
        self, indices: Shaped[np.ndarray | Array, "B L C"] | Any, grid: int | None = None
    ) -> UInt8[Array, "B H W I"]:
        """Indices of square images, in the autoencoder's channel order -> uint8 images.

        Args:
          indices: integers.
          grid: side in positions that the images must have; any by default.

        Raises:
          UserError: they are not integers from 0 to V - 1, there are none, the number of positions
            is not a square or that of `grid`, or the channels are not the autoencoder's.
        """
        shape = ("B", "L", "C") if grid is None else ("B", grid**2, self.config.index_channels)
        indices = check_values(indices, shape, self.quantizer)
        grid = round(indices.shape[1] ** 0.5)
        if grid * grid != indices.shape[1] or indices.shape[2] != self.config.index_channels:
            raise UserError(
                f"indices of {indices.shape[1]} positions, {indices.shape[2]} channels do not fit "
                f"this autoencoder: a square number and {self.config.index_channels} are needed"
            )
        with meshes.use_mesh(self.mesh):
            maps = unflatten_positions(indices, grid)
        return self._decode_indices(maps)

    def decode_maps(
        self, indices: Shaped[np.ndarray | Array, "B h w C"] | Any
    ) -> UInt8[Array, "B H W I"]:
        """Like `decode`, for images of any height and width."""
        shape = "B", "h", "w", self.config.index_channels
        return self._decode_indices(check_values(indices, shape, self.quantizer))

    def decode_latents(
        self, latents: Float[np.ndarray | Array, "B h w C"] | Any
    ) -> UInt8[Array, "B H W I"]:
        """Scaled latents -> uint8 images.

        Raises:
          UserError: they are not floats, do not have the autoencoder's channels, or there are none.
        """
        shape = "B", "h", "w", self.config.latent_channels
        return self._decoded(checks.array("latents", latents, "floats", shape))

    def _decode_indices(
        self, indices: Shaped[np.ndarray | Array, "B h w C"]
    ) -> UInt8[Array, "B H W I"]:
        with meshes.use_mesh(self.mesh):
            latents = self._dequantize(indices)
        return self._decoded(latents)

    def _decoded(self, latents: Float[np.ndarray | Array, "B h w C"]) -> UInt8[Array, "B H W I"]:
        shape = padded_size(len(latents), self.mesh), *latents.shape[1:]
        if compiled := self._compiled.get(shape):
            wait([compiled])
        return self._run(self._decode, latents)

    def _run(self, function: Callable[..., Any], *batched: Any) -> Any:
        """Calls a jitted `function(params, *batched)` on a padded batch, split over the mesh."""
        size = len(batched[0])
        padded = padded_size(size, self.mesh)
        with meshes.use_mesh(self.mesh):
            batched = jax.tree.map(lambda x: _pad(x, padded), batched)
            batched = jax.device_put(batched, meshes.batch_sharding(self.mesh))
            result = function(self.params, *batched)
            return jax.tree.map(lambda x: x[:size], result) if padded > size else result


def _encode(
    module: Autoencoder,
    quantizer: AnyQuantizer,
    with_deviation: bool,
    params: Mapping[str, Any],
    images: UInt8[Array, "B H W I"],
    keys: Shaped[Array, " B"] | None,
) -> Encoded:
    variables = {"params": params}
    posterior: Any = module.apply(variables, images_to_float(images), method="encode")
    latents = posterior.mean
    deviation = jnp.exp(0.5 * posterior.logvar)
    if keys is not None:
        noise = jax.vmap(lambda key: jax.random.normal(key, latents.shape[1:]))(keys)
        latents += deviation * noise
    latents *= module.config.scale
    return Encoded(
        latents,
        flatten_positions(quantizer.quantize(latents)),
        jnp.sum(quantizer.clipped(latents), axis=(1, 2)),
        jnp.isnan(latents).any(axis=(1, 2, 3)),
        deviation * module.config.scale if with_deviation else None,
    )


def _decode(
    module: Autoencoder, params: Mapping[str, Any], latents: Float[Array, "B h w C"]
) -> UInt8[Array, "B H W I"]:
    variables = {"params": params}
    images: Any = module.apply(variables, latents / module.config.scale, method="decode")
    return images_to_uint8(images)


def check_images(
    images: Any, config: AutoencoderConfig, *, single: bool = False, side: int | None = None
) -> UInt8[np.ndarray | Array, "*B H W I"]:
    """Checks images for an autoencoder.

    Args:
      images: an array, or anything that numpy makes an array of.
      config: the autoencoder's.
      single: also accept one image without a batch axis.
      side: height and width that the images must have; any by default.

    Raises:
      UserError: the images are not uint8, or do not have the autoencoder's channels or a size that
        its downsampling divides, or that of `side`, or there are none.
    """
    found = checks.to_array("images", images)
    shapes = "[B, H, W, channels]" + " or [H, W, channels]" * single
    if found.dtype != np.uint8 or found.ndim not in (3, 4)[not single :]:
        advice = ""
        if jnp.issubdtype(found.dtype, jnp.floating):
            advice = "; scale them to 0..255, round, and take .astype(np.uint8)"
        elif found.dtype == np.uint8 and found.ndim == 3:
            advice = "; images[None] is a batch of one"
        raise UserError(
            f"images must be uint8 of shape {shapes}, not {found.dtype} {list(found.shape)}{advice}"
        )
    if not found.size:
        raise UserError(f"images of shape {list(found.shape)} are empty; give at least one")
    if found.shape[-1] != config.image_channels:
        raise UserError(
            f"images have {found.shape[-1]} channels, the autoencoder takes "
            f"{config.image_channels}; set --config.data.image_channels"
        )
    height, width = found.shape[-3:-1]
    config.check_image_size(height, width)
    if side not in (None, height) or side not in (None, width):
        raise UserError(
            f"images are {height}x{width}, the model draws {side}x{side} pixels; "
            "tokenbridge_jax.data.images.prepare cuts a picture to a size, and `outpaint` accepts "
            "other sizes"
        )
    return found


def check_values(
    values: Any,
    shape: tuple[int | str, ...],
    quantizer: AnyQuantizer,
    name: str = "indices",
    used: Bool[np.ndarray, "..."] | None = None,
) -> Shaped[np.ndarray | Array, "..."]:
    """Checks indices, or latents with `Unquantized`, and returns them in its `index_dtype`.

    Args:
      values: the indices or latents.
      shape: as for `checks.array`.
      quantizer: says which of them they are, and the number of levels.
      name: of the argument.
      used: which positions matter; all by default.

    Raises:
      UserError: they are not integers, or floats, of this shape; or not from 0 to V - 1, or not
        finite.
    """
    of_latents = isinstance(quantizer, Unquantized)
    found = checks.array(name, values, "floats" if of_latents else "integers", shape)
    some = np.asarray(found)[... if used is None else used]
    if of_latents and not np.isfinite(some).all():
        raise UserError(f"{name} hold NaN or infinity")
    if not of_latents and some.size and (some.min() < 0 or some.max() >= quantizer.levels):
        raise UserError(
            f"indices must be from 0 to {quantizer.levels - 1}, not from {some.min()} to "
            f"{some.max()}"
        )
    return found.astype(quantizer.index_dtype)


def in_batches(
    function: Callable[[np.ndarray], Shaped[np.ndarray | Array, "b ..."]],
    values: Shaped[np.ndarray, "B ..."],
    size: int,
) -> Shaped[np.ndarray, "B ..."]:
    """Applies a function to `size` values at a time, and joins the results."""
    return np.concatenate([function(values[i : i + size]) for i in range(0, len(values), size)])


def padded_size(size: int, mesh: Mesh) -> int:
    """The next of the sizes 1, 2, 3, 4, 6, 8, 12, 16, 24, ... per batch shard of the mesh.

    At most a third of a batch is then padding, and few programs are compiled.
    """
    shards = meshes.batch_shards(mesh)
    share = max(1, -(-size // shards))
    step = 1 << max(0, (share - 1).bit_length() - 2)
    return -(-share // step) * step * shards


def _pad(x: Any, size: int) -> Any:
    """Appends copies of the first entry until the batch has `size` entries."""
    if len(x) == size:
        return x
    numpy = np if isinstance(x, np.ndarray) else jnp
    return numpy.concatenate([x, numpy.repeat(x[:1], size - len(x), axis=0)])
