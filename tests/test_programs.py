"""A saved pipeline may hold its compiled programs: another process then compiles none of them."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from jobs import REPOSITORY
from tiny_model import random_params, tiny, tiny_pipeline

from tokenbridge_jax import Pipeline
from tokenbridge_jax.autoencoder import autoencoder_hash
from tokenbridge_jax.pipeline import programs
from tokenbridge_jax.runtime import compilation_cache
from tokenbridge_jax.runtime.errors import UserError

CALL = {"class_ids": [0, "dog"], "num_iter": 2, "guidance": 2.0, "guidance_interval": (0.0, 0.7)}

# Draws, and prints how often a program was compiled or read, by JAX's own count: while loading,
# those of them that were read, and while drawing. Then one of the files is lost.
DRAWS = """
import json, sys
from pathlib import Path
import jax, numpy as np
from tokenbridge_jax import Pipeline
folder, out, call = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: events.append(name))
count = lambda name: sum(event.endswith(name) for event in events)
pipeline = Pipeline.load(folder, programs=True)
loaded = [count("compile_requests_use_cache"), count("cache_hits")]
before = count("backend_compile_duration")
np.save(out, pipeline.generate(seed=5, **call))
print(*loaded, count("backend_compile_duration") - before)
next(Path(folder).glob("programs/jit__draw*")).unlink()
jax.clear_caches()
Pipeline.load(folder, programs=True)
"""


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A pipeline on all devices, as `load` makes it."""
    config = tiny(positions=16)
    made = tiny_pipeline(config, random_params(config))
    found = autoencoder_hash(made.codec.config, made.codec.params)
    made.description = dataclasses.replace(made.description, autoencoder_hash=found)
    folder = tmp_path_factory.mktemp("plain") / "tiny"
    made.save_pretrained(folder)
    assert not (folder / "programs").exists()
    return Pipeline.load(folder)


@pytest.fixture(scope="module")
def saved(pipeline, tmp_path_factory):
    """A folder with programs; JAX's settings are those of before."""
    folder = tmp_path_factory.mktemp("hub") / "tiny"
    before = jax.config.values.copy()
    pipeline.save_pretrained(folder, programs=[CALL])
    assert jax.config.values == before
    return folder


def test_another_process_compiles_none_of_them_and_draws_the_same(pipeline, saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "tiny")
    argv = [folder, tmp_path / "images.npy", json.dumps(CALL)]
    done = subprocess.run(
        [sys.executable, "-c", DRAWS, *argv],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    asked, read, compiled = map(int, done.stdout.split())
    assert asked == read == len(list(saved.glob("programs/*-cache"))) >= 2
    assert compiled == 0
    # The images are drawn here by programs that were compiled here.
    images = pipeline.generate(seed=5, **CALL)
    np.testing.assert_array_equal(np.load(tmp_path / "images.npy"), images)
    line = f"1 of {asked} programs of {folder / 'programs'} did not fit and were compiled\n"
    assert done.stderr == line


@pytest.mark.parametrize("fact", ["jax", "device"])
def test_programs_for_another_machine_are_left_alone(saved, tmp_path, fact, capsys, monkeypatch):
    folder = shutil.copytree(saved, tmp_path / "tiny")
    about = json.loads((folder / "programs/programs.json").read_text())
    about["for"][fact] = "another"
    (folder / "programs/programs.json").write_text(json.dumps(about))
    monkeypatch.setattr(compilation_cache, "only_in", None)
    Pipeline.load(folder, programs=True)
    err = capsys.readouterr().err
    assert err.startswith(f"{folder / 'programs'} is for {fact} another: ")
    assert err.count("\n") == 1
    shutil.rmtree(folder / "programs")
    Pipeline.load(folder, programs=True)
    assert capsys.readouterr().err.startswith(f"{folder} has no compiled programs: ")


@pytest.mark.parametrize("damage", ["{}", "[]", '{"for": {}}', '{"for": {}, "calls": [5]}'])
def test_a_damaged_description_is_named_and_the_rest_is_loaded(saved, tmp_path, damage, capsys):
    folder = shutil.copytree(saved, tmp_path / "tiny")
    (folder / "programs/programs.json").write_text(damage)
    Pipeline.load(folder, programs=True)
    err = capsys.readouterr().err
    assert err.startswith(f"{folder / 'programs/programs.json'} is damaged: ")
    assert err.count("\n") == 1


def test_nothing_is_loaded_unless_asked_for(saved, monkeypatch):
    monkeypatch.setattr(programs, "load", None)
    Pipeline.load(saved)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"class_ids": [0], "num_iter": 0}, "num_iter"),
        ({"class_ids": ["horse"]}, "horse"),
        ({"class_ids": np.zeros(1)}, "in JSON"),
        ({"num_iter": 16}, "must be a list of dicts with class_ids"),
        ("class_ids", "must be a list of dicts with class_ids"),
        ({"class_ids": [0], 5: 1}, "must be a list of dicts with class_ids"),
        ({"class_ids": [0], "numbers": [1]}, "numbers is no setting of sampling"),
    ],
)
def test_a_call_that_cannot_be_made_leaves_no_folder(pipeline, tmp_path, call, message):
    with pytest.raises(UserError, match=message):
        pipeline.save_pretrained(tmp_path / "tiny", programs=[call])
    with pytest.raises(UserError, match="must be a list of dicts with class_ids"):
        pipeline.save_pretrained(tmp_path / "tiny", programs=5)
    assert list(tmp_path.iterdir()) == []
