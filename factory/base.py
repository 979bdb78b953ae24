"""The shared base: a timm network with its normalisation and input contract (docs/bases.md).

A checkpoint is one safetensors file whose metadata names the timm architecture and its arguments, so that a
file alone is enough to rebuild the model; nothing is ever unpickled.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from timm.layers.config import set_fused_attn
from torch import nn

from exporters.contract import InputContract
from factory.networks import embedding_convolution, patch_embedding, traits
from factory.own_networks import NAMES as OWN_NETWORKS
from factory.recipes.part import Trait
from factory.seeds import derive_seed
from factory.settings import BaseSettings
from factory.vits import KeyedVit, call_projections
from keys.errors import InputError
from keys.files import write_atomic

BLOCK_SIZE = 4
"""Side of a block in pixels where neither the recipe nor a patch says it."""

_ASSETS = Path(__file__).parent / "assets" / "base"
EMBEDDED = {
    "shipped": _ASSETS / "vit-fashion-mnist.safetensors",
    "hardened": _ASSETS / "vit-fashion-mnist-hardened.safetensors",
}
"""The bases that come with the program: by plain training, and by adversarial training on from that one."""


@dataclass(frozen=True)
class Architecture:
    """A timm model name with its arguments, and what its input looks like."""

    name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    contract: InputContract
    labels: tuple[str, ...]
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Base:
    """The shared network, in evaluation mode, and everything that a device model inherits from it."""

    architecture: Architecture
    network: nn.Module

    @property
    def patch_size(self) -> int:
        """Side of one patch in pixels; raises InputError if the network has no patches, or none that are square."""
        if patch_embedding(self.network) is None:
            raise InputError(f"Base {self.architecture.name} has no {Trait.PATCH_EMBEDDING.value.removeprefix('a ')}.")
        height, width = embedding_convolution(self.network).kernel_size
        if height != width:
            raise InputError(f"Base {self.architecture.name} has patches of {height}×{width}; they must be square.")
        return height

    @property
    def default_block_size(self) -> int:
        """M of the block shuffle where a recipe says nothing: the patch size, or 4 where there are no patches.

        4 is what the key-based paper's Table I has for a ResNet-50 (its [16]). Raises InputError if it does not suit.
        """
        if patch_embedding(self.network) is not None:
            return self.patch_size
        height, width = self.architecture.contract.height, self.architecture.contract.width
        if height % BLOCK_SIZE or width % BLOCK_SIZE:
            raise InputError(
                f"Base {self.architecture.name} has no patches, so that blocks are of {BLOCK_SIZE} pixels unless "
                f"recipe.block_size says otherwise, and these do not tile images of {height}×{width}; state a block "
                "size that does."
            )
        return BLOCK_SIZE

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the architecture and all weights: the base's name in manifests."""
        return weights_digest(self.network, json.dumps(_to_json(self.architecture), sort_keys=True))


def weights_digest(module: nn.Module, prefix: str = "") -> str:
    """SHA-256 over names, shapes, types and bytes of a module's state."""
    digest = hashlib.sha256(prefix.encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def build_network(architecture: Architecture, *, pretrained: bool = False, seed: int = 0) -> nn.Module:
    """Create the timm model of ``architecture`` in evaluation mode; random weights come from ``seed``.

    Fused attention is off: its bf16 backward is slow on CPUs, and the exported graphs stay plain.
    Raises InputError if timm does not know the name, or the model does not take the contract's images.
    """
    set_fused_attn(False)
    if not timm.is_model(architecture.name):
        close = ", ".join(difflib.get_close_matches(architecture.name, timm.list_models()))
        raise InputError(
            f"Base {architecture.name!r} is neither {' nor '.join(map(repr, EMBEDDED))}, nor a checkpoint file, nor a "
            "model timm knows" + (f" (close to it: {close})." if close else f", nor one of {', '.join(OWN_NETWORKS)}.")
        )
    torch.manual_seed(derive_seed(seed, "initial weights"))
    try:
        network = timm.create_model(
            architecture.name, pretrained=pretrained, num_classes=len(architecture.labels), **architecture.arguments
        ).eval()
    except Exception as error:
        raise InputError(
            f"Base {architecture.name!r} could not be created: {error} Where there is no network, give a checkpoint "
            "by path, or --random-weights for a dry run."
        ) from error
    if isinstance(network, KeyedVit):
        call_projections(network)
    _check_input(architecture, network)
    return network


def _check_input(architecture: Architecture, network: nn.Module) -> None:
    """Raise InputError unless the model takes the contract's images, every pixel of them.

    A network of volumes is asked by the transform that makes them.
    """
    contract = architecture.contract
    size = (contract.height, contract.width)
    refused = f"Base {architecture.name!r} does not take {contract.channels}×{contract.height}×{contract.width} images"
    if patch_embedding(network) is not None:
        convolution = embedding_convolution(network)
        stated = getattr(getattr(network, "patch_embed", None), "img_size", size)
        if stated != size or convolution.in_channels != contract.channels:
            raise InputError(f"{refused}.")
        if any(side % patch for side, patch in zip(size, convolution.kernel_size, strict=True)):
            raise InputError(  # timm would leave out the last rows and columns
                f"Patches of {convolution.kernel_size[0]} pixels do not tile images of {size[0]}×{size[1]}; "
                f"choose another size or patch for base {architecture.name!r}."
            )
    elif Trait.IMAGES in traits(network):
        try:
            with torch.inference_mode():
                answer = network(torch.zeros(1, *contract.shape))
        except (RuntimeError, AssertionError, ValueError, IndexError) as error:
            raise InputError(
                f"{refused}: {str(error).splitlines()[0] if str(error) else 'it fails on one'}."
            ) from error
        classes = len(architecture.labels)
        if classes and getattr(answer, "shape", None) != (1, classes):
            raise InputError(f"Base {architecture.name!r} does not answer an image with {classes} logits.")


def contract_for(channels: int, size: int) -> InputContract:
    """The input contract of a square model: bicubic resize of the shorter side, then a centre crop."""
    return InputContract(
        channels=channels, height=size, width=size,
        resize=f"bicubic, antialiased, shorter side to {size}, centre crop {size}x{size}",
    )  # fmt: skip


def timm_architecture(
    name: str, labels: tuple[str, ...], image_size: int | None, arguments: dict[str, Any] | None = None
) -> Architecture:
    """The architecture of a timm name, with timm's own statistics for its pre-trained weights."""
    arguments = dict(arguments or {})
    config = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    input_size = config.input_size if config else (3, 224, 224)
    if image_size is not None and _is_of_one_size(name):
        arguments["img_size"] = image_size
    size = int(arguments.get("img_size", image_size or input_size[1]))
    channels = int(arguments.get("in_chans", input_size[0]))
    mean = tuple(float(v) for v in (config.mean if config else (0.5,) * 3))[:channels]
    std = tuple(float(v) for v in (config.std if config else (0.5,) * 3))[:channels]
    return Architecture(name, mean, std, contract_for(channels, size), labels, arguments)


def _is_of_one_size(name: str) -> bool:
    """Whether the model is made for images of one size, which it is told as ``img_size``."""
    config = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    # A few of timm's Evas do not say so.
    return config is None or bool(config.fixed_input_size) or name.split(".")[0] in timm.list_models(module="eva")


def read_architecture(settings: BaseSettings) -> Architecture:
    """What the base that the settings name looks like, before any data set is known (a timm name has no labels).

    Raises InputError for an unknown base, or a checkpoint that is missing, damaged or pickled.
    """
    return read_base(settings).architecture


def read_base(settings: BaseSettings) -> Base:
    """The base as far as it is known before any data set: a timm name has random weights, no labels and two classes.

    With it a wrong name or recipe is refused before images are decoded. Raises InputError as
    :func:`read_architecture`.
    """
    path = _checkpoint(settings)
    if path is not None:
        return read_checkpoint(path)
    architecture = timm_architecture(settings.name, (), settings.image_size)
    return Base(architecture, build_network(replace(architecture, labels=("one", "other"))))


def load_base(settings: BaseSettings, labels: tuple[str, ...], seed: int) -> Base:
    """Load the base that the settings name.

    ``labels`` are the data set's classes: a timm name gets a head for them, a checkpoint must have as many.
    Raises InputError for an unknown, unsupported or damaged base, and for a class count that does not match.
    """
    path = _checkpoint(settings)
    if path is not None:
        base = read_checkpoint(path)
        known = base.architecture.labels
        if len(labels) != len(known):
            raise InputError(f"Base {settings.name} has {len(known)} classes, but the data set has {len(labels)}.")
        unnamed = labels == tuple(map(str, range(len(labels))))
        if labels != known and not unnamed:
            differing = next((a, b) for a, b in zip(known, labels, strict=True) if a != b)
            raise InputError(
                f"Base {settings.name} and the data set name their classes differently: {differing[0]!r} and "
                f"{differing[1]!r} stand in one place. Packages would carry wrong labels."
            )
        return base
    architecture = timm_architecture(settings.name, labels, settings.image_size)
    return Base(architecture, build_network(architecture, pretrained=not settings.random_weights, seed=seed))


def _checkpoint(settings: BaseSettings) -> Path | None:
    """The checkpoint file that the settings name, or None for a timm name."""
    path = EMBEDDED.get(settings.name, Path(settings.name))
    if path.suffix in {".pt", ".pth", ".bin", ".ckpt"}:
        raise InputError(f"{path} is a pickled checkpoint; give a .safetensors file written by 'keyfoundry pretrain'.")
    return path if path.suffix == ".safetensors" else None


def save_checkpoint(base: Base, path: Path, notes: dict[str, Any] | None = None) -> None:
    """Write the base as one safetensors file; ``notes`` (seed, command, result) go into its metadata."""
    metadata = {"keyfoundry": json.dumps({**_to_json(base.architecture), "notes": notes or {}}, sort_keys=True)}
    tensors = {name: tensor.detach().contiguous() for name, tensor in base.network.state_dict().items()}
    write_atomic(path, save(tensors, metadata))


def read_checkpoint(path: Path) -> Base:
    """Read a file that :func:`save_checkpoint` wrote; raises InputError if it is missing or damaged."""
    if not path.is_file():
        raise InputError(f"The base {path} does not exist.")
    try:
        with safe_open(str(path), "pt") as file:
            metadata = json.loads((file.metadata() or {})["keyfoundry"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 – not a dict
        architecture = Architecture(
            name=metadata["name"], mean=tuple(metadata["mean"]), std=tuple(metadata["std"]),
            contract=InputContract.from_json(metadata["contract"]), labels=tuple(metadata["labels"]),
            arguments=metadata["arguments"],
        )  # fmt: skip
    except (SafetensorError, KeyError, TypeError, ValueError, InputError) as error:
        raise InputError(f"{path} is not a base written by 'keyfoundry pretrain', or it is damaged: {error}") from error
    network = build_network(architecture)
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        raise InputError(f"The weights in {path} do not fit its architecture {architecture.name}.") from error
    if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
        raise InputError(f"The base {path} holds weights that are not finite.")
    return Base(architecture, network)


def _to_json(architecture: Architecture) -> dict[str, Any]:
    return {**asdict(architecture), "contract": architecture.contract.to_json()}
