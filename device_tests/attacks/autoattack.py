"""AutoAttack, standard version (Croce and Hein, ICML 2020): four attacks in turn, each on what still stands.

Run through the authors' attacks as pyautoattack has them: the same numbers are drawn as by its AutoAttack class, so
that the candidates are the same where one batch holds all images. That class itself is not used: it fixes 100 steps
and switches off any tracing (coverage, debuggers) while it inspects the model.

It stops at the first success, so its images barely cross the source's boundary and transfer less than others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from pyautoattack.fab_pt import FABAttack_PT
from pyautoattack.square import SquareAttack
from torch import nn

from device_tests.attacks.apgd import PACKAGE_NAMES, classes_of, counted, gradient_attacks
from device_tests.attacks.attack import Progress
from device_tests.attacks.ball import WORDS, check_ball, named
from device_tests.attacks.gradients import at_rest, batches
from device_tests.perturbation import Norm
from keys.errors import InputError


class _Member(Protocol):
    def perturb(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True)
class AutoAttack:
    """APGD on the cross-entropy, targeted APGD on the DLR loss, targeted FAB, Square; the standard budget by default.

    ``steps``: of the three gradient attacks, one restart each; ``targets``: most likely wrong classes that the
    targeted ones aim at; ``queries``: of Square. With three classes the untargeted DLR loss stands in for the targeted
    one, with two nothing does; there are never more targets than wrong classes. An image that the source gets wrong
    already, or that nothing fools, comes back unchanged.
    """

    steps: int = 100
    targets: int = 9
    queries: int = 5000
    norm: Norm = Norm.LINF

    def __post_init__(self) -> None:
        check_ball(self.norm)

    @property
    def name(self) -> str:
        """``"autoattack"`` or ``"autoattack-l2"``."""
        return named("autoattack", self.norm)

    @property
    def description(self) -> str:
        """Norm and budget in words."""
        return (
            f"AutoAttack, {WORDS[self.norm]}, APGD-CE + APGD-T + FAB-T ({self.steps} steps, {self.targets} targets) + "
            f"Square ({self.queries} queries)"
        )

    @property
    def gradients_per_image(self) -> int:
        """Gradients and Square's queries, at most: an image that is fooled costs no more."""
        return (self.steps + 1) * (1 + self.targets) + self.steps * self.targets + self.queries + _LOOKS

    @torch.no_grad()
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
        """Candidates; see :class:`~device_tests.attacks.attack.Attack`. The global random state is left as it was.

        Raises :class:`InputError` in L2 for images whose sides Square's first tiling does not fit.
        """
        if self.norm is Norm.L2:
            _check_tiling(*images.shape[-2:])
        candidates = images.clone()
        with at_rest(model), torch.random.fork_rng(enabled=True):
            standing = torch.arange(len(images), device=images.device)
            standing = standing[~_fooled(model, images, labels)]
            for attack in self._attacks(model, images, epsilon, seed, progress):
                still: list[torch.Tensor] = []
                for part in batches(images[standing]):
                    chosen = standing[part]
                    proposed = attack.perturb(images[chosen], labels[chosen])
                    proposed = torch.where(_finite(proposed), proposed, images[chosen])
                    candidates[chosen] = proposed
                    still.append(chosen[~_fooled(model, proposed, labels[chosen])])
                standing = torch.cat(still) if still else standing
        return candidates

    def _attacks(
        self, model: nn.Module, images: torch.Tensor, epsilon: float, seed: int, progress: Progress | None
    ) -> Iterator[_Member]:
        classes = classes_of(model, images)
        gradients = counted(model, progress)
        yield from gradient_attacks(
            gradients, classes, steps=self.steps, targets=self.targets, norm=self.norm, epsilon=epsilon, seed=seed,
            device=images.device,
        )  # fmt: skip
        shared: dict[str, Any] = {
            "norm": PACKAGE_NAMES[self.norm], "eps": epsilon, "seed": seed, "device": images.device,
        }  # fmt: skip
        yield FABAttack_PT(
            gradients, targeted=True, n_iter=self.steps, n_target_classes=min(self.targets, classes - 1), **shared
        )

        def answers(x: torch.Tensor) -> torch.Tensor:
            if progress is not None:
                progress(len(x))
            return model(x)

        yield SquareAttack(answers, n_queries=self.queries, resc_schedule=False, **shared)


_LOOKS = 3
"""Square's queries besides its steps: the clean image, the first candidate and the result."""


def _check_tiling(height: int, width: int) -> None:
    # Square's first candidate in L2 is tiled with squares of a fifth of the height, from a margin on.
    side = height // 5
    margin = (height - 5 * side) // 2
    if side == 0 or any(margin + side * (length // side) > length for length in (height, width)):
        raise InputError(
            f"AutoAttack in L2 cannot tile images of {height}×{width} pixels: Square needs five squares a side; use "
            "images of 25 pixels or more, or APGD."
        )


def _fooled(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.cat([model(images[part]).argmax(1) != labels[part] for part in batches(images)])


def _finite(images: torch.Tensor) -> torch.Tensor:
    return torch.isfinite(images).flatten(1).all(1).view(-1, 1, 1, 1)
