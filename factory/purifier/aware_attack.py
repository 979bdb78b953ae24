"""Attacks that know of the purifier. Each proposes; whether it fools the purified classifier is judged elsewhere.

The purifier optimises a network and bisects a boundary, and hands no gradient back. BPDA (Athalye, Carlini and Wagner,
*Obfuscated Gradients Give a False Sense of Security*, ICML 2018, section 4.1) takes its output in the forward pass and
the identity in the backward pass; EOT (section 4.2) averages that over the purifier's seeds, which an attacker does not
know. Where the purifier finds no crossing it returns its input, and such a gradient no longer sees it: therefore the
attack can also climb the loss of all reconstructions that have a vote, so that none of them keeps the true label.
Square Attack asks the purified classifier for its scores and needs no gradient at all, so that none can mislead it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from device_tests.attacks.ascent import ascend
from device_tests.attacks.attack import Progress
from device_tests.attacks.gradients import loss_gradient
from device_tests.attacks.square import Square
from device_tests.perturbation import Norm
from factory.purifier.purify import purify
from factory.purifier.settings import PurifierSettings
from factory.purifier.trajectory import reconstruct
from factory.seeds import derive_seed


@dataclass(frozen=True)
class PurifierBPDA:
    """PGD whose gradient is taken behind the purifier, averaged over ``samples`` of its seeds.

    ``trajectory`` False: at the purified images. True: at the given image and all its recognisable reconstructions.
    ``steps`` and their lengths as in :class:`~device_tests.attacks.pgd.PGD`. Fits
    :class:`~device_tests.attacks.attack.Attack`; the model it is given is the classifier *behind* the purifier.
    """

    purifier: PurifierSettings
    steps: int = 10
    samples: int = 2
    reach: float = 2.0
    trajectory: bool = False

    @property
    def name(self) -> str:
        """``"purifier-bpda"`` or ``"purifier-trajectory"``."""
        return "purifier-trajectory" if self.trajectory else "purifier-bpda"

    @property
    def norm(self) -> Norm:
        """L∞."""
        return Norm.LINF

    @property
    def description(self) -> str:
        """Norm and budget in words."""
        return (
            f"BPDA with EOT on {'all reconstructions' if self.trajectory else 'the purified image'}, L∞, {self.steps} "
            f"steps from {self.reach:g}·ε to 0 along a cosine, {self.samples} seeds a step, {self.purifier}"
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
            repeated, wanted = x.repeat(self.samples, 1, 1, 1), truth.repeat(self.samples)
            if self.trajectory:
                slope = self._slope_of_votes(model, repeated, wanted, seeds)
            else:
                slope = loss_gradient(model, purify(repeated, model, self.purifier, seeds=seeds).images, wanted)
            return slope.view(self.samples, *x.shape).mean(dim=0)

        turns = [math.pi * index / self.steps for index in range(self.steps)]
        return ascend(
            model, images, labels, gradient, norm=Norm.LINF, epsilon=epsilon,
            lengths=[self.reach * (1 + math.cos(turn)) / 2 for turn in turns],
            random_start=torch.Generator().manual_seed(seed), gradients_per_step=self.samples, progress=progress,
        )  # fmt: skip

    def _slope_of_votes(self, model: nn.Module, images: Tensor, labels: Tensor, seeds: list[int]) -> Tensor:
        drawn = reconstruct(images, self.purifier, seeds=seeds)
        total = loss_gradient(model, images, labels)
        for reconstructions, fidelity in zip(drawn.images, drawn.fidelity, strict=True):
            votes = fidelity >= self.purifier.recognisable
            if votes.any():
                total[votes] += loss_gradient(model, reconstructions[votes], labels[votes])
        return total


class PurifiedClassifier(nn.Module):
    """The classifier behind the purifier, as one that can only be asked: logits N×K of the purified images.

    Every call draws the purifier's seed anew, from ``seed`` and the call's number: an attacker does not know it.
    """

    def __init__(self, classifier: nn.Module, settings: PurifierSettings, seed: int) -> None:
        super().__init__()
        self.classifier = classifier
        self._settings, self._seed, self._calls = settings, seed, 0

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Logits of images N×C×H×W in [0, 1], without a gradient."""
        seeds = [derive_seed(self._seed, "purified", self._calls)] * len(images)
        self._calls += 1
        with torch.enable_grad():  # the prior is optimised, whoever asks
            purified = purify(images.detach(), self._ask, self._settings, seeds=seeds).images
        return self._ask(purified)

    @torch.no_grad()
    def _ask(self, images: Tensor) -> Tensor:
        return self.classifier(images)


@dataclass(frozen=True)
class PurifierSquare:
    """Square Attack on the purified classifier; ``queries``: at most, per image, each a whole purification.

    Fits :class:`~device_tests.attacks.attack.Attack`; the model it is given is the classifier *behind* the purifier.
    """

    purifier: PurifierSettings
    queries: int = 100

    @property
    def name(self) -> str:
        """``"purifier-square"``."""
        return "purifier-square"

    @property
    def norm(self) -> Norm:
        """L∞."""
        return Norm.LINF

    @property
    def description(self) -> str:
        """Norm and budget in words."""
        return f"{Square(queries=self.queries).description}, of the purified classifier, {self.purifier}"

    @property
    def gradients_per_image(self) -> int:
        """Purifications, at most."""
        return self.queries

    def generate(
        self, model: nn.Module, images: Tensor, labels: Tensor, *, epsilon: float, seed: int,
        progress: Progress | None = None,
    ) -> Tensor:  # fmt: skip
        """Candidates; see :class:`~device_tests.attacks.attack.Attack`."""
        behind = PurifiedClassifier(model, self.purifier, seed)
        square = Square(queries=self.queries)
        return square.generate(behind, images, labels, epsilon=epsilon, seed=seed, progress=progress)
