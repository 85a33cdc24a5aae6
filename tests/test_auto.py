"""The settings that `auto` picks, against brute force and by stand-ins for the compiler."""

import dataclasses
import itertools
import json

import jax
import pytest
from etils import epath
from jobs import start_job
from ml_collections import ConfigDict

from configs import digits, imagenet256
from tokenbridge_jax import config as configs
from tokenbridge_jax.benchmark.inputs import make_model
from tokenbridge_jax.commands import arguments
from tokenbridge_jax.runtime import meshes
from tokenbridge_jax.runtime.compiled import Trial
from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.runtime.hardware import Devices
from tokenbridge_jax.training import auto
from tokenbridge_jax.training.auto import Choice, Settings

GIB = 2**30
V5E, V6E = int(15.75 * GIB), int(31.25 * GIB)


def choices(devices, size="L", batch=2048, **values):
    config = imagenet256.get_config(f"size={size}")
    config.training.batch_size = batch
    changes = {name.replace("__", "."): value for name, value in values.items()}
    config = configs.with_changes(config, changes)
    return configs.auto_choices(config, make_model(config), devices)


def first_fit(listed, memory):
    return next(choice for choice in listed if choice.bytes <= memory)


# --- The list -------------------------------------------------------------------------------------


@pytest.mark.parametrize("devices", [Devices("a", "tpu", 1), Devices("b", "tpu", 16, slices=2)])
def test_the_list_is_what_brute_force_finds(devices):
    config = imagenet256.get_config("size=B")
    config.training.batch_size = 32
    model = make_model(config)
    step = auto.Step(model, configs.mask_sampler(config, 256), 1.0, 32)
    tree = auto.abstract_params(model)
    counts = [sum(leaf.size for leaf in jax.tree.leaves(part)) for part in (tree, tree["head"])]
    rows = 32 // devices.number
    everything = [
        Settings(fsdp, remat, chunk, count, scan_layers=True)
        for fsdp, remat, chunk, count in itertools.product(
            range(1, devices.number // devices.slices + 1),
            ("none", "dots", "full"),
            auto.HEAD_CHUNKS,
            range(1, rows + 1),
        )
        if devices.number // devices.slices % fsdp == rows % count == 0
    ]
    needs = {s: auto.needed_bytes(step, s, devices, *counts) for s in everything}
    costs = {s: auto.overhead(step, s, devices) for s in everything}
    listed = choices(devices, "B", 32)
    assert listed[0].overhead == min(costs.values())
    assert listed[-1].bytes == min(needs.values())
    for memory in sorted(needs.values()):
        best = min(cost for s, cost in costs.items() if needs[s] <= memory)
        assert first_fit(listed, memory).overhead == best
    for before, now in itertools.pairwise(listed):
        assert now.overhead > before.overhead
        assert now.bytes < before.bytes


def test_the_bytes_are_those_of_compiled_steps_or_a_little_more():
    """GiB by `tokenbridge preflight`, which compiled these steps with libtpu 0.0.42.1.

    All but the last row are older than kernels that save memory.
    """
    compiled = [
        ("L", 64, 2048, dict(fsdp=8, remat="dots", head_chunk=512), 8.4),
        ("H", 16, 2048, dict(fsdp=8, remat="full", head_chunk=1024), 12.8),
        ("L", 256, 2048, dict(fsdp=8, head_chunk=1024), 8.9),
        ("H", 64, 2048, dict(fsdp=4), 49.6),
        ("L", 16, 2048, dict(fsdp=4), 69.4),
        ("L", 1, 2048, dict(remat="dots", head_chunk=512, accumulation=128), 14.68),
        ("L", 4, 128, dict(fsdp=2, head_chunk=2048), 24.97),
        ("L", 4, 64, dict(remat="dots", head_chunk=512), 12.64),
    ]
    for size, number, batch, settings, gib in compiled:
        values = {"accumulation": 1, "scan_layers": True, "remat": "none", "fsdp": 1}
        values |= {"head_chunk": 4096} | settings
        changes = {auto.KEYS[name].replace(".", "__"): value for name, value in values.items()}
        (only,) = choices(Devices("a", "tpu", number), size, batch, **changes)
        assert only.settings == Settings(**values)
        assert 1 <= only.bytes / GIB / gib <= 1.12


def test_less_memory_never_picks_what_needs_more():
    listed = choices(Devices("a", "tpu", 4))
    picked = [first_fit(listed, gib * GIB) for gib in range(9, 100)]
    for small, large in itertools.pairwise(picked):
        assert small.bytes <= large.bytes
        assert small.overhead >= large.overhead


def test_settings_of_the_published_sizes():
    # A GPU of 140 GiB, of which JAX takes three quarters, keeps what was the default before.
    gpu = Devices("H200", "gpu", 1)
    assert first_fit(choices(gpu, batch=64), 105 * GIB).settings == Settings()
    # One chip of a kind that Colab has takes the paper's batch in parts.
    for memory in (V5E, V6E):
        chosen = first_fit(choices(Devices("chip", "tpu", 1)), memory).settings
        assert chosen.scan_layers
        assert chosen.fsdp == 1
        assert 2048 % chosen.accumulation == 0
    # Another slice is reached by the axis `data` alone.
    assert max(c.settings.fsdp for c in choices(Devices("v6e", "tpu", 64, slices=8))) == 8


def test_on_cpus_everything_is_plain():
    config = digits.get_config()
    for devices in (Devices("cpu", "cpu", 1), Devices("cpu", "cpu", 8)):
        first = configs.auto_choices(config, make_model(config), devices)[0]
        assert first.settings == Settings(scan_layers=True)  # digits fixes this one.
    assert choices(Devices("cpu", "cpu", 8))[0].settings == Settings()
    assert configs.make_mesh(config) == meshes.make_mesh()
    assert make_model(imagenet256.get_config()).remat == "none"


def test_values_of_the_config_are_fixed():
    devices = Devices("a", "tpu", 8)
    for name, value in [("fsdp", 4), ("remat", "dots"), ("head_chunk", 300), ("accumulation", 8)]:
        listed = choices(devices, **{auto.KEYS[name].replace(".", "__"): value})
        assert {getattr(choice.settings, name) for choice in listed} == {value}
    # A fixed `data` leaves one size for `fsdp`.
    assert {choice.settings.fsdp for choice in choices(devices, mesh__data=2)} == {4}
    with pytest.raises(UserError, match="does not fit 8 devices"):
        choices(devices, mesh__data=3)


# --- Trying ---------------------------------------------------------------------------------------

LISTED = [Choice(Settings(head_chunk=c), c * 2**20, 1 / c) for c in (4096, 2048, 1024, 512, 256)]


def trial(factor, gib):
    """A compiler that wants `factor` times the estimate; the list of what it tried, and devices."""
    tried = []

    def attempt(settings):
        tried.append(settings.head_chunk)
        if factor is None:
            return Trial(False, None)
        return Trial(True, int(factor * settings.head_chunk * 2**20))

    devices = Devices("kind", "gpu", 2, memory=int(gib * GIB) + auto.HEADROOM)
    return tried, attempt, devices


@pytest.mark.parametrize(
    ("factor", "gib", "tries"),
    [
        (1.0, 4.0, [4096]),
        (1.0, 1.5, [1024]),
        # What it wants says how far the estimates of the rest are off, so some are not tried.
        (1.1, 4.0, [4096, 2048]),
        (3.0, 2.0, [2048, 512]),
        # The last one is always tried.
        (20.0, 5.5, [4096, 256]),
    ],
)
def test_the_first_that_the_compiler_accepts(factor, gib, tries, capsys):
    tried, attempt, devices = trial(factor, gib)
    assert auto.pick(LISTED, devices, attempt).head_chunk == tries[-1]
    assert tried == tries
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(tries)
    assert lines[0].startswith(f"auto: kind x 2: fsdp 1, remat none, head_chunk {tries[0]}, ")
    assert f"{factor * tries[-1] / 1024:.1f} GiB compiled" in lines[-1]
    assert [line.endswith(": picked") for line in lines] == [False] * (len(tries) - 1) + [True]


@pytest.mark.parametrize(("gib", "tries"), [(7.9, [4096]), (8.1, [])])
def test_what_needs_half_of_the_memory_is_picked_without_trying(gib, tries, capsys):
    tried, attempt, devices = trial(1.0, gib)
    assert auto.pick(LISTED, devices, attempt, trust=0.5).head_chunk == 4096
    assert tried == tries
    line = "4.0 GiB estimated, 8.1 available: picked without trying"
    assert (line in capsys.readouterr().err) == (not tries)


@pytest.mark.parametrize("factor", [None, 100.0])
def test_if_nothing_fits_one_line_says_so(factor, capsys):
    tried, attempt, devices = trial(factor, 4.0)
    with pytest.raises(auto.DoesNotFit, match=r"model.head_chunk.* fit kind x 2; use more"):
        auto.pick(LISTED, devices, attempt)
    assert tried[-1] == 256
    assert capsys.readouterr().err.count("does not fit") == len(tried)


def test_a_program_that_was_not_compiled_is_never_picked():
    """Even if it names fewer bytes than there are."""
    devices = Devices("kind", "gpu", 2, memory=2**40)
    with pytest.raises(auto.DoesNotFit):
        auto.pick(LISTED, devices, lambda settings: Trial(False, 2**20))


# --- Remembering ----------------------------------------------------------------------------------


def test_a_pick_is_remembered_for_these_devices(tmp_path):
    found = []

    def recall(devices, question, settings):
        return auto.recall(
            epath.Path(tmp_path), devices, question, lambda: found.append(1) or settings
        )

    one, two = Devices("kind", "tpu", 1), Devices("kind", "tpu", 2)
    first, second, third = Settings(fsdp=1), Settings(fsdp=2), Settings(remat="full")
    assert recall(one, {"batch": 8}, first) == first
    assert recall(two, {"batch": 8}, second) == second
    assert recall(one, {"batch": 8}, third) == first
    assert recall(two, {"batch": 8}, third) == second
    assert len(found) == 2
    assert recall(one, {"batch": 9}, third) == third
    assert recall(dataclasses.replace(two, slices=2), {"batch": 8}, third) == third
    assert set(json.loads((tmp_path / auto.FILE).read_text())) == {"kind x 1", "kind x 2"}


JOB = """
import sys
from etils import epath
from tokenbridge_jax.runtime import processes
from tokenbridge_jax.runtime.hardware import Devices
from tokenbridge_jax.training import auto
processes.join(True)
number = int(sys.argv[1])
find = lambda: auto.Settings(head_chunk=100 + number)
for workdir in sys.argv[2:]:
    print(auto.recall(epath.Path(workdir), Devices("kind", "tpu", 2), {}, find).head_chunk)
processes.leave(0)
"""


def test_processes_agree_on_what_process_0_remembers(tmp_path):
    """Each has a folder of its own here; that of process 1 is never read."""
    folders = [tmp_path / name for name in "ab"]
    for folder, chunk in zip(folders, (7, 8), strict=True):
        folder.mkdir()
        remembered = lambda chunk=chunk: Settings(head_chunk=chunk)  # noqa: E731
        auto.recall(epath.Path(folder), Devices("kind", "tpu", 2), {}, remembered)
    job = start_job(["-c", JOB], [[i, folder] for i, folder in enumerate(folders)], devices=1)
    assert [process.communicate(timeout=60)[0].split() for process in job] == [["7"], ["7"]]


# --- Flags and files ------------------------------------------------------------------------------


def parse(*flags):
    values = dict(elsewhere={}, default_config="digits", needs_workdir=False)
    return arguments.parse("train", list(flags), lambda flag_values: None, **values).config


def test_flags_replace_auto_by_values():
    config = parse(
        "--config.mesh.fsdp=8", "--config.model.head_chunk", "512", "--config.model.remat=dots",
        "--noconfig.model.scan_layers", "--config.training.accumulation=4",
    )  # fmt: skip
    assert configs.given_settings(config, 8) == dataclasses.asdict(Settings(8, "dots", 512, 4))
    assert configs.filled(config) == config
    plain = configs.filled(parse())
    assert (plain.mesh.fsdp, plain.model.head_chunk, plain.training.accumulation) == (1, 4096, 1)


@pytest.mark.parametrize(
    ("flag", "line"),
    [
        ("mesh.fsdp=eight", "mesh.fsdp is eight; it must be auto, -1 or a whole number"),
        ("mesh.fsdp=0", "mesh.fsdp is 0; it must be"),
        ("model.head_chunk=1e3", "model.head_chunk is 1000.0; it must be auto, or a whole number"),
        ("model.head_chunk=True", "model.head_chunk is True; it must be"),
        ("model.scan_layers=1", "model.scan_layers is 1; it must be auto, True or False"),
        ("model.remat=some", "model.remat is some; it must be auto or none or dots or full"),
        ("training.accumulation=0", "training.accumulation is 0; it must be auto, or a whole"),
        ("training.accumulation", "training.accumulation is True; it must be auto"),
    ],
)
def test_other_values_are_one_line(flag, line):
    with pytest.raises(UserError) as error:
        parse(f"--config.{flag}")
    assert str(error.value).startswith(line)
    assert "\n" not in str(error.value)


def test_a_workdir_remembers_auto_and_values_alike(tmp_path):
    config = parse("--config.mesh.fsdp=8")
    (tmp_path / arguments.CONFIG_FILE).write_text(json.dumps(config.to_dict()))
    again = parse(
        f"--workdir={tmp_path}", "--config.model.head_chunk=64", "--config.mesh.fsdp=auto"
    )
    assert (again.mesh.fsdp, again.model.head_chunk, again.model.remat) == ("auto", 64, "auto")


def test_auto_replaces_numbers_of_a_users_own_file():
    values = imagenet256.get_config("size=B").to_dict()
    values["model"]["head_chunk"] = values["mesh"]["fsdp"] = 2
    config = ConfigDict(values)
    free = configs.with_changes(config, dict.fromkeys(auto.KEYS.values(), "auto"))
    assert configs.given_settings(free, 8) == {}
    assert configs.filled(free, Settings(4, "dots", 256)).model.head_chunk == 256
