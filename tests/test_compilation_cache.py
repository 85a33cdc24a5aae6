"""Commands keep compiled programs on disk for the next start."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache as jax_cache
from jobs import REPOSITORY
from token_shards import make_config, write_autoencoder

from tokenbridge_jax.commands import arguments
from tokenbridge_jax.config import experiment
from tokenbridge_jax.runtime import compilation_cache, processes, storage

pytest_plugins = ["probe"]

# Runs a command and prints how many programs it compiled and wrote, and how many it read.
COUNTED = """
import collections, sys
import jax
from tokenbridge_jax.commands import runner
counts = collections.Counter()
jax.monitoring.register_event_listener(lambda name, **_: counts.update([name]))
status = runner.run("tokenize", sys.argv[1:])
print(*(counts[f"/jax/compilation_cache/cache_{kind}"] for kind in ("misses", "hits")))
sys.exit(status)
"""


def start(workdir: Path, cache: Path, **variables: str) -> subprocess.Popen:
    """Starts `tokenize`, which compiles an encoder."""
    own = {name for name in os.environ if "COMPILATION_CACHE" in name or "PERSISTENT_CACHE" in name}
    env = {name: value for name, value in os.environ.items() if name not in own}
    # However fast this machine compiles, every program is written.
    env |= {"XDG_CACHE_HOME": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return subprocess.Popen(
        [sys.executable, "-c", COUNTED, "--workdir", workdir],
        env=env | {"PYTHONPATH": str(REPOSITORY)} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen) -> tuple[int, int, str]:
    """Programs compiled and written, programs read, and stderr."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    written, read = map(int, out.split("\n")[-2].split())
    return written, read, err


def files(folder: Path, kind: str = "cache") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob(f"*-{kind}")}


def test_the_second_start_compiles_nothing_and_two_at_once_are_safe(tmp_path, images):
    workdirs = [write_autoencoder(tmp_path / f"work{i}") for i in range(4)]
    settings = experiment("base")
    settings.update(make_config(images))
    for workdir in workdirs:
        storage.write_json(workdir / arguments.CONFIG_FILE, settings.to_dict())
    cache, folder = tmp_path / "cache", tmp_path / "cache" / "tokenbridge_jax" / "programs"

    found = [end(process) for process in [start(workdir, cache) for workdir in workdirs[:2]]]
    programs = files(folder)
    assert len(programs) > 3
    assert sum(written for written, *_ in found) >= len(programs)
    assert folder.stat().st_mode & 0o077 == 0

    # A process was killed while it wrote a program: the next start writes it again.
    torn = max(programs, key=lambda name: len(programs[name]))
    (folder / torn).write_bytes(programs[torn][:100])
    (folder / torn.replace("-cache", "-atime")).unlink()
    found.append(end(start(workdirs[2], cache)))
    assert found[-1][:2] == (1, len(programs) - 1)
    assert files(folder).keys() == programs.keys()
    assert len(files(folder)[torn]) > 100

    shutil.rmtree(workdirs[2] / "tokens")
    found.append(end(start(workdirs[2], cache)))
    assert found[-1][:2] == (0, len(programs))
    assert not any("ompil" in err for *_, err in found)

    # A variable switches it off.
    assert end(start(workdirs[3], cache, JAX_ENABLE_COMPILATION_CACHE="false"))[:2] == (0, 0)


@pytest.fixture
def config(monkeypatch, tmp_path):
    """JAX's settings of the cache, restored afterwards; the user's cache is `tmp_path`."""
    names = [*compilation_cache.SETTINGS, "jax_enable_compilation_cache"]
    names.append("jax_compilation_cache_dir")
    before = {name: getattr(jax.config, name) for name in names}
    for name in names:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update("jax_enable_compilation_cache", True)
    jax_cache.reset_cache()
    yield jax.config
    for name, value in before.items():
        jax.config.update(name, value)
    jax_cache.reset_cache()


def test_the_folder_is_bounded(config, tmp_path, monkeypatch):
    compilation_cache.enable()
    assert config.jax_compilation_cache_max_size == 2 * 2**30
    monkeypatch.setenv("JAX_COMPILATION_CACHE_MAX_SIZE", "20000")
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    config.update("jax_compilation_cache_dir", None)
    config.update("jax_compilation_cache_max_size", 20_000)
    config.update("jax_persistent_cache_min_compile_time_secs", 0)
    compilation_cache.enable()
    folder = Path(config.jax_compilation_cache_dir)
    newest = set()
    for power in range(2, 12):
        before = files(folder).keys()
        jax.jit(lambda x, power=power: jnp.sort(x) ** power)(jnp.arange(3.0))
        newest = files(folder).keys() - before
    assert newest
    assert 10_000 < sum(map(len, files(folder).values())) <= 20_000
    assert len(files(folder)) < 10


def test_without_a_bound_programs_have_a_folder_of_their_own_and_stay(
    config, tmp_path, monkeypatch
):
    def start(power):
        config.update("jax_compilation_cache_dir", None)
        jax_cache.reset_cache()
        compilation_cache.enable()
        jax.jit(lambda x: jnp.sort(x) ** power)(jnp.arange(3.0))
        return Path(config.jax_compilation_cache_dir)

    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    config.update("jax_persistent_cache_min_compile_time_secs", 0)
    bounded = start(2)
    kept = files(bounded)
    assert kept
    monkeypatch.setenv("JAX_COMPILATION_CACHE_MAX_SIZE", "-1")
    config.update("jax_compilation_cache_max_size", -1)
    free = start(3)
    assert free != bounded
    one = files(free).keys()
    start(4)
    assert files(free).keys() > one
    monkeypatch.delenv("JAX_COMPILATION_CACHE_MAX_SIZE")
    assert start(2) == bounded
    assert files(bounded) == kept
    assert files(free).keys() > one


def test_the_choices_of_algorithms_are_bounded(config, tmp_path, monkeypatch):
    """XLA keeps them on GPUs, in a folder that JAX names."""
    folder = tmp_path / "tokenbridge_jax" / "programs" / "xla_gpu_per_fusion_autotune_cache_dir"
    folder.mkdir(parents=True)
    for age in range(10):
        (folder / f"{age}.textproto").write_bytes(bytes(100))
        os.utime(folder / f"{age}.textproto", (0, 1000 - age))
    monkeypatch.setattr(compilation_cache, "_CHOICES_BYTES", 1000)
    compilation_cache.enable()
    assert len(list(folder.iterdir())) == 10
    config.update("jax_compilation_cache_dir", None)
    monkeypatch.setattr(compilation_cache, "_CHOICES_BYTES", 999)
    compilation_cache.enable()
    assert {path.stem for path in folder.iterdir()} == set("0123")


def test_a_users_folder_is_left_alone(config, tmp_path):
    config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    before = config.values.copy()
    compilation_cache.enable()
    assert config.values == before
    assert list(tmp_path.iterdir()) == []


def test_small_programs_are_not_kept(config, tmp_path):
    compilation_cache.enable()
    jax.jit(lambda x: x + 1)(1)
    folder = tmp_path / "tokenbridge_jax" / "programs"
    assert config.jax_compilation_cache_dir == str(folder)
    assert not files(folder)


def test_without_a_folder_a_line_says_so_and_the_command_runs(config, probe, run, monkeypatch):
    probe.then = lambda args: int(jax.jit(lambda x: x + 2)(1))
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/version")
    status, out, err = run()
    assert (status, out) == (3, "")
    assert err.startswith("compiled programs are not kept for the next start: cannot write to ")
    assert err.count("\n") == 1
    assert config.jax_compilation_cache_dir is None


@pytest.mark.parametrize("count", [1, 2])
def test_only_jobs_of_several_processes_have_none(config, probe, run, monkeypatch, count):
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: None)
    monkeypatch.setattr(processes, "_tell_when_aborted", lambda: None)
    monkeypatch.setattr(jax, "process_count", lambda: count)
    assert run("--distributed")[0] == 0
    assert (config.jax_compilation_cache_dir is None) == (count > 1)
    monkeypatch.setattr(jax, "process_count", lambda: 1)
    assert run()[0] == 0
    assert config.jax_compilation_cache_dir is not None


def test_an_import_sets_nothing(config):
    code = "import jax, tokenbridge_jax.pipeline; print(jax.config.jax_compilation_cache_dir)"
    env = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=True)
    assert out.stdout == b"None\n"
