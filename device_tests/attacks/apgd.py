"""APGD: gradient ascent that chooses its own step lengths (Croce and Hein, ICML 2020), through pyautoattack.

AutoAttack's two gradient attacks by themselves, for comparisons and canaries.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from torch import nn

from device_tests.attacks.attack import Progress
from device_tests.attacks.ball import WORDS, check_ball, named
from device_tests.attacks.gradients import at_rest, batches
from device_tests.perturbation import Norm
from keys.errors import InputError

PACKAGE_NAMES = {Norm.LINF: "Linf", Norm.L2: "L2"}
"""What pyautoattack calls the two norms."""

quiet = logging.getLogger("keyfoundry.autoattack")
quiet.addHandler(logging.NullHandler())
quiet.propagate = False


@dataclass(frozen=True)
class APGD:
    """APGD with ``steps`` steps and one restart, on the cross-entropy or the targeted DLR loss.

    ``loss`` ``"ce"``: the iterate with the highest loss is proposed, fooled or not, because that is what transfers.
    ``"targeted"``: one run for each of the ``targets`` most likely wrong classes, until the source is fooled; an image
    that never fools it comes back unchanged. Raises :class:`InputError` on use if the targeted loss is asked of a
    model with fewer than four classes.
    """

    loss: Literal["ce", "targeted"] = "ce"
    steps: int = 50
    targets: int = 9
    norm: Norm = Norm.LINF

    def __post_init__(self) -> None:
        check_ball(self.norm)

    @property
    def name(self) -> str:
        """``"apgd-ce"`` or ``"apgd-t"``, with ``-l2`` in L2."""
        return named("apgd-ce" if self.loss == "ce" else "apgd-t", self.norm)

    @property
    def description(self) -> str:
        """Norm and budget in words."""
        words = "cross-entropy" if self.loss == "ce" else f"targeted DLR loss, at most {self.targets} targets"
        return f"APGD, {WORDS[self.norm]}, {words}, {self.steps} steps, one restart"

    @property
    def gradients_per_image(self) -> int:
        """One gradient more than steps in each run."""
        return (self.steps + 1) * (1 if self.loss == "ce" else self.targets)

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
        """Candidates; see :class:`~device_tests.attacks.attack.Attack`. The global random state is left as it was."""
        candidates = images.clone()
        with at_rest(model), torch.random.fork_rng(enabled=True):
            arguments = (counted(model, progress), self.steps, PACKAGE_NAMES[self.norm])
            if self.loss == "ce":
                attack = APGDAttack(*arguments, eps=epsilon, seed=seed, device=images.device, logger=quiet)
            else:
                targets = targets_for(classes_of(model, images), self.targets)
                attack = APGDAttack_targeted(
                    *arguments, eps=epsilon, seed=seed, n_target_classes=targets, device=images.device, logger=quiet
                )
            torch.random.manual_seed(seed)  # with best_loss the package does not do so itself
            for part in batches(images):
                best = {"best_loss": True} if self.loss == "ce" else {}
                candidates[part] = attack.perturb(images[part], labels[part], **best)
        return candidates


def counted(model: nn.Module, progress: Progress | None) -> Callable[[torch.Tensor], torch.Tensor]:
    """The model as a function that reports every image whose gradient is about to be taken."""

    def logits(images: torch.Tensor) -> torch.Tensor:
        if progress is not None and torch.is_grad_enabled():
            progress(len(images))
        return model(images)

    return logits


def classes_of(model: nn.Module, images: torch.Tensor) -> int:
    """How many classes the model tells apart."""
    return int(model(images[:1]).shape[1])


def gradient_attacks(
    logits: Callable[[torch.Tensor], torch.Tensor], classes: int, *, steps: int, targets: int, norm: Norm,
    epsilon: float, seed: int, device: torch.device,
) -> Iterator[APGDAttack]:  # fmt: skip
    """AutoAttack's gradient attacks that choose their step lengths, in its order.

    APGD on the cross-entropy; then with four classes or more on the targeted DLR loss, with three on the untargeted
    one; with two no more, because the loss needs three.
    """
    shared: dict[str, Any] = {
        "n_iter": steps, "norm": PACKAGE_NAMES[norm], "eps": epsilon, "seed": seed, "device": device, "logger": quiet,
    }  # fmt: skip
    yield APGDAttack(logits, loss="ce", **shared)
    if classes >= 4:
        yield APGDAttack_targeted(logits, n_target_classes=min(targets, classes - 1), **shared)
    elif classes == 3:
        yield APGDAttack(logits, loss="dlr", **shared)


def targets_for(classes: int, wanted: int) -> int:
    """How many wrong classes the targeted DLR loss can be aimed at; raises :class:`InputError` if it has no value."""
    if classes < 4:
        raise InputError(
            f"The targeted DLR loss needs four classes or more, and the model has {classes}; use APGD on the "
            "cross-entropy, or AutoAttack, which leaves out what cannot be run."
        )
    return min(wanted, classes - 1)
