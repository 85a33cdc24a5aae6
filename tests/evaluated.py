"""A saved pipeline of random weights, pictures to compare its samples with, checks of results."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tiny_model import random_params, tiny, tiny_pipeline

CLASSES = 3


def save_tiny(folder: Path, **settings: Any) -> None:
    """Images of 8x8 grey pixels, of three classes; `settings` are those of the model."""
    config = tiny(positions=16, **settings)
    tiny_pipeline(config, random_params(config)).save_pretrained(folder)


def write_pictures(folder: Path, count: int = 40) -> None:
    """Random pictures of 8x8 RGB pixels."""
    images = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:03d}.png")


def assert_json_and_plots(found: dict, plot: Callable, folder: Path, count: int) -> None:
    """A result is plain JSON, and `plot` makes `count` pictures of it."""
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    paths = plot(found, folder / "plots")
    assert len(paths) == count
    for path in paths:
        with Image.open(path) as picture:
            assert min(picture.size) > 400
