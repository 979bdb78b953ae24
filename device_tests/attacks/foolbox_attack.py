"""Any attack of foolbox as an attack here: C&W, DDN, an L0 attack and every other one by its class name.

Rules: foolbox's own judgement is not used. Its minimisation attacks look for the nearest fooling image and may come
back with one outside the set: nothing was found then, and the clean image is proposed. Its attacks with a fixed ε
are clipped into it. Whatever crashes inside foolbox comes out as one :class:`InputError`.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import inspect
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from device_tests.attacks.attack import Progress
from device_tests.attacks.gradients import at_rest, batches
from device_tests.images import LEVELS
from device_tests.perturbation import Norm
from keys.errors import InputError

Argument = float | int | str | bool | None
"""What an attack of foolbox is built with; plain values, so that the description says all of it."""

_DISTANCES = {Norm.LINF: "linf", Norm.L2: "l2", Norm.L0: "l0"}


@dataclass(frozen=True)
class FoolboxAttack:
    """The class ``attack`` of ``foolbox.attacks``, built with ``arguments``, as an attack of ``norm``.

    ``cost``: forward passes per image, about: a time is estimated from it. L0 counts values in foolbox and pixels
    here, so that what foolbox finds is in the set on images of any number of channels. Raises :class:`InputError`
    if foolbox is missing, has no such attack, does not take the arguments, or measures another norm.
    """

    name: str
    attack: str
    arguments: Mapping[str, Argument] = field(default_factory=dict[str, Argument])
    norm: Norm = Norm.L2
    cost: int = 1

    def __post_init__(self) -> None:
        _build(self.attack, self.arguments, self.norm)

    @property
    def description(self) -> str:
        """The attack's class, norm and arguments; what is not named is foolbox's own default."""
        arguments = ", ".join(f"{name}={value!r}" for name, value in sorted(self.arguments.items()))
        return f"foolbox {_foolbox().__version__} {self.attack}({arguments}), {self.norm.value}"

    @property
    def gradients_per_image(self) -> int:
        """``cost``."""
        return self.cost

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
        """Candidates; see :class:`~device_tests.attacks.attack.Attack`. Random states are left as they were.

        Raises :class:`InputError` if foolbox fails on a batch, or its values are not finite.
        """
        foolbox = _foolbox()
        candidates = torch.empty_like(images)
        watched = _Watched(model, progress)
        with at_rest(watched), _seeded(seed):
            target = foolbox.PyTorchModel(watched, bounds=(0, 1), device=images.device)
            for part in batches(images):
                clean, truth = images[part], labels[part]
                attack = _build(self.attack, self.arguments, self.norm)
                fixed = isinstance(attack, foolbox.attacks.base.FixedEpsilonAttack)
                try:
                    criterion = foolbox.criteria.Misclassification(truth)
                    _, found, _ = attack(target, clean, criterion, epsilons=epsilon if fixed else None)
                except Exception as error:
                    raise InputError(
                        f"foolbox's {self.attack} failed on images {part.start} to {part.stop - 1} "
                        f"({type(error).__name__}: {error}), so that {self.name} is not measured on this model; leave "
                        "it out or change its arguments."
                    ) from error
                if not torch.isfinite(found).all():
                    raise InputError(
                        f"foolbox's {self.attack} returned values that are not finite on images {part.start} to "
                        f"{part.stop - 1}; train its source model again or leave {self.name} out."
                    )
                candidates[part] = _inside(found.detach().clamp(0, 1), clean, self.norm, epsilon)
        return candidates


def carlini_wagner(
    steps: int = 200, searches: int = 5, confidence: float = 0.0, rate: float = 0.02, constant: float = 1.0
) -> FoolboxAttack:
    """C&W in L2 (Carlini and Wagner, IEEE S&P 2017): ``searches`` constants c, ``steps`` of Adam at ``rate`` for each.

    With ``confidence`` 0 its images barely cross the boundary; a larger margin in logits transfers better.
    """
    # With few constants to try, the search starts where it would otherwise arrive after some tenfold steps. A high one
    # finds more fooling images, farther away.
    arguments: dict[str, Argument] = {
        "binary_search_steps": searches, "steps": steps, "stepsize": rate, "confidence": confidence,
        "initial_const": constant,
    }  # fmt: skip
    return FoolboxAttack("cw", "L2CarliniWagnerAttack", arguments, Norm.L2, cost=steps * searches)


def ddn(steps: int = 100) -> FoolboxAttack:
    """DDN in L2: gradient direction and size apart (Rony et al., CVPR 2019)."""
    return FoolboxAttack("ddn", "DDNAttack", {"steps": steps}, Norm.L2, cost=steps)


def fast_minimum_l0(steps: int = 200) -> FoolboxAttack:
    """FMN in L0: white-box search for the fewest values (Pintor et al., NeurIPS 2021)."""
    return FoolboxAttack("fmn-l0", "L0FMNAttack", {"steps": steps}, Norm.L0, cost=steps)


class _Watched(nn.Module):
    """A model whose forward passes are reported."""

    def __init__(self, model: nn.Module, progress: Progress | None) -> None:
        super().__init__()
        self.model, self._progress = model, progress

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self._progress is not None:
            self._progress(len(images))
        return self.model(images)


def _foolbox() -> Any:
    # foolbox imports GitPython for its model zoo, and that refuses to be imported where there is no git.
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    try:
        return importlib.import_module("foolbox")
    except ImportError as error:
        raise InputError(f"foolbox cannot be imported ({error}); install keyfoundry[factory].") from error


def _build(name: str, arguments: Mapping[str, Argument], norm: Norm) -> Any:
    attacks = _foolbox().attacks
    found = getattr(attacks, name, None)
    if not (inspect.isclass(found) and issubclass(found, attacks.base.AttackWithDistance)):
        close = ", ".join(
            difflib.get_close_matches(name, [other for other in dir(attacks) if other.endswith("Attack")])
        )
        raise InputError(f"foolbox has no attack {name!r}" + (f"; close to it: {close}." if close else "."))
    if norm not in _DISTANCES:
        raise InputError(f"foolbox has no attacks of {norm.value}; use one of this project's own.")
    distance = getattr(_foolbox().distances, _DISTANCES[norm])
    # Some attacks take any distance; the norm decides it for them.
    own = {"distance": distance} if issubclass(found, attacks.base.FlexibleDistanceMinimizationAttack) else {}
    try:
        attack: Any = found(**arguments, **own)
        measured = attack.distance
    except (TypeError, ValueError, ImportError) as error:
        raise InputError(f"foolbox's {name} does not take {dict(arguments)}: {error}") from error
    if measured is not distance:
        raise InputError(f"foolbox's {name} measures the {measured}, not {norm.value}; give it its own norm.")
    return attack


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the two global generators that foolbox draws from; afterwards they are as they were."""
    state = np.random.get_state()
    try:
        with torch.random.fork_rng(enabled=True):
            torch.manual_seed(seed)
            np.random.seed(seed % 2**32)
            yield
    finally:
        np.random.set_state(state)


def _inside(found: torch.Tensor, clean: torch.Tensor, norm: Norm, epsilon: float) -> torch.Tensor:
    """``found`` where it lies in the set, else the clean image."""
    difference = found - clean
    if norm is Norm.L0:
        # A value that moved by less than half a level is the same after rounding.
        changed = (difference.abs() * LEVELS >= 0.5).any(dim=1, keepdim=True)
        found = torch.where(changed, found, clean)
        size = changed.flatten(1).sum(dim=1).float()
    elif norm is Norm.L2:
        size = difference.flatten(1).norm(dim=1)
    else:
        size = difference.flatten(1).abs().max(dim=1).values
    return torch.where((size <= epsilon + 1e-6).view(-1, 1, 1, 1), found, clean)
