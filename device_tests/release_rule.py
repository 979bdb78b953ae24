"""The release rule: a pure function from measured figures to *released* or *rejected*, with reasons.

Rules: one acceptance test per device, on the per-image worst case over all attacks of the threats that count, with
stated risks; the allowed accuracy drop; parity wherever the package will run. Its settings are fixed before a
device is measured. What was not measured is a reason to reject, never a pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from device_tests.accuracy import accuracy_drop
from device_tests.evidence import Measured
from device_tests.statistics import AcceptancePlan, Risks, acceptance_plan, plan_within
from exporters.measured import NotMeasured
from keys.errors import InputError


class ParityVerdict(Protocol):
    """What the rule reads of a parity measurement; ``exporters.parity.Parity`` is one."""

    @property
    def passed(self) -> bool:
        """Whether the runtime agrees with the trained model within its stated limits."""
        ...


@dataclass(frozen=True)
class ReleaseRule:
    """The limits of the rule; all are settings, none is moved after a result is seen.

    ``p0``: acceptable fooling rate, rejected with probability at most ``alpha``. ``p1``: unacceptable fooling rate,
    released with probability at most ``beta``. ``allowed_accuracy_drop``: share of the test images by which a
    device may fall behind the base. Raises :class:`InputError` for values that state no rule.
    """

    p0: float
    p1: float
    alpha: float
    beta: float
    allowed_accuracy_drop: float = 0.03

    def __post_init__(self) -> None:
        # Also tells right away, and not after hours of training, if no test of acceptable size keeps the risks.
        acceptance_plan(self.p0, self.p1, self.alpha, self.beta)
        if not 0 <= self.allowed_accuracy_drop < 1:
            raise InputError(
                f"The allowed accuracy drop must lie in [0, 1), not {self.allowed_accuracy_drop}; "
                "0.03 allows three points."
            )

    @property
    def risks(self) -> Risks:
        """The acceptance test's rates and risks."""
        return Risks(self.p0, self.p1, self.alpha, self.beta)

    @property
    def smallest_plan(self) -> AcceptancePlan:
        """The acceptance test with the fewest images; a device needs that many that it gets right when clean."""
        return acceptance_plan(self.p0, self.p1, self.alpha, self.beta)


@dataclass(frozen=True)
class AcceptanceTest:
    """The acceptance test as it was applied: ``fooled`` of the first ``plan.n`` images; passes if ≤ ``plan.c``."""

    plan: AcceptancePlan
    fooled: int

    @property
    def passed(self) -> bool:
        """Whether no more images are fooled than the limit."""
        return self.fooled <= self.plan.c


@dataclass(frozen=True)
class Condition:
    """One condition of the rule: whether it is met, and a sentence with the figures."""

    name: str
    met: bool
    sentence: str


@dataclass(frozen=True)
class Decision:
    """What was decided about one device. ``test`` is ``None`` where the acceptance test could not be applied."""

    rule: ReleaseRule
    conditions: tuple[Condition, ...]
    test: AcceptanceTest | None

    @property
    def released(self) -> bool:
        """True only if every condition was measured and met."""
        return all(condition.met for condition in self.conditions)

    @property
    def reasons(self) -> tuple[str, ...]:
        """The sentences of the conditions that are not met; empty for a released device."""
        return tuple(condition.sentence for condition in self.conditions if not condition.met)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "released": self.released,
            "reasons": list(self.reasons),
            "conditions": [asdict(condition) for condition in self.conditions],
            "rule": asdict(self.rule),
            "test": None if self.test is None else asdict(self.test) | {"passed": self.test.passed},
        }


@dataclass(frozen=True, eq=False)
class QuantisedFigures:
    """What the rule reads of a quantised format: two accuracies on the same images, and who was fooled.

    ``worst_fooled``: as in :func:`decide`, for the format itself.
    """

    base_accuracy: Measured
    accuracy: Measured
    worst_fooled: np.ndarray | NotMeasured


def decide(
    rule: ReleaseRule,
    *,
    base_accuracy: Measured,
    device_accuracy: Measured,
    parities: Mapping[str, ParityVerdict | NotMeasured],
    worst_fooled: np.ndarray | NotMeasured,
    quantised: Mapping[str, QuantisedFigures] | None = None,
) -> Decision:
    """Apply the rule to one device.

    ``base_accuracy`` and ``device_accuracy``: on the same test images. ``parities``: one entry for each runtime that
    must have been compared with the trained model; a runtime that another one stands in for is left out by the
    caller, one that is named and not measured rejects. ``worst_fooled``: for each image that the device gets
    right when clean, in the test set's fixed order, whether any counted attack fools it (bool n). ``quantised``:
    for each quantised format of the package; each has to meet by itself what the model has to meet.
    """
    applied, transfer = _transfer(rule, worst_fooled)
    conditions = [_accuracy(rule, base_accuracy, device_accuracy), *_parities(parities), transfer]
    for name, figures in (quantised or {}).items():
        _, fooled = _transfer(rule, figures.worst_fooled)
        for condition in (_accuracy(rule, figures.base_accuracy, figures.accuracy), fooled):
            conditions.append(Condition(f"{condition.name} {name}", condition.met, f"{name}: {condition.sentence}"))
    return Decision(rule, tuple(conditions), applied)


def _accuracy(rule: ReleaseRule, base: Measured, device: Measured) -> Condition:
    if isinstance(base, NotMeasured):
        return Condition("accuracy", False, f"The clean accuracy of the base was not measured: {base.reason}.")
    if isinstance(device, NotMeasured):
        return Condition("accuracy", False, f"The clean accuracy of the device was not measured: {device.reason}.")
    # The point estimate, on purpose: both models see the same images, so most of the sampling error cancels, and
    # the drop bounds what a user loses, not what an attacker gains. The report shows the intervals beside it.
    drop = accuracy_drop(base, device)
    met = drop <= rule.allowed_accuracy_drop + 1e-9
    direction = f"{drop:.4f} below" if drop >= 0 else f"{-drop:.4f} above"
    return Condition(
        "accuracy",
        met,
        f"Clean accuracy {device.value:.4f} is {direction} the base's {base.value:.4f} on the same {device.n} "
        f"images; at most {rule.allowed_accuracy_drop:g} below is allowed.",
    )


def _parities(parities: Mapping[str, ParityVerdict | NotMeasured]) -> list[Condition]:
    if not parities:
        return [Condition("parity", False, "Parity was not measured: no runtime was compared.")]
    conditions = []
    for runtime, parity in parities.items():
        if isinstance(parity, NotMeasured):
            met, sentence = False, f"Parity of {runtime} was not measured: {parity.reason}."
        elif parity.passed:
            met, sentence = True, f"{runtime} agrees with the trained model within its limits."
        else:
            met, sentence = False, f"{runtime} differs from the trained model by more than its limits allow."
        conditions.append(Condition(f"parity {runtime}", met, sentence))
    return conditions


def _transfer(rule: ReleaseRule, worst_fooled: np.ndarray | NotMeasured) -> tuple[AcceptanceTest | None, Condition]:
    if isinstance(worst_fooled, NotMeasured):
        sentence = f"The worst case over the attacks was not measured: {worst_fooled.reason}."
        return None, Condition("transfer", False, sentence)
    plan = plan_within(len(worst_fooled), rule.risks)
    if plan is None:
        needed = rule.smallest_plan.n
        return None, Condition(
            "transfer",
            False,
            f"The worst case over the attacks was not measured: the acceptance test needs {needed} images that "
            f"the device gets right when clean, and there were {len(worst_fooled)}; give more test images.",
        )
    test = AcceptanceTest(plan, int(worst_fooled[: plan.n].sum()))
    return test, Condition(
        "transfer",
        test.passed,
        f"In the worst case over the attacks {test.fooled} of {plan.n} images are fooled; at most {plan.c} are "
        f"allowed, which rejects a device with a fooling rate of {rule.p0:g} with probability "
        f"{plan.producer_risk:.4f} and releases one with {rule.p1:g} with probability {plan.consumer_risk:.4f}.",
    )
