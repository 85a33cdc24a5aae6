"""The public PyTorch networks that the tests of evaluation compare with."""

import re
from pathlib import Path

import numpy as np
import torch
import torchvision_stand_in

from tokenbridge_jax.evaluation import inception

torchvision_stand_in.install()

import lpips  # noqa: E402
from torch_fidelity import feature_extractor_inceptionv3  # noqa: E402

LPIPS_BACKBONES = {"vgg": torchvision_stand_in.VGG16, "alex": torchvision_stand_in.AlexNet}


def random_inception_state(seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights with the names of `pt_inception-2015-12-05-6726825d.pth`."""
    rng = np.random.default_rng(seed)
    scales = {"weight": (1, 0.1), "running_var": (1, 0.05)}
    state = {"fc.bias": rng.normal(size=1008).astype(np.float32)}
    for name, shape in inception.tensor_shapes().items():
        mean, scale = scales.get(name.split(".")[-1], (0, 0.1))
        if len(shape) > 1:
            mean, scale = 0, (2 / np.prod(shape[1:])) ** 0.5
        state[name] = rng.normal(mean, scale, shape).astype(np.float32)
    return state


def torch_fidelity_extractor(state: dict[str, np.ndarray], path: Path) -> torch.nn.Module:
    """torch-fidelity's extractor with these weights, which it reads from a file."""
    torch.save({name: torch.from_numpy(array) for name, array in state.items()}, path)
    return feature_extractor_inceptionv3.FeatureExtractorInceptionV3(
        "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
    )


def lpips_network(name: str) -> tuple[torch.nn.Module, dict, dict]:
    """The lpips package's network on a random backbone, and the state dicts of its two parts."""
    torch.manual_seed(0)
    backbone = LPIPS_BACKBONES[name]()
    network = lpips.LPIPS(net=name, pnet_rand=True, verbose=False).eval()
    for key, parameter in network.net.named_parameters():
        _, place, kind = key.split(".")
        parameter.data = backbone.state_dict()[f"features.{place}.{kind}"]
    linear = {k: v for k, v in network.state_dict().items() if re.match(r"lin\d", k)}
    return network, *(
        {k: v.numpy() for k, v in state.items()} for state in (backbone.state_dict(), linear)
    )
