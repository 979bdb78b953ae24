"""Was the attack strong enough? Its white-box success on its own source beside a strong attack's.

Rules: both are counted on the same images, the first ones that the source gets right when clean. The strong attack
has every advantage: the same ball, and its images are judged before they are rounded to 8 bits. Success is
judged here, by the source's own predictions, never by the attack.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from device_tests.accuracy import predict
from device_tests.attacks.apgd import PACKAGE_NAMES, classes_of, counted, gradient_attacks
from device_tests.attacks.attack import Progress
from device_tests.attacks.gradients import at_rest, batches
from device_tests.attacks.pgd import PGD
from device_tests.crafting import AdversarialSet, content_key
from device_tests.evidence import Measured, Proportion, SelfCheck
from device_tests.images import from_8bit
from device_tests.perturbation import Norm, Perturbation
from device_tests.threats import Source
from exporters.measured import NotMeasured
from exporters.run_torch import TorchRuntime

UNBOUNDED = PGD(steps=20)
"""What is run where nothing bounds the change: it fools any model whose gradients mean something."""

MARGIN = 0.05
"""Five points: how far below the strong attack an attack may stay and still be believed."""


@dataclass(frozen=True)
class StrongBudget:
    """How much of AutoAttack is run (Croce and Hein, ICML 2020): its white-box gradient attacks.

    APGD on the cross-entropy, then on what is left the targeted APGD on the DLR loss for the ``targets`` most likely
    wrong classes; ``steps`` each, one restart. With three classes the untargeted DLR loss stands in, with two
    nothing does, because the loss needs more classes. ``images``: how many of the source's correct images are used.
    """

    steps: int = 50
    targets: int = 3
    images: int = 100

    def describe(self, classes: int) -> str:
        """Name what is run on a model with this many classes."""
        if classes >= 4:
            wrong = min(self.targets, classes - 1)
            return f"APGD-CE + APGD-T ({wrong} targets), {self.steps} steps each"
        return ("APGD-CE + APGD-DLR" if classes == 3 else "APGD-CE") + f", {self.steps} steps each"


@dataclass(frozen=True)
class StrongResult:
    """What a strong attack did on one source.

    ``images``: indices of the attacked images among those given. ``fooled``: one bool for each of them.
    """

    source: str
    attack: str
    images: tuple[int, ...]
    fooled: tuple[bool, ...]

    @property
    def success(self) -> Measured:
        """The strong attack's white-box success."""
        return _success(np.array(self.fooled, dtype=bool))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "source": self.source,
            "attack": self.attack,
            "images": list(self.images),
            "fooled": list(self.fooled),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> StrongResult:
        """Read what :meth:`to_json` wrote; raises ``ValueError`` for anything else."""
        names = {"source", "attack", "images", "fooled"}
        if set(value) != names or len(value["images"]) != len(value["fooled"]):
            raise ValueError(f"no result of a strong attack: fields {sorted(value)}")
        return cls(
            str(value["source"]),
            str(value["attack"]),
            tuple(int(index) for index in value["images"]),
            tuple(fooled is True for fooled in value["fooled"]),
        )


def strong_key(
    source: Source,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    perturbation: Perturbation,
    budget: StrongBudget,
    seed: int,
) -> str:
    """Return a digest (64 hex digits) of all that the result of :func:`run_strong` with these arguments depends on."""
    chosen = _chosen(source.model, images, labels, budget)
    settings = ("strong", *chosen.tolist(), perturbation.code, budget, seed)
    return content_key(source.model, images[chosen], labels[chosen], *settings)


def run_strong(
    source: Source,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    perturbation: Perturbation,
    budget: StrongBudget,
    seed: int,
    progress: Progress | None = None,
) -> StrongResult:
    """Attack the first ``budget.images`` images that the source gets right, as hard as the budget allows.

    ``images``: uint8 N×C×H×W; ``labels``: integers N; ``perturbation``: an L∞ or L2 ball (else ``ValueError``).
    ``progress`` hears of every image's gradient; at most images · (steps + 1) · (1 + targets) of them. The global
    random state is left as it was.
    """
    if perturbation.norm not in PACKAGE_NAMES:
        raise ValueError(f"the strong attack knows no {perturbation}")
    model = source.model
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    right = _chosen(model, images, labels, budget)
    clean = torch.from_numpy(from_8bit(images[right])).to(device)
    truth = torch.from_numpy(labels[right].astype(np.int64)).to(device)

    standing = np.ones(len(right), dtype=bool)
    with at_rest(model), torch.no_grad(), torch.random.fork_rng(enabled=True):
        classes = classes_of(model, torch.from_numpy(from_8bit(images[:1])).to(device))
        for attack in gradient_attacks(
            counted(model, progress), classes, steps=budget.steps, targets=budget.targets, norm=perturbation.norm,
            epsilon=perturbation.radius, seed=seed, device=device,
        ):  # fmt: skip
            left = np.flatnonzero(standing)
            for part in batches(clean[left]):
                chosen = torch.from_numpy(left[part]).to(device)
                candidates = attack.perturb(clean[chosen], truth[chosen])
                held = model(candidates).argmax(dim=1) == truth[chosen]
                standing[left[part]] = held.cpu().numpy()
    return StrongResult(
        source=source.id,
        attack=budget.describe(classes),
        images=tuple(int(index) for index in right),
        fooled=tuple(bool(fooled) for fooled in ~standing),
    )


def fooled_without_bound(
    model: nn.Module, images: np.ndarray, labels: np.ndarray, *, seed: int, progress: Progress | None = None
) -> Measured:
    """How many of the images that a model gets right PGD fools with ε = 1 in L∞, the whole range of pixel values.

    ``images``: uint8 N×C×H×W; ``labels``: integers N. Not measured if the model gets none right. A model that
    withstands it misleads gradients, and no attack by gradients says anything about it (Athalye et al., 2018).
    """
    right = np.flatnonzero(_predict(model, images) == labels)
    if not len(right):
        return _success(np.zeros(0, dtype=bool))
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    clean = torch.from_numpy(from_8bit(images[right])).to(device)
    truth = torch.from_numpy(labels[right].astype(np.int64)).to(device)
    found = UNBOUNDED.generate(model, clean, truth, epsilon=1.0, seed=seed, progress=progress)
    changed = Perturbation(Norm.LINF, 1.0).to_8bit(found.detach().cpu().numpy(), images[right])
    return _success(_predict(model, changed) != labels[right])


def self_check(
    source: Source,
    adversarial: AdversarialSet,
    labels: np.ndarray,
    strong: StrongResult,
    margin: float = MARGIN,
) -> tuple[SelfCheck, ...]:
    """Compare each attack of an adversarial set with the strong attack, on the strong attack's images.

    ``labels``: integers N for the set's images. One check per attack; the source is believed if one passes.
    Raises ``ValueError`` if the three are not about one source.
    """
    if not source.id == adversarial.source == strong.source:
        raise ValueError(f"{source.id}, {adversarial.source} and {strong.source} are not one source")
    chosen = np.array(strong.images, dtype=np.int64)
    checks = []
    for attack, images in adversarial.images.items():
        fooled = np.zeros(0, dtype=bool)
        if len(chosen):
            fooled = _predict(source.model, images[chosen]) != labels[chosen]
        behind = sum(strong.fooled) - int(fooled.sum())
        checks.append(
            SelfCheck(
                source=source.id,
                attack=attack,
                attack_success=_success(fooled),
                strong_attack=strong.attack,
                strong_success=strong.success,
                # In images, with slack for 0.05·n that is no exact float.
                passed=len(chosen) > 0 and behind <= margin * len(chosen) + 1e-9,
                margin=margin,
            )
        )
    return tuple(checks)


def _chosen(model: nn.Module, images: np.ndarray, labels: np.ndarray, budget: StrongBudget) -> np.ndarray:
    """Positions of the images that are attacked: the first that the source gets right, however many follow them."""
    return np.flatnonzero(_predict(model, images) == labels)[: budget.images]


def _predict(model: nn.Module, images: np.ndarray) -> np.ndarray:
    with at_rest(model):
        return predict(TorchRuntime(model), images)


def _success(fooled: np.ndarray) -> Measured:
    if len(fooled) == 0:
        return NotMeasured("the source gets none of the clean images right")
    return Proportion(int(fooled.sum()), len(fooled))
