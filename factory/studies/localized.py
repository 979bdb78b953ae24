"""N pixels and patches, as in the volumization paper (its Figure 3), on whatever models there are.

Two measures are the paper's: the robustness score δ, accuracy under attack minus clean accuracy over all images, and
the defence success rate, the share of attacked images (right when clean) on which the attack fails. The grey patch
beside every adversarial one tells occlusion from attack.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from device_tests.attacks.attack import Attack
from device_tests.attacks.patch import GreyPatch, PatchExamples, UniversalPatch
from device_tests.attacks.pixels import PixelEvolution, SparseSearch
from device_tests.fleet_statistics import FleetDifference, arm_difference
from device_tests.perturbation import Norm, Perturbation
from device_tests.report.study_document import (
    BudgetLine,
    Cell,
    Curve,
    CurvePoint,
    Section,
    Series,
    StudyDocument,
    Table,
    TableCell,
)
from device_tests.statistics import Pairs
from device_tests.threats import Source, Threat
from device_tests.transfer import TargetJudgement
from exporters.measured import NotMeasured
from factory.studies.canary_section import canary_section
from factory.studies.spec import ArmSettings, LocalizedSpec
from factory.studies.study_report import cell, complement, difference, study_document, written
from factory.studies.workbench import FleetMeasured, Workbench, correct, fooling, outcomes, worst_over

FEWEST_OF_EVOLUTION = 50
"""Queries below which differential evolution has hardly a generation."""

Judged = dict[tuple[str, Perturbation], list[TargetJudgement]]


def localized(bench: Workbench, spec: LocalizedSpec, command: str) -> StudyDocument:
    """Attack every model itself with ever more pixels and ever larger patches."""
    pixels = [Perturbation(Norm.L0, float(count)) for count in spec.pixels]
    patches = [Perturbation(Norm.PATCH, share) for share in spec.patches]
    judged: Judged = {}
    for arm in spec.arms:
        for perturbation in pixels:
            judged[arm.name, perturbation] = _judge(bench, arm, _pixel_attacks(spec), perturbation)
        for perturbation in patches:
            judged[arm.name, perturbation] = _judge(bench, arm, _patch_attacks(bench, spec), perturbation)
    sections = [
        Section(
            title="N pixels", prose=("White-box queries: the attacks ask the model itself for its scores.",),
            blocks=(
                _curve(spec, judged, pixels, "Defence success rate against N-pixel attacks", "pixels", 1.0, None),
                _table(spec, judged, pixels, None),
            ),
        ),
        Section(
            title="Patches",
            prose=("One universal patch per model, fitted on training images, at places drawn anew for each image.",),
            blocks=(
                _curve(spec, judged, patches, "Defence success rate against patches", "% of the area", 100.0, "patch"),
                _table(spec, judged, patches, "patch"),
                _grey_table(spec, judged, patches),
            ),
        ),
        canary_section(bench, spec.arms[:4]),
    ]  # fmt: skip
    highlights: dict[str, FleetMeasured] = {
        f"{arm.name}: defence success, {pixels[-1]}": complement(fooling(judged[arm.name, pixels[-1]], worst_over()))
        for arm in spec.arms
    }
    return study_document(
        bench, name="localized", title="Pixels and patches against keyed devices", conclusion=_conclusion(spec, judged),
        highlights=highlights, budgets=_budgets(bench, spec), sections=sections, command=command,
    )  # fmt: skip


def _pixel_attacks(spec: LocalizedSpec) -> tuple[Attack, ...]:
    return (SparseSearch(queries=spec.queries), PixelEvolution(queries=max(FEWEST_OF_EVOLUTION, spec.queries)))


def _patch_attacks(bench: Workbench, spec: LocalizedSpec) -> tuple[Attack, ...]:
    taken = bench.splits.train.take(spec.patch_images)
    examples = PatchExamples(taken.images.numpy(), taken.labels.numpy())
    return (UniversalPatch(examples, steps=spec.patch_steps), GreyPatch())


def _judge(
    bench: Workbench, arm: ArmSettings, attacks: Sequence[Attack], perturbation: Perturbation
) -> list[TargetJudgement]:
    on = bench.images(arm)
    found: list[TargetJudgement] = []
    for member in bench.members(arm):
        # Queries and patches have no strong reference attack on their own source: see the grey patch.
        itself = Source(member.id, Threat.QUERIES, member.baked, f"{member.id} itself", (member.id,))
        made = bench.attack(itself, attacks, perturbation, on)
        found.append(bench.judge(member.id, member.baked, [made], on))
    return found


def _curve(
    spec: LocalizedSpec, judged: Judged, perturbations: Sequence[Perturbation], title: str, x_label: str, scale: float,
    attack: str | None,
) -> Curve:  # fmt: skip
    return Curve(
        title=title, caption="Share of the images that are right when clean on which the attack fails.",
        x_label=x_label, y_label="defence success rate", x_scale="linear",
        series=tuple(
            Series(
                name=arm.name,
                points=tuple(
                    CurvePoint(x=scale * p.size, figure=_success(judged[arm.name, p], attack))
                    for p in perturbations
                ),
            )
            for arm in spec.arms
        ),
    )  # fmt: skip


def _table(spec: LocalizedSpec, judged: Judged, perturbations: Sequence[Perturbation], attack: str | None) -> Table:
    rows: list[tuple[TableCell, ...]] = []
    for arm in spec.arms:
        for perturbation in perturbations:
            found = judged[arm.name, perturbation]
            success = _success(found, attack)
            rows.append((arm.name, str(perturbation), success, difference(_robustness(found, attack))))
    return Table(
        title="δ and success of the defence" + (" (patches)" if attack else ""),
        caption="δ: accuracy under attack minus clean accuracy, over all images of all models of the arm.",
        columns=("arm", "attack", "defence success rate", "δ"), rows=tuple(rows),
    )  # fmt: skip


def _success(found: Sequence[TargetJudgement], attack: str | None) -> Cell:
    return cell(complement(fooling(found, worst_over(None, attack))))


def _robustness(found: Sequence[TargetJudgement], attack: str | None) -> FleetDifference | NotMeasured:
    wrong = outcomes(found, worst_over(None, attack))
    if isinstance(wrong, NotMeasured):
        return wrong
    right = correct(found)
    return arm_difference(right & ~wrong, right, np.ones_like(right))


def _grey_table(spec: LocalizedSpec, judged: Judged, patches: Sequence[Perturbation]) -> Table:
    rows: list[tuple[TableCell, ...]] = []
    for arm in spec.arms:
        for perturbation in patches:
            found = judged[arm.name, perturbation]
            rates = [cell(fooling(found, worst_over(None, name))) for name in ("patch", "grey-patch")]
            rows.append((arm.name, str(perturbation), *rates, _pair(found[0])))
    return Table(
        title="Patch against grey patch",
        caption="Same images, same places. McNemar's exact test on the first model of the arm.",
        columns=("arm", "size", "adversarial patch fools", "grey patch fools", "difference on the same images"),
        rows=tuple(rows),
    )  # fmt: skip


def _pair(judgement: TargetJudgement) -> str:
    both: list[np.ndarray] = []
    for name in ("patch", "grey-patch"):
        wrong = worst_over(None, name)(judgement)
        if isinstance(wrong, NotMeasured):
            return f"not measured: {wrong.reason}"
        both.append(wrong[judgement.correct])
    pairs = Pairs.of(both[0], both[1])
    low, high = pairs.interval
    return f"{pairs.difference:+.3f} [{low:+.3f}, {high:+.3f}] (n = {pairs.n}, p = {pairs.p_value:.2g})"


def _conclusion(spec: LocalizedSpec, judged: Judged) -> list[str]:
    said: list[str] = []
    largest = Perturbation(Norm.PATCH, spec.patches[-1])
    most = Perturbation(Norm.L0, float(spec.pixels[-1]))
    for arm in spec.arms:
        said.append(
            f"{arm.name}: {most} fool {written(fooling(judged[arm.name, most], worst_over()))}; a {largest} fools "
            f"{written(fooling(judged[arm.name, largest], worst_over(None, 'patch')))}, a grey one of that size "
            f"{written(fooling(judged[arm.name, largest], worst_over(None, 'grey-patch')))}."
        )
    return said


def _budgets(bench: Workbench, spec: LocalizedSpec) -> list[BudgetLine]:
    images = ", ".join(sorted({str(arm.images or spec.images) for arm in spec.arms}))
    return [
        BudgetLine(
            part=a.name, images=images, steps=a.description, restarts="1", queries=f"{a.gradients_per_image} per image"
        )
        for a in _pixel_attacks(spec)
    ] + [
        BudgetLine(part=a.name, images=images, steps=a.description, restarts="1", queries="none")
        for a in _patch_attacks(bench, spec)
    ]
