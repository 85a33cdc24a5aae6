"""Test set-up: eight fake CPU devices, exact float32 products, no implicit rank promotion."""

import importlib.metadata
import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
# Nearly all the time goes into compiling programs that then run for milliseconds.
FLAGS = ["--xla_backend_optimization_level=0"]
if importlib.metadata.version("jaxlib").startswith("0.10."):
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")  # Later versions need them.
os.environ.setdefault("XLA_FLAGS", " ".join(FLAGS))

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")
