"""What the public networks use of torchvision, in plain PyTorch.

torchvision's compiled part ends the interpreter, or cannot be imported, beside a build of PyTorch
that is not its own. The networks need only the layers of two architectures.
"""

import sys
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec

from torch import nn


def install() -> None:
    """Takes torchvision's place among the imported modules, whether or not it is installed."""
    unused = dict.fromkeys(("CIFAR10", "CIFAR100", "STL10"), object)
    contents = {
        "torchvision": {"__version__": "0.28.0"},
        "torchvision.datasets": unused,
        "torchvision.transforms": {},
        "torchvision.transforms.functional": {},
        "torchvision.models": {"vgg16": VGG16, "alexnet": AlexNet},
    }
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    for name, content in contents.items():
        module = module_from_spec(ModuleSpec(name, None, is_package=name != "torchvision.datasets"))
        vars(module).update(content)
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)


class VGG16(nn.Module):
    """Configuration D, without its classifier; weights are random, as without `pretrained`."""

    def __init__(self, pretrained: bool = False):
        assert not pretrained
        super().__init__()
        layers, inputs = [], 3
        for width, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
            for _ in range(count):
                layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU(inplace=True)]
                inputs = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)


class AlexNet(nn.Module):
    """The one-column AlexNet, without its classifier."""

    def __init__(self, pretrained: bool = False):
        assert not pretrained
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 11, stride=4, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(64, 192, 5, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(192, 384, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(384, 256, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(256, 256, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2),
        )
