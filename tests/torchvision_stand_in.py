"""The parts of torchvision that the public networks use, in plain PyTorch.

With another build of PyTorch than its own, torchvision's compiled part stops the interpreter or
cannot be imported. The networks need only the layers of two architectures.
"""

import sys
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec

from torch import nn


def install() -> None:
    """Replaces torchvision among the imported modules, whether or not it is installed."""
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


class _Network(nn.Module):
    """Random convolutions of the given widths, without a classifier; None is a pooling."""

    pool: tuple[int, int]
    widths: tuple[int | None, ...]
    # Size, stride and padding of the first convolutions; the others are 3 x 3 with padding 1.
    first: tuple[tuple[int, int, int], ...] = ()

    def __init__(self, pretrained: bool = False):
        assert not pretrained
        super().__init__()
        layers, inputs, first = [], 3, iter(self.first)
        for width in self.widths:
            if width is None:
                layers.append(nn.MaxPool2d(*self.pool))
            else:
                layers.append(nn.Conv2d(inputs, width, *next(first, (3, 1, 1))))
                layers.append(nn.ReLU(inplace=True))
                inputs = width
        self.features = nn.Sequential(*layers)


class VGG16(_Network):
    """Configuration D."""

    pool = (2, 2)
    widths = (64, 64, None, 128, 128, None, *[256] * 3, None, *[512] * 3, None, *[512] * 3, None)


class AlexNet(_Network):
    """The one-column AlexNet."""

    pool = (3, 2)
    widths = (64, None, 192, None, 384, 256, 256, None)
    first = ((11, 4, 2), (5, 1, 2))
