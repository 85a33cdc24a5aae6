"""The training loop: exact resume, interruption, non-finite losses, hooks, printed lines."""

import dataclasses
import itertools
import os
import re
import shutil
import signal
import threading
import time

import jax
import numpy as np
import pytest
from etils import epath
from toy import ToyTask, toy_batch, toy_batches

from tokenbridge_jax.runtime import meshes
from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.training import program
from tokenbridge_jax.training.checkpoints import latest_step
from tokenbridge_jax.training.loop import Hook, Interrupted, Run, fit
from tokenbridge_jax.training.metric_writer import read_metrics
from tokenbridge_jax.training.optimizer import OptimizerConfig
from tokenbridge_jax.training.program import Program, Recipe
from tokenbridge_jax.training.step import make_train_step

TOTAL = 6


def make_run(directory, **changes):
    """A toy run with dropout, noise, accumulation, warm-up, cosine decay and clipping."""
    recipe = Recipe(
        OptimizerConfig(0.05, TOTAL, warmup_steps=2, clip=0.5),
        batch_size=16,
        ema_decay=0.8,
        accumulation=2,
        log_every=changes.pop("log_every", 1),
        checkpoint_every=changes.pop("checkpoint_every", 2),
        keep=3,
        keep_every=0,
    )
    settings = dict(
        name="toy",
        directory=epath.Path(directory),
        task=ToyTask(),
        recipe=recipe,
        seed=3,
        batches=toy_batches,
        flops_per_image=1e3,
        fields={"seed": 3, "log_every": recipe.log_every},
        fixed={"seed"},
    )
    return Run(**(settings | changes))


@pytest.fixture(scope="module")
def mesh():
    return meshes.make_mesh(2, 2, 2)


@pytest.fixture(scope="module")
def straight(mesh, tmp_path_factory):
    """The folder and final state of a run that was not interrupted."""
    directory = tmp_path_factory.mktemp("straight")
    return directory, fit(make_run(directory), mesh)


def losses(directory):
    """Step, loss, gradient norm and learning rate of every line, as exact numbers."""
    rows = read_metrics(directory / "metrics.jsonl")
    return [(row["step"], row["loss"], row["grad_norm"], row["learning_rate"]) for row in rows]


def abstract_batch(mesh):
    """What `toy_batch` gives, before there is one."""
    sharding = meshes.batch_sharding(mesh)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), toy_batch(0)
    )


def assert_same_state(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def signal_at(step, number):
    def run(state, at, writer):
        if at == step:
            os.kill(os.getpid(), number)
        return {}

    return Hook(1, run)


def test_a_stopped_run_continues_bit_for_bit(straight, mesh, tmp_path, capfd):
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted):
        fit(make_run(tmp_path, hooks=[signal_at(3, signal.SIGINT)]), mesh)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    told, _, saved = capfd.readouterr().err.partition("a second signal stops at once")
    assert told.endswith("\nstops after this update; ")
    assert "stopped and saved at step 4" in saved
    assert latest_step(tmp_path / "checkpoints") == 4
    state = fit(make_run(tmp_path), mesh)
    assert "continues from step 4 of 6" in capfd.readouterr().err
    assert losses(tmp_path) == losses(straight[0])
    assert [step for step, *_ in losses(tmp_path)] == list(range(1, TOTAL + 1))
    assert_same_state(state, straight[1])


def test_a_run_killed_between_checkpoints_repeats_the_lost_steps_exactly(straight, mesh, tmp_path):
    def dying_batches(start):
        return itertools.islice(toy_batches(start), 5)  # Step 6 finds no batch and raises.

    with pytest.raises(StopIteration):
        fit(make_run(tmp_path, batches=dying_batches), mesh)
    assert [step for step, *_ in losses(tmp_path)] == [1, 2, 3, 4]
    state = fit(make_run(tmp_path), mesh)
    assert losses(tmp_path) == losses(straight[0])
    assert_same_state(state, straight[1])


def test_a_resumed_run_may_change_its_mesh(straight, mesh, tmp_path):
    with pytest.raises(Interrupted):
        fit(make_run(tmp_path, hooks=[signal_at(2, signal.SIGTERM)]), mesh)
    one = meshes.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    fit(make_run(tmp_path), one)
    np.testing.assert_allclose(losses(tmp_path), losses(straight[0]), rtol=1e-5)


def test_a_finished_run_does_nothing(straight, mesh, capsys):
    directory, state = straight

    def no_batches(start):
        raise AssertionError("a finished run asked for data")

    before = (directory / "metrics.jsonl").read_bytes()
    assert_same_state(fit(make_run(directory, batches=no_batches), mesh), state)
    assert "all 6 steps are done; nothing left to train" in capsys.readouterr().err
    assert (directory / "metrics.jsonl").read_bytes() == before


def test_another_runs_checkpoints_are_refused_by_field(straight, mesh, capsys):
    directory, _ = straight
    other = make_run(directory, fields={"seed": 4, "log_every": 1})
    with pytest.raises(UserError, match="belongs to another run: seed was 3, is 4"):
        fit(other, mesh)
    fit(make_run(directory, fields={"seed": 3, "log_every": 5}), mesh)
    assert "note: log_every was 1, is 5" in capsys.readouterr().err


def test_an_implicit_transfer_in_a_step_is_an_error(mesh, tmp_path, monkeypatch):
    def make_step(*arguments, **settings):
        step = make_train_step(*arguments, **settings)
        return lambda state, batch, *others: step(state, jax.device_get(batch), *others)

    monkeypatch.setattr(program, "make_train_step", make_step)
    with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device transfer"):
        fit(make_run(tmp_path), mesh)


def poisoned(bad_step, factor):
    """Batches of which one is multiplied by a factor."""

    def batches(start):
        for step in itertools.count(start):
            batch = toy_batch(step)
            batch["y"] *= np.float32(factor if step == bad_step else 1)
            yield batch

    return batches


def test_a_loss_that_is_not_finite_stops_the_run_at_the_last_good_checkpoint(mesh, tmp_path):
    with pytest.raises(UserError) as caught:
        fit(make_run(tmp_path, batches=poisoned(4, np.nan)), mesh)
    message = str(caught.value)
    assert "loss is nan at step 5" in message
    assert f"the last good checkpoint is step 4 in {tmp_path}/checkpoints" in message
    assert latest_step(tmp_path / "checkpoints") == 4
    assert [step for step, *_ in losses(tmp_path)] == [1, 2, 3, 4]
    assert all(np.isfinite(row).all() for row in losses(tmp_path))


def test_a_bad_update_is_never_saved(mesh, tmp_path):
    """The update that is not finite is itself due for a checkpoint."""

    with pytest.raises(UserError, match=r"is inf at step 2: stopped; no checkpoint had been"):
        fit(make_run(tmp_path, batches=poisoned(1, 1e30)), mesh)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == []


def test_hooks_join_their_steps_line_and_lines_come_when_due(mesh, tmp_path, capsys):
    seen = []

    def count_leaves(state, step, writer):
        seen.append((step, int(state.step)))
        return {"val": 10.0 * step}

    never = Hook(0, lambda *_: pytest.fail("every=0 is never"))
    run = make_run(tmp_path, log_every=3, hooks=[Hook(4, count_leaves), never])
    fit(run, mesh)
    assert seen == [(4, 4), (6, 6)]
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [(row["step"], row.get("val")) for row in rows] == [(3, None), (4, 40.0), (6, 60.0)]
    assert {"loss", "grad_norm", "learning_rate", "param_norm", "largest"} <= rows[0].keys()
    assert all(row["images_per_second"] > 0 for row in rows)
    printed = capsys.readouterr().err
    # 4 x 8 + 8 + 8 x 3 + 3 parameters.
    assert f"toy: 67 parameters ({tmp_path / 'parameters.txt'})" in printed
    assert "first/kernel" in (tmp_path / "parameters.txt").read_text()
    assert re.search(r"^toy 6/6 .*  loss [\d.]+  MFU \d+\.\d%$", printed, re.MULTILINE)
    peak = 1e12 * float(printed.partition("peak ")[2].split()[0])
    share = rows[0]["images_per_second"] * 1e3 / peak
    assert rows[0]["share_of_peak"] == pytest.approx(share, rel=0.01)


def test_an_impossible_run_is_refused_before_anything_is_written(mesh, tmp_path):
    def no_batches(start):
        raise UserError("there are no images")

    with pytest.raises(UserError, match="there are no images"):
        fit(make_run(tmp_path / "new", batches=no_batches), mesh)
    assert not (tmp_path / "new").exists()


def test_an_incomplete_checkpoint_is_reported_and_skipped(straight, mesh, tmp_path, capsys):
    shutil.copytree(straight[0], tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoints" / "6" / "opt_state")
    state = fit(make_run(tmp_path), mesh)
    assert "checkpoint 6 is incomplete: continuing from step 4" in capsys.readouterr().err
    assert_same_state(state, straight[1])


def test_metrics_of_lost_checkpoints_are_not_erased(straight, mesh, tmp_path):
    shutil.copytree(straight[0], tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(UserError, match=r"metrics.jsonl ends at step 6 but .* has no complete"):
        fit(make_run(tmp_path), mesh)
    assert losses(tmp_path) == losses(straight[0])
    assert not (tmp_path / "checkpoints").exists()


def test_a_run_killed_before_its_first_checkpoint_is_complete_starts_again(
    straight, mesh, tmp_path
):
    shutil.copytree(straight[0], tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoints")
    metrics = tmp_path / "metrics.jsonl"
    # The second checkpoint, of step 4, would have waited for the first one.
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:4]))
    fit(make_run(tmp_path), mesh)
    assert losses(tmp_path) == losses(straight[0])


def test_the_time_of_hooks_is_not_part_of_the_speed(mesh, tmp_path):
    def slow(state, step, writer):
        time.sleep(1)
        return {}

    fit(make_run(tmp_path, log_every=3, hooks=[Hook(4, slow)]), mesh)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    # With the second that the hook sleeps, the speed would be below 32 images per second.
    assert rows[-1]["step"] == 6
    assert rows[-1]["images_per_second"] > 32


def test_runs_that_differ_in_numbers_share_their_program(mesh, tmp_path):
    run = make_run(tmp_path)
    batch = abstract_batch(mesh)

    def program(seed, **changes):
        optimizer = dataclasses.replace(run.recipe.optimizer, **changes)
        recipe = dataclasses.replace(run.recipe, optimizer=optimizer)
        return Program.make(run.task, recipe, seed, mesh).trace(batch, None).lower().as_text()

    numbers = {"learning_rate": 0.5, "total_steps": 77, "warmup_steps": 11}
    assert program(3) == program(2**32 - 1, **numbers)
    assert program(3) != program(3, weight_decay=0.3)


def test_a_step_that_was_compiled_ahead_is_not_compiled_again(mesh, tmp_path, caplog):
    run = make_run(tmp_path)
    program = Program.make(run.task, run.recipe, run.seed, mesh)
    batch = abstract_batch(mesh)

    def compiled():
        return sum("XLA compilation of jit(step)" in line.getMessage() for line in caplog.records)

    with jax.log_compiles():
        program.compile(batch, None)
        assert compiled() == 1
        fit(run, mesh, program)
    assert compiled() == 1


@pytest.fixture
def large_host(monkeypatch):
    """A host on which two programs are compiled at a time."""
    monkeypatch.setattr(program, "host_cores", lambda: 8)
    monkeypatch.setattr(program, "host_memory", lambda: 16 * 2**30)


@pytest.fixture
def before_compiling(monkeypatch):
    """Sets what a thread does, other than the main one, before it compiles a program."""
    compile_one = jax.stages.Lowered.compile

    def set_up(function):
        def compile_after(self):
            if threading.current_thread() is not threading.main_thread():
                function()
            return compile_one(self)

        monkeypatch.setattr(jax.stages.Lowered, "compile", compile_after)

    return set_up


def two_kinds(step):
    """The task ignores draws, but None and an empty tuple have programs of their own."""
    return (None, ())[step % 2]


@pytest.mark.parametrize("small", [None, "host_cores", "host_memory"])
def test_programs_are_compiled_in_threads_on_large_hosts(
    small, mesh, tmp_path, straight, large_host, monkeypatch, caplog, capsys
):
    if small:
        monkeypatch.setattr(program, small, lambda: 7)
    with jax.log_compiles():  # In this thread.
        fit(make_run(tmp_path, draw=two_kinds), mesh)
    compiled = ["XLA compilation of jit(step)" in line.getMessage() for line in caplog.records]
    assert sum(compiled) == (2 if small else 1)
    assert losses(tmp_path) == losses(straight[0])
    assert ("compiled meanwhile: 1" in capsys.readouterr().err) == (not small)


def test_an_update_is_reported_while_the_program_of_the_next_is_compiled(
    mesh, tmp_path, straight, large_host, before_compiling, capsys
):
    metrics, seen, seconds = tmp_path / "metrics.jsonl", [], 3.0

    def wait_for_a_line():
        begin = time.monotonic()
        while not (metrics.exists() and read_metrics(metrics)):
            assert time.monotonic() - begin < 60
            time.sleep(0.1)
        seen.extend(row["step"] for row in read_metrics(metrics))
        time.sleep(seconds)

    before_compiling(wait_for_a_line)
    fit(make_run(tmp_path, draw=two_kinds), mesh)
    assert seen == [1]
    assert losses(tmp_path) == losses(straight[0])
    told = "update 1 is done; the next one waits until its program is compiled"
    assert told in capsys.readouterr().err
    # The wait is no time of training. An update has 16 images.
    assert read_metrics(metrics)[1]["images_per_second"] > 2 * 16 / seconds


@pytest.mark.parametrize("checkpoint_every", [1, 4])
def test_a_run_that_waits_for_a_program_stops_without_it(
    mesh, tmp_path, straight, large_host, before_compiling, capfd, checkpoint_every
):
    over, threads = threading.Event(), []

    def signal_and_wait():
        threads.append(threading.current_thread())
        begin = time.monotonic()
        while "the next one waits" not in capfd.readouterr().err:
            assert time.monotonic() - begin < 60
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)
        over.wait(60)

    before_compiling(signal_and_wait)
    begin = time.monotonic()
    with pytest.raises(Interrupted):
        fit(make_run(tmp_path, draw=two_kinds, checkpoint_every=checkpoint_every), mesh)
    assert time.monotonic() - begin < 60
    assert latest_step(tmp_path / "checkpoints") == 1
    over.set()
    threads[0].join(60)
    before_compiling(lambda: None)
    fit(make_run(tmp_path, draw=two_kinds), mesh)
    assert losses(tmp_path) == losses(straight[0])


def test_a_job_of_several_processes_compiles_nothing_ahead(
    mesh, tmp_path, large_host, monkeypatch, caplog
):
    run = make_run(tmp_path)
    ours = Program.make(run.task, run.recipe, run.seed, mesh)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with jax.log_compiles():
        ours.compile_ahead(abstract_batch(mesh), map(two_kinds, range(2)))
    assert not [line for line in caplog.records if "XLA compilation" in line.getMessage()]


def test_an_error_of_a_compiling_thread_is_raised(mesh, tmp_path, large_host, before_compiling):
    def fail():
        raise ValueError("in a thread")

    before_compiling(fail)
    run = make_run(tmp_path, draw=lambda step: () if step == 2 else None)
    with pytest.raises(ValueError, match="in a thread"):
        fit(run, mesh)
    # The first two updates did not need that program.
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_a_run_that_ends_gives_up_the_programs_that_wait(
    mesh, tmp_path, large_host, before_compiling
):
    """Two threads begin two programs, which take until the run has ended. Two more wait."""
    over, begun = threading.Event(), []

    def wait_for_the_end():
        begun.append(threading.current_thread())
        assert over.wait(60)

    before_compiling(wait_for_the_end)
    # The first two updates need the same program.
    draws = [None, None, (), ((),), ((), ()), ((), (), ())]
    hooks = [signal_at(1, signal.SIGTERM)]
    with pytest.raises(Interrupted):
        fit(make_run(tmp_path, draw=lambda step: draws[step], hooks=hooks), mesh)
    over.set()
    for thread in begun:
        thread.join(60)
    assert 1 <= len(begun) <= 2
