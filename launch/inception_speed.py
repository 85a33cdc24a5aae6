"""Measures the images a second of FID's Inception on one accelerator, here and in PyTorch.

It uses random weights and 10,000 images of 256x256 in the host's memory, resized on the device, and
reports the best of three passes after one that compiles. PyTorch's network is pytorch-fid's
(`pip install pytorch-fid torchvision`); without it, only this package is measured.

  python launch/inception_speed.py
"""

import argparse
import functools
import importlib.util
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from tokenbridge_jax.evaluation import inception
from tokenbridge_jax.evaluation.metrics import frechet_distance
from tokenbridge_jax.evaluation.moments import Gaussian, gaussian


def main() -> None:
    """Prints a line for every network, precision and batch size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[64, 256])
    args = parser.parse_args()
    images, state = make_images(args.images), random_state()
    if importlib.util.find_spec("pytorch_fid"):
        time_torch(images, state, args.batch_sizes)
    params = inception.import_inception(state)
    exact: dict[str, np.ndarray] = {}
    for precision in inception.PRECISIONS:
        for batch_size in args.batch_sizes:
            network = jax.jit(functools.partial(inception.features, precision=precision))
            on_device = jax.device_put(params)

            def run(batch: np.ndarray, network=network, on_device=on_device) -> jax.Array:
                return network(on_device, jax.device_put(batch))[0]

            features = timed(f"jax {jax.__version__} {precision}", run, images, batch_size)
            exact.setdefault("highest", features)
        print(f"    {differences(features, exact['highest'])}")


def timed(
    name: str, run: Callable[[np.ndarray], object], images: np.ndarray, batch_size: int
) -> np.ndarray:
    """Prints the images a second; returns the features."""
    best, features = 0.0, np.zeros(0)
    for _ in range(4):
        started = time.perf_counter()
        batches = range(0, len(images) - batch_size + 1, batch_size)
        results = [run(images[start : start + batch_size]) for start in batches]
        features = np.concatenate([np.asarray(to_host(r)) for r in results])
        best = max(best, len(features) / (time.perf_counter() - started))
    print(f"{name}, batch {batch_size}: {best:.0f} img/s", flush=True)
    return features


def to_host(result: Any) -> Any:
    """Copies an array of PyTorch to the host."""
    return result.cpu() if hasattr(result, "cpu") else result


def differences(features: np.ndarray, exact: np.ndarray) -> str:
    """The difference of features from those of full precision, and its effect on FID."""
    count = min(len(features), len(exact)) // 2 * 2
    features, exact = features[:count], exact[:count]
    worst = np.abs(features - exact).max() / np.abs(exact).max()
    # The same images in two precisions, then two halves of them compared in one precision.
    moved = frechet_distance(shrunk(features), shrunk(exact))
    half = count // 2
    distances = [frechet_distance(shrunk(x[:half]), shrunk(x[half:])) for x in (features, exact)]
    return (
        f"features within {worst:.1e} of the largest; FID to full precision {moved:.1e}; "
        f"FID of two halves {distances[0]:.5f}, in full precision {distances[1]:.5f}"
    )


def shrunk(features: np.ndarray) -> Gaussian:
    """Moments of the first 512 features, which are enough for a comparison."""
    return gaussian(features[:, :512])


def make_images(count: int) -> np.ndarray:
    """Pictures of coloured squares; those of the second half are brighter."""
    rng = np.random.default_rng(0)
    squares = rng.integers(0, 200, (count, 8, 8, 3), dtype=np.uint8)
    squares[count // 2 :] += 30
    return squares.repeat(32, axis=1).repeat(32, axis=2)


def random_state() -> dict[str, np.ndarray]:
    """Weights with the names and shapes of the published file: random kernels, no normalisation."""
    rng = np.random.default_rng(0)
    state = {"fc.bias": np.zeros(inception.CLASSES, np.float32)}
    for name, shape in inception.tensor_shapes().items():
        one = name.endswith(("bn.weight", "running_var"))
        spread = math.sqrt(2 / math.prod(shape[1:])) if len(shape) > 1 else 0.0
        state[name] = rng.normal(one, spread, shape).astype(np.float32)
    return state


def time_torch(images: np.ndarray, state: dict[str, np.ndarray], batch_sizes: list[int]) -> None:
    """Times pytorch-fid's network in float32 and TF32, with PyTorch's search for algorithms on."""
    import pytorch_fid.inception
    import torch

    tensors = {name: torch.from_numpy(array) for name, array in state.items()}
    pytorch_fid.inception.load_state_dict_from_url = lambda *_, **__: tensors
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = pytorch_fid.inception.InceptionV3([3]).eval().to(device)
    torch.backends.cudnn.benchmark = True

    def run(batch: np.ndarray) -> object:
        # The result stays on the device, so that the host does not wait for each batch.
        pixels = torch.from_numpy(batch).to(device).permute(0, 3, 1, 2).float() / 255
        with torch.inference_mode():
            return network(pixels)[0][:, :, 0, 0]

    for tf32 in (False, True):
        torch.backends.cudnn.allow_tf32 = tf32
        for batch_size in batch_sizes:
            kind = "TF32 (its default)" if tf32 else "float32"
            timed(f"torch {torch.__version__} {kind}", run, images, batch_size)


if __name__ == "__main__":
    main()
