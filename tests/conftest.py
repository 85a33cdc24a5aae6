"""Test set-up: eight fake CPU devices, no implicit rank promotion, no network."""

import gc
import importlib.metadata
import os
import signal
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
# Commands keep no compiled programs in the user's cache.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
# No test contacts the hub of models.
os.environ["HF_HUB_OFFLINE"] = "1"
# Most of the time is spent in compiling programs, which then run for milliseconds.
FLAGS = [
    "--xla_backend_optimization_level=0",
    "--xla_cpu_parallel_codegen_split_count=1",
    "--xla_llvm_disable_expensive_passes=true",
]
if importlib.metadata.version("jaxlib").startswith("0.10."):
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")  # Later versions need them.
os.environ.setdefault("XLA_FLAGS", " ".join(FLAGS))

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

jax.config.update("jax_numpy_rank_promotion", "raise")
# In the background of a script SIGINT is ignored, also by the commands that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection():
    """Imports make little garbage: the collector rests, a quarter of the time before tests."""
    gc.disable()


def pytest_collection_finish():
    """Keeps the garbage collector from searching the libraries' objects, a tenth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(200_000, 20, 100)
    gc.enable()


@pytest.fixture(autouse=True, scope="module")
def few_mapped_regions():
    """Drops all compiled programs when there are many.

    A program takes about four mapped regions of memory, and Linux allows a process 65,530. LLVM
    crashes when it gets no more.
    """
    yield
    regions = Path("/proc/self/maps")
    if regions.exists() and regions.read_text().count("\n") > 20_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """Compiled programs on disk, for modules that compile the same programs several times.

    In other modules, writing them takes longer than it saves.
    """
    settings = {
        "jax_enable_compilation_cache": True,
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("programs")),
        "jax_persistent_cache_min_compile_time_secs": 0.5,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name.upper(), str(value))
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


# Fixtures import the package: before pytest starts, annotations are not yet checked.


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """27 smooth pictures in 3 class folders."""
    from token_shards import write_pictures

    return write_pictures(tmp_path_factory.mktemp("images"))


@pytest.fixture
def workdir(tmp_path):
    """A workdir with the autoencoder of `token_shards`."""
    from token_shards import write_autoencoder

    return write_autoencoder(tmp_path / "work")


@pytest.fixture(scope="session")
def finished(tmp_path_factory, images):
    """A workdir tokenized without interruption."""
    from token_shards import make_config, write_autoencoder

    from tokenbridge_jax.data.tokenizing import tokenize

    workdir = write_autoencoder(tmp_path_factory.mktemp("finished"))
    tokenize(make_config(images), workdir)
    return workdir


@pytest.fixture(scope="session")
def pipeline():
    """A pipeline with random weights; 4x4 positions of 2x2 pixels."""
    from tiny_model import random_params, tiny, tiny_pipeline

    config = tiny(positions=16)
    return tiny_pipeline(config, random_params(config))


@pytest.fixture(scope="session")
def params():
    """Random parameters of `tiny_model.TINY`."""
    from tiny_model import TINY, random_params

    return random_params(TINY)


@pytest.fixture(scope="session")
def batch():
    """Three images for `tiny_model.TINY`."""
    from tiny_model import BATCH, TINY, random_batch

    return random_batch(TINY, BATCH)


@pytest.fixture(scope="session")
def pixels():
    """Three images for `pipeline`."""
    return np.random.default_rng(0).integers(256, size=(3, 8, 8, 1)).astype(np.uint8)


@pytest.fixture
def gpu_to_lower_for(monkeypatch):
    """Tells jax 0.11 and later about a GPU, to lower its kernels on a machine without one."""
    if jax.__version_info__ >= (0, 11):
        from jax._src.pallas.triton import gpu_info

        h200 = gpu_info.get_gpu_info_from_version(gpu_info.GpuVersion.H200)
        monkeypatch.setitem(gpu_info.registry, "cpu", lambda: h200)


@pytest.fixture
def refused(capsys):
    """Runs a command that must end with status 2 and one line, which contains a message."""
    from tokenbridge_jax.commands import runner

    def refused(name: str, message: str, argv: list[str]) -> None:
        assert runner.run(name, argv) == 2
        out, err = capsys.readouterr()
        assert err.startswith(f"tokenbridge {name}: error: ")
        assert message in err
        assert err.count("\n") == 1
        assert out == ""

    return refused
