"""Attacks that know of the purifier. Each proposes; whether it fools the purified classifier is judged elsewhere.

The purifier optimises a network and bisects a boundary, and hands no gradient back. BPDA (Athalye, Carlini and Wagner,
*Obfuscated Gradients Give a False Sense of Security*, ICML 2018, section 4.1) takes its output in the forward pass and
the identity in the backward pass; EOT (section 4.2) averages that over the purifier's seeds, which an attacker does not
know. An attack through a blur needs no purification at all: noise that is smooth is learned by the prior as early as
the picture.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from device_tests.attacks.ascent import ascend
from device_tests.attacks.attack import Progress
from device_tests.attacks.gradients import loss_gradient
from device_tests.perturbation import Norm
from factory.purifier.purify import purify
from factory.purifier.settings import PurifierSettings
from factory.seeds import derive_seed


@dataclass(frozen=True)
class PurifierBPDA:
    """PGD whose gradient is taken at the purified images, averaged over ``samples`` seeds of the purifier.

    ``steps`` and their lengths as in :class:`~device_tests.attacks.pgd.PGD`. Fits
    :class:`~device_tests.attacks.attack.Attack`; the model it is given is the classifier *behind* the purifier.
    """

    purifier: PurifierSettings
    steps: int = 10
    samples: int = 2
    reach: float = 2.0

    @property
    def name(self) -> str:
        """``"purifier-bpda"``."""
        return "purifier-bpda"

    @property
    def norm(self) -> Norm:
        """L∞."""
        return Norm.LINF

    @property
    def description(self) -> str:
        """Norm and budget in words."""
        return (
            f"BPDA with EOT, L∞, {self.steps} steps from {self.reach:g}·ε to 0 along a cosine, {self.samples} seeds a "
            f"step, through {self.purifier}"
        )

    @property
    def gradients_per_image(self) -> int:
        """One gradient, and one purification, per step and seed."""
        return self.steps * self.samples

    def generate(
        self, model: nn.Module, images: Tensor, labels: Tensor, *, epsilon: float, seed: int,
        progress: Progress | None = None,
    ) -> Tensor:  # fmt: skip
        """Candidates; see :class:`~device_tests.attacks.attack.Attack`. Every step purifies every image anew."""
        asked = 0

        def gradient(x: Tensor, truth: Tensor) -> Tensor:
            nonlocal asked
            drawn = [derive_seed(seed, "bpda", asked, sample) for sample in range(self.samples)]
            asked += 1
            seeds = [one for one in drawn for _ in range(len(x))]
            purified = purify(x.repeat(self.samples, 1, 1, 1), model, self.purifier, seeds=seeds).images
            slope = loss_gradient(model, purified, truth.repeat(self.samples))
            return slope.view(self.samples, *x.shape).mean(dim=0)

        turns = [math.pi * index / self.steps for index in range(self.steps)]
        return ascend(
            model, images, labels, gradient, norm=Norm.LINF, epsilon=epsilon,
            lengths=[self.reach * (1 + math.cos(turn)) / 2 for turn in turns],
            random_start=torch.Generator().manual_seed(seed), gradients_per_step=self.samples, progress=progress,
        )  # fmt: skip


class Blurred(nn.Module):
    """A classifier of images that are blurred first by a Gaussian of ``sigma`` pixels; mean logits with the sharp ones.

    A gradient through it leads to noise that survives smoothing, and that fools the classifier without it as well.
    """

    def __init__(self, model: nn.Module, sigma: float = 1.0) -> None:
        super().__init__()
        self.model = model
        place = torch.arange(-math.ceil(3 * sigma), math.ceil(3 * sigma) + 1, dtype=torch.float32)
        line = torch.exp(-place.square() / (2 * sigma**2))
        self.line: Tensor
        self.register_buffer("line", line / line.sum())

    def forward(self, images: Tensor) -> Tensor:
        """Logits N×K of images N×C×H×W in [0, 1]."""
        line, radius = self.line, len(self.line) // 2
        flat = F.pad(images.flatten(0, 1)[:, None], (radius,) * 4, mode="reflect")
        soft = F.conv2d(F.conv2d(flat, line.view(1, 1, -1, 1)), line.view(1, 1, 1, -1)).view_as(images)
        return (self.model(images) + self.model(soft)) / 2
