"""One patch for all images (Brown et al. 2017), and its control: a grey patch of the same size in the same place.

Rules: the patch is fitted on images that are not judged, over random places, and pasted at a place drawn for each
judged image from the seed. Both attacks draw the same places for the same seed, so that they can be compared image
by image. ε is the share of the area; the patch is the largest square within it.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from device_tests.attacks.attack import Progress
from device_tests.attacks.gradients import at_rest
from device_tests.images import from_8bit
from device_tests.perturbation import Norm, Perturbation
from keys.errors import InputError

GREY = 0.5


@dataclass(frozen=True, eq=False)
class PatchExamples:
    """What a patch is fitted on: ``images`` uint8 N×C×H×W and ``labels`` N, none of them judged.

    Raises :class:`InputError` if they are no such pair.
    """

    images: np.ndarray
    labels: np.ndarray

    def __post_init__(self) -> None:
        if self.images.dtype != np.uint8 or self.images.ndim != 4 or not 1 <= len(self.images) == len(self.labels):
            raise InputError(
                f"A patch is fitted on uint8 images N×C×H×W with one label each, not {self.images.dtype} "
                f"{self.images.shape} with {len(self.labels)} labels."
            )

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the images and their labels."""
        content = np.ascontiguousarray(self.images).tobytes() + self.labels.astype(np.int64).tobytes()
        return hashlib.sha256(f"{self.images.shape}\0".encode() + content).hexdigest()

    def overlap(self, images: torch.Tensor) -> int:
        """How many of the float ``images`` N×C×H×W are, in 8 bits, among these."""
        own = {image.tobytes() for image in self.images}
        levels = torch.round(images * 255).to(torch.uint8).cpu().numpy()
        return sum(image.tobytes() in own for image in levels)


@dataclass(frozen=True, eq=False)
class UniversalPatch:
    """A square patch that fools as many images as possible wherever it lies, by gradients on the ``examples``.

    ``steps`` of Adam on the patch alone, each with ``batch`` examples at new places (expectation over transformation,
    Athalye et al., ICML 2018), from a uniformly random patch. Raises :class:`InputError` for an empty budget.
    """

    examples: PatchExamples
    steps: int = 100
    batch: int = 32
    rate: float = 0.05
    norm: ClassVar[Norm] = Norm.PATCH

    def __post_init__(self) -> None:
        if min(self.steps, self.batch) < 1 or not self.rate > 0:
            raise InputError(
                f"A patch needs steps, a batch and a rate above zero, not {self.steps}, {self.batch} and {self.rate}."
            )

    @property
    def name(self) -> str:
        """``"patch"``."""
        return "patch"

    @property
    def description(self) -> str:
        """Budget, and the examples by their digest."""
        return (
            f"universal patch, {self.steps} steps of Adam at {self.rate:g} with {self.batch} of "
            f"{len(self.examples.images)} examples {self.examples.digest[:16]} at random places"
        )

    @property
    def gradients_per_image(self) -> int:
        """``steps``: the fit costs ``steps``·``batch`` gradients however many images are judged."""
        return self.steps

    def generate(
        self,
        model: nn.Module,
        images: torch.Tensor,
        labels: torch.Tensor,
        *,
        epsilon: float,
        seed: int,
        progress: Progress | None = None,
    ) -> torch.Tensor:
        """Candidates; see :class:`~device_tests.attacks.attack.Attack`. ``labels`` are not looked at.

        Raises :class:`InputError` if a judged image is among the examples, or their shapes differ.
        """
        if tuple(images.shape[1:]) != self.examples.images.shape[1:]:
            raise InputError(
                f"The patch's examples are {self.examples.images.shape[1:]} and the judged images "
                f"{tuple(images.shape[1:])}; fit it on images of the same size."
            )
        shared = self.examples.overlap(images)
        if shared:
            raise InputError(
                f"{shared} of the judged images are among the patch's examples; fit it on images that are not judged."
            )
        height, width = images.shape[-2:]
        side = Perturbation(Norm.PATCH, epsilon).side(height, width)
        patch = self.fit(model, side, seed=seed, device=images.device, progress=progress, each=len(images))
        return pasted(images, patch, places(len(images), height, width, side, seed))

    def fit(
        self,
        model: nn.Module,
        side: int,
        *,
        seed: int,
        device: torch.device | None = None,
        progress: Progress | None = None,
        each: int = 1,
    ) -> torch.Tensor:
        """The patch itself, C×side×side in [0, 1]; ``progress`` hears of ``each`` after every step.

        Lowers the mean of −log(1 − p) for p of the true class, which, unlike the cross-entropy, does not go on pushing
        images that are fooled already. Raises :class:`InputError` if a gradient is not finite.
        """
        generator = torch.Generator().manual_seed(seed)
        shape = self.examples.images.shape
        patch = torch.rand((shape[1], side, side), generator=generator).to(device or "cpu")
        optimizer = torch.optim.Adam([patch], lr=self.rate)
        with at_rest(model):
            for step in range(self.steps):
                chosen = torch.randint(shape[0], (self.batch,), generator=generator)
                images = torch.from_numpy(from_8bit(self.examples.images[chosen.numpy()])).to(patch)
                labels = torch.from_numpy(self.examples.labels[chosen.numpy()].astype(np.int64)).to(patch.device)
                spots = _places(self.batch, shape[2], shape[3], side, generator)
                with torch.enable_grad():
                    leaf = patch.detach().requires_grad_(True)
                    logits = model(pasted(images, leaf, spots))
                    others = logits.scatter(1, labels[:, None], -torch.inf)
                    loss = (logits.logsumexp(dim=1) - others.logsumexp(dim=1)).mean()
                patch.grad = torch.autograd.grad(loss, leaf)[0]
                if not torch.isfinite(patch.grad).all():
                    raise InputError(
                        "The loss of a model that a patch is fitted on has no finite gradient, so its weights are not "
                        "usable; train that model again."
                    )
                for group in optimizer.param_groups:
                    group["lr"] = self.rate * (1 + math.cos(math.pi * step / self.steps)) / 2
                optimizer.step()
                # Outside the graph, so that no gradient passes the clamp.
                patch.clamp_(0, 1)
                if progress is not None:
                    progress(each)
        return patch


@dataclass(frozen=True)
class GreyPatch:
    """The control: mid-grey where :class:`UniversalPatch` pastes its patch, for the same seed and share of the area."""

    norm: ClassVar[Norm] = Norm.PATCH

    @property
    def name(self) -> str:
        """``"grey-patch"``."""
        return "grey-patch"

    @property
    def description(self) -> str:
        """What is pasted."""
        return f"control: a patch of {GREY} at the universal patch's places"

    @property
    def gradients_per_image(self) -> int:
        """None."""
        return 0

    def generate(
        self,
        model: nn.Module,
        images: torch.Tensor,
        labels: torch.Tensor,
        *,
        epsilon: float,
        seed: int,
        progress: Progress | None = None,
    ) -> torch.Tensor:
        """Candidates; see :class:`~device_tests.attacks.attack.Attack`. Neither model nor labels are looked at."""
        height, width = images.shape[-2:]
        side = Perturbation(Norm.PATCH, epsilon).side(height, width)
        patch = torch.full((images.shape[1], side, side), GREY, device=images.device)
        return pasted(images, patch, places(len(images), height, width, side, seed))


def places(n: int, height: int, width: int, side: int, seed: int) -> torch.Tensor:
    """Where the patch of n judged images lies: int64 n×2, its first row and column, uniform over all that fit."""
    return _places(n, height, width, side, torch.Generator().manual_seed(seed))


def pasted(images: torch.Tensor, patch: torch.Tensor, spots: torch.Tensor) -> torch.Tensor:
    """Images N×C×H×W with ``patch`` C×s×s over each at its place (:func:`places`); differentiable in the patch."""
    n, channels = images.shape[:2]
    side = patch.shape[-1]
    along = torch.arange(side, device=images.device)
    spots = spots.to(images.device)
    index = (
        torch.arange(n, device=images.device).view(n, 1, 1, 1),
        torch.arange(channels, device=images.device).view(1, channels, 1, 1),
        (spots[:, :1] + along).view(n, 1, side, 1),
        (spots[:, 1:] + along).view(n, 1, 1, side),
    )
    return images.index_put(index, patch.to(images).expand(n, -1, -1, -1))


def _places(n: int, height: int, width: int, side: int, generator: torch.Generator) -> torch.Tensor:
    room = torch.tensor([height - side + 1, width - side + 1])
    return (torch.rand((n, 2), generator=generator) * room).long().minimum(room - 1)
