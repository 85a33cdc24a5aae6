"""The networks of the metrics: public weights, imported once into a folder of this machine.

- FID, sFID, IS, KID, precision, recall: `pt_inception-2015-12-05-6726825d.pth` of
  github.com/mseitzer/pytorch-fid (releases, fid_weights);
- FD_DINOv2: `dinov2_vitl14_pretrain.pth` of dl.fbaipublicfiles.com/dinov2/dinov2_vitl14, or
  `model.safetensors` of huggingface.co/facebook/dinov2-large;
- LPIPS: `vgg16-397923af.pth`, `alexnet-owt-7be5be79.pth` of download.pytorch.org/models, and
  `vgg.pth`, `alex.pth` of the PyPI package lpips (lpips/weights/v0.1).
"""

import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from tokenbridge_jax.evaluation import dinov2, inception, lpips
from tokenbridge_jax.evaluation.features import (
    DinoExtractor,
    Extractor,
    InceptionExtractor,
    NetworkExtractor,
    ThumbnailExtractor,
)
from tokenbridge_jax.runtime import checks, safetensors_file, storage
from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.torch_bridge import state_dicts
from tokenbridge_jax.torch_bridge.kinds import recognise

# The SHA-256 of the published files, or its first digits if only those are published.
PUBLISHED: dict[str, tuple[str, ...]] = {
    "inception": ("6726825d",),
    # facebookresearch's file, and Hugging Face's.
    "dinov2": (
        "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
        "399fba97a95f22c36834418bc69373364a99af3a1153da1c0fb31db567c92e23",
    ),
    "vgg16": ("397923af",),
    "alexnet": ("7be5be79",),
    "lpips_vgg": ("a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",),
    "lpips_alex": ("df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0",),
}
# The files of every network.
PARTS = {
    "inception": ("inception",),
    "dinov2": ("dinov2",),
    "lpips_vgg": ("vgg16", "lpips_vgg"),
    "lpips_alex": ("alexnet", "lpips_alex"),
}
# The extractors that need a network, and the network's name for people.
_EXTRACTORS: dict[str, tuple[type[NetworkExtractor], str]] = {
    "inception": (InceptionExtractor, "Inception"),
    "dinov2": (DinoExtractor, "DINOv2"),
}
# Names of extractors.
FEATURES = (*_EXTRACTORS, "thumbnails")

FOLDER_VARIABLE = "TOKENBRIDGE_NETWORKS"
NO_FOLDER = (
    "there is no folder for networks, because this user has no home: name one by --networks, or "
    f"set {FOLDER_VARIABLE} to one"
)


class Network(NamedTuple):
    """An imported network.

    Attributes:
      params: its parameters.
      facts: the SHA-256 of its files, and whether these are the published ones.
    """

    params: dict[str, Any]
    facts: dict[str, Any]


def default_folder() -> Path | None:
    """$TOKENBRIDGE_NETWORKS, or a folder in the user's cache; None for a user without a home."""
    if folder := os.environ.get(FOLDER_VARIABLE):
        return Path(storage.expand(folder))
    cache = storage.user_cache()
    return cache and cache / "tokenbridge_jax" / "networks"


def import_network(name: str, paths: dict[str, str], folder: Path, *, unpublished: bool) -> Path:
    """Checks a network's public files and converts them for `load_network`.

    Args:
      name: one of `PARTS`.
      paths: the file of every part.
      folder: to write to.
      unpublished: accept files whose SHA-256 is not the published one, such as conversions to
        `.safetensors` or `.npz`. The facts of results then say so.

    Returns:
      The path of the written file.

    Raises:
      UserError: a file contains no weights, is not the published one, or is of another network.
    """
    for path in paths.values():
        recognise(Path(path))
    digests = {part: storage.sha256(path) for part, path in paths.items()}
    changed = [part for part in digests if not digests[part].startswith(PUBLISHED[part])]
    if changed and not unpublished:
        raise UserError(
            f"{paths[changed[0]]} is not the published file: its SHA-256 begins with "
            f"{digests[changed[0]][:8]}, not {' or '.join(x[:8] for x in PUBLISHED[changed[0]])}; "
            "download it again (--unpublished accepts a conversion)"
        )
    tensors = [state_dicts.read(path)["model"] for path in paths.values()]
    try:
        if name == "inception":
            params = inception.import_inception(tensors[0])
        elif name == "dinov2":
            params = dinov2.import_dinov2(tensors[0], dinov2.VIT_L)
        else:
            params = lpips.import_lpips(tensors[0], tensors[1], name.removeprefix("lpips_"))
    except UserError as error:
        raise UserError(f"{', '.join(paths.values())}: {error}") from error
    for layer, values in params.items():
        if not all(np.isfinite(array).all() for array in values.values()):
            raise UserError(f"{', '.join(paths.values())}: {layer} contains NaN or infinity")
    target = folder / f"{name}.safetensors"
    safetensors_file.write(target, params)
    storage.write_json(_facts_file(target), {"published": not changed, "sha256": digests})
    return target


def load_network(name: str, folder: Path | None) -> Network | None:
    """Reads a network that `import_network` wrote; None if it or the folder does not exist.

    Raises:
      UserError: its files are damaged.
    """
    if folder is None or not is_imported(name, folder):
        return None
    path = folder / f"{name}.safetensors"
    facts = storage.read_json(_facts_file(path))
    weights = {f"{part}_sha256": digest for part, digest in facts["sha256"].items()}
    return Network(safetensors_file.read(path), weights | {f"{name}_published": facts["published"]})


def is_imported(name: str, folder: Path) -> bool:
    """Whether `import_network` has written a network there."""
    path = folder / f"{name}.safetensors"
    # Not `Path.exists`, which raises an error in a folder that this user may not read.
    return os.path.exists(path) and os.path.exists(_facts_file(path))


def load_lpips(folder: Path | None, side: int) -> dict[str, Network]:
    """The imported networks of LPIPS, by name, without those that need images above `side`."""
    loaded = {name: load_network(f"lpips_{name}", folder) for name in lpips.NETWORKS}
    return {name: x for name, x in loaded.items() if x and side >= lpips.SMALLEST[name]}


def make_extractor(
    name: str, folder: Path | None, *, batch_size: int | None = None, precision: str = "high"
) -> Extractor:
    """Makes an extractor of features.

    Args:
      name: one of `FEATURES`.
      folder: of imported networks, if there is one.
      batch_size: images per batch over the devices of a process; by default 64 per accelerator, 16
        on CPUs.
      precision: of the network's products, one of `inception.PRECISIONS`.

    Raises:
      UserError: there are no such features, the network is not imported, or the batch size is below
        1.
    """
    if name not in FEATURES:
        raise UserError(f"evaluation.features='{name}' is not one of {', '.join(FEATURES)}")
    if batch_size is not None:
        checks.at_least("--batch_size", batch_size, 1)
    if name == "thumbnails":
        return ThumbnailExtractor()
    extractor, title = _EXTRACTORS[name]
    network = load_network(name, folder)
    if folder is None:
        raise UserError(f"{NO_FOLDER}; --features thumbnails needs none")
    if network is None:
        raise UserError(
            f"{folder} holds no {title} network: `tokenbridge import-metrics --help` says how to "
            "import it; --features thumbnails needs none"
        )
    if batch_size is None:
        devices = jax.local_devices()
        batch_size = 16 if devices[0].platform == "cpu" else 64 * len(devices)
    return extractor(
        network.params, batch_size=batch_size, precision=precision, facts=network.facts
    )


def _facts_file(path: Path) -> Path:
    return path.with_suffix(".json")
