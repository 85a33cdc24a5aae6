"""The public PyTorch networks that evaluation is compared with."""

import re
from pathlib import Path

import numpy as np
import torch
import torchvision_stand_in

from tokenbridge_jax.evaluation import inception

torchvision_stand_in.install()

import lpips  # noqa: E402
import pytorch_fid.inception  # noqa: E402
from torch_fidelity.feature_extractor_inceptionv3 import (  # noqa: E402
    FeatureExtractorInceptionV3,
)

LPIPS_BACKBONES = {"vgg": torchvision_stand_in.VGG16, "alex": torchvision_stand_in.AlexNet}


def random_inception_state(seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights with the names of `pt_inception-2015-12-05-6726825d.pth`."""
    rng = np.random.default_rng(seed)

    def draw(shape: tuple[int, ...], scale: float, offset: float = 0.0) -> np.ndarray:
        return (offset + scale * rng.normal(size=shape)).astype(np.float32)

    state = {"fc.weight": draw((1008, 2048), 0.02), "fc.bias": draw((1008,), 1.0)}
    for name, conv, inputs in inception.convolutions():
        outputs, fan_in = (conv.outputs,), inputs * np.prod(conv.kernel)
        state |= {
            f"{name}.conv.weight": draw((*outputs, inputs, *conv.kernel), (2 / fan_in) ** 0.5),
            f"{name}.bn.weight": draw(outputs, 0.1, 1),
            f"{name}.bn.bias": draw(outputs, 0.1),
            f"{name}.bn.running_mean": draw(outputs, 0.1),
            f"{name}.bn.running_var": draw(outputs, 0.05, 1),
        }
    return state


def pytorch_fid_network(state: dict[str, np.ndarray], monkeypatch) -> torch.nn.Module:
    """pytorch-fid's Inception with these weights; loading them is strict."""
    tensors = {name: torch.from_numpy(array) for name, array in state.items()}
    monkeypatch.setattr(
        pytorch_fid.inception, "load_state_dict_from_url", lambda *args, **kwargs: tensors
    )
    return pytorch_fid.inception.fid_inception_v3().eval()


def torch_fidelity_extractor(state: dict[str, np.ndarray], path: Path) -> torch.nn.Module:
    """torch-fidelity's extractor with these weights, which go through a file."""
    torch.save({name: torch.from_numpy(array) for name, array in state.items()}, path)
    return FeatureExtractorInceptionV3(
        "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
    )


def lpips_network(name: str) -> tuple[torch.nn.Module, dict, dict]:
    """The lpips package's network on a random backbone; the backbone's state dict, the layers'."""
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
