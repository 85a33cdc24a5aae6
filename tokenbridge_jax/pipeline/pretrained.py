"""Saves a trained pipeline as a folder that needs no other file, in the layout of model hubs.

  README.md           the model card: what is known about the model and its training; how to use it
  model.json          `description.ModelDescription`, and the step
  model.safetensors   the averaged parameters by their names in Flax: `backbone/z_proj/kernel`
  autoencoder/        `config.json` and `params.safetensors`, as in a workdir
  config.json         the settings of the run, without its mesh and the path of its images
  programs/           compiled programs, if they were asked for (see `programs`)

It is a workdir with one file instead of checkpoints: commands that only read accept it as
--workdir. Parameters are float32, whatever dtype the model computes in: so samples stay the same,
bit for bit, and numpy, which has no bfloat16, can read them.
"""

import contextlib
import os
import uuid
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from tokenbridge_jax.autoencoder import save_autoencoder
from tokenbridge_jax.codec import Codec
from tokenbridge_jax.model_config import HEADS
from tokenbridge_jax.pipeline import programs
from tokenbridge_jax.pipeline.description import MODEL_FILE, ModelDescription
from tokenbridge_jax.runtime import meshes, processes, safetensors_file, storage
from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.training.checkpoints import differences, latest_step, load_params

WEIGHTS_FILE = "model.safetensors"

# `config.mesh` for unknown devices.
ANY_DEVICES = {"data": -1, "fsdp": 1, "tensor": 1, "slices": -1}


class Trained(NamedTuple):
    """The content of a folder. The attributes are those of `Pipeline`."""

    description: ModelDescription
    params: dict[str, Any]
    codec: Codec
    step: int
    facts: Mapping[str, Any]


def save(
    trained: Trained,
    directory: epath.PathLike,
    compiled: Callable[[], Mapping[str, bytes]] = dict,
) -> None:
    """Writes the folder; if that fails, none is left. All processes of a job call it; one writes.

    Args:
      trained: the content.
      directory: the folder.
      compiled: makes the files of `programs/`, by name, once the folder is known to be free.

    Raises:
      UserError: the folder exists and is not empty, or cannot be written.
    """
    directory = storage.as_path(directory)
    if not storage.in_object_store(directory):
        directory = directory.absolute()
    trained = trained._replace(params=jax.tree.map(meshes.on_host, trained.params))
    mistake = ""
    if jax.process_index() == 0:
        try:
            _write(trained, directory, compiled)
        except UserError as error:
            mistake = str(error)
    if mistake := processes.gather(mistake)[0]:
        raise UserError(mistake)


def load_weights(
    workdir: epath.PathLike, abstract: Any, *, part: str = "ema_params", step: int | None = None
) -> tuple[Any, int]:
    """Loads the model's parameters from a workdir or a saved folder; returns their step too.

    Args:
      workdir: has `model.json`, and `checkpoints/` or `model.safetensors`.
      abstract: tree of `jax.ShapeDtypeStruct` with shardings, on any mesh.
      part: "ema_params", or "params", which only checkpoints have.
      step: step of the checkpoint; None is the latest.

    Raises:
      UserError: there is no such checkpoint, arrays differ (the message names all), or a file is
        missing or damaged.
    """
    workdir = storage.as_path(workdir)
    saved = storage.read_json(workdir / MODEL_FILE).get("step")
    if saved is None:
        return _from_checkpoints(workdir / "checkpoints", abstract, part, step)
    if step not in (None, saved):
        raise UserError(f"there is no checkpoint of step {step}; {workdir} holds step {saved}")
    if part != "ema_params":
        raise UserError(f"{workdir} holds the averaged parameters alone: ask for those (--ema)")
    path = workdir / WEIGHTS_FILE
    stored = safetensors_file.read(path)
    if found := differences("params", stored, abstract):
        raise UserError(f"{path} does not fit {workdir / MODEL_FILE}: {'; '.join(found)}")

    def place(leaf: jax.ShapeDtypeStruct, array: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: array[index])

    return jax.tree.map(place, abstract, stored), saved


def _from_checkpoints(
    checkpoints: epath.Path, abstract: Any, part: str, step: int | None
) -> tuple[Any, int]:
    latest = latest_step(checkpoints)
    step = latest if step is None else step
    if not (checkpoints / str(step)).exists():
        there = sorted(int(path.name) for path in checkpoints.iterdir() if path.name.isdigit())
        raise UserError(
            f"there is no checkpoint of step {step}; there are {', '.join(map(str, there))}"
        )
    return load_params(checkpoints, abstract, part=part, step=step), step


def _write(
    trained: Trained, directory: epath.Path, compiled: Callable[[], Mapping[str, bytes]]
) -> None:
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory} is there already; name a new folder, or empty it")
    files_of_programs = compiled()
    # A folder gets its name when it is complete. In an object store, `model.json` is written last.
    folder = directory
    if not storage.in_object_store(directory):
        folder = directory.with_name(f".{uuid.uuid4().hex}.tmp")
    description, params, codec, step, facts = trained
    try:
        storage.write_bytes(folder / "README.md", model_card(trained, directory.name).encode())
        if config := facts.get("config"):
            elsewhere = {"data": config["data"] | {"path": ""}, "mesh": ANY_DEVICES}
            storage.write_json(folder / "config.json", config | elsewhere)
        save_autoencoder(
            folder / "autoencoder", codec.config, codec.params, facts.get("autoencoder")
        )
        safetensors_file.write(folder / WEIGHTS_FILE, params)
        for name, content in files_of_programs.items():
            storage.write_bytes(folder / programs.FOLDER / name, content)
        storage.write_json(folder / MODEL_FILE, description.to_json() | {"step": step})
        if folder != directory:
            os.replace(folder, directory)
    except OSError as error:
        raise storage.write_error(directory, error) from error
    finally:
        if folder != directory:
            with contextlib.suppress(OSError):
                folder.rmtree(missing_ok=True)


def model_card(trained: Trained, name: str) -> str:
    """Returns `README.md` for the folder `name`, with the YAML header that model hubs read."""
    description, params, codec, step, facts = trained
    model, autoencoder, names = description.config, codec.config, description.class_names
    config: Mapping[str, Any] = facts.get("config", {})
    sampling = {k: v for k, v in config.get("sampling", {}).items() if k != "batch_size"}
    used = [f"{k}={tuple(v) if isinstance(v, list) else v!r}" for k, v in sampling.items()]
    side = round(model.positions**0.5) * autoencoder.downsampling
    rows = {
        "images": f"{side}x{side} pixels, {autoencoder.image_channels} channels",
        "classes": f"{model.classes:,} ({', '.join(names[:5])}{', ...' if names[5:] else ''})",
        "parameters": f"{_count(params):,}, averaged (EMA), float32",
        "updates trained": f"{step:,}" if step else "none, imported weights",
        "computes in": model.dtype,
        "backbone": f"encoder {_size(model, 'encoder')}; decoder {_size(model, 'decoder')}",
        **(_rows_of_latents(model) if model.of_latents else _rows_of_indices(model)),
        "autoencoder": f"{_count(codec.params):,} parameters, latents scaled by "
        f"{autoencoder.scale:g}, {_listed(facts.get('autoencoder', {}))}",
        "autoencoder's hash": description.autoencoder_hash,
        "training": _listed(config.get("training", {})) if step else "",
        "sampling": _listed(sampling),
    }
    table = "\n".join(
        f"| {name} | {value.replace('|', '&#124;')} |" for name, value in rows.items() if value
    )
    return f"""---
library_name: tokenbridge_jax
tags:
- arxiv:2503.16430
- class-conditional-image-generation
- jax
- tokenbridge
---

# {name}

A class-conditional [TokenBridge](https://arxiv.org/abs/2503.16430) and its autoencoder, for
`tokenbridge_jax`.

| | |
|---|---|
{table}

```python
from tokenbridge_jax import Pipeline

pipeline = Pipeline.load("{name}")
images = pipeline.generate({", ".join(["[0, 1]", *used])})  # uint8 NHWC
```

`tokenbridge sample --workdir {name}` does the same. With numpy alone, from inside the folder:

```python
import json
from safetensors.numpy import load_file

model = json.load(open("model.json"))
weights = load_file("model.safetensors")
autoencoder = load_file("autoencoder/params.safetensors")
```
"""


def _count(params: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _rows_of_indices(model: Any) -> dict[str, str]:
    quirk = "on: when sampling, the first timestep embedding is added to the head's first token"
    return {
        "channel head": f"{model.head}, {HEADS[model.head].summary(model)}",
        "positions, channels, levels": f"{model.positions}, {model.channels}, {model.levels}",
        "quantizer": model.quantizer.description,
        "channel order": ", ".join(map(str, model.channel_order)),
        "first-token quirk": quirk if model.first_token_quirk else "off",
    }


def _rows_of_latents(model: Any) -> dict[str, str]:
    return {
        "head": f"{model.head}, {HEADS[model.head].summary(model)}",
        "positions, channels": f"{model.positions}, {model.channels}",
        "quantizer": model.quantizer.description,
    }


def _size(model: Any, part: str) -> str:
    layers, width, heads = (getattr(model, f"{part}_{x}") for x in ("layers", "width", "heads"))
    return f"{layers} layers of width {width}, {heads} heads"


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items() if value is not None)
