"""What the public networks take from torchvision, in plain PyTorch.

torchvision's compiled part ends the interpreter, or is not imported, beside another build of
PyTorch than its own. Of all that it holds, the networks need the layers of three architectures.
"""

import sys
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec

import torch
from torch import nn
from torch.nn import functional


def install() -> None:
    """Takes torchvision's place among the imported modules, whether or not it is installed."""
    unused = dict.fromkeys(("CIFAR10", "CIFAR100", "STL10"), object)
    networks = {"vgg16": VGG16, "alexnet": AlexNet, "inception_v3": Inception3}
    contents = {
        "torchvision": {"__version__": "0.28.0"},
        "torchvision.datasets": unused,
        "torchvision.transforms": {},
        "torchvision.transforms.functional": {},
        "torchvision.models": networks,
        "torchvision.models.inception": {
            block.__name__: block for block in (InceptionA, InceptionC, InceptionE)
        },
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


class Conv(nn.Module):
    """A convolution without bias, its norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int | tuple[int, int], **settings):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, bias=False, **settings)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.relu(self.bn(self.conv(x)))


# pytorch-fid gives blocks A, C and E a `forward` of its own.


class InceptionA(nn.Module):
    def __init__(self, inputs: int, pool_features: int):
        super().__init__()
        self.branch1x1 = Conv(inputs, 64, 1)
        self.branch5x5_1 = Conv(inputs, 48, 1)
        self.branch5x5_2 = Conv(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = Conv(inputs, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, padding=1)
        self.branch_pool = Conv(inputs, pool_features, 1)


class InceptionB(nn.Module):
    def __init__(self, inputs: int):
        super().__init__()
        self.branch3x3 = Conv(inputs, 384, 3, stride=2)
        self.branch3x3dbl_1 = Conv(inputs, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, functional.max_pool2d(x, 3, 2)], 1)


class InceptionC(nn.Module):
    def __init__(self, inputs: int, channels_7x7: int):
        super().__init__()
        wide, tall = {"kernel": (1, 7), "padding": (0, 3)}, {"kernel": (7, 1), "padding": (3, 0)}
        middle = channels_7x7
        self.branch1x1 = Conv(inputs, 192, 1)
        self.branch7x7_1 = Conv(inputs, middle, 1)
        self.branch7x7_2 = Conv(middle, middle, **wide)
        self.branch7x7_3 = Conv(middle, 192, **tall)
        self.branch7x7dbl_1 = Conv(inputs, middle, 1)
        self.branch7x7dbl_2 = Conv(middle, middle, **tall)
        self.branch7x7dbl_3 = Conv(middle, middle, **wide)
        self.branch7x7dbl_4 = Conv(middle, middle, **tall)
        self.branch7x7dbl_5 = Conv(middle, 192, **wide)
        self.branch_pool = Conv(inputs, 192, 1)


class InceptionD(nn.Module):
    def __init__(self, inputs: int):
        super().__init__()
        self.branch3x3_1 = Conv(inputs, 192, 1)
        self.branch3x3_2 = Conv(192, 320, 3, stride=2)
        self.branch7x7x3_1 = Conv(inputs, 192, 1)
        self.branch7x7x3_2 = Conv(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = Conv(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = Conv(192, 192, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        branches = [self.branch3x3_2(self.branch3x3_1(x)), self.branch7x7x3_4(seven)]
        return torch.cat([*branches, functional.max_pool2d(x, 3, 2)], 1)


class InceptionE(nn.Module):
    def __init__(self, inputs: int):
        super().__init__()
        self.branch1x1 = Conv(inputs, 320, 1)
        self.branch3x3_1 = Conv(inputs, 384, 1)
        self.branch3x3_2a = Conv(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = Conv(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = Conv(inputs, 448, 1)
        self.branch3x3dbl_2 = Conv(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = Conv(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = Conv(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = Conv(inputs, 192, 1)


class Inception3(nn.Module):
    """The third Inception, on which pytorch-fid puts blocks A, C and E of its own."""

    def __init__(self, num_classes: int, aux_logits: bool, weights: None, init_weights: bool):
        assert (aux_logits, weights, init_weights) == (False, None, False)
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, padding=1)
        self.maxpool1 = nn.MaxPool2d(3, 2)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3)
        self.maxpool2 = nn.MaxPool2d(3, 2)
        # pytorch-fid fills the places of its own blocks.
        for name in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c"):
            self.register_module(f"Mixed_{name}", None)
        self.Mixed_6a, self.Mixed_7a = InceptionB(288), InceptionD(768)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(2048, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name, layer in self.named_children():
            if name != "fc":
                x = layer(x)
        return self.fc(torch.flatten(x, 1))
