"""Test set-up: eight fake CPU devices, no implicit rank promotion."""

import gc
import importlib.metadata
import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
# Nearly all the time goes into compiling programs that then run for milliseconds.
FLAGS = ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
if importlib.metadata.version("jaxlib").startswith("0.10."):
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")  # Later versions need them.
os.environ.setdefault("XLA_FLAGS", " ".join(FLAGS))

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_finish():
    """A tenth of the time went into looking for garbage among the libraries' own objects."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(200_000, 20, 100)


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """Compiled programs on disk, for a module whose runs compile the same ones again.

    In others, writing them takes longer than it saves.
    """
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("programs")),
        "jax_persistent_cache_min_compile_time_secs": 0.5,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def pipeline():
    """A pipeline with random weights; 4x4 positions of 2x2 pixels."""
    from tiny_model import random_params, tiny, tiny_pipeline  # After pytest's import hooks.

    config = tiny(positions=16)
    return tiny_pipeline(config, random_params(config))


@pytest.fixture(scope="session")
def images():
    return np.random.default_rng(0).integers(256, size=(3, 8, 8, 1)).astype(np.uint8)


@pytest.fixture
def gpu_to_lower_for(monkeypatch):
    """What jax 0.11 and later must know to lower a GPU's kernels on a machine without one."""
    if jax.__version_info__ >= (0, 11):
        from jax._src.pallas.triton import gpu_info

        h200 = gpu_info.get_gpu_info_from_version(gpu_info.GpuVersion.H200)
        monkeypatch.setitem(gpu_info.registry, "cpu", lambda: h200)
