"""The description of a model in a workdir's `model.json`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from etils import epath

from tokenbridge_jax.model import TokenBridgeConfig
from tokenbridge_jax.runtime import storage
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
