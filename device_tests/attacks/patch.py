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
from device_tests.attacks.gradients import at_rest, batches
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

    def refuse(self, images: torch.Tensor) -> None:
        """Raise :class:`InputError` unless ``images`` (float N×C×H×W) are of these examples' size and none of them."""
        if tuple(images.shape[1:]) != self.images.shape[1:]:
            raise InputError(
                f"The patch's examples are {self.images.shape[1:]} and the judged images "
                f"{tuple(images.shape[1:])}; fit it on images of the same size."
            )
        shared = self.overlap(images)
        if shared:
            raise InputError(
                f"{shared} of the judged images are among the patch's examples; fit it on images that are not judged."
            )


@dataclass(frozen=True, eq=False)
class UniversalPatch:
    """A square patch that fools as many images as possible wherever it lies, by gradients on the ``examples``.

    ``steps`` of Adam on the patch alone, each with ``batch`` examples at new places (expectation over transformation,
    Athalye et al., ICML 2018), three times: from a black, a white and a random patch, of which the one that fools most
    examples is taken. Where it starts matters: on the shipped base a patch of 25 % fitted from noise in
    60 steps fooled 0.33 of 135 images, a plain black one 0.48. Raises :class:`InputError` for an empty budget.
    """

    examples: PatchExamples
    steps: int = 100
    batch: int = 32
    rate: float = 0.1

    @property
    def norm(self) -> Norm:
        """One square patch."""
        return Norm.PATCH

    _STARTS: ClassVar[tuple[float | None, ...]] = (0.0, 1.0, None)
    """Levels of the plain patches to start from; ``None`` is uniform noise."""

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
            f"universal patch, best of {len(self._STARTS)} starts, {self.steps} steps of Adam at {self.rate:g} with "
            f"{self.batch} of {len(self.examples.images)} examples {self.examples.digest[:16]} at random places"
        )

    @property
    def gradients_per_image(self) -> int:
        """The fit's steps: it costs a batch of gradients in each, however many images are judged."""
        return self.steps * len(self._STARTS)

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
        self.examples.refuse(images)
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
        device: torch.device,
        progress: Progress | None = None,
        each: int = 1,
    ) -> torch.Tensor:
        """The patch itself, C×side×side in [0, 1]; ``progress`` hears of ``each`` after every step.

        Only examples that the model gets right are used, where there are any. Raises :class:`InputError` if a gradient
        is not finite.
        """
        generator = torch.Generator().manual_seed(seed)
        channels, height, width = self.examples.images.shape[1:]
        everything = np.arange(len(self.examples.images))
        fitted: list[torch.Tensor] = []
        with at_rest(model):
            # An example that is wrong without a patch has nothing to teach, and would blur which patch is best.
            right = everything[~self._wrong(model, everything, device)]
            usable = right if len(right) else everything
            spots = _places(len(usable), height, width, side, generator)
            for start in self._STARTS:
                patch = torch.rand((channels, side, side), generator=generator)
                if start is not None:
                    patch.fill_(start)
                patch = patch.to(device)
                self._descend(model, patch, usable, generator, progress, each)
                fitted.append(patch)
            return max(fitted, key=lambda patch: self._wrong(model, usable, device, patch, spots).sum())

    def _descend(
        self, model: nn.Module, patch: torch.Tensor, usable: np.ndarray, generator: torch.Generator,
        progress: Progress | None, each: int,
    ) -> None:  # fmt: skip
        """Lower, in place, the mean probability of the true class: the share of images expected to be right.

        Unlike the cross-entropy it does not go on pushing images that are fooled already.
        """
        optimizer = torch.optim.Adam([patch], lr=self.rate)
        height, width = self.examples.images.shape[2:]
        for step in range(self.steps):
            chosen = usable[torch.randint(len(usable), (self.batch,), generator=generator).numpy()]
            images, labels = self._tensors(chosen, patch.device)
            spots = _places(self.batch, height, width, patch.shape[-1], generator)
            with torch.enable_grad():
                leaf = patch.detach().requires_grad_(True)
                right = model(pasted(images, leaf, spots)).softmax(dim=1).gather(1, labels[:, None]).mean()
            patch.grad = torch.autograd.grad(right, leaf)[0]
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
        patch.grad = None

    @torch.no_grad()
    def _wrong(
        self, model: nn.Module, chosen: np.ndarray, device: torch.device, patch: torch.Tensor | None = None,
        spots: torch.Tensor | None = None,
    ) -> np.ndarray:  # fmt: skip
        """Which of the chosen examples the model gets wrong, with the patch at their spots or without one: bool."""
        wrong: list[np.ndarray] = []
        for part in batches(torch.from_numpy(self.examples.images[chosen])):
            images, labels = self._tensors(chosen[part], device)
            if patch is not None and spots is not None:
                images = pasted(images, patch, spots[part])
            wrong.append((model(images).argmax(dim=1) != labels).cpu().numpy())
        return np.concatenate(wrong)

    def _tensors(self, chosen: np.ndarray, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        images = torch.from_numpy(from_8bit(self.examples.images[chosen])).to(device)
        return images, torch.from_numpy(self.examples.labels[chosen].astype(np.int64)).to(device)


@dataclass(frozen=True)
class GreyPatch:
    """The control: mid-grey where :class:`UniversalPatch` pastes its patch, for the same seed and share of the area."""

    @property
    def norm(self) -> Norm:
        """One square patch."""
        return Norm.PATCH

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
