"""How the fooling rate grows with the number of colluding devices, and what that says for a large fleet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from device_tests.attacks.attack import Attack
from device_tests.attacks.catalogue import named_attacks
from device_tests.collusion_trend import Trend as FittedTrend
from device_tests.collusion_trend import collusion_trend
from device_tests.fleet_statistics import FleetRate
from device_tests.perturbation import Perturbation
from device_tests.report.study_document import (
    BudgetLine,
    Curve,
    CurvePoint,
    Reference,
    Section,
    Series,
    StudyDocument,
    Table,
    Trend,
    TrendPoint,
)
from device_tests.threats import Threat
from device_tests.transfer import TargetJudgement
from exporters.measured import NotMeasured
from factory.studies.canary_section import canary_section
from factory.studies.spec import ArmSettings, CollusionSpec
from factory.studies.study_report import cell, in_words, study_document, written
from factory.studies.workbench import FleetMeasured, Workbench, advantage, correct, fooling, outcomes, worst_over

ADAPTIVE_ATTRACTORS = 0.15
"""Where collusion levels off with adaptive attractors, as their authors report it (GTSRB, 2023): a mark, no measure."""


@dataclass(frozen=True, eq=False)
class Line:
    """One arm: the fooling rate for each number of colluding devices, and from the base alone."""

    arm: ArmSettings
    judged: dict[int, list[TargetJudgement]]
    base: FleetMeasured

    def rate(self, count: int) -> FleetMeasured:
        """Fooling rate under ``count`` colluding devices and the base."""
        if count not in self.judged:
            return NotMeasured(f"the arm has too few models for {count} colluding ones and a target")
        return fooling(self.judged[count], worst_over())


def collusion(bench: Workbench, spec: CollusionSpec, command: str) -> StudyDocument:
    """Attack ever larger groups of devices together with the base, and judge every device outside of them."""
    perturbation = Perturbation.parse(spec.perturbation)
    lines = [_line(bench, spec, arm, perturbation) for arm in spec.arms]
    trends = {line.arm.name: _trend(line, spec.fleet_size) for line in lines}
    curve = Curve(
        title=f"Fooling rate against colluding devices, {perturbation}",
        caption="Each point: the mean over all devices outside the group, the group and the public base being attacked "
        "at once. Dotted: the fitted trend.",
        x_label="colluding devices", y_label="fooling rate", x_scale="linear",
        series=tuple(
            Series(
                name=line.arm.name,
                points=tuple(CurvePoint(x=float(k), figure=cell(line.rate(k))) for k in sorted(line.judged)),
            )
            for line in lines
            if line.judged
        ),
        references=(Reference(label="adaptive attractors' plateau, as published", at=ADAPTIVE_ATTRACTORS),),
        trends=tuple(
            _drawn(name, trend, spec.fleet_size) for name, trend in trends.items() if isinstance(trend, FittedTrend)
        ),
    )  # fmt: skip
    table = Table(
        title="The same in numbers", caption="T0 is the public base alone.",
        columns=("arm", "T0", *(f"{k} device{'' if k == 1 else 's'}" for k in spec.colluding)),
        rows=tuple((line.arm.name, cell(line.base), *(cell(line.rate(k)) for k in spec.colluding)) for line in lines),
    )  # fmt: skip
    sections = [
        Section(title="Collusion", prose=(_SYMMETRY,), blocks=(curve, table)),
        Section(title=f"A fleet of {spec.fleet_size:,}", prose=tuple(_said(trends, spec)), blocks=()),
        Section(title="Keyed against un-keyed", prose=tuple(_against_control(lines)), blocks=()),
        canary_section(bench, spec.arms[:4]),
    ]
    largest = {line.arm.name: max(line.judged) for line in lines if line.judged}
    most = {
        f"{line.arm.name}, {largest[line.arm.name]} devices": line.rate(largest[line.arm.name])
        for line in lines
        if line.judged
    }
    return study_document(
        bench, name="collusion", title="What colluding devices gain", conclusion=_conclusion(lines),
        highlights=most, budgets=_budgets(spec), sections=sections, command=command,
    )  # fmt: skip


_SYMMETRY = (
    "Every device is trained by the same recipe, so a device whose key an attacker guessed is as good to him as one "
    "that he extracted: this is also the curve for guessed keys."
)


def _attacks(spec: CollusionSpec) -> tuple[Attack, ...]:
    steps = spec.momentum_steps
    return named_attacks(spec.attacks, pgd_steps=steps, momentum_steps=steps, bf16=spec.bf16)


def _line(bench: Workbench, spec: CollusionSpec, arm: ArmSettings, perturbation: Perturbation) -> Line:
    members, on = bench.members(arm), bench.images(arm)
    from_base = bench.attack(bench.base_source(), _attacks(spec), perturbation, on)
    base = fooling([bench.judge(m.id, m.baked, [from_base], on) for m in members], worst_over([Threat.PUBLIC_BASE]))
    judged: dict[int, list[TargetJudgement]] = {}
    for count in spec.colluding:
        if count < len(members):
            sources = bench.ensemble_with_base(members, count)
            made = [bench.attack(source, _attacks(spec), perturbation, on) for source in sources]
            judged[count] = [bench.judge(member.id, member.baked, made, on) for member in members]
    return Line(arm, judged, base)


def _trend(line: Line, fleet_size: int) -> FittedTrend | NotMeasured:
    counts = sorted(line.judged)
    fooled: list[np.ndarray] = []
    for count in counts:
        found = outcomes(line.judged[count], worst_over())
        if isinstance(found, NotMeasured):
            return found
        fooled.append(found)
    if not counts:
        return NotMeasured("no group was attacked")
    drawn = sorted({*range(1, max(counts) + 5), fleet_size})
    return collusion_trend(counts, np.array(fooled), correct(line.judged[counts[0]]), predict=drawn)


def _drawn(name: str, trend: FittedTrend, fleet_size: int) -> Trend:
    near = [prediction for prediction in trend.predictions if prediction.k != fleet_size]
    points = tuple(TrendPoint(x=float(p.k), value=p.value, low=p.low, high=p.high) for p in near)
    return Trend(name=f"{name}, fitted", formula=f"the {trend.curves[0].model} curve, by AICc", points=points)


def _said(trends: dict[str, FittedTrend | NotMeasured], spec: CollusionSpec) -> list[str]:
    said: list[str] = []
    for name, trend in trends.items():
        if isinstance(trend, NotMeasured):
            said.append(f"{name}: no trend ({trend.reason}).")
            continue
        far = max(trend.predictions, key=lambda prediction: prediction.k)
        said.append(
            f"{name}: the {trend.curves[0].model} curve fits best and says {far.value:.2f} [{far.low:.2f}, "
            f"{far.high:.2f}] for {far.k:,} colluding devices. {trend.caveat}"
        )
    said.append(
        f"None of this was measured beyond {max(spec.colluding)} devices: for a fleet of {spec.fleet_size:,} it is an "
        "extrapolation, and an attacker who extracts so many devices is limited by the work of extracting them."
    )
    return said


def _against_control(lines: Sequence[Line]) -> list[str]:
    said: list[str] = []
    for line in lines:
        for control in lines:
            if not line.arm.keyed or control.arm.keyed:
                continue
            if control.arm.adapts != line.arm.adapts:
                continue
            for count in sorted(set(line.judged) & set(control.judged)):
                gained = in_words(advantage(control.judged[count], line.judged[count], worst_over()))
                said.append(
                    f"{control.arm.name} minus {line.arm.name}, {count} colluding: {gained} (positive: the key helps)."
                )
    return said or ["No un-keyed arm was studied beside a keyed one."]


def _conclusion(lines: Sequence[Line]) -> list[str]:
    said: list[str] = []
    for line in lines:
        counts = sorted(line.judged)
        rates = {k: line.rate(k) for k in counts}
        shown = [f"{k}: {written(rate)}" for k, rate in rates.items() if isinstance(rate, FleetRate)]
        said.append(f"{line.arm.name}, fooled by so many colluding devices – {'; '.join(shown) or 'not measured'}.")
    return said


def _budgets(spec: CollusionSpec) -> list[BudgetLine]:
    images = ", ".join(sorted({str(arm.images or spec.images) for arm in spec.arms}))
    return [
        BudgetLine(part=attack.name, images=images, steps=attack.description, restarts="1", queries="none")
        for attack in _attacks(spec)
    ]
