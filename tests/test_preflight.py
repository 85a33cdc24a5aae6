"""Compares the counts of `tokenbridge preflight` with counts by hand; compiling needs libtpu."""

import importlib.util
import json
import re
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from configs import imagenet256
from tokenbridge_jax.benchmark.inputs import make_model
from tokenbridge_jax.commands import arguments, runner
from tokenbridge_jax.config import auto_choices, with_changes
from tokenbridge_jax.model import abstract_params
from tokenbridge_jax.preflight import chips, lowering, text
from tokenbridge_jax.preflight import estimate as reports
from tokenbridge_jax.preflight.hlo import Collective, Program
from tokenbridge_jax.preflight.profile import Operation
from tokenbridge_jax.preflight.roofline import estimate, links
from tokenbridge_jax.runtime import meshes
from tokenbridge_jax.runtime.compiled import wanted_bytes
from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.runtime.hardware import Devices

ROOT = Path(__file__).parent.parent
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)


def test_products_count_as_often_as_they_run():
    def loss(w, x):
        @jax.checkpoint
        def layer(x, _):
            return jnp.tanh(x @ w), None

        return jnp.sum(jax.lax.scan(layer, x, length=5)[0])

    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    jaxpr = gradient.trace(jnp.ones((6, 6)), jnp.ones((2, 6))).jaxpr.jaxpr
    # Forward, forward again, and two products of the same size backward, each five times.
    assert lowering.matmul_flops(jaxpr) == 5 * 4 * (2 * 2 * 6 * 6)


def test_products_in_a_shard_map_count_for_every_device():
    mesh = meshes.make_mesh(data=4, fsdp=2)
    spec = PartitionSpec(("data", "fsdp"))
    product = jax.shard_map(
        lambda x, w: x @ w, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=spec
    )
    jaxpr = jax.jit(product).trace(jnp.ones((16, 6)), jnp.ones((6, 6))).jaxpr.jaxpr
    assert lowering.matmul_flops(jaxpr) == 2 * 16 * 6 * 6


def test_only_the_default_branch_of_the_platforms_counts():
    def twice_or_once(x):
        return jax.lax.platform_dependent(x, cuda=lambda x: x @ x @ x, default=lambda x: x @ x)

    jaxpr = jax.jit(twice_or_once).trace(jnp.ones((6, 6))).jaxpr.jaxpr
    assert lowering.matmul_flops(jaxpr) == 2 * 6**3


@pytest.mark.parametrize(
    ("name", "chip_count", "device_count"),
    [
        ("v4:2x2x1", 4, 4),
        ("v4-32", 16, 16),
        ("v5litepod-1", 1, 1),
        ("v5e:2x2", 4, 4),
        ("v5litepod-256", 256, 256),
        ("v5p-128", 64, 64),
        ("v5p:8x8x8", 512, 512),
        ("v6e-64", 64, 64),
        ("tpu7x-32", 16, 32),
        ("tpu7x:4x4x4", 64, 128),
    ],
)
def test_slices_have_two_names(name, chip_count, device_count):
    where = chips.parse_slice(name)
    assert where.chips == chip_count
    assert where.chips * where.figures.devices == device_count
    if importlib.util.find_spec("libtpu"):
        devices = chips.slice_devices(where)
        assert len(devices) == device_count
        assert chips.peak_flops(devices[0]) > 1e14


@pytest.mark.parametrize(
    "name", ["v9:2x2", "v5e:2", "v5e-7", "v4-9", "v5p:4x4", "v4", "", "v5e:0x4"]
)
def test_for_unknown_slices_the_known_ones_are_listed(name):
    with pytest.raises(UserError, match=r"no topology .*: *.*(v5e:2x2|v5e:1x1|v4:2x2x2|v5p:2x2x2)"):
        chips.parse_slice(name)


def test_without_libtpu_one_line_says_what_to_install(monkeypatch, refused):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused("preflight", "[tpu]", ["--topology=v5e:2x2"])


def test_estimate_by_hand():
    # 64 chips of v5e: axes of eight are lines and have half of the 200 GB/s. A group of 8 chips is
    # along one of the two axes.
    where = chips.parse_slice("v5e:8x8")
    reduced = Collective("all-reduce", 64, 1, 1, 64 * 10**6)
    gathered = Collective("all-gather", 8, 1, 1, 8 * 10**6)
    program = Program(15 * 10**8, 819 * 10**6, [reduced, gathered])
    spent = estimate(program, 197 * 10**11, 197e12, where)
    assert spent.products == pytest.approx(0.1)
    assert spent.memory == pytest.approx(1e-3)
    assert spent.network == pytest.approx(2 * 63e6 / 100e9 + 7e6 / 50e9)
    assert spent.instructions == pytest.approx(15e8 / (197e12 / (4 * 2 * 128**2)))
    assert spent.bound == spent.products
    # Axes of sixteen are rings; on v5p axes of four, if all are; a group of 4 is along one axis.
    assert links(Collective("all-reduce", 4, 1, 1, 1), chips.parse_slice("v5p:2x2x4")) == 0.5 / 3
    assert links(Collective("all-reduce", 256, 1, 1, 1), chips.parse_slice("v5e:16x16")) == 1
    assert links(Collective("all-reduce", 64, 1, 1, 1), chips.parse_slice("v5p:4x4x4")) == 1


def test_memory_in_messages_of_the_compiler():
    long = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 23.15G of 15.75G hbm."
    assert wanted_bytes(Exception(long)) == int(23.15 * 2**30)
    short = "required for HLO temporaries (512.00M) exceeds available HBM (15.75G)."
    assert wanted_bytes(Exception(short)) == 512 * 2**20
    assert wanted_bytes(Exception("INTERNAL: something else")) is None


@needs_libtpu
def test_a_compiled_program_has_the_counts_by_hand():
    where = chips.parse_slice("v5e:2x2")
    mesh = meshes.make_mesh(data=4, devices=chips.slice_devices(where))

    def gradient(w, x):
        return jax.grad(lambda w: jnp.sum((x @ w) ** 2))(w)

    work = toy_work(mesh, gradient, (256, 512), (1024, 256))
    compiled = lowering.compile_work(work, 4)
    # Forward and backward, each on a quarter of the rows.
    assert compiled.flops == 2 * (2 * 1024 * 256 * 512) // 4
    (reduced,) = compiled.program.collectives
    assert (reduced.kind, reduced.group, reduced.runs) == ("all-reduce", 4, 1)
    assert reduced.bytes == 256 * 512 * 4


def toy_work(mesh, function, *shapes):
    """A program with float32 arrays; the last one is split over all devices."""
    specs = [PartitionSpec()] * (len(shapes) - 1) + [PartitionSpec(("data", "fsdp"))]
    arrays = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in zip(shapes, specs, strict=True)
    ]
    with jax.set_mesh(mesh):
        traced = jax.jit(function).trace(*arrays)
    state = lowering._bytes_on_device(arrays)
    return lowering.Work(
        traced, 4, {"parameters": state, "EMA": 0, "optimizer": 0}, 1e12, 1.0, "a toy"
    )


@needs_libtpu
def test_what_fits_and_what_does_not():
    mesh = meshes.make_mesh(data=4, devices=chips.slice_devices(chips.parse_slice("v5e:2x2")))

    def compile_copy(gib):
        work = toy_work(mesh, lambda x: x + 1, (4, gib, 2**28))
        return lowering.compile_work(work, 4)

    # A copy needs memory for its input and its output: 14 and 16 of 15.75 GiB.
    fitting, too_large = compile_copy(7), compile_copy(8)
    assert fitting.program is not None
    assert fitting.needed == pytest.approx(14 * 2**30, rel=1e-3)
    assert too_large.program is None
    assert too_large.needed == pytest.approx(16 * 2**30, rel=1e-3)


@needs_libtpu
def test_auto_and_suggestions_fit(monkeypatch, tmp_path, capsys):
    """Programs that need 1.1 times what the memory model says, on a chip of 15.75 GiB."""
    where = chips.parse_slice("v5e:1x1")
    devices = chips.slice_devices(where)
    config = imagenet256.get_config("size=L")
    number = Devices("v5e", "tpu", 1, memory=where.figures.memory)

    def work_of(config, mesh):
        (choice,) = auto_choices(config, make_model(config), number)
        return toy_work(mesh, jnp.sum, (1, int(1.1 * choice.bytes) // 2**20, 2**18))

    def check_here(config, where, profile=None):
        return reports.check(config, where, devices, tmp_path)

    monkeypatch.setattr(reports, "training_work", work_of)
    monkeypatch.setattr(reports, "check_apart", check_here)
    # libtpu may be loaded already in this process, and then writes no schedules.
    operation = Operation("fusion.1", "", 1, 1.0, "HBM")
    monkeypatch.setattr(reports, "read_profile", lambda *arguments: [operation])
    found = reports.check_auto(config, where)
    assert found["fits"]
    tries = re.findall("auto: .*", capsys.readouterr().err)
    assert len(tries) == 2
    picked = {name: found["settings"][name] for name in ("remat", "head_chunk", "accumulation")}
    assert all(f"{name} {value}" in tries[1] for name, value in picked.items())

    # The same is suggested for values that do not fit, and it fits as values.
    fixed = with_changes(config, {"model.remat": "none", "training.accumulation": 8})
    assert not reports.check_auto(fixed, where)["fits"]
    suggested = reports.suggest(fixed, where)
    assert suggested["settings"] == found["settings"]
    values = arguments.parse(
        "preflight", ["--config=imagenet256:size=L", *suggested["flags"]], lambda flag_values: None,
        elsewhere={}, default_config="digits", needs_workdir=False,
    ).config  # fmt: skip
    assert reports.check_auto(values, where)["settings"] == found["settings"]
    assert reports.suggest(config, where) is None


def small_config():
    """The smallest ImageNet config with one layer in each part."""
    config = imagenet256.get_config("quick")
    config.model.update(encoder_layers=1, decoder_layers=1, head_layers=1)
    config.model.update(scan_layers=True, dropout=0.0)
    config.training.batch_size = config.sampling.batch_size = 8
    return config


def test_a_training_step_before_compiling():
    config = small_config()
    work = lowering.training_work(config, meshes.make_mesh(data=4, fsdp=2))
    model = make_model(config)
    numbers = sum(leaf.size for leaf in jax.tree.leaves(abstract_params(model)))
    # Every chip has half of all but a few small leaves; the optimizer has two moments.
    assert 4 * numbers / 2 <= work.state["parameters"] <= 4 * numbers / 2 * 1.05
    assert work.state["EMA"] == work.state["parameters"]
    assert 0 <= work.state["optimizer"] - 2 * work.state["parameters"] <= 64
    assert work.state["batch"] == 16 * 16
    # Backward costs twice as much as forward. Attention's weights are computed once more, and slots
    # are padded. In the program that needs the most memory, all 16 positions are hidden.
    forward = 8 * model.forward_flops(16)
    assert 3 <= lowering.matmul_flops(work.traced.jaxpr.jaxpr) / forward <= 4.5
    assert 0.7 * 3 * forward < work.model_flops < 3 * forward
    assert 0.9 < work.mean <= 1


def test_a_sampler_before_compiling():
    config = small_config()
    config.sampling.num_iter = 2
    work = lowering.sampling_work(config, meshes.make_mesh(data=8))
    assert list(work.state) == ["parameters"]
    assert 1 <= lowering.matmul_flops(work.traced.jaxpr.jaxpr) / work.model_flops <= 2


@needs_libtpu
def test_report_of_a_training_step(tmp_path, capsys, monkeypatch):
    # The schedules come from compiling: no program may be read from, or written to, a cache.
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "true")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "programs"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    layers = {k: v for k, v in small_config().model.items() if k.endswith("layers")}
    flags = ["--config=configs/imagenet256.py:quick", "--topology=v5e:2x2", "--json"]
    flags += [f"--config.model.{name}={value}" for name, value in layers.items()]
    flags += ["--config.model.dropout=0.0", "--config.training.batch_size=8"]
    flags += ["--config.model.dtype=bfloat16"]  # Products of float32 take longer to compile.
    assert runner.run("preflight", [*flags, f"--profile={tmp_path}/profile"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["chips"], report["settings"]["batch"], report["fits"]) == (4, 8, True)
    assert report["settings"]["remat"] == "none"  # By `auto`, as the others.
    memory = report["memory"]
    parts = set(memory) - {"available", "needed"}
    assert sum(memory[part] for part in parts) == memory["needed"] < memory["available"]
    # Every gradient is summed over the chips, at least in bfloat16.
    reduced = [one for one in report["a_device"]["collectives"] if one["kind"] == "all-reduce"]
    assert sum(one["bytes"] for one in reduced) >= 2 * memory["parameters"] / 4
    profile = (tmp_path / "profile" / "profile.txt").read_text()
    total = re.search(r"([\d.]+) ms a run", profile)
    seconds = report["seconds"]
    assert float(total[1]) == pytest.approx(1e3 * seconds["program"], abs=0.01)
    assert seconds["program"] > seconds["products_at_peak"]
    assert "head/blocks/mlp/fc1" in profile
    run = report["run"]
    assert run["steps"] == 200
    seconds = run["steps"] * report["seconds"]["expected"]
    assert run["chip_hours"] == pytest.approx(4 * seconds / 3600)
    assert "does not fit" not in text.as_text(report)
    assert not (tmp_path / "programs").exists()


@needs_libtpu
@pytest.mark.parametrize(
    ("flag", "named"),
    [
        ("--config.training.batch_size=6", "batch_size 6"),
        ("--topology=v5e:3x3", "v5e:3x3"),
        ("--profile=setup.py/x", "setup.py is a file"),
    ],
)
def test_mistakes_are_one_line(flag, named, refused):
    quick = ["--config=configs/imagenet256.py:quick", "--config.model.scan_layers=True"]
    refused("preflight", named, ["--topology=v5e:2x2", *quick, flag])


def test_a_sampler_with_conditions_is_refused(refused):
    flags = ["--sample", "--topology=v5e:2x2", "--config=digits"]
    refused(
        "preflight", "sampling.guidance_every=2", [*flags, "--config.sampling.guidance_every=2"]
    )


def test_every_tpu_type_is_a_topology():
    lines = shell(
        """for type in $TPU_TYPES; do tpu_type "$type"
        echo "$type" "$CHIPS" "$HOSTS" "$TOPOLOGY"; done"""
    ).stdout.splitlines()
    assert len(lines) == 9
    for line in lines:
        name, chip_count, hosts, topology = line.split()
        where = chips.parse_slice(topology)
        assert where == chips.parse_slice(name)
        assert where.chips == int(chip_count) == 4 * int(hosts)


def test_unknown_tpu_types_are_one_line():
    result = shell("tpu_type v9-8")
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert "v9-8" in result.stderr


def shell(commands):
    script = f"source launch/tpu_types.sh; {commands}"
    return subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("hours", "chips", "expected"),
    [(0.5, 4, "run: 9 steps for 7 images (x): 30m00s, 2.0 chip-hours"),
     (36, 100, "run: 9 steps for 7 images (x): 1.5 days, 3,600 chip-hours")],
)  # fmt: skip
def test_short_runs_are_shown_in_minutes(hours: float, chips: int, expected: str):
    run = {"steps": 9, "images": 7, "whose_images": "x", "days": hours / 24}
    assert text.run_line(run | {"chip_hours": hours * chips}) == expected


def test_the_table_has_a_row_for_each_report():
    report = {
        "topology": "tpu7x:2x2x4", "chips": 16, "devices": 32, "fits": True,
        "settings": {"batch": 2048, "mesh": {"fsdp": 4}, "remat": "dots", "head_chunk": 512,
                     "accumulation": 2},
        "memory": {"needed": 10 * 2**30, "available": 20 * 2**30},
        "seconds": {"expected": 1.5}, "share_of_peak": 0.254,
        "run": {"chip_hours": 12345.6, "days": 3.21},
    }  # fmt: skip
    large = report | {"fits": False}
    *_, first, second = text.table({"tpu7x-32 L": report, "tpu7x-32 H": large}).splitlines()
    assert first == (
        "| tpu7x-32 L | tpu7x:2x2x4 | 16 | 128 | fsdp 4, remat dots, head_chunk 512, accumulation 2"
        " | 20.0 of 40.0 | 1.50 | 25% | 12,346 | 3.2 |"
    )
    assert "does not fit" in second
