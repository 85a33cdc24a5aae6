"""Any number of images, drawn batch by batch on a mesh."""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Integer, Shaped

from tokenbridge_jax.codec import check_values, padded_size
from tokenbridge_jax.model_config import TokenBridgeConfig
from tokenbridge_jax.runtime import checks, meshes
from tokenbridge_jax.runtime.compilation_cache import compile_beside_others
from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.runtime.progress import Progress
from tokenbridge_jax.sampling.sampler import Known, Request, generate, generate_steps, lower
from tokenbridge_jax.sampling.schedule import SamplingSettings

BATCH_SIZE = 64  # Images at once, unless the caller says how many.

# Called with the steps done, the number of all steps, and what a batch is then.
Preview = Callable[[int, int, np.ndarray], None]


def generate_in_batches(
    config: TokenBridgeConfig,
    params: dict[str, Any],
    labels: Int[np.ndarray, " N"] | Float[np.ndarray, "N classes"] | Any,
    settings: SamplingSettings,
    mesh: Mesh,
    *,
    seed: int | Any = 0,
    batch_size: int | Any = BATCH_SIZE,
    known: Shaped[np.ndarray, "N L C"] | Any = None,
    hidden: Bool[np.ndarray, "N L"] | Any = None,
    progress: bool = False,
    preview: Preview | Any = None,
    preview_every: int | Any = 1,
) -> Shaped[np.ndarray, "N L C"]:
    """Samples the indices of any number of images, batch by batch, split over a mesh.

    Image i has sample index i: its indices do not depend on the batch size or the mesh.

    Args:
      config: the model.
      params: its parameters, laid out on `mesh`.
      labels: the class of every image, or its weights of the classes, which sum to 1, or are all 0
        for no class.
      settings: how to sample.
      mesh: the devices.
      seed: of all randomness.
      batch_size: images at once, over all devices; rounded up to a multiple of the mesh's batch
        shards, and no more than there are images. Edits fill up to the next of a few sizes.
      known: indices of images to be edited; at hidden positions they have no effect. A batch has
        images with equally many hidden positions.
      hidden: the positions to draw, with `known`; all by default.
      progress: print rate and ETA to stderr.
      preview: called for one batch after the other with what `generate_steps` yields, with indices
        on the host.
      preview_every: number of steps between two calls.

    Returns:
      Indices of the quantizer's `index_dtype`; a model of latents gives float32 latents instead.

    Raises:
      UserError: batch size, seed, a number, a label, weights, an index, or a shape or dtype is not
        as described here.
    """
    preview_every = checks.at_least("preview_every", preview_every, 1)
    checks.preview(preview)
    labels = checks.labels(labels, config.classes)
    if known is None and hidden is not None:
        raise UserError("hidden says what to draw of known images: give known too")
    shape = (len(labels), config.positions, config.channels)
    if hidden is not None:
        hidden = np.asarray(checks.array("hidden", hidden, "bool", shape[:2]))
    dtype = config.quantizer.index_dtype
    result = np.zeros(shape, dtype)
    if known is not None:
        visible = np.zeros(shape[:2], bool) if hidden is None else ~hidden
        result = np.array(check_values(known, shape, config.quantizer, "known", visible))
    requests = _requests(config, labels, mesh, seed, batch_size, known=result, hidden=hidden)
    with Progress(len(labels), desc="sample", visible=progress) as bar:
        for chosen, request in requests:
            with meshes.use_mesh(mesh):
                arguments = config, params, request, settings
                if preview is None:
                    drawn = meshes.on_host(generate(*arguments))
                else:
                    for done, steps, indices in generate_steps(*arguments, preview_every):
                        drawn = meshes.on_host(indices)
                        preview(done, steps, drawn[: len(chosen)].astype(dtype))
            result[chosen] = drawn[: len(chosen)]
            bar.update(len(chosen))
    return result


def start_batches(
    config: TokenBridgeConfig,
    params: dict[str, Any],
    labels: Int[np.ndarray, " N"] | Float[np.ndarray, "N classes"] | Any,
    settings: SamplingSettings,
    mesh: Mesh,
    *,
    seed: int | Any = 0,
    batch_size: int | Any = BATCH_SIZE,
    numbers: Sequence[int] | Integer[np.ndarray, " n"] | Any = None,
) -> Iterator[tuple[int, Shaped[Array, "size L C"]]]:
    """Starts the batches of `generate_in_batches` one after the other, in order.

    Other arguments and errors are those of `generate_in_batches`.

    Args:
      numbers: the images to draw, by their place in `labels`; all by default. They are drawn in
        batches as large as those of all images.

    Raises:
      UserError: a number is not from 0 to N - 1.

    Returns:
      An iterator of the number of images in a batch, and their indices on the devices, which may
      still be drawing them. Further rows fill the batch up.
    """
    labels = checks.labels(labels, config.classes)
    if numbers is not None:
        numbers = np.asarray(checks.to_array("numbers", numbers))
        whole = numbers.ndim == 1 and (numbers.dtype.kind in "iu" or not numbers.size)
        if not whole or ((numbers < 0) | (numbers >= len(labels))).any():
            raise UserError(f"numbers must be whole numbers from 0 to {len(labels) - 1}")
        numbers = numbers.astype(np.int32)
    requests = _requests(config, labels, mesh, seed, batch_size, numbers)

    def start(chosen: np.ndarray, request: Request) -> tuple[int, jax.Array]:
        with meshes.use_mesh(mesh):
            return len(chosen), generate(config, params, request, settings)

    return itertools.starmap(start, requests)


def compile_batch(
    config: TokenBridgeConfig,
    params: dict[str, Any],
    rows: int,
    settings: SamplingSettings,
    mesh: Mesh,
) -> None:
    """Compiles the program that draws a batch of whole images, of one class each.

    Args:
      config: the model.
      params: its parameters, which may be abstract arrays with shardings.
      rows: of the batch; see `batch_rows`.
      settings: how to sample.
      mesh: the devices.
    """
    images: Any = jax.ShapeDtypeStruct((rows,), np.int32, sharding=meshes.batch_sharding(mesh))
    with meshes.use_mesh(mesh):  # JAX keeps it for later calls of `generate`.
        compile_beside_others(lambda: lower(config, params, Request(images, images), settings))


def batch_rows(count: int, batch_size: int | Any, mesh: Mesh) -> int:
    """The rows of a batch of `generate_in_batches`, when it draws whole images.

    Raises:
      UserError: the batch size is not a whole number above 0.
    """
    batch_size = checks.at_least("sampling.batch_size", batch_size, 1)
    return meshes.round_up_batch(min(batch_size, count), mesh)


def _requests(
    config: TokenBridgeConfig,
    labels: np.ndarray,
    mesh: Mesh,
    seed: int | Any,
    batch_size: int | Any,
    numbers: Int[np.ndarray, " n"] | None = None,
    known: Any = None,
    hidden: Any = None,
) -> Iterator[tuple[Int[np.ndarray, " n"], Request]]:
    """The batches of `generate_in_batches`: which images they hold, and what to draw of them."""
    batch_size = checks.at_least("sampling.batch_size", batch_size, 1)
    seed = checks.seed(seed)
    put = functools.partial(jax.device_put, device=meshes.batch_sharding(mesh))
    counts = np.full(len(labels), config.positions) if hidden is None else hidden.sum(axis=1)

    def request(batch: np.ndarray, num_hidden: int) -> Request:
        made = Request(put(labels[batch]), put(batch), seed)
        if hidden is None:
            return made
        return made._replace(known=Known(put(known[batch]), put(hidden[batch]), num_hidden))

    def requests() -> Iterator[tuple[np.ndarray, Request]]:
        for num_hidden in np.unique(counts[counts > 0]).tolist():
            images = np.flatnonzero(counts == num_hidden).astype(np.int32)
            size = batch_rows(len(images), batch_size, mesh)
            if hidden is not None:  # Groups have many sizes, and each size needs a program.
                size = min(meshes.round_up_batch(batch_size, mesh), padded_size(size, mesh))
            images = images if numbers is None else numbers
            for start in range(0, len(images), size):
                chosen = images[start : start + size]
                # The last image fills the batch up.
                batch = np.pad(chosen, (0, size - len(chosen)), mode="edge")
                yield chosen, request(batch, num_hidden)

    return requests()
