"""An attack on models that sort the parts of an image before they look: it searches for orders, not only for pixels.

Such a model is piecewise smooth: between two changes of the order its gradient is exact, at a change there is none. An
attack that follows gradients alone can stop at an order that happens to be good for the defender. This one starts each
of its climbs at a point of the ball whose order differs from the clean image's, takes gradients with the order held
(BPDA in the words of Athalye et al., ICML 2018), and keeps of all iterates, whatever order they end in, the one
that the true model, sorting again, is most wrong about.

Read it beside PGD with as many gradients: if it fools clearly more images, the sorting masks gradients; if it fools as
many, the order is no obstacle and no help. See docs/volumization.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from device_tests.attacks.answers import margins
from device_tests.attacks.attack import Progress
from device_tests.attacks.ball import WORDS, Ball, check_ball, named
from device_tests.attacks.gradients import at_rest, batches, loss_gradient
from device_tests.perturbation import Norm
from keys.errors import InputError

Orders = Callable[[torch.Tensor], torch.Tensor]
"""Images N×C×H×W in [0, 1] → the order int64 N×P in which the model takes their P parts."""

HeldLogits = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Images and orders → logits N×K of the model with the order held at what is given; differentiable in the images."""

Holding = Literal["clean", "current", "candidate"]
_HOLDINGS: dict[str, str] = {
    "clean": "held at the clean image's",
    "current": "taken anew at every step",
    "candidate": "held at a candidate's for the first half of the steps, then taken anew",
}


@dataclass(frozen=True)
class OrderFlip:
    """``climbs`` gradient ascents of ``steps`` steps each, from different orders; the worst iterate of all.

    ``orders`` and ``held`` open the model up; the model that :meth:`generate` is given must be
    ``held(images, orders(images))``. ``holding`` says where the order of a gradient comes from: ``clean`` is BPDA with
    the order of the clean image, ``current`` that of the iterate, ``candidate`` an order found nearby. For
    ``candidate``, ``proposals`` random points of the ball are asked for their order before each climb but the first,
    and the one whose loss with its order held is the largest is where the climb starts; half of them differ from the
    clean image in one tile of a quarter of the sides only, because a small change moves fewer places.
    """

    orders: Orders = field(repr=False, compare=False)
    held: HeldLogits = field(repr=False, compare=False)
    steps: int = 20
    climbs: int = 4
    proposals: int = 8
    holding: Holding = "candidate"
    reach: float = 2.0
    norm: Norm = Norm.LINF

    def __post_init__(self) -> None:
        check_ball(self.norm)
        if self.holding not in _HOLDINGS:
            raise InputError(f"An order is held at one of {', '.join(_HOLDINGS)}, not {self.holding!r}.")
        if self.steps < 1 or self.climbs < 1 or self.proposals < 1:
            raise InputError(
                f"An attack on the order needs one step, climb and proposal or more, not {self.steps}, {self.climbs} "
                f"and {self.proposals}."
            )

    @property
    def name(self) -> str:
        """``"order-flip"``, ``"order-clean"`` or ``"order-current"``; in L2 with ``-l2``."""
        return named("order-flip" if self.holding == "candidate" else f"order-{self.holding}", self.norm)

    @property
    def description(self) -> str:
        """Norm and budget in words."""
        words = f"{self.climbs} climbs of {self.steps} steps from {self.reach:g}·ε to 0 along a cosine"
        found = f", {self.proposals} points asked for their order each" if self.holding == "candidate" else ""
        return f"PGD, {WORDS[self.norm]}, {words}{found}, the order {_HOLDINGS[self.holding]}"

    @property
    def gradients_per_image(self) -> int:
        """Gradients; answers of the true model and of proposals come on top and cost less."""
        return self.steps * self.climbs

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
        """Candidates, judged by ``model`` as it is; see :class:`~device_tests.attacks.attack.Attack`."""
        generator = torch.Generator().manual_seed(seed)
        found = torch.empty_like(images)
        with torch.no_grad(), at_rest(model):
            for part in batches(images):
                found[part] = self._worst(model, images[part], labels[part], epsilon, generator, progress)
        return found

    def _worst(
        self,
        model: nn.Module,
        clean: torch.Tensor,
        labels: torch.Tensor,
        epsilon: float,
        generator: torch.Generator,
        progress: Progress | None,
    ) -> torch.Tensor:
        ball = Ball(self.norm, clean, epsilon)
        worst, least = clean.clone(), margins(model(clean), labels)
        usual = self.orders(clean)
        for climb in range(self.climbs):
            x = ball.random(generator)
            held = usual
            if climb and self.holding == "candidate":
                x, held = self._candidate(ball, clean, labels, x, generator)
            for index in range(self.steps):
                if self.holding == "current" or (self.holding == "candidate" and 2 * index >= self.steps):
                    held = self.orders(x)
                length = self.reach * (1 + math.cos(math.pi * index / self.steps)) / 2
                direction = loss_gradient(_Held(self.held, held), x, labels)
                x = ball.step(x, direction, length * epsilon)
                if progress is not None:
                    progress(len(labels))
                # By the true model: an image that is only fooled while the order is held is not fooled.
                margin = margins(model(x), labels)
                better = margin < least
                worst[better], least[better] = x[better], margin[better]
        return worst

    def _candidate(
        self, ball: Ball, clean: torch.Tensor, labels: torch.Tensor, x: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A start and its order for each image: the one of the largest loss among random points and ``x``."""
        # A copy: an order that is the same for all images may be one row shown many times.
        best, held = x.clone(), self.orders(x).clone()
        least = margins(self.held(x, held), labels)
        for proposal in range(self.proposals):
            point = ball.random(generator)
            if proposal % 2:
                point = torch.where(_tile(clean, generator), point, clean)
            orders = self.orders(point)
            margin = margins(self.held(point, orders), labels)
            better = margin < least
            best[better], held[better], least[better] = point[better], orders[better], margin[better]
        return best, held


class _Held(nn.Module):
    """The model with the order held, as a module for the gradient."""

    def __init__(self, held: HeldLogits, orders: torch.Tensor) -> None:
        super().__init__()
        self.held, self.orders = held, orders

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.held(images, self.orders)


def _tile(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """True in one random tile of a quarter of the height and width, the same for all images: H×W."""
    height, width = images.shape[-2:]
    rows, columns = max(1, height // 4), max(1, width // 4)
    top = int(torch.randint(height - rows + 1, (1,), generator=generator).item())
    left = int(torch.randint(width - columns + 1, (1,), generator=generator).item())
    inside = torch.zeros(height, width, dtype=torch.bool, device=images.device)
    inside[top : top + rows, left : left + columns] = True
    return inside
