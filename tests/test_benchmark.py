"""`tokenbridge benchmark`: its lines, its profiles, and mistakes."""

import functools
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_configs import CONFIGS, load
from token_shards import write_tokens

from tokenbridge_jax.benchmark import profiles, programs, timing, training_speed
from tokenbridge_jax.benchmark.ceilings import measure_ceilings
from tokenbridge_jax.benchmark.measure import Case, Reporter
from tokenbridge_jax.benchmark.timing import time_calls
from tokenbridge_jax.commands import runner
from tokenbridge_jax.runtime import meshes
from tokenbridge_jax.training import model_task

# On Python 3.12 the types of the profiler have no module. If warnings are errors, it then fails.
pytestmark = pytest.mark.filterwarnings("ignore:builtin type .* has no __module__ attribute")

# 16 positions of 4 channels. Training has two programs: 14 hidden slots and 16.
SMALL = [
    f"--config={CONFIGS / 'digits.py'}",
    "--config.data.image_size=8",
    "--config.autoencoder.channels=8",
    "--config.autoencoder.multipliers=(1,1)",
    "--config.autoencoder.latent_channels=4",
    *(f"--config.model.{part}_width=16" for part in ("encoder", "decoder", "head")),
    *(f"--config.model.{part}_layers=1" for part in ("encoder", "decoder", "head")),
    "--config.training.hidden_bucket=14",
]


@pytest.fixture
def benchmark(capsys):
    """Runs the command; returns the ceilings and the lines of the cases."""

    def benchmark(*argv):
        assert runner.run("benchmark", [argv[0], *SMALL, *argv[1:]]) == 0
        first, *lines = map(json.loads, capsys.readouterr().out.splitlines())
        assert first["what"] == "ceilings"
        assert first["device"] == jax.devices()[0].device_kind
        assert first["jax"] == jax.__version__
        assert {line["what"] for line in lines} == {argv[0]}
        return first, lines

    return benchmark


def check_numbers(line, ceilings, unit: str, work: float, devices: int):
    """Checks the numbers that every line has."""
    seconds = line["seconds"]
    assert 0 < seconds["min"] <= seconds["median"] <= seconds["max"]
    assert line[f"{unit}_per_second"] == pytest.approx(work / seconds["median"], rel=1e-4)
    assert line["cpu_seconds"] > 0
    if line["flops_by_hand"]:
        rate = ceilings["matmul"]["flops_per_second"]
        share = line["flops_by_hand"] / seconds["median"] / rate / devices
        assert line["share_of_peak"] == pytest.approx(share, rel=1e-4)
        assert line["flops_by_compiler"] > 0
        assert line["program_memory_bytes"]["arguments"] > 0
        assert line["compile_seconds"] > 0
        assert line["peak_memory_bytes"] is None  # CPUs do not report it.


def test_a_training_step(benchmark):
    ceilings, (line,) = benchmark("train", "--batch=8", "--hidden=15", "--repeats=2")
    check_numbers(line, ceilings, "images", 8, devices=8)
    settings = line["settings"]
    assert (settings["hidden"], settings["hidden_slots"], settings["visible_slots"]) == (15, 16, 1)
    assert settings["model"]["encoder_width"] == 16
    assert settings["mesh"] == {"data": 8, "fsdp": 1, "tensor": 1}


def test_training_weights_its_programs_by_their_probabilities():
    config = load("digits").get_config()
    config.training.hidden_bucket = 14
    mesh = meshes.make_mesh()
    cases = training_speed.cases(config, mesh, [8, 16], all_buckets=True)
    # The mask ratio is normal with mean 1 and deviation 0.25, truncated to [0.7, 1]. The number of
    # hidden positions is ceil(16 ratio).
    normal = statistics.NormalDist(1, 0.25)
    cuts = [normal.cdf(ratio) for ratio in (0.7, 14 / 16, 1)]
    chances = np.diff(cuts) / (cuts[-1] - cuts[0])
    keys = "batch", "hidden_slots", "visible_slots"
    assert [[case.settings[key] for key in keys] for case in cases] == [
        [8, 14, 4], [8, 16, 1], [16, 14, 4], [16, 16, 1]
    ]  # fmt: skip
    assert [case.settings["probability"] for case in cases] == pytest.approx([*chances, *chances])

    # Lines of a machine with 1 TFLOP/s on which the programs take 2, 3, 4 and 5 seconds.
    trainer = training_speed.Trainer(config, mesh)
    flops_per_image = model_task.training_flops(trainer.model, trainer.masks)
    lines = [
        {
            "settings": {**case.settings, "calls_per_timing": 1},
            "seconds": {"median": median, "min": median / 2, "max": 9.0, "repeats": 10},
            "compile_seconds": 1.0,
            "flops_by_hand": case.flops,
            "share_of_peak": case.flops / median / 1e12,
        }
        for case, median in zip(cases, (2.0, 3.0, 4.0, 5.0), strict=True)
    ]
    for batch, first, line in zip((8, 16), (2, 4), training_speed.expectations(lines), strict=True):
        median = chances @ [first, first + 1]
        flops = batch * flops_per_image
        assert line["settings"]["batch"] == batch
        assert line["seconds"] == pytest.approx(
            {"median": median, "min": median / 2, "max": 9, "repeats": 10}
        )
        assert line["images_per_second"] == pytest.approx(batch / median)
        assert line["flops_by_hand"] == pytest.approx(flops)
        assert line["share_of_peak"] == pytest.approx(flops / median / 1e12)
        assert [p["hidden_slots"] for p in line["programs"]] == [14, 16]

    failed = [{"settings": lines[0]["settings"], "error": "no memory"}, *lines[1:]]
    first, second = training_speed.expectations(failed)
    assert "seconds" not in first
    assert "error" in first
    assert "error" not in second


def test_samples(benchmark):
    flags = "--batch=8", "--steps=3", "--guidance=1.5", "--repeats=2"
    ceilings, (line,) = benchmark("sample", *flags)
    check_numbers(line, ceilings, "images", 8, devices=8)
    assert (line["settings"]["num_iter"], line["settings"]["guidance"]) == (3, 1.5)


def test_guidance_of_latents_runs_the_head_for_both_branches(benchmark):
    flags = "--positions=2", "--repeats=1", "--config.model.head=diffusion"
    flags += ("--config.model.head_steps=4",)
    (alone,), (guided,) = (benchmark("head", *flags, f"--guidance={g}")[1] for g in (1, 3))
    assert guided["flops_by_hand"] == 2 * alone["flops_by_hand"]
    assert guided["flops_by_compiler"] > alone["flops_by_compiler"]
    assert (alone["settings"]["guidance"], guided["settings"]["guidance"]) == (1, 3)


def test_the_head_with_a_profile_and_a_file(benchmark, tmp_path):
    flags = "--positions=2,3", f"--profile={tmp_path}", f"--out={tmp_path / 'lines'}"
    ceilings, lines = benchmark("head", *flags, "--repeats=2")
    for count, line in zip((2, 3), lines, strict=True):
        check_numbers(line, ceilings, "positions", count, devices=1)
        places, operations = (tmp_path / f"head_positions{count}.txt").read_text().split("\n\n")[1:]
        assert "  head\n" in places
        assert "jit(draw)" in operations
    assert lines[1]["flops_by_hand"] == 1.5 * lines[0]["flops_by_hand"]
    written = [json.loads(line) for line in (tmp_path / "lines").read_text().splitlines()]
    assert written == [ceilings, *lines]


def test_the_autoencoder(benchmark):
    ceilings, lines = benchmark("autoencoder", "--batch=8", "--precision=float32", "--repeats=2")
    assert [line["settings"]["direction"] for line in lines] == ["encode", "decode"]
    for line in lines:
        check_numbers(line, ceilings, "images", 8, devices=8)
        assert line["settings"]["precision"] == "float32"


def test_the_quantizer(benchmark):
    ceilings, lines = benchmark("quantize", "--repeats=2")
    assert [line["settings"]["direction"] for line in lines] == ["quantize", "dequantize"]
    for line in lines:
        values = line["settings"]["values"]
        check_numbers(line, ceilings, "values", values, devices=1)
        assert line["bytes_per_second"] == pytest.approx(5 * line["values_per_second"], rel=1e-4)
        share = line["bytes_per_second"] / ceilings["copy"]["bytes_per_second"]
        assert line["share_of_copy"] == pytest.approx(share, rel=1e-4)


def test_the_loader(benchmark):
    flags = "--batch=16,32", "--records=100", "--repeats=2"
    ceilings, lines = benchmark("loader", *flags, "--config.tokenize.records_per_shard=30")
    for batch, line in zip((16, 32), lines, strict=True):
        work = batch * line["settings"]["batches_per_call"]
        check_numbers(line, ceilings, "images", work, devices=1)
        assert (line["settings"]["records"], line["settings"]["views"]) == (100, 2)


def test_the_loader_from_given_shards(benchmark, tmp_path):
    write_tokens(tmp_path, {"train": [20, 13]})
    _, (line,) = benchmark("loader", f"--data={tmp_path}", "--batch=16", "--repeats=1")
    settings = line["settings"]
    assert (settings["records"], settings["channels"]) == (33, 3)
    assert settings["folder"] == str(tmp_path)


def test_images_from_disk(benchmark, images):
    source = ("--config.data.source=folder", f"--config.data.path={images}")
    flags = ("--config.data.image_channels=3", "--config.data.image_size=16", "--batch=8")
    ceilings, lines = benchmark("images", *source, *flags, "--workers=1,2", "--repeats=2")
    *cases, last = lines
    for workers, line in zip((1, 2), cases, strict=True):
        check_numbers(line, ceilings, "images", 4 * workers * 8, 1)
        assert line["settings"]["workers"] == workers
        assert line["settings"]["images"] == 27
    one, two = (line["images_per_second"] for line in cases)
    assert last["parallel_efficiency"] == [
        {"batch": 8, "workers": 1, "efficiency": 1.0},
        {"batch": 8, "workers": 2, "efficiency": pytest.approx(two / 2 / one, rel=1e-4)},
    ]


# --- Timing, profiles -----------------------------------------------------------------------------


def test_short_calls_are_timed_in_runs():
    calls = []

    def call(seconds):
        calls.append(seconds)
        time.sleep(seconds)

    long = time_calls(lambda: call(0.02), 3)
    assert (long.calls_per_timing, len(long.repeats), len(calls)) == (1, 3, 4)
    assert long.median >= 0.02
    short = time_calls(lambda: call(0.001), 3)
    assert short.calls_per_timing > 5
    assert len(short.repeats) == 3
    assert short.median >= 0.001
    assert time_calls(lambda: call(0.02), 1).to_json()["repeats"] == 1


@pytest.mark.parametrize(("enough", "expected"), [(0.0, 3), (0.09, 5), (9.0, 7)])
def test_long_calls_are_timed_less_often_except_training_steps(monkeypatch, enough, expected):
    monkeypatch.setattr(timing, "ENOUGH_SECONDS", enough)
    monkeypatch.setattr(timing, "_run", lambda call, calls: 0.02)
    assert len(time_calls(lambda: None, 7).repeats) == expected
    assert len(time_calls(lambda: None, 7, overlapped=True).repeats) == 7


def test_a_profile_names_modules_and_operations():
    """There are six products in a loop; the loop's own time does not include theirs."""
    x = jax.random.normal(jax.random.key(0), (400, 400))

    @jax.jit
    def function(x):
        with jax.named_scope("mlp"):
            return jax.lax.scan(lambda x, _: (jnp.tanh(x @ x), None), x, None, length=6)[0]

    known = programs.loaded_programs()
    function(x).block_until_ready()
    names = programs.source_names(programs.new_programs(known))
    start = time.perf_counter()
    text = profiles.record(lambda: function(x), 2, names)
    elapsed = time.perf_counter() - start
    head, places, operations = text.split("\n\n")
    assert "2 calls" in head
    assert 0 < float(head.split()[0]) * 1e-3 * 2 < elapsed
    row = next(line.split() for line in operations.splitlines() if line.endswith("/dot_general"))
    assert row[2] == "6"
    shares = [float(line.split()[1].rstrip("%")) for line in places.splitlines()[1:]]
    assert sum(shares) == pytest.approx(100, abs=0.01 * len(shares))
    assert shares == sorted(shares, reverse=True)


def profile_data(plane: str, lines: dict[str, list[tuple]]) -> jax.profiler.ProfileData:
    """A recording with events of `(name, start, duration, instruction)`; times are microseconds."""
    names = sorted({event[0] for events in lines.values() for event in events})
    text = ""
    for line, events in lines.items():
        text += f"lines {{ name: '{line}' "
        for name, start, duration, instruction in events:
            stat = f"stats {{ metadata_id: 1 str_value: '{instruction}' }}" if instruction else ""
            text += (
                f"events {{ metadata_id: {names.index(name) + 1} offset_ps: {start * 10**6} "
                f"duration_ps: {duration * 10**6} {stat} }} "
            )
        text += "} "
    for number, name in enumerate(names, 1):
        text += f"event_metadata {{ key: {number} value {{ id: {number} name: '{name}' }} }} "
    text += "stat_metadata { key: 1 value { id: 1 name: 'hlo_op' } }"
    text = f"planes {{ name: '/host:CPU' }} planes {{ name: '{plane}' {text} }}"
    return jax.profiler.ProfileData.from_text_proto(text)


def test_profiles_of_accelerators():
    names = {
        "while.1": "jit(step)/jvp(M.loss)/head/while",
        "gemm.4": "jit(step)/jvp(M.loss)/backbone/dot_general",
        "gemm.2": "jit(step)/transpose(jvp(M.loss))/head/while/body/mlp/dot_general",
        "loop_add_fusion_3": "jit(step)/checkpoint/rematted_computation/M.loss/head/mlp/add",
    }
    gpu = {
        "Stream #20(Compute)": [
            ("sm90_gemm", 0, 6000, "gemm.2"), ("loop_add_fusion_3", 6000, 1000, ""),
            ("sm90_gemm", 7000, 3000, "gemm.2"), ("sm90_gemm", 9000, 1000, "gemm.4"),
        ],
        "Stream #21(Memcpy)": [("MemcpyD2D", 0, 1000, "")],
        "XLA Modules": [("jit_step", 0, 99_000, "")],
    }  # fmt: skip
    assert [line.split() for line in table_lines(profile_data("/device:GPU:0", gpu), names)] == [
        ["4.500", "75.00%", "1", "4500.0", "backward:", "head/mlp"],
        ["0.500", "8.33%", "0.5", "1000.0", "again:", "head/mlp"],
        ["0.500", "8.33%", "0.5", "1000.0", "backbone"],
        ["0.500", "8.33%", "0.5", "1000.0", "MemcpyD2D"],
        ["4.500", "75.00%", "1", "4500.0", "sm90_gemm", names["gemm.2"]],
        ["0.500", "8.33%", "0.5", "1000.0", "loop_add_fusion_3", names["loop_add_fusion_3"]],
        ["0.500", "8.33%", "0.5", "1000.0", "sm90_gemm", names["gemm.4"]],
        ["0.500", "8.33%", "0.5", "1000.0", "MemcpyD2D"],
    ]
    # The copy overlaps a kernel, and two kernels overlap by 1 ms.
    head = profiles.tabulate(profile_data("/device:GPU:0", gpu), 2, names).splitlines()[0]
    assert head.startswith("6.000 ms a call in operations, 5.000 ms in which any of them ran;")
    tpu = {
        "XLA Modules": [("jit_step", 0, 99_000, "")],
        "XLA Ops": [
            ("%while.1 = (s32[]) while(...)", 0, 10_000, ""), ("%gemm.2 = ...", 1000, 4000, ""),
            ("%gemm.2 = ...", 5000, 5000, ""),
        ],
    }  # fmt: skip
    lines = [line.split() for line in table_lines(profile_data("/device:TPU:0", tpu), names)]
    assert [line[0] for line in lines] == ["4.500", "0.500", "4.500", "0.500"]
    assert lines[2][-2:] == ["gemm.2", names["gemm.2"]]
    assert "no operation" in profiles.tabulate(profile_data("/device:GPU:0", {}), 1, names)


def table_lines(data, names) -> list[str]:
    text = profiles.tabulate(data, 2, names)
    return [line for line in text.splitlines()[2:] if line and "share" not in line]


# --- Failures and mistakes ------------------------------------------------------------------------


def test_other_cases_run_after_one_without_enough_memory(capsys):
    reporter = Reporter(measure_ceilings(1), 1)
    for values in (2**44, 8):
        work = {"values": values}
        call = functools.partial(jnp.zeros, values)
        reporter.measure(Case("try", work, lambda stack, call=call: call, work))
    _, big, small = map(json.loads, capsys.readouterr().out.splitlines())
    assert big["settings"] == {"values": 2**44}
    assert big["error"].startswith("RESOURCE_EXHAUSTED: Out of memory")
    assert "seconds" not in big
    assert small["values_per_second"] > 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            [],
            "name one: tokenbridge benchmark train|sample|head|autoencoder|quantize|loader|images",
        ),
        (["trian"], "there is no 'trian'; name one: tokenbridge benchmark train|"),
        (["--batch=8"], "name one: tokenbridge benchmark"),
        (["train", "sample"], "unexpected argument 'sample'"),
        (["train", "--batch=12"], "--batch=12 does not divide over 8 batch shards; make"),
        (["train", "--batch=8,x"], "--batch=8,x must be numbers from 1, such as 1,64"),
        (["sample", "--steps=0"], "--steps=0 must be numbers from 1"),
        (["sample", "--batch="], "--batch= must be numbers from 1"),
        (["sample", "--guidance=nan"], "sampling.guidance=nan must be finite"),
        (["head", "--guidance=nan"], "sampling.guidance=nan must be finite"),
        (["head", "--positions=-4"], "--positions=-4 must be numbers from 1"),
        (["head", "--repeats=0"], "--repeats=0 must be at least 1"),
        (["train", "--hidden=3"], "--hidden=3 never occurs; a batch hides 12 to 16 positions"),
        (["autoencoder", "--batch=1"], "--batch=1 does not divide over 8 batch shards"),
        (["autoencoder", "--precision=float16"], "--precision"),
        (["loader", "--batch=64", "--records=63"], "--batch=64 is more than the 63 images"),
        (["loader", "--data=nowhere"], "nowhere holds no token shards"),
        (["quantize", "--config.quantizer.levels=1"], "quantizer levels is 1, must be 2 to 4096"),
        (["quantize", "--out=/nowhere/lines"], "cannot write /nowhere/lines"),
    ],
)
def test_mistakes_are_reported_in_one_line(refused, argv, message):
    refused("benchmark", message, argv)


def test_help(capsys):
    for argv in (["--help"], ["train", "--help"]):
        assert runner.run("benchmark", argv) == 0
        out = capsys.readouterr().out
        for word in ("train ", "loader ", "--all_buckets", "--profile", "--config"):
            assert word in out
