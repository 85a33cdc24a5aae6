"""Samples to be scored: drawn once, kept as indices, decoded whenever their images are needed.

At size L an image's indices are 4 kB, so those of 50,000 images fit anywhere, and a run that was
stopped goes on with the next batch.
"""

import hashlib
import io as bytes_io
import json
import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import Int, Integer

from tokenbridge_jax.codec import Codec
from tokenbridge_jax.evaluation.image_sets import MadeImages, rgb
from tokenbridge_jax.pipeline import Pipeline
from tokenbridge_jax.runtime import checks, meshes, processes, safetensors_file, storage
from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.runtime.progress import Progress
from tokenbridge_jax.sampling.batches import generate_in_batches
from tokenbridge_jax.sampling.schedule import SamplingSettings

# Who gets how many images: every class as many (or one more), as ADM, MAR and TokenBridge have it,
# or each image a random class, as LlamaGen.
LABEL_POLICIES = ("balanced", "random")

ROUNDING = "round(127.5 (clip(x, -1, 1) + 1)) to uint8"


def make_labels(policy: str, count: int, classes: int, seed: int) -> Int[np.ndarray, " N"]:
    """The class of every sample, in a random order: a file of them is never sorted by class.

    With "balanced" all classes come once before one comes again. The labels of fewer samples are
    the first of those of more.
    """
    rng = np.random.default_rng(seed)
    if policy == "random":
        return rng.integers(0, classes, count).astype(np.int32)
    rounds = [rng.permutation(classes) for _ in range(-(-count // classes))]
    return np.concatenate(rounds)[:count].astype(np.int32)


def describe(
    pipeline: Pipeline,
    settings: SamplingSettings,
    *,
    policy: str,
    seed: int,
) -> dict[str, Any]:
    """What fixes the samples but for their number, and a figure of them has to state.

    Raises:
      UserError: the weights hold NaN or infinity.
    """
    model = json.dumps(pipeline.description.to_json(), sort_keys=True)
    return {
        "label_policy": policy,
        "label_classes": len(pipeline.description.class_names),
        "checkpoint_step": pipeline.step,
        "weights": "EMA",
        "weights_sha256": weights_sha256(pipeline.params, pipeline.step),
        "model_json_sha256": hashlib.sha256(model.encode()).hexdigest(),
        "autoencoder_sha256": pipeline.description.autoencoder_hash,
        "model_dtype": pipeline.config.dtype,
        "sampling": settings.to_json(),
        "seed": seed,
        "image_size": f"{pipeline.image_size}x{pipeline.image_size}",
        "rounding": ROUNDING,
    }


def weights_sha256(params: Any, step: int) -> str:
    """Names the parameters' content, wherever they lie.

    Raises:
      UserError: some are NaN or infinite.
    """
    whole = jax.tree.map(meshes.on_host, params)
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(whole)):
        raise UserError(f"the weights of step {step} hold NaN or infinity; name another --step")
    return safetensors_file.sha256(whole)


def sample_folder(folder: epath.PathLike, facts: dict[str, Any]) -> epath.Path:
    """Where in `folder` samples with these facts are kept: others never get there."""
    return epath.Path(folder) / f"samples_{facts['checkpoint_step']}_{short_hash(facts)}"


def short_hash(facts: dict[str, Any]) -> str:
    """Twelve digits that name facts."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def draw(
    pipeline: Pipeline,
    folder: epath.Path,
    labels: Int[np.ndarray, " N"],
    settings: SamplingSettings,
    *,
    seed: int,
    batch_size: int,
    progress: bool = True,
) -> Integer[np.ndarray, "N L C"]:
    """The indices of all samples; those that the folder holds, perhaps more, are not drawn again.

    Every process of a job calls this, and one writes.

    Raises:
      UserError: the folder holds something else, cannot be written, or is not the same folder for
        all processes.
    """
    batch_size = checks.at_least("sampling.batch_size", batch_size, 1)
    parts = _read_parts(folder)
    done = sum(map(len, parts))
    if done and progress:
        print(f"{folder} holds {done} samples: going on from there", file=sys.stderr)
    if len(set(processes.gather(str(done)))) > 1:
        raise UserError(f"the processes of this job see different files in {folder}: share it")
    size = meshes.round_up_batch(min(batch_size, len(labels)), pipeline.mesh)
    with Progress(len(labels), desc="sample", done=done, visible=progress) as bar:
        for start in range(done, len(labels), size):
            wanted = labels[start : start + size]
            # A last batch is filled up: it needs no program of its own.
            full = np.pad(wanted, (0, size - len(wanted)), mode="edge")
            indices = generate_in_batches(
                pipeline.config,
                pipeline.params,
                full,
                settings,
                pipeline.mesh,
                seed=seed,
                batch_size=size,
                first=start,
            )[: len(wanted)]
            parts.append(indices)
            if jax.process_index() == 0:
                buffer = bytes_io.BytesIO()
                np.save(buffer, indices)
                storage.write_bytes(folder / _part_name(start), buffer.getvalue())
            bar.update(len(wanted))
    return np.concatenate(parts)[: len(labels)]


def _read_parts(folder: epath.Path) -> list[Integer[np.ndarray, "n L C"]]:
    parts: list[np.ndarray] = []
    for path in sorted(folder.glob("indices_*.npy")):
        with storage.npy_errors(path, "remove it, and run this again to draw its samples anew"):
            part = np.load(bytes_io.BytesIO(path.read_bytes()), allow_pickle=False)
        if path.name != _part_name(sum(map(len, parts))):
            raise UserError(f"samples before {path} are missing; remove it and those after it")
        parts.append(part)
    return parts


def _part_name(start: int) -> str:
    return f"indices_{start:08d}.npy"


def decoded_images(
    codec: Codec,
    indices: Integer[np.ndarray, "N L C"],
    path: epath.PathLike,
    facts: Mapping[str, Any] = MappingProxyType({}),
) -> MadeImages:
    """The images of indices, decoded a batch at a time; `path` names them in messages."""
    side = round(indices.shape[1] ** 0.5) * codec.config.downsampling
    return MadeImages(path, lambda some: rgb(np.asarray(codec.decode(some))), indices, side, facts)
