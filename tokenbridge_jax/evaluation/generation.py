"""Samples to score: drawn once, stored as indices, decoded whenever their images are needed.

At size L, the indices of an image take 4 kB. Each batch is stored, so a run that was stopped
continues with the next batch.
"""

import hashlib
import io as bytes_io
import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import Int, Shaped

from tokenbridge_jax.codec import Codec
from tokenbridge_jax.evaluation.image_sets import ImageSet, rgb
from tokenbridge_jax.model_config import DRAWING_FIELDS
from tokenbridge_jax.pipeline import Pipeline
from tokenbridge_jax.runtime import meshes, processes, safetensors_file, storage
from tokenbridge_jax.runtime.differences import first_difference
from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.runtime.progress import Progress, say
from tokenbridge_jax.sampling.batches import start_batches
from tokenbridge_jax.sampling.schedule import SamplingSettings

# "balanced": all classes have equally many images (or one more), as for ADM, MAR and TokenBridge.
# "random": every image has a random class, as for LlamaGen.
LABEL_POLICIES = ("balanced", "random")

# Says in a folder of samples what determines them.
FACTS_FILE = "settings.json"

ROUNDING = "round(127.5 (clip(x, -1, 1) + 1)) to uint8"


def make_labels(policy: str, count: int, classes: int, seed: int) -> Int[np.ndarray, " N"]:
    """The class of every sample, in a random order, so that no file is sorted by class.

    With "balanced", every class occurs once before any class occurs again. A larger count adds
    labels at the end and does not change the first ones.
    """
    rng = np.random.default_rng(seed)
    if policy == "random":
        return rng.integers(0, classes, count).astype(np.int32)
    rounds = [rng.permutation(classes) for _ in range(-(-count // classes))]
    return np.concatenate(rounds)[:count].astype(np.int32)


def describe(
    pipeline: Pipeline, settings: SamplingSettings, *, labels: Mapping[str, Any], seed: int
) -> dict[str, Any]:
    """Everything that determines the samples, except their number; it is reported with results.

    Every process of a job must call this.

    Args:
      pipeline: what draws them.
      settings: how it draws.
      labels: which class an image has, as JSON.
      seed: of all randomness.

    Raises:
      UserError: the weights contain NaN or infinity.
    """
    model = json.dumps(pipeline.description.to_json(), sort_keys=True)
    return {
        **labels,
        "checkpoint_step": pipeline.step,
        "weights": "EMA",
        "weights_sha256": weights_sha256(pipeline.params, pipeline.step),
        "drawing": {name: getattr(pipeline.config, name) for name in DRAWING_FIELDS},
        "model_json_sha256": hashlib.sha256(model.encode()).hexdigest(),
        "autoencoder_sha256": pipeline.description.autoencoder_hash,
        "model_dtype": pipeline.config.dtype,
        "sampling": settings.to_json(),
        "seed": seed,
        "image_size": f"{pipeline.image_size}x{pipeline.image_size}",
        "rounding": ROUNDING,
    }


def weights_sha256(params: Any, step: int) -> str:
    """A SHA-256 of the parameters, which does not depend on the devices that hold them.

    Raises:
      UserError: some are NaN or infinite.
    """
    whole = jax.tree.map(meshes.on_host, params)
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(whole)):
        raise UserError(f"the weights of step {step} hold NaN or infinity; name another --step")
    return safetensors_file.sha256(whole)


def sample_folder(folder: epath.PathLike, facts: dict[str, Any]) -> epath.Path:
    """The folder within `folder` that holds only samples with these facts."""
    return epath.Path(folder) / f"samples_{facts['checkpoint_step']}_{short_hash(facts)}"


def claim_folder(folder: epath.PathLike, facts: Mapping[str, Any], *, write: bool = True) -> None:
    """Keeps images of other facts out of a folder, by a file in it with the facts.

    Every process of a job must call this; the first one looks and writes.

    Args:
      folder: what to claim.
      facts: everything that determines the images, as JSON.
      write: False only looks, to refuse early what would be refused.

    Raises:
      UserError: the folder holds images of other facts, or files of unknown ones.
    """
    refusal = ""
    if jax.process_index() == 0:
        try:
            _claim(epath.Path(folder), json.loads(json.dumps(facts)), write)
        except UserError as error:
            refusal = str(error)
    if refusal := processes.gather(refusal)[0]:
        raise UserError(refusal)


def _claim(folder: epath.Path, facts: Mapping[str, Any], write: bool = True) -> None:
    path, mend = folder / FACTS_FILE, "remove the folder, or name another --output"
    # Before the look for the facts: another job may be the first to write them now.
    try:
        held = folder.exists() and any(not file.name.startswith(".") for file in folder.iterdir())
    except OSError as error:
        raise storage.read_error(folder, error) from error
    if not storage.exists(path):
        if held:
            raise UserError(
                f"{folder} holds files, but no {FACTS_FILE} with their settings; {mend}"
            )
        if not write:
            return
        storage.write_json(path, facts, storage.create_bytes)
    kept = storage.read_json(path)  # Of the job that was first, perhaps not of this one.
    if not isinstance(kept, dict):
        raise UserError(f"{path} does not hold settings; {mend}")
    if difference := first_difference(kept, facts):
        name, theirs, ours = difference
        raise UserError(
            f"the images in {folder} have {name} = {theirs} but this run has {ours}; set it back, "
            f"{mend}"
        )


def short_hash(facts: dict[str, Any]) -> str:
    """A hash of facts, twelve hexadecimal digits."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def draw(
    pipeline: Pipeline,
    folder: epath.Path,
    labels: Int[np.ndarray, " N"],
    settings: SamplingSettings,
    *,
    seed: int,
    batch_size: int,
) -> Shaped[np.ndarray, "N L C"]:
    """The indices of all samples. Samples that the folder already holds are not drawn again.

    Every process of a job must call this; the first one writes the files and prints the progress.
    `folder`, from `sample_folder`, may hold more than N samples. `batch_size`, over all devices, is
    rounded up to a multiple of the batch shards.

    Raises:
      UserError: the folder's files are damaged or incomplete, the folder cannot be written, or it
        is not the same folder for all processes.
    """
    parts = _read_parts(folder)
    done = sum(map(len, parts))
    draws = done < len(labels)
    if not draws:
        say(f"{folder} holds {done} samples, {len(labels)} are asked for: nothing to draw")
    elif done:
        say(f"{folder} holds {done} samples: continuing from there")
    if len(set(processes.gather(str(done)))) > 1:
        raise UserError(f"the processes of this job see different files in {folder}: share it")
    started = start_batches(
        pipeline.config,
        pipeline.params,
        labels,
        settings,
        pipeline.mesh,
        seed=seed,
        batch_size=batch_size,
        numbers=range(done, len(labels)),
    )
    first = jax.process_index() == 0
    with Progress(len(labels), desc="sample", done=done, visible=first and draws) as bar:
        for count, drawn in started:
            with meshes.use_mesh(pipeline.mesh):
                indices = meshes.on_host(drawn)[:count]
            indices = indices.astype(pipeline.config.quantizer.index_dtype)
            if first:
                storage.write_npy(folder / _part_name(sum(map(len, parts))), indices)
            parts.append(indices)
            bar.update(count)
    return np.concatenate(parts)[: len(labels)]


def _read_parts(folder: epath.Path) -> list[Shaped[np.ndarray, "n L C"]]:
    parts: list[np.ndarray] = []
    for path in sorted(folder.glob("indices_*.npy")):
        with storage.npy_errors(path, "remove it, and run this again to draw its samples again"):
            part = np.load(bytes_io.BytesIO(path.read_bytes()), allow_pickle=False)
        if path.name != _part_name(sum(map(len, parts))):
            raise UserError(f"samples before {path} are missing; remove it and those after it")
        parts.append(part)
    return parts


def _part_name(start: int) -> str:
    return f"indices_{start:08d}.npy"


def decoded_images(
    codec: Codec,
    indices: Shaped[np.ndarray, "N L C"],
    path: epath.PathLike,
    facts: Mapping[str, Any] | None = None,
) -> ImageSet:
    """The images of indices, decoded in batches; see `ImageSet` for `path` and `facts`."""
    side = round(indices.shape[1] ** 0.5) * codec.config.downsampling
    shape = (side, side)
    return ImageSet(path, lambda some: rgb(np.asarray(codec.decode(some))), indices, shape, facts)
