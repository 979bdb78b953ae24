"""Features at chosen depths of a network: which modules they come out of, how wide they are, and their capture.

A depth is the name of a submodule (``"blocks.3"``, ``"layer4"``), whose output is taken, or a fraction of the network's
stages: 0.5 is the output of the middle one, 1.0 what the classifier sees. Stages are a ViT's blocks, otherwise what
timm lists as the network's feature maps, otherwise its children that hold parameters.

Hooks lie on the network while one batch runs through it and are gone afterwards. Names are those of the network
without peft's wrapper.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from peft import PeftModel
from torch import Tensor, nn

from factory.classifier import ImageClassifier
from keys.errors import InputError

Tokens = Literal["average", "class"]
"""How the tokens of a Transformer become one vector: the mean of those of patches, or the first one."""


@dataclass(frozen=True)
class Depth:
    """Where features are taken. ``module``: whose output, or whose input if ``before``; ``width``: their channels d."""

    name: str
    module: str
    before: bool
    width: int


def plain(model: nn.Module) -> nn.Module:
    """The network of a classifier, under peft's wrapper if it has one."""
    network = model.network if isinstance(model, ImageClassifier) else model
    return network.get_base_model() if isinstance(network, PeftModel) else network


def classifier_name(network: nn.Module) -> str:
    """The name of the one layer that makes logits of features: timm's classifier, else what is called ``head``.

    Raises InputError if the network names none, or several (a distilled DeiT).
    """
    network = plain(network)
    get: Any = getattr(network, "get_classifier", None)
    found = get() if callable(get) else getattr(network, "head", None)
    name = next((name for name, module in network.named_modules() if module is found and name), None)
    if name is None:
        raise InputError(
            f"A {type(network).__name__} has no single layer that makes logits, before which prototypes could stand; "
            "name the depths without 1.0 and keep inference at softmax."
        )
    return name


def find_depths(network: nn.Module, wanted: Sequence[str | float]) -> tuple[Depth, ...]:
    """The depths of ``network`` for names and fractions in (0, 1]; raises InputError for one that it does not have."""
    network = plain(network)
    found = tuple(_find(network, one) for one in wanted)
    if len({(depth.module, depth.before) for depth in found}) < len(found):
        raise InputError(f"The depths {list(wanted)} name one place of the network twice; leave one of them out.")
    return found


def _find(network: nn.Module, wanted: str | float) -> Depth:
    if isinstance(wanted, str):
        if wanted not in dict(network.named_modules()) or not wanted:
            known = ", ".join(_stages(network))
            raise InputError(f"A {type(network).__name__} has no part {wanted!r}; its stages are {known}.")
        return Depth(wanted, wanted, False, _width(network, wanted))
    if wanted == 1.0:
        name = classifier_name(network)
        layer = network.get_submodule(name)
        width = getattr(layer, "in_features", None)
        if not isinstance(width, int):
            raise InputError(
                f"The classifier {name} is a {type(layer).__name__}, not one linear layer; name the depths without 1.0."
            )
        return Depth("1.0", name, True, width)
    stages = _stages(network)
    name = stages[math.ceil(wanted * len(stages) - 1e-9) - 1]
    return Depth(f"{wanted:g}", name, False, _width(network, name))


def _stages(network: nn.Module) -> list[str]:
    blocks = getattr(network, "blocks", None)
    if isinstance(blocks, nn.Sequential | nn.ModuleList) and hasattr(network, "patch_embed"):
        return [f"blocks.{index}" for index in range(len(blocks))]
    listed: Any = getattr(network, "feature_info", None)
    names = [entry["module"] for entry in listed if "module" in entry] if isinstance(listed, list) else []
    modules = dict(network.named_modules())
    if names and all(name in modules for name in names):
        return names
    with contextlib.suppress(InputError):
        last = classifier_name(network).split(".")[0]
        return [n for n, child in network.named_children() if n != last and any(True for _ in child.parameters())]
    return [name for name, child in network.named_children() if any(True for _ in child.parameters())]


def _width(network: nn.Module, name: str) -> int:
    """Channels of a module's output: of its last layer that has some, or of the last such layer before it."""
    embedded = getattr(network, "embed_dim", None)
    if name.startswith("blocks.") and name.count(".") == 1 and isinstance(embedded, int):
        return embedded
    names = [inner for inner, _ in network.named_modules()]
    last = max(index for index, inner in enumerate(names) if inner == name or inner.startswith(f"{name}."))
    for inner in reversed(names[: last + 1]):
        module = network.get_submodule(inner)
        for attribute in ("out_features", "out_channels", "num_features"):
            width = getattr(module, attribute, None)
            if isinstance(width, int) and not any(True for _ in module.children()):
                return width
    raise InputError(f"How many channels come out of {name} cannot be told; choose another depth.")


@contextlib.contextmanager
def captured(model: nn.Module, depths: Sequence[Depth]) -> Iterator[dict[str, Tensor]]:
    """Features by the depths' names, filled while ``model`` runs inside the block; the hooks are gone after it.

    Only a module that is called has a hook: a network whose forward pass goes around one leaves its name out.
    """
    network, features = plain(model), dict[str, Tensor]()
    with contextlib.ExitStack() as hooks:
        for depth in depths:
            module = network.get_submodule(depth.module)
            hook = _before(features, depth.name) if depth.before else _after(features, depth.name)
            handle = module.register_forward_pre_hook(hook) if depth.before else module.register_forward_hook(hook)
            hooks.callback(handle.remove)
        yield features


def _before(features: dict[str, Tensor], name: str) -> Any:
    def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        features[name] = inputs[0]

    return keep


def _after(features: dict[str, Tensor], name: str) -> Any:
    def keep(_: nn.Module, __: Any, output: Tensor) -> None:
        features[name] = output

    return keep


def class_tokens(network: nn.Module) -> int:
    """How many tokens come before those of the patches; 0 also where there are no tokens at all."""
    return getattr(plain(network), "num_prefix_tokens", 0)


def pooled(features: Tensor, depth: Depth, network: nn.Module, tokens: Tokens) -> Tensor:
    """One vector per image, N×width: of maps N×C×H×W (or N×C×D×H×W) the mean place, of tokens N×T×d by ``tokens``.

    Raises InputError if that is not as wide as the depth was found to be.
    """
    if features.ndim == 3:
        first = class_tokens(network)
        features = features[:, 0] if tokens == "class" else features[:, first:].mean(dim=1)
    elif features.ndim > 3:
        features = features.flatten(2).mean(dim=2)
    if features.ndim != 2 or features.shape[1] != depth.width:
        raise InputError(
            f"Features at depth {depth.name} ({depth.module}) have the shape {tuple(features.shape)}, not N×"
            f"{depth.width}; choose another depth."
        )
    return features
