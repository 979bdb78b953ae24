"""Devices judged on adversarial images made elsewhere: one row per device, and the public base beside them.

Rules: as everywhere, only images that a target gets right when clean count, and a figure carries its n. Nobody knows
here how strong the attack was: there is no self-check, so a low fooling rate says nothing good about a device, and a
high one says something bad.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from device_tests.accuracy import predict
from device_tests.evidence import Measured, Proportion, measured_from_json, require_fields
from device_tests.foreign_pairs import ForeignPairs
from device_tests.perturbation import Perturbation
from device_tests.release_rule import AcceptanceTest
from device_tests.statistics import AcceptancePlan, Risks, plan_within
from exporters.measured import NotMeasured
from exporters.runtime import Runtime


@dataclass(frozen=True)
class ForeignResult:
    """One target: its accuracy on the clean images, and its fooling rate among those that it gets right.

    ``per_class``: class name → the same for the images of that class. ``acceptance``: the release rule's acceptance
    test on these images.
    """

    target: str
    runtime: str
    clean: Proportion
    fooled: Measured
    per_class: Mapping[str, Measured]
    acceptance: AcceptanceTest | NotMeasured

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        acceptance = self.acceptance
        return {
            "target": self.target,
            "runtime": self.runtime,
            "clean": self.clean.to_json(),
            "fooled": self.fooled.to_json(),
            "per_class": {name: fooled.to_json() for name, fooled in self.per_class.items()},
            "acceptance": acceptance.to_json()
            if isinstance(acceptance, NotMeasured)
            else asdict(acceptance) | {"passed": acceptance.passed},
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ForeignResult:
        """Read what :meth:`to_json` wrote; raises ``ValueError`` for anything else."""
        require_fields(value, *cls.__dataclass_fields__)
        return cls(
            str(value["target"]),
            str(value["runtime"]),
            Proportion.from_json(value["clean"]),
            measured_from_json(value["fooled"]),
            {str(name): measured_from_json(fooled) for name, fooled in value["per_class"].items()},
            _acceptance_from_json(value["acceptance"]),
        )


@dataclass(frozen=True)
class ForeignJudgement:
    """All targets on one set of foreign images. ``reference``: the public base, where it was given."""

    where: str
    perturbation: Perturbation
    images: int
    notes: tuple[str, ...]
    devices: tuple[ForeignResult, ...]
    reference: ForeignResult | None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "where": self.where,
            "perturbation": self.perturbation.code,
            "images": self.images,
            "notes": list(self.notes),
            "devices": [device.to_json() for device in self.devices],
            "reference": None if self.reference is None else self.reference.to_json(),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ForeignJudgement:
        """Read what :meth:`to_json` wrote; raises ``ValueError`` for anything else."""
        require_fields(value, *cls.__dataclass_fields__)
        reference = value["reference"]
        return cls(
            str(value["where"]),
            Perturbation.parse(value["perturbation"]),
            int(value["images"]),
            tuple(str(note) for note in value["notes"]),
            tuple(ForeignResult.from_json(device) for device in value["devices"]),
            None if reference is None else ForeignResult.from_json(reference),
        )


def judge_foreign(
    devices: Mapping[str, Runtime],
    pairs: ForeignPairs,
    labels: Sequence[str],
    risks: Risks,
    *,
    where: str,
    reference: tuple[str, Runtime] | None = None,
) -> ForeignJudgement:
    """Judge every device, by its id, on the same pairs; ``labels`` are the class names, ``where`` the file's name.

    ``reference``: a name and a model that everyone can have (the public base), judged alike and shown beside them.
    """
    results = [_judge(name, runtime, pairs, labels, risks) for name, runtime in devices.items()]
    return ForeignJudgement(
        where=where,
        perturbation=pairs.perturbation,
        images=len(pairs),
        notes=pairs.notes,
        devices=tuple(results),
        reference=None if reference is None else _judge(*reference, pairs, labels, risks),
    )


def _judge(name: str, runtime: Runtime, pairs: ForeignPairs, labels: Sequence[str], risks: Risks) -> ForeignResult:
    correct = predict(runtime, pairs.clean) == pairs.labels
    fooled = predict(runtime, pairs.adversarial) != pairs.labels
    per_class: dict[str, Measured] = {}
    for number, label in enumerate(labels):
        per_class[label] = _share(fooled[correct & (pairs.labels == number)])
    return ForeignResult(
        target=name,
        runtime=runtime.name,
        clean=Proportion(int(correct.sum()), len(correct)),
        fooled=_share(fooled[correct]),
        per_class=per_class,
        acceptance=_accept(fooled[correct], risks),
    )


def _share(fooled: np.ndarray) -> Measured:
    if not len(fooled):
        return NotMeasured("the target gets none of the clean images right")
    return Proportion(int(fooled.sum()), len(fooled))


def _accept(fooled: np.ndarray, risks: Risks) -> AcceptanceTest | NotMeasured:
    plan = plan_within(len(fooled), risks)
    if plan is None:
        return NotMeasured(
            f"the target gets only {len(fooled)} of the clean images right, too few for the stated risks"
        )
    return AcceptanceTest(plan, int(fooled[: plan.n].sum()))


def _acceptance_from_json(value: Mapping[str, Any]) -> AcceptanceTest | NotMeasured:
    if "not_measured" in value:
        return NotMeasured.from_json(value)
    require_fields(value, "plan", "fooled", "passed")
    require_fields(value["plan"], *AcceptancePlan.__dataclass_fields__)
    test = AcceptanceTest(AcceptancePlan(**value["plan"]), int(value["fooled"]))
    if test.passed is not value["passed"]:
        raise ValueError(f"{test.fooled} fooled at a limit of {test.plan.c} is not passed = {value['passed']!r}")
    return test
