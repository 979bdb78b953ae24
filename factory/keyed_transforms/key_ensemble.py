"""Several keys in one device: their models side by side in one module, averaged, or one of them chosen for each image.

Ensembles of key-based models are MaungMaung and Kiya's (GCCE 2021, the paper's reference [24]); the choice at random is
that of Iijima et al. (2023, reference [19]), there among encrypted ViTs on a server. A device has no randomness that
parity could be checked with, so the choice here is a keyed hash of the image's 8-bit values, made in the graph.

The hash is i = (Σ_j w_j · v[q[j]]) mod k of the c·H·W values v, with the permutation q from a subkey and public whole
numbers w_j = 1 + (j mod W). W is so small that the sum stays below 2³¹: 32-bit integers give the same choice in every
runtime. It is linear, not cryptographic: a change of one value by one level moves the choice by a constant that the
key decides. It keeps an outsider from knowing which model answers; it does not withstand an insider.

The choice has no gradient, and the chosen member's alone leads to images that another member answers. Whoever
differentiates in the image is handed the gradient of all members' mean (EOT; Athalye, Carlini and Wagner, ICML 2018).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from factory.classifier import ImageClassifier
from keys.errors import InputError

LEVELS = 256


class KeyEnsemble(nn.Module):
    """Models of one device, one for each of its keys: float N×C×H×W in [0, 1] to logits N×K.

    ``members``: two or more modules with the same classes. Without ``order`` their logits are averaged: logits, not
    probabilities, because what a package gives are logits (the logarithm of a mean of probabilities overflows in
    float16 where the members are sure), and because it is what attackers of ensembles differentiate. With ``order``, a
    permutation of the c·H·W values of an image, int64, one member answers for each image. All of them are computed in
    either case. Raises InputError for fewer than two members, or images with too many values for the hash.
    """

    order: Tensor | None
    weights: Tensor

    def __init__(self, members: Sequence[nn.Module], order: np.ndarray | None = None) -> None:
        super().__init__()
        if len(members) < 2:
            raise InputError("An ensemble of keys needs two or more members; leave recipe.keys out for one key.")
        self.members = nn.ModuleList(members)
        self.register_buffer("order", None if order is None else torch.from_numpy(order.astype(np.int64)))
        if order is not None:
            period = min(len(order), (2**31 - 1) // ((LEVELS - 1) * len(order)))
            if period < len(members):
                raise InputError(
                    f"Images of {len(order)} values are too large to choose among {len(members)} keys; average them."
                )
            weights = 1 + torch.arange(len(order), dtype=torch.int32) % period
            self.register_buffer("weights", weights, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits N×K of images N×C×H×W in [0, 1]."""
        logits = torch.stack([member(images) for member in self.members], 1)
        if self.order is None:
            return logits.mean(1)
        chosen = self.choice(images).long().view(-1, 1, 1).expand(-1, 1, logits.shape[2])
        answer = logits.gather(1, chosen).squeeze(1)
        if torch.is_grad_enabled() and images.requires_grad:
            # One step of an attack may change the choice; its expectation over the members is what it has to climb.
            mean = logits.mean(1)
            return answer.detach() + mean - mean.detach()
        return answer

    def choice(self, images: Tensor) -> Tensor:
        """Which member answers for each image: int32 N of 0 … k − 1. Raises InputError if all are averaged."""
        if self.order is None:
            raise InputError("This ensemble averages its members; none of them is chosen.")
        levels = torch.floor(images.clamp(0, 1) * (LEVELS - 1) + 0.5).to(torch.int32)
        ordered = levels.flatten(1).index_select(1, self.order)
        return (ordered * self.weights).sum(1, dtype=torch.int32) % len(self.members)

    def each(self, change: Callable[[nn.Module], nn.Module]) -> KeyEnsemble:
        """The same ensemble of changed members, in evaluation mode."""
        order = None if self.order is None else self.order.cpu().numpy()
        return KeyEnsemble([change(member) for member in self.members], order).eval()


DeviceClassifier = ImageClassifier | KeyEnsemble
"""What a device is trained as: one model, or one for each of its keys."""


def behind(model: DeviceClassifier, other: DeviceClassifier | None) -> nn.Module:
    """The networks of ``model`` behind the transforms of ``other`` of the same form, or behind none."""
    if isinstance(model, KeyEnsemble):
        others = list(other.members) if isinstance(other, KeyEnsemble) else [None] * len(model.members)
        pairs = iter(zip(model.members, others, strict=True))
        return model.each(lambda _: _behind(*next(pairs)))
    return _behind(model, other)


def _behind(model: nn.Module, other: nn.Module | None) -> ImageClassifier:
    assert isinstance(model, ImageClassifier)
    transform = other.transform if isinstance(other, ImageClassifier) else None
    mean, std = model.mean.flatten().tolist(), model.std.flatten().tolist()
    return ImageClassifier(model.network, mean, std, transform, model.attractors)
