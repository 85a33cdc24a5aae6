"""Autoencoder and model as one object: images -> indices, indices -> images, class -> image."""

import dataclasses
import functools
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Integer, Shaped, UInt8

import tokenbridge_jax.pipeline.editing as editing
import tokenbridge_jax.pipeline.pretrained as pretrained
import tokenbridge_jax.pipeline.programs as saved_programs
from tokenbridge_jax.autoencoder import load_autoencoder, read_description
from tokenbridge_jax.codec import Codec, check_values, in_batches
from tokenbridge_jax.loss import position_nll
from tokenbridge_jax.model import abstract_params
from tokenbridge_jax.model_config import DRAWING_FIELDS, HEADS, TokenBridgeConfig
from tokenbridge_jax.ops.precision import check_precision
from tokenbridge_jax.pipeline.description import ClassId, ModelDescription
from tokenbridge_jax.runtime import checks, meshes, storage
from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.runtime.progress import Progress
from tokenbridge_jax.sampling.batches import (
    BATCH_SIZE,
    Preview,
    batch_rows,
    compile_batch,
    generate_in_batches,
    start_batches,
)
from tokenbridge_jax.sampling.schedule import SamplingSettings, make_settings


class Pipeline:
    """Autoencoder, quantizer and model of a workdir.

    Images are uint8 NHWC. Indices are integers `[B, L, C]`, with positions row-major and channels
    in the autoencoder's order. If the model's head draws latents (`config.of_latents`), float32
    latents take the place of indices.

    Attributes:
      description: the model's config, class names and autoencoder hash.
      config: the model's.
      params: the model's, laid out on `mesh`.
      codec: autoencoder and quantizer.
      mesh: the devices that sample.
      step: number of updates that made the parameters.
      facts: for `save_pretrained`: `config` of the run, and `autoencoder`, the `extra` of its
        description.
      grid: side of the model's images in positions.
      patch_size: side of a position in pixels.
      image_size: side of the model's images in pixels.
    """

    def __init__(
        self,
        description: ModelDescription,
        params: dict[str, Any],
        codec: Codec,
        mesh: Mesh,
        step: int = 0,
        facts: Mapping[str, Any] | None = None,
    ):
        """`Pipeline.load` makes one from a workdir. The class describes the arguments."""
        self.description, self.config = description, description.config
        self.params, self.codec, self.mesh = params, codec, mesh
        self.step, self.facts = step, facts or {}
        self.grid = round(self.config.positions**0.5)
        self.patch_size = codec.config.downsampling
        self.image_size = self.grid * self.patch_size
        score = functools.partial(position_nll, self.config)
        self._position_nll = jax.jit(score, out_shardings=meshes.replicated(mesh))

    @classmethod
    def load(
        cls,
        workdir: epath.PathLike | Any,
        *,
        step: int | Any = None,
        dtype: str | None = None,
        precision: str = "float32",
        mesh: Mesh | Any = None,
        drawing: Mapping[str, Any] | Any = None,
        programs: bool = False,
        ahead: Mapping[str, Any] | Any = None,
    ) -> "Pipeline":
        """Loads a pipeline with the EMA parameters from a workdir or a `save_pretrained` folder.

        Args:
          workdir: has `autoencoder/`, `model.json`, and `checkpoints/` or `model.safetensors`.
          step: step of the checkpoint; by default the latest.
          dtype: compute dtype of the model, "bfloat16" or "float32"; by default that of training.
          precision: precision of the autoencoder, as in `Codec`.
          mesh: devices to use; by default all devices of this process.
          drawing: how the model draws, instead of the settings of training: `head_steps`,
            `head_clip`, `head_solver`, `head_proposals`, `reveal_steps` or `float8`.
          programs: also load the compiled programs of a saved folder, if they fit. They are machine
            code that runs with your rights, so only from someone whom you trust.
          ahead: what `generate` or `stream` will draw first, such as `{"count": 8,
            "num_iter": 32}`: the number of images, of one class each, `batch_size`, and settings.
            The programs for it are compiled while the weights are read, or later in a job of
            several processes. Not with `programs`.

        Raises:
          UserError: a file is missing or damaged, the model was trained with another autoencoder,
            or a setting makes no sense.
        """
        checks.path("workdir", workdir)
        checks.mesh(mesh)
        step = None if step is None else checks.at_least("step", step, 0)
        workdir = storage.as_path(workdir)
        if not storage.exists(workdir):
            raise UserError(f"workdir {workdir} does not exist; check --workdir")
        mesh = mesh or meshes.make_mesh(devices=jax.local_devices())
        description = ModelDescription.load(workdir)
        if not isinstance(drawing, Mapping | None):
            raise UserError(f"drawing={drawing!r} must be a dict, such as {{'head_steps': 50}}")
        changes = dict(drawing or {})
        if wrong := changes.keys() - {*DRAWING_FIELDS}:
            raise UserError(f"drawing has {min(wrong)}, not one of {', '.join(DRAWING_FIELDS)}")
        changes |= {} if dtype is None else {"dtype": dtype}
        if changes:
            config = dataclasses.replace(description.config, **changes)
            HEADS[config.head].check_drawing(description.config, config)
            description = dataclasses.replace(description, config=config)
        config, folder = description.config, workdir / "autoencoder"
        described = read_description(folder)
        found, facts = described["hash"], {"autoencoder": described["extra"]}
        if found != description.autoencoder_hash:
            raise UserError(
                f"{folder} is not the autoencoder this model was trained with "
                f"(hash {found[:12]} instead of {description.autoencoder_hash[:12]}); restore it"
            )
        check_precision(precision, "precision")
        if ahead is not None and programs:
            raise UserError("ahead compiles what programs=True reads: give one of them")
        first = None if ahead is None else _first_batch(ahead, mesh)
        if jax.process_count() > 1:
            first = None
        params, step, codec = _read_and_compile(workdir, config, mesh, step, precision, first)
        if (workdir / "config.json").exists():
            facts["config"] = storage.read_json(workdir / "config.json")
        pipeline = cls(description, params, codec, mesh, step, facts)
        if programs:
            saved_programs.load(pipeline, workdir)
        return pipeline

    def save_pretrained(
        self, directory: epath.PathLike | Any, *, programs: Sequence[Mapping[str, Any]] | Any = ()
    ) -> None:
        """Writes a folder that needs no other file, for `load` and model hubs (see `pretrained`).

        If writing fails, no folder is left. Every process of a job calls this; one writes.

        Args:
          directory: the folder.
          programs: arguments of calls of `generate`, in JSON, such as `{"class_ids": [0],
            "num_iter": 16}`. The folder gets the programs of these calls, compiled for these
            devices; `load(directory, programs=True)` uses them. Programs in memory are dropped.

        Raises:
          UserError: the folder exists and is not empty, or cannot be written, or an argument of a
            call is not as `generate` needs it.
        """
        checks.path("directory", directory)
        pretrained.save(
            pretrained.Trained(self.description, self.params, self.codec, self.step, self.facts),
            directory,
            lambda: saved_programs.compile_for(self, programs),
        )

    def encode(self, images: UInt8[np.ndarray, "B H W I"] | Any) -> Shaped[np.ndarray, "B L C"]:
        """Images of the size the model draws -> indices of the means of their posteriors.

        `data.images.prepare` crops a picture to this size; `codec.encode` accepts any size.

        Raises:
          UserError: the images are not uint8, have another size or number of channels, or there
            are none.
        """
        return np.asarray(self.codec.encode(images, side=self.image_size).indices)

    def decode(self, indices: Shaped[np.ndarray, "B L C"] | Any) -> UInt8[np.ndarray, "B H W I"]:
        """Indices -> images.

        Raises:
          UserError: they are not integers from 0 to V - 1, do not have the model's shape, or there
            are none.
        """
        return np.asarray(self.codec.decode(indices, grid=self.grid))

    def generate(
        self,
        class_ids: Sequence[ClassId] | Any,
        *,
        seed: int | Any = 0,
        batch_size: int | Any = BATCH_SIZE,
        progress: bool = False,
        preview: Preview | Any = None,
        preview_every: int | Any = 1,
        **settings: Any,
    ) -> UInt8[np.ndarray, "B H W I"]:
        """Samples one image for each class in the list.

        Args:
          class_ids: as in `labels`.
          seed: image i depends on the seed, on i and on its class, but not on the other images.
          batch_size: images at once.
          progress: print rate and ETA to stderr.
          preview: called with the steps done, the number of steps, and the decoded images of a
            batch, one batch after the other. Hidden positions are decoded from latents near 0. With
            a preview the host starts each step by itself, which takes longer.
          preview_every: number of steps between two calls; the last step always has a call.
          **settings: fields of `SamplingSettings`: num_iter, guidance, guidance_schedule,
            temperature, guidance_interval, guidance_every, order, choice_temperature.

        Raises:
          UserError: a class does not exist or a setting is out of range.
        """
        checks.preview(preview)
        checks.at_least("preview_every", preview_every, 1)
        make_settings(settings)  # `stream` takes more than that.
        if preview is None:
            parts = self.stream(
                class_ids, seed=seed, batch_size=batch_size, progress=progress, **settings
            )
            return np.concatenate(list(parts))
        checks.seed(seed)
        size = batch_rows(len(self.labels(class_ids)), batch_size, self.mesh)
        self.codec.compile_decoder(size, self.grid, self.grid)  # While the other is compiled.
        indices = self.generate_indices(
            class_ids,
            seed=seed,
            batch_size=batch_size,
            progress=progress,
            preview=lambda done, steps, x: preview(done, steps, self.decode(x)),
            preview_every=preview_every,
            **settings,
        )
        return in_batches(self.decode, indices, size)

    def stream(
        self,
        class_ids: Sequence[ClassId] | Any,
        *,
        seed: int | Any = 0,
        batch_size: int | Any = BATCH_SIZE,
        numbers: Sequence[int] | Integer[np.ndarray, " n"] | Any = None,
        progress: bool = False,
        **settings: Any,
    ) -> Generator[UInt8[np.ndarray, "b H W I"], None, None]:
        """Like `generate`, but yields the images batch by batch, in order.

        While the caller uses a batch, the devices draw the next one. All processes of a job get all
        images. The arrays are read-only.

        Other arguments and errors are those of `generate`, without previews.

        Args:
          numbers: the images to draw, by their place in `class_ids`; all by default. Their pixels
            are those of a call that draws all.

        Raises:
          UserError: a number is not from 0 to B - 1.
        """
        labels = self.labels(class_ids)
        started = start_batches(
            self.config,
            self.params,
            labels,
            make_settings(settings),
            self.mesh,
            seed=seed,
            batch_size=batch_size,
            numbers=numbers,
        )
        size = batch_rows(len(labels), batch_size, self.mesh)
        total = len(labels if numbers is None else numbers)
        return self._decoded(started, size, total, progress)

    def _decoded(
        self, started: Iterator[tuple[int, Array]], size: int, total: int, visible: bool
    ) -> Generator[UInt8[np.ndarray, "b H W I"], None, None]:
        images, wanted = None, 0
        if total:  # While the program that draws is compiled.
            self.codec.compile_decoder(size, self.grid, self.grid)
        with Progress(total, desc="sample", visible=visible and total > 0) as progress:
            for count, drawn in started:
                if images is not None:
                    yield np.asarray(images)[:wanted]
                with meshes.use_mesh(self.mesh):
                    indices = meshes.on_host(drawn)
                # With the rows that fill the batch up: a smaller batch might be rounded otherwise.
                images, wanted = self.codec.decode(indices, grid=self.grid), count
                progress.update(count)
            if images is not None:
                yield np.asarray(images)[:wanted]

    edit = editing.edit
    outpaint = editing.outpaint

    def generate_indices(
        self,
        class_ids: Sequence[ClassId] | Any,
        *,
        seed: int | Any = 0,
        batch_size: int | Any = BATCH_SIZE,
        known: Shaped[np.ndarray, "B L C"] | Any = None,
        hidden: Bool[np.ndarray, "B L"] | Any = None,
        progress: bool = False,
        preview: Preview | Any = None,
        preview_every: int | Any = 1,
        **settings: Any,
    ) -> Shaped[np.ndarray, "B L C"]:
        """Like `generate`, without decoding. With `known`, only `hidden` positions are drawn."""
        return generate_in_batches(
            self.config,
            self.params,
            self.labels(class_ids),
            make_settings(settings),
            self.mesh,
            seed=seed,
            batch_size=batch_size,
            known=known,
            hidden=hidden,
            progress=progress,
            preview=preview,
            preview_every=preview_every,
        )

    def log_probs(
        self,
        indices: Shaped[np.ndarray, "B L C"] | Any,
        class_ids: Sequence[ClassId] | Any,
        *,
        hidden: Bool[np.ndarray, "B L"] | Any = None,
        batch_size: int | Any = BATCH_SIZE,
    ) -> Float[np.ndarray, "B L C"]:
        """Computes the log-probabilities of indices at hidden positions, given the visible ones.

        Each position is predicted independently; each of its channels is predicted from the
        channels before it in the channel order. These are the probabilities of sampling at
        temperature 1 without guidance, with `first_token_quirk` if it is on. Confidence order
        compares their sum over channels. For latents they are log-densities, if the head has any.

        Args:
          indices: of whole images.
          class_ids: one for each image, as in `labels`.
          hidden: the positions to predict; all by default, so that only the class is given.
          batch_size: images at once.

        Returns:
          Log-probabilities in nats, float32, NaN at visible positions.

        Raises:
          UserError: a class does not exist, shapes, levels or the batch size do not fit, or the
            head has no probabilities.
        """
        batch_size = checks.at_least("batch_size", batch_size, 1)
        labels = checks.labels(self.labels(class_ids), self.config.classes)
        shape = len(labels), self.config.positions, self.config.channels
        indices = np.asarray(check_values(indices, shape, self.config.quantizer))
        hidden = np.ones(shape[:2], bool) if hidden is None else hidden
        hidden = np.asarray(checks.array("hidden", hidden, "bool", shape[:2]))
        sharding = meshes.batch_sharding(self.mesh)
        size = meshes.round_up_batch(min(batch_size, len(labels)), self.mesh)

        def score(rows: np.ndarray) -> np.ndarray:
            full = np.pad(rows, (0, size - len(rows)), mode="edge")
            batch = jax.device_put((indices[full], labels[full], hidden[full]), sharding)
            return -np.asarray(self._position_nll(self.params, *batch))[: len(rows)]

        with meshes.use_mesh(self.mesh):
            return in_batches(score, np.arange(len(labels)), size)

    def labels(
        self, class_ids: Sequence[ClassId] | Any
    ) -> Int[np.ndarray, " B"] | Float[np.ndarray, "B classes"]:
        """Numbers or weights of classes; see `ModelDescription.labels`."""
        return self.description.labels(class_ids)

    def class_id(self, class_id: int | str) -> int:
        """Returns the number of a class given by number or name (see `class_names`).

        Raises:
          UserError: there is no such class.
        """
        return self.description.class_id(class_id)


def _first_batch(ahead: Any, mesh: Mesh) -> tuple[int, SamplingSettings]:
    """The rows of a batch that `ahead` describes, and how it is drawn."""
    if not isinstance(ahead, Mapping) or "count" not in ahead:
        raise UserError(f"ahead={ahead!r} must be a dict with count, the number of images")
    settings = {key: ahead[key] for key in ahead if key not in ("count", "batch_size")}
    count = checks.at_least("count", ahead["count"], 1)
    rows = batch_rows(count, ahead.get("batch_size", BATCH_SIZE), mesh)
    return rows, make_settings(settings)


def _read_and_compile(
    workdir: epath.Path,
    config: TokenBridgeConfig,
    mesh: Mesh,
    step: int | None,
    precision: str,
    first: tuple[int, SamplingSettings] | None,
) -> tuple[dict[str, Any], int, Codec]:
    """The model's parameters with their step, and the codec, which are read at the same time.

    With a `first` batch its programs are compiled meanwhile, or read if they are on disk.
    """

    def load_codec() -> Codec:
        local = meshes.make_mesh(devices=jax.local_devices())
        parts = load_autoencoder(workdir / "autoencoder")
        codec = Codec(*parts, config.quantizer, local, precision)
        if first:
            grid = round(config.positions**0.5)
            codec.compile_decoder(first[0], grid, grid)
        return codec

    threads = ThreadPoolExecutor(2)
    loading = threads.submit(load_codec)
    try:
        abstract = abstract_params(config, mesh)
        if first:
            compiling = threads.submit(compile_batch, config, abstract, *first, mesh)
        params, step = pretrained.load_weights(workdir, abstract, step=step)
    except Exception:
        loading.result()  # An error of the autoencoder takes the place of the model's.
        raise
    finally:
        threads.shutdown(wait=False)
    codec = loading.result()
    if first:
        compiling.result()
    return params, step, codec
