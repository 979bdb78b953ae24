"""Networks of the papers and small-image variants that timm lacks, registered with it: a base's name stays timm's.

All are built from scratch for images of 28 to 64 pixels; none has pre-trained weights. A network that is no network of
images, or has more than that, says so by a class attribute ``TRAITS`` (see :func:`factory.networks.traits`).

>>> import timm, torch
>>> timm.create_model("cnn6", num_classes=10)(torch.zeros(2, 1, 28, 28)).shape
torch.Size([2, 10])
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.models import register_model
from timm.models._registry import generate_default_cfgs
from timm.models.convmixer import ConvMixer
from timm.models.resnet import BasicBlock, Bottleneck, ResNet, downsample_conv
from timm.models.vgg import cfgs
from torch import Tensor, nn

from factory.recipes.part import Trait
from factory.volumization.networks import build_network

_GREY = {"input_size": (1, 28, 28), "mean": (0.5,), "std": (0.5,), "fixed_input_size": False}
_COLOUR = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3, "fixed_input_size": False}

default_cfgs = generate_default_cfgs(
    {
        "cnn6": _GREY,
        "cnn6_flat": {**_GREY, "fixed_input_size": True},
        "bottleneck_resnet": _COLOUR,
        "convmixer_small": _COLOUR,
        "resnet18_small": _COLOUR,
        "vgg11_small": _COLOUR,
        "vgg16_small": _COLOUR,
        "vgg19_small": _COLOUR,
        "resnet34_small": _COLOUR,
        "resnet50_small": _COLOUR,
        "vgg2d": {**_COLOUR, "fixed_input_size": True},
        "vgg3d": {**_COLOUR, "fixed_input_size": True},
        "resnet2d": {**_COLOUR, "fixed_input_size": True},
        "resnet3d": {**_COLOUR, "fixed_input_size": True},
        "efficientnet2d": {**_COLOUR, "fixed_input_size": True},
        "efficientnet3d": {**_COLOUR, "fixed_input_size": True},
    }
)
"""What a network's input is where nothing else is asked for; timm looks for it here, by this name."""

NAMES = tuple(default_cfgs)


class Cnn6(nn.Module):
    """The six convolutions of the conformity paper (Table 1, "CNN-6"): grey N×1×28×28 to logits N×K.

    Three times two convolutions 5×5 with PReLU and pooling 2×2, of 32, 64 and 128 channels; then the mean over space,
    or all values where ``image_size`` is given, and fully connected layers of 512, 64 and ``num_classes``. The table
    does not say how the convolutions are padded (here: the size stays) or what lies between the fully connected
    layers (here: ReLU, without which they would be one linear map). PReLUs have one slope for each channel.
    """

    def __init__(self, num_classes: int = 10, in_chans: int = 1, image_size: int | None = None) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.layer1 = _stage(in_chans, 32)
        self.layer2 = _stage(32, 64)
        self.layer3 = _stage(64, 128)
        self.pool = nn.AdaptiveAvgPool2d(1) if image_size is None else nn.Identity()
        values = 128 if image_size is None else 128 * (image_size // 8) ** 2
        self.fc1, self.act1 = nn.Linear(values, 512), nn.ReLU()
        self.fc2, self.act2 = nn.Linear(512, 64), nn.ReLU()
        self.head = nn.Linear(64, num_classes) if num_classes else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """Logits N×K."""
        values = self.pool(self.layer3(self.layer2(self.layer1(images)))).flatten(1)
        return self.head(self.act2(self.fc2(self.act1(self.fc1(values)))))


def _stage(before: int, channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, channels, 5, padding=2), nn.PReLU(channels),
        nn.Conv2d(channels, channels, 5, padding=2), nn.PReLU(channels), nn.MaxPool2d(2),
    )  # fmt: skip


class BottleneckResNet(nn.Module):
    """The conformity paper's residual network (Table 1, "ResNet-110"), N×C×H×W to logits N×K.

    A convolution 3×3 of 16 channels, then three stages of n bottlenecks, of 64, 128 and 256 channels, the second and
    the third at half the size; the mean over space, a fully connected layer of 1,024 with ReLU, and one of
    ``num_classes``. A bottleneck has three convolutions, so that ``depth`` is 9n + 2: n = 12 gives the table's 110.
    Raises ValueError for another depth.
    """

    def __init__(self, depth: int = 110, num_classes: int = 10, in_chans: int = 3) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 9)
        if blocks < 1 or rest:
            raise ValueError(f"the depth must be 9n + 2 (11, 20, 29, … 110), not {depth}.")
        self.num_classes = num_classes
        self.conv1 = nn.Conv2d(in_chans, 16, 3, padding=1, bias=False)
        self.bn1, self.act1 = nn.BatchNorm2d(16), nn.ReLU()
        self.layer1 = _bottlenecks(16, 16, blocks, stride=1)
        self.layer2 = _bottlenecks(64, 32, blocks, stride=2)
        self.layer3 = _bottlenecks(128, 64, blocks, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc1, self.act2 = nn.Linear(256, 1024), nn.ReLU()
        self.head = nn.Linear(1024, num_classes) if num_classes else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Logits N×K."""
        values = self.layer3(self.layer2(self.layer1(self.act1(self.bn1(self.conv1(images))))))
        return self.head(self.act2(self.fc1(self.pool(values).flatten(1))))


def _bottlenecks(before: int, planes: int, blocks: int, stride: int) -> nn.Sequential:
    after = 4 * planes
    first = Bottleneck(before, planes, stride, downsample_conv(before, after, 1, stride))
    return nn.Sequential(first, *(Bottleneck(after, planes) for _ in range(blocks - 1)))


class SmallVgg(nn.Module):
    """VGG for small images, N×C×H×W to logits N×K: timm's convolutions 3×3 with batch norm, and one linear layer.

    The last of the five poolings and the two layers of 4,096 are left out; what they would see of 28 to 64 pixels is
    one place. ``convolutions``: as in :data:`timm.models.vgg.cfgs`. ``width``: channels of the first.
    """

    def __init__(
        self, convolutions: Sequence[int | str], num_classes: int = 10, in_chans: int = 3, width: int = 64
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        layers: list[nn.Module] = []
        before = in_chans
        for entry in convolutions[:-1]:
            if isinstance(entry, str):
                layers.append(nn.MaxPool2d(2))
                continue
            channels = entry * width // 64
            layers += [nn.Conv2d(before, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]
            before = channels
        self.features, self.pool = nn.Sequential(*layers), nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(before, num_classes) if num_classes else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Logits N×K."""
        return self.head(self.pool(self.features(images)).flatten(1))


@register_model
def cnn6(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """:class:`Cnn6` with the mean over space."""
    return Cnn6(**_scratch("cnn6", pretrained, arguments))


@register_model
def cnn6_flat(pretrained: bool = False, img_size: int = 28, **arguments: Any) -> nn.Module:
    """:class:`Cnn6` whose first fully connected layer sees every place of images of ``img_size`` pixels."""
    return Cnn6(image_size=img_size, **_scratch("cnn6_flat", pretrained, arguments))


@register_model
def bottleneck_resnet(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """:class:`BottleneckResNet` of ``depth`` 9n + 2."""
    return BottleneckResNet(**_scratch("bottleneck_resnet", pretrained, arguments))


@register_model
def convmixer_small(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """timm's ConvMixer, by default of 256 channels, 8 blocks, kernels of 5 and patches of 2 pixels.

    ``patch_size`` 2, 4 or 7, ``dim``, ``depth`` and ``kernel_size`` choose another.
    """
    sizes: dict[str, Any] = {"dim": 256, "depth": 8, "kernel_size": 5, "patch_size": 2}
    return ConvMixer(**(sizes | _scratch("convmixer_small", pretrained, arguments)))


@register_model
def resnet18_small(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """ResNet-18 for small images: a stem 3×3 with stride 1, and no pooling behind it."""
    return _small_resnet(BasicBlock, (2, 2, 2, 2), _scratch("resnet18_small", pretrained, arguments))


@register_model
def resnet34_small(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """ResNet-34 for small images, as :func:`resnet18_small`."""
    return _small_resnet(BasicBlock, (3, 4, 6, 3), _scratch("resnet34_small", pretrained, arguments))


@register_model
def resnet50_small(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """ResNet-50 for small images, as :func:`resnet18_small`."""
    return _small_resnet(Bottleneck, (3, 4, 6, 3), _scratch("resnet50_small", pretrained, arguments))


@register_model
def vgg11_small(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """:class:`SmallVgg` with the eight convolutions of VGG-11."""
    return SmallVgg(cfgs["vgg11"], **_scratch("vgg11_small", pretrained, arguments))


@register_model
def vgg16_small(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """:class:`SmallVgg` with the thirteen convolutions of VGG-16."""
    return SmallVgg(cfgs["vgg16"], **_scratch("vgg16_small", pretrained, arguments))


@register_model
def vgg19_small(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """:class:`SmallVgg` with the sixteen convolutions of VGG-19."""
    return SmallVgg(cfgs["vgg19"], **_scratch("vgg19_small", pretrained, arguments))


@register_model
def vgg3d(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """The volumization paper's VGG over volumes of patches, see :mod:`factory.volumization.networks`.

    ``img_size`` and ``patch_size`` say what volumes; ``width``, ``depth_kernel`` and ``aggregate`` are as there.
    """
    return _volumized("vgg3d", pretrained, **arguments)


@register_model
def resnet3d(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """The same for a ResNet."""
    return _volumized("resnet3d", pretrained, **arguments)


@register_model
def efficientnet3d(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """The same for an EfficientNet."""
    return _volumized("efficientnet3d", pretrained, **arguments)


@register_model
def vgg2d(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """The control of :func:`vgg3d`: the same network over plain images of ``img_size`` pixels."""
    return _plain("vgg2d", pretrained, **arguments)


@register_model
def resnet2d(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """The control of :func:`resnet3d`."""
    return _plain("resnet2d", pretrained, **arguments)


@register_model
def efficientnet2d(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """The control of :func:`efficientnet3d`."""
    return _plain("efficientnet2d", pretrained, **arguments)


def _volumized(name: str, pretrained: bool, img_size: int = 32, patch_size: int = 16, **arguments: Any) -> nn.Module:
    own = _scratch(name, pretrained, arguments)
    channels, classes = own.pop("in_chans", 3), own.pop("num_classes", 10) or 2
    patches = (img_size // patch_size) ** 2
    network = build_network(name, channels=channels, patches=patches, side=patch_size, classes=classes, **own)
    network.TRAITS = frozenset({Trait.VOLUMES, Trait.PATCH_LOGITS})
    network.volume = (patches, patch_size)
    return network


def _plain(name: str, pretrained: bool, img_size: int = 32, **arguments: Any) -> nn.Module:
    own = _scratch(name, pretrained, arguments)
    channels, classes = own.pop("in_chans", 3), own.pop("num_classes", 10) or 2
    return build_network(name, channels=channels, patches=1, side=img_size, classes=classes, **own)


def _small_resnet(block: type[BasicBlock] | type[Bottleneck], layers: tuple[int, ...], arguments: Any) -> ResNet:
    network = ResNet(**({"block": block, "layers": layers} | arguments))
    network.conv1 = nn.Conv2d(arguments.get("in_chans", 3), 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    network.maxpool = nn.Identity()
    return network


def _scratch(name: str, pretrained: bool, arguments: dict[str, Any]) -> dict[str, Any]:
    """The network's own arguments, without those that timm gives for pre-trained weights; lists become tuples."""
    if pretrained:
        raise ValueError(f"{name} has no pre-trained weights; make some with 'keyfoundry pretrain'.")
    of_timm = {"pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}
    own = {key: value for key, value in arguments.items() if key not in of_timm}
    return {key: tuple(value) if isinstance(value, list) else value for key, value in own.items()}
