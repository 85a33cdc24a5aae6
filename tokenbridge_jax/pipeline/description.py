"""The description of a model in a workdir's `model.json`."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float, Int

from tokenbridge_jax.data.class_names import class_number
from tokenbridge_jax.model_config import TokenBridgeConfig
from tokenbridge_jax.runtime import checks, storage
from tokenbridge_jax.runtime.errors import UserError

MODEL_FILE = "model.json"

# A class by number or name; several classes with weights; or None for unconditional images.
ClassId = int | str | Mapping[int | str, float | int] | None


@dataclasses.dataclass(frozen=True)
class ModelDescription:
    """The content of `WORKDIR/model.json`: all that the arrays of the checkpoints do not say.

    Attributes:
      config: of the model.
      class_names: one for each label.
      autoencoder_hash: hash of the autoencoder whose latents the model was trained on.
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
        """Writes `model.json`. If this fails, an existing file stays as it is."""
        storage.write_json(storage.as_path(workdir) / MODEL_FILE, self.to_json())

    @classmethod
    def load(cls, workdir: epath.PathLike) -> "ModelDescription":
        """Reads `model.json`.

        Raises:
          UserError: the file does not exist or is damaged.
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

    def labels(
        self, class_ids: Sequence[ClassId] | Any
    ) -> Int[np.ndarray, " B"] | Float[np.ndarray, "B classes"]:
        """Converts classes to the model's input: numbers, or weights if one is a mixture or None.

        Args:
          class_ids: each is a number or a name, which `class_id` looks up; or a dict of classes
            with weights, which mixes their embeddings; or None for no class, where guidance has no
            effect.

        Raises:
          UserError: a class does not exist, the list is empty, or the weights of a mixture are 0.
        """
        listed = checks.items(class_ids)
        if listed is None:
            raise UserError(f"{class_ids!r} is no list of classes; write [{class_ids!r}] for one")
        if not listed:
            raise UserError("no classes were asked for; name at least one")
        if not any(c is None or isinstance(c, Mapping) for c in listed):
            return np.array([self.class_id(c) for c in listed], np.int32)
        weights = np.zeros((len(listed), self.config.classes), np.float32)
        for row, class_id in zip(weights, listed, strict=True):
            if isinstance(class_id, Mapping):
                for part, weight in class_id.items():
                    row[self.class_id(part)] += weight
                if not row.any():  # Zeros stand for no class.
                    raise UserError("the weights of an image's classes must sum to 1, not to 0")
            elif class_id is not None:
                row[self.class_id(class_id)] = 1
        return weights

    def class_id(self, class_id: int | str) -> int:
        """Returns the number of a class given by number or name (see `class_names`).

        Raises:
          UserError: there is no such class.
        """
        return class_number(class_id, self.class_names, self.config.classes)
