"""The trained line as one object: images -> indices, indices -> images, classes -> images."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Int, Integer, UInt8

from tokenbridge_jax import io, parallel
from tokenbridge_jax.autoencoder import load_autoencoder, read_description
from tokenbridge_jax.codec import Codec
from tokenbridge_jax.errors import UserError
from tokenbridge_jax.model import TokenBridgeConfig, init_params
from tokenbridge_jax.progress import Progress
from tokenbridge_jax.sampling import SamplingSettings, generate
from tokenbridge_jax.training.checkpoints import latest_step, load_params

MODEL_FILE = "model.json"


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

    def save(self, workdir: epath.PathLike) -> None:
        """Writes `model.json`, whole or not at all."""
        value = {
            "model": self.config.to_json(),
            "class_names": list(self.class_names),
            "autoencoder_hash": self.autoencoder_hash,
        }
        io.write_json(epath.Path(workdir) / MODEL_FILE, value)

    @classmethod
    def load(cls, workdir: epath.PathLike) -> "ModelDescription":
        """Reads what `save` wrote.

        Raises:
          UserError: there is none, or it is damaged.
        """
        path = epath.Path(workdir) / MODEL_FILE
        if not path.exists():
            raise UserError(f"{workdir} holds no trained model; run `tokenbridge train` first")
        value = io.read_json(path)
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
    labels: Int[np.ndarray, " N"],
    settings: SamplingSettings,
    mesh: Mesh,
    *,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = False,
) -> Integer[np.ndarray, "N L C"]:
    """Samples any number of images, batch by batch, split over a mesh.

    Image i has sample index i: its indices do not depend on the batch size or the mesh.

    Args:
      config: the model.
      params: its parameters, laid out on `mesh`.
      labels: the class of every image.
      settings: how to sample.
      mesh: the devices.
      seed: of all randomness.
      batch_size: images at once, over all devices; rounded up to a multiple of the mesh's batch
        shards, and no more than there are images.
      progress: print rate and ETA to stderr.

    Raises:
      UserError: batch size, seed or a label is out of range.
    """
    if batch_size < 1:
        raise UserError(f"sampling.batch_size={batch_size} must be at least 1")
    if not 0 <= seed < 2**32:
        raise UserError(f"seed={seed} must be from 0 to 2**32 - 1")
    if labels.min() < 0 or labels.max() >= config.classes:
        raise UserError(f"labels must be from 0 to {config.classes - 1}, the model's classes")
    shards = parallel.batch_shards(mesh)
    batch_size = -(-min(batch_size, len(labels)) // shards) * shards
    sharding = parallel.batch_sharding(mesh)
    drawn = []
    with (
        parallel.use_mesh(mesh),
        Progress(len(labels), desc="sample", visible=progress) as bar,
    ):
        for start in range(0, len(labels), batch_size):
            numbers = np.arange(start, start + batch_size, dtype=np.int32)
            batch_labels = labels[np.minimum(numbers, len(labels) - 1)].astype(np.int32)
            batch_labels, numbers = jax.device_put((batch_labels, numbers), sharding)
            indices = generate(config, params, batch_labels, numbers, settings, seed=seed)
            if not indices.is_fully_addressable:
                indices = multihost_utils.process_allgather(indices, tiled=True)
            drawn.append(np.asarray(indices)[: len(labels) - start])
            bar.update(len(drawn[-1]))
    return np.concatenate(drawn).astype(config.quantizer.index_dtype)


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
    ):
        """Use `Pipeline.load` for a workdir.

        Args:
          description: of the model.
          params: of the model, laid out on `mesh`.
          codec: autoencoder and quantizer.
          mesh: devices to sample on.
          step: updates the parameters have seen.
        """
        self.description, self.params, self.codec = description, params, codec
        self.mesh, self.step = mesh, step

    @classmethod
    def load(
        cls,
        workdir: epath.PathLike,
        *,
        step: int | None = None,
        dtype: str | None = None,
        mesh: Mesh | None = None,
    ) -> "Pipeline":
        """Loads what the commands left in a workdir, with the EMA parameters.

        Args:
          workdir: with `autoencoder/`, `model.json` and `checkpoints/`.
          step: which checkpoint; the latest if not given.
          dtype: compute dtype of the model, "bfloat16" or "float32"; by default the one it was
            trained in. The autoencoder computes in float32, as it does for shards.
          mesh: devices to use; all of this process's by default.

        Raises:
          UserError: something is missing or damaged, or the autoencoder is not the one the model
            was trained with.
        """
        workdir = epath.Path(workdir)
        if not workdir.exists():
            raise UserError(f"workdir {workdir} does not exist; check --workdir")
        mesh = mesh or parallel.make_mesh(devices=jax.local_devices())
        description = ModelDescription.load(workdir)
        if dtype is not None:
            config = dataclasses.replace(description.config, dtype=dtype)
            description = dataclasses.replace(description, config=config)
        config = description.config
        autoencoder_config, autoencoder_params = load_autoencoder(workdir / "autoencoder")
        found = read_description(workdir / "autoencoder")["hash"]
        if found != description.autoencoder_hash:
            raise UserError(
                f"{workdir / 'autoencoder'} is not the autoencoder this model was trained with "
                f"(hash {found[:12]} instead of {description.autoencoder_hash[:12]}); restore it"
            )
        codec = Codec(
            autoencoder_config,
            autoencoder_params,
            config.quantizer,
            parallel.make_mesh(devices=jax.local_devices()),
        )
        checkpoints = workdir / "checkpoints"
        latest = latest_step(checkpoints)
        if step is not None and not (checkpoints / str(step)).exists():
            there = sorted(int(path.name) for path in checkpoints.iterdir() if path.name.isdigit())
            raise UserError(
                f"there is no checkpoint of step {step}; there are {', '.join(map(str, there))}"
            )
        step = latest if step is None else step
        params = load_params(checkpoints, abstract_sharded_params(config, mesh), step=step)
        return cls(description, params, codec, mesh, step)

    @property
    def config(self) -> TokenBridgeConfig:
        """Of the model."""
        return self.description.config

    def encode(self, images: UInt8[np.ndarray, "B H W I"]) -> Integer[np.ndarray, "B L C"]:
        """Images of the autoencoder's size -> indices of their posterior means."""
        return np.asarray(self.codec.encode(images).indices)

    def decode(self, indices: Integer[np.ndarray, "B L C"]) -> UInt8[np.ndarray, "B H W I"]:
        """Indices -> images."""
        return np.asarray(self.codec.decode(indices))

    def generate(
        self,
        class_ids: Sequence[int | str],
        *,
        seed: int = 0,
        batch_size: int = 64,
        progress: bool = False,
        **settings: Any,
    ) -> UInt8[np.ndarray, "B H W I"]:
        """Samples one image for every class asked for.

        Args:
          class_ids: classes by number or name.
          seed: image i is the same for the same seed, whatever else is asked for beside it.
          batch_size: images at once.
          progress: print rate and ETA to stderr.
          **settings: fields of `SamplingSettings`: num_iter, guidance, guidance_schedule,
            temperature, guidance_interval.

        Raises:
          UserError: a class does not exist or a setting is out of range.
        """
        indices = self.generate_indices(
            class_ids, seed=seed, batch_size=batch_size, progress=progress, **settings
        )
        batches = range(0, len(indices), batch_size)
        return np.concatenate([self.decode(indices[i : i + batch_size]) for i in batches])

    def generate_indices(
        self,
        class_ids: Sequence[int | str],
        *,
        seed: int = 0,
        batch_size: int = 64,
        progress: bool = False,
        **settings: Any,
    ) -> Integer[np.ndarray, "B L C"]:
        """As `generate`, without decoding."""
        if not len(class_ids):
            raise UserError("no classes were asked for; name at least one")
        return sample_indices(
            self.config,
            self.params,
            np.array([self.class_id(c) for c in class_ids], np.int32),
            SamplingSettings(**settings),
            self.mesh,
            seed=seed,
            batch_size=batch_size,
            progress=progress,
        )

    def class_id(self, class_id: int | str) -> int:
        """The number of a class given by number or name.

        Raises:
          UserError: there is no such class.
        """
        names = self.description.class_names
        if class_id in names:
            return names.index(str(class_id))
        try:
            number = int(class_id)
        except ValueError:
            raise UserError(f"there is no class named '{class_id}' among {len(names)}") from None
        if not 0 <= number < self.config.classes:
            raise UserError(
                f"class {number} does not exist; classes are 0..{self.config.classes - 1}"
            )
        return number


def abstract_sharded_params(config: TokenBridgeConfig, mesh: Mesh) -> Any:
    """Shapes, dtypes and shardings of the model's parameters on a mesh."""
    boxed = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    return parallel.abstract_arrays(boxed, mesh)
