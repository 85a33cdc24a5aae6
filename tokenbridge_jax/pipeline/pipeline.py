"""The trained line as one object: images -> indices, indices -> images, classes -> images."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int, Integer, UInt8

from tokenbridge_jax.autoencoder import load_autoencoder, read_description
from tokenbridge_jax.codec import (
    Codec,
    check_image_side,
    check_images,
    check_index_range,
    check_indices,
    in_batches,
    padded_size,
)
from tokenbridge_jax.data.class_names import class_number
from tokenbridge_jax.loss import position_nll
from tokenbridge_jax.model import TokenBridgeConfig, init_params
from tokenbridge_jax.pipeline import editing, pretrained
from tokenbridge_jax.pipeline.pretrained import load_weights
from tokenbridge_jax.runtime import checks, meshes, storage
from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.runtime.progress import Progress
from tokenbridge_jax.sampling.sampler import Known, Preview, generate
from tokenbridge_jax.sampling.schedule import SamplingSettings

MODEL_FILE = "model.json"

# A class by number or name, classes with their weights, or none: the model's unconditional images.
ClassId = int | str | Mapping[int | str, float | int] | None


@dataclasses.dataclass(frozen=True)
class ModelDescription:
    """What `WORKDIR/model.json` says: all that the checkpoints' arrays do not.

    Attributes:
      config: of the model.
      class_names: by label.
      autoencoder_hash: of the autoencoder whose latents the model was trained on.
    """

    config: TokenBridgeConfig
    class_names: tuple[str, ...]
    autoencoder_hash: str

    def to_json(self) -> dict[str, Any]:
        """The content of `model.json`."""
        return {
            "model": self.config.to_json(),
            "class_names": list(self.class_names),
            "autoencoder_hash": self.autoencoder_hash,
        }

    def save(self, workdir: epath.PathLike) -> None:
        """Writes `model.json`, whole or not at all."""
        storage.write_json(storage.as_path(workdir) / MODEL_FILE, self.to_json())

    @classmethod
    def load(cls, workdir: epath.PathLike) -> "ModelDescription":
        """Reads what `save` wrote.

        Raises:
          UserError: there is none, or it is damaged.
        """
        path = storage.as_path(workdir) / MODEL_FILE
        if not storage.exists(path):
            raise UserError(f"{workdir} holds no trained model; run `tokenbridge train` first")
        value = storage.read_json(path)
        try:
            return cls(
                TokenBridgeConfig.from_json(value["model"]),
                tuple(value["class_names"]),
                value["autoencoder_hash"],
            )
        except (KeyError, TypeError) as error:
            raise UserError(f"{path} does not describe a model ({error})") from error


def sample_indices(
    config: TokenBridgeConfig,
    params: dict[str, Any],
    labels: Int[np.ndarray, " N"] | Float[np.ndarray, "N classes"] | Any,
    settings: SamplingSettings,
    mesh: Mesh,
    *,
    seed: int | Any = 0,
    batch_size: int | Any = 64,
    first: int | Any = 0,
    known: Integer[np.ndarray, "N L C"] | Any = None,
    hidden: Bool[np.ndarray, "N L"] | Any = None,
    progress: bool = False,
    preview: Preview | Any = None,
    preview_every: int | Any = 1,
) -> Integer[np.ndarray, "N L C"]:
    """Samples any number of images, batch by batch, split over a mesh.

    Image i has sample index `first` + i: its indices do not depend on the batch size or the mesh.

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
      first: sample index of the first image, where these are a part of more.
      known: indices of images to be edited; at hidden positions they count for nothing. A batch has
        images with equally many hidden positions.
      hidden: the positions to draw, with `known`; all by default.
      progress: print rate and ETA to stderr.
      preview: called for one batch after the other as `generate` does, with indices on the host.
      preview_every: so many steps.

    Raises:
      UserError: batch size, seed, a number, a label, weights, an index, or a shape or dtype is not
        as it is said here.
    """
    batch_size = checks.at_least("sampling.batch_size", batch_size, 1)
    seed = checks.seed(seed)
    preview_every = checks.at_least("preview_every", preview_every, 1)
    checks.preview(preview)
    labels = checks.labels(labels, config.classes)
    first = checks.at_least("first", first, 0)
    if first + len(labels) > 2**31:
        raise UserError(f"first={first} leaves no numbers below 2**31 for {len(labels)} images")
    if known is None and hidden is not None:
        raise UserError("hidden says what to draw of known images: give known too")
    shape = (len(labels), config.positions, config.channels)
    if known is not None:
        known = np.asarray(checks.array("known", known, "integers", shape))
    if known is not None and hidden is not None:
        hidden = np.asarray(checks.array("hidden", hidden, "bool", shape[:2]))
        check_index_range(known[~hidden], config.levels)
    shards = meshes.batch_shards(mesh)
    sharding = meshes.batch_sharding(mesh)
    known = np.zeros(shape) if known is None else known
    known = known.astype(config.quantizer.index_dtype)
    result = known.copy()

    def draw(batch: np.ndarray, count: int, num_hidden: int) -> np.ndarray:
        """Draws the images of a batch; those after the first `count` only fill it."""
        batch_labels, numbers = jax.device_put((labels[batch], batch + first), sharding)
        given = None
        if hidden is not None:
            indices, mask = jax.device_put((known[batch], hidden[batch]), sharding)
            given = Known(indices, mask, num_hidden)

        def fetch(indices: jax.Array) -> np.ndarray:
            if not indices.is_fully_addressable:
                indices = multihost_utils.process_allgather(indices, tiled=True)
            return np.asarray(indices)[:count].astype(config.quantizer.index_dtype)

        indices = generate(
            config,
            params,
            batch_labels,
            numbers,
            settings,
            seed=seed,
            known=given,
            preview=preview and (lambda step, steps, shown: preview(step, steps, fetch(shown))),
            preview_every=preview_every,
        )
        return fetch(indices)

    counts = np.full(len(labels), config.positions) if hidden is None else hidden.sum(axis=1)
    with (
        meshes.use_mesh(mesh),
        Progress(len(labels), desc="sample", visible=progress) as bar,
    ):
        for num_hidden in np.unique(counts[counts > 0]):
            images = np.flatnonzero(counts == num_hidden).astype(np.int32)
            size = -(-min(batch_size, len(images)) // shards) * shards
            if hidden is not None:  # Groups have many sizes, and each size a program.
                size = min(-(-batch_size // shards) * shards, padded_size(size, shards))
            for start in range(0, len(images), size):
                chosen = images[start : start + size]
                batch = np.pad(chosen, (0, size - len(chosen)), mode="edge")
                result[chosen] = draw(batch, len(chosen), int(num_hidden))
                bar.update(len(chosen))
    return result


class Pipeline:
    """Autoencoder, quantizer and model of a workdir.

    Images are uint8 NHWC; indices are integers `[B, L, C]`, positions row-major, channels in the
    autoencoder's order.
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
        """Use `Pipeline.load` for a workdir.

        Args:
          description: of the model.
          params: of the model, laid out on `mesh`.
          codec: autoencoder and quantizer.
          mesh: devices to sample on.
          step: updates the parameters have seen.
          facts: for `save_pretrained`: `config` of the run, and `autoencoder`, the `extra` of its
            description.
        """
        self.description, self.params, self.codec = description, params, codec
        self.mesh, self.step, self.facts = mesh, step, facts or {}
        score = functools.partial(position_nll, description.config)
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
    ) -> "Pipeline":
        """Loads what the commands left in a workdir, or `save_pretrained` wrote, with the EMA
        parameters.

        Args:
          workdir: with `autoencoder/`, `model.json`, and `checkpoints/` or `model.safetensors`.
          step: which checkpoint; the latest if not given.
          dtype: compute dtype of the model, "bfloat16" or "float32"; by default the one it was
            trained in.
          precision: of the autoencoder, as `Codec` takes it.
          mesh: devices to use; all of this process's by default.

        Raises:
          UserError: something is missing or damaged, or the autoencoder is not the one the model
            was trained with.
        """
        checks.path("workdir", workdir)
        checks.mesh(mesh)
        step = None if step is None else checks.at_least("step", step, 0)
        workdir = storage.as_path(workdir)
        if not storage.exists(workdir):
            raise UserError(f"workdir {workdir} does not exist; check --workdir")
        mesh = mesh or meshes.make_mesh(devices=jax.local_devices())
        description = ModelDescription.load(workdir)
        if dtype is not None:
            config = dataclasses.replace(description.config, dtype=dtype)
            description = dataclasses.replace(description, config=config)
        config = description.config
        autoencoder_config, autoencoder_params = load_autoencoder(workdir / "autoencoder")
        described = read_description(workdir / "autoencoder")
        found, facts = described["hash"], {"autoencoder": described["extra"]}
        if found != description.autoencoder_hash:
            raise UserError(
                f"{workdir / 'autoencoder'} is not the autoencoder this model was trained with "
                f"(hash {found[:12]} instead of {description.autoencoder_hash[:12]}); restore it"
            )
        codec = Codec(
            autoencoder_config,
            autoencoder_params,
            config.quantizer,
            meshes.make_mesh(devices=jax.local_devices()),
            precision,
        )
        params, step = load_weights(workdir, abstract_sharded_params(config, mesh), step=step)
        if (workdir / "config.json").exists():
            facts["config"] = storage.read_json(workdir / "config.json")
        return cls(description, params, codec, mesh, step, facts)

    def save_pretrained(self, directory: epath.PathLike | Any) -> None:
        """Writes a folder that stands alone, for `load` and for a model hub (see `pretrained`).

        It is whole or not there. Every process of a job calls this, and one writes.

        Raises:
          UserError: the folder is there and not empty, or cannot be written.
        """
        checks.path("directory", directory)
        pretrained.save(self, directory)

    @property
    def config(self) -> TokenBridgeConfig:
        """Of the model."""
        return self.description.config

    @property
    def grid(self) -> int:
        """Positions a side of the model's images."""
        return round(self.config.positions**0.5)

    @property
    def patch_size(self) -> int:
        """Pixels a side of a position."""
        return self.codec.config.downsampling

    @property
    def image_size(self) -> int:
        """Pixels a side of the model's images."""
        return self.grid * self.patch_size

    def encode(self, images: UInt8[np.ndarray, "B H W I"] | Any) -> Integer[np.ndarray, "B L C"]:
        """Images of the size the model draws -> indices of their posterior means.

        Raises:
          UserError: the images are not uint8, not of this size or the autoencoder's channels, or
            there are none. (`data.images.prepare` cuts a picture; `codec.encode` takes any size.)
        """
        given = check_images(images, self.codec.config)
        mend = "tokenbridge_jax.data.images.prepare cuts a picture to a size"
        check_image_side(given, self.image_size, mend)
        return np.asarray(self.codec.encode(given).indices)

    def decode(self, indices: Integer[np.ndarray, "B L C"] | Any) -> UInt8[np.ndarray, "B H W I"]:
        """Indices -> images.

        Raises:
          UserError: they are no integers from 0 to V - 1 of the model's shape, or there are none.
        """
        shape = "B", self.config.positions, self.config.channels
        return np.asarray(self.codec.decode(check_indices(indices, shape, self.config.quantizer)))

    def generate(
        self,
        class_ids: Sequence[ClassId] | Any,
        *,
        seed: int | Any = 0,
        batch_size: int | Any = 64,
        progress: bool = False,
        preview: Preview | Any = None,
        preview_every: int | Any = 1,
        **settings: Any,
    ) -> UInt8[np.ndarray, "B H W I"]:
        """Samples one image for every class asked for.

        Args:
          class_ids: as `labels` takes them.
          seed: image i is the same for the same seed, whatever else is asked for beside it.
          batch_size: images at once.
          progress: print rate and ETA to stderr.
          preview: called with the steps done, their number, and the decoded images of a batch,
            where hidden positions are decoded from latents near 0; one batch after the other. It
            takes longer then: steps are started one by one.
          preview_every: so many steps, and after the last one.
          **settings: fields of `SamplingSettings`: num_iter, guidance, guidance_schedule,
            temperature, guidance_interval, order, choice_temperature.

        Raises:
          UserError: a class does not exist or a setting is out of range.
        """
        checks.preview(preview)
        indices = self.generate_indices(
            class_ids,
            seed=seed,
            batch_size=batch_size,
            progress=progress,
            preview=preview and (lambda done, steps, x: preview(done, steps, self.decode(x))),
            preview_every=preview_every,
            **settings,
        )
        return in_batches(self.decode, indices, batch_size)

    edit = editing.edit
    outpaint = editing.outpaint

    def generate_indices(
        self,
        class_ids: Sequence[ClassId] | Any,
        *,
        seed: int | Any = 0,
        batch_size: int | Any = 64,
        known: Integer[np.ndarray, "B L C"] | Any = None,
        hidden: Bool[np.ndarray, "B L"] | Any = None,
        progress: bool = False,
        preview: Preview | Any = None,
        preview_every: int | Any = 1,
        **settings: Any,
    ) -> Integer[np.ndarray, "B L C"]:
        """As `generate`, without decoding; with `known`, only the `hidden` positions are drawn."""
        return sample_indices(
            self.config,
            self.params,
            self.labels(class_ids),
            SamplingSettings(**settings),
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
        indices: Integer[np.ndarray, "B L C"] | Any,
        class_ids: Sequence[ClassId] | Any,
        *,
        hidden: Bool[np.ndarray, "B L"] | Any = None,
        batch_size: int | Any = 64,
    ) -> Float[np.ndarray, "B L C"]:
        """How likely the model finds the indices at hidden positions, given the visible ones.

        Every position is predicted by itself, each of its channels given those before it in the
        channel order. The sum over channels is what confidence order compares, at temperature 1
        and without guidance: the probabilities are those of sampling, with `first_token_quirk`
        where that is on.

        Args:
          indices: of whole images.
          class_ids: one for each image, as `labels` takes them.
          hidden: the positions to predict; all by default, so that only the class is given.
          batch_size: images at once.

        Returns:
          Log-probabilities in nats, float32, NaN at visible positions.

        Raises:
          UserError: a class does not exist, or shapes, levels or the batch size do not fit.
        """
        batch_size = checks.at_least("batch_size", batch_size, 1)
        labels = checks.labels(self.labels(class_ids), self.config.classes)
        shape = (len(labels), self.config.positions)
        each = "B", *shape[1:], self.config.channels
        indices = np.asarray(check_indices(indices, each, self.config.quantizer))
        if hidden is None:
            hidden = np.ones(shape, bool)
        hidden = np.asarray(checks.array("hidden", hidden, "bool", each[:2]))
        if indices.shape != (*shape, self.config.channels) or hidden.shape != shape:
            raise UserError(
                f"for {len(labels)} classes there must be indices of shape "
                f"{[*shape, self.config.channels]} and hidden of {list(shape)}, not "
                f"{list(indices.shape)} and {list(hidden.shape)}"
            )
        shards = meshes.batch_shards(self.mesh)
        size = -(-min(batch_size, len(labels)) // shards) * shards
        parts = []
        with meshes.use_mesh(self.mesh):
            for start in range(0, len(labels), size):
                rows = np.minimum(np.arange(start, start + size), len(labels) - 1)
                batch = jax.device_put(
                    (indices[rows], labels[rows], hidden[rows]), meshes.batch_sharding(self.mesh)
                )
                parts.append(-np.asarray(self._position_nll(self.params, *batch)))
        return np.concatenate(parts)[: len(labels)]

    def labels(
        self, class_ids: Sequence[ClassId] | Any
    ) -> Int[np.ndarray, " B"] | Float[np.ndarray, "B classes"]:
        """Classes as the model takes them: numbers, or weights if one is a mixture or None.

        Args:
          class_ids: each a number or a name, which `class_id` looks up, a dict of classes with
            weights, whose embeddings are mixed, or None: no class, where guidance changes nothing.

        Raises:
          UserError: a class does not exist, or there is none, or a mixture has no weight.
        """
        listed = checks.items(class_ids)
        if listed is None:
            raise UserError(f"{class_ids!r} is no list of classes; write [{class_ids!r}] for one")
        class_ids = listed
        if not len(class_ids):
            raise UserError("no classes were asked for; name at least one")
        if not any(c is None or isinstance(c, Mapping) for c in class_ids):
            plain: Any = class_ids
            return np.array([self.class_id(c) for c in plain], np.int32)
        weights = np.zeros((len(class_ids), self.config.classes), np.float32)
        for row, class_id in zip(weights, class_ids, strict=True):
            if isinstance(class_id, Mapping):
                for part, weight in class_id.items():
                    row[self.class_id(part)] += weight
                if not row.any():  # Which would stand for no class.
                    raise UserError("the weights of an image's classes must sum to 1, not to 0")
            elif class_id is not None:
                row[self.class_id(class_id)] = 1
        return weights

    def class_id(self, class_id: int | str) -> int:
        """The number of a class given by number or name (see `class_names.class_number`).

        Raises:
          UserError: there is no such class.
        """
        return class_number(class_id, self.description.class_names, self.config.classes)


def abstract_sharded_params(config: TokenBridgeConfig, mesh: Mesh) -> Any:
    """Shapes, dtypes and shardings of the model's parameters on a mesh."""
    with jax.enable_x64(False):
        boxed = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    return meshes.abstract_arrays(boxed, mesh)
