"""The conformity-loss paper's suite (its Table 2): FGSM, BIM, MIM, PGD and C&W, white-box and from another model.

White-box: every model is attacked itself, the ceiling that is expected to win. Black-box: the same attacks made on the
public base. AutoAttack beside them says how much of what the suite leaves is real.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from device_tests.accuracy import predict
from device_tests.attacks.attack import Attack
from device_tests.attacks.autoattack import AutoAttack
from device_tests.attacks.catalogue import named_attacks
from device_tests.attacks.foolbox_attack import carlini_wagner
from device_tests.perturbation import Norm, Perturbation
from device_tests.report.charts import Pictures
from device_tests.report.study_document import (
    BarGroup,
    Bars,
    BudgetLine,
    Cell,
    Curve,
    CurvePoint,
    Gallery,
    GalleryItem,
    Section,
    Series,
    StudyDocument,
    Table,
    TableCell,
)
from device_tests.threats import Source, Threat
from device_tests.transfer import TargetJudgement
from exporters.run_torch import TorchRuntime
from factory.studies.canary_section import canary_section
from factory.studies.spec import ArmSettings, WhiteboxSpec
from factory.studies.study_report import cell, study_document
from factory.studies.workbench import (
    FleetMeasured,
    Workbench,
    clean_accuracy,
    fooling,
    one_model,
    robust_accuracy,
    worst_over,
)

STEPS = 10
"""Iterations of BIM, MIM and PGD in the paper, of ε/10 each for BIM and MIM."""

GALLERY = "examples"

SUITE = ("fgsm", "bim", "mi-fgsm", "pgd")


def whitebox(bench: Workbench, spec: WhiteboxSpec, command: str) -> StudyDocument:
    """Attack every model itself and from the base, with each attack of the suite."""
    balls = [Perturbation.parse(text) for text in (spec.epsilon, *spec.further)]
    judged = {
        (arm.name, perturbation): _judge(bench, arm, _suite(spec, perturbation), perturbation)
        for arm in spec.arms
        for perturbation in (*balls, Perturbation.parse(spec.carlini_wagner))
    }
    sections = [
        Section(
            title=f"{words}, {perturbation}", prose=(),
            blocks=(_table(spec, judged, perturbation, threat, f"Accuracy, {words.lower()}"),),
        )
        for perturbation in balls
        for words, threat in (("White-box", Threat.TARGET_ITSELF), ("Black-box, from the base", Threat.PUBLIC_BASE))
    ]  # fmt: skip
    distance = Perturbation.parse(spec.carlini_wagner)
    sections.append(
        Section(
            title=f"C&W, {distance}",
            prose=("C&W has no budget of its own: what it finds beyond this distance counts as not found.",),
            blocks=(
                _table(spec, judged, distance, Threat.TARGET_ITSELF, "Accuracy, white-box, C&W"),
                _table(spec, judged, distance, Threat.PUBLIC_BASE, "Accuracy, black-box, C&W"),
            ),
        )
    )
    sections.append(_epsilon_section(spec, judged, balls))
    sections.append(_classes_section(bench, spec, judged, balls[0]))
    sections.append(_gallery_section(bench, spec, balls[0]))
    sections.append(canary_section(bench, spec.arms[:4]))
    highlights: dict[str, FleetMeasured] = {
        f"{arm.name}: accuracy left, white-box, {balls[0]}": robust_accuracy(
            judged[arm.name, balls[0]], worst_over([Threat.TARGET_ITSELF])
        )
        for arm in spec.arms
    }
    return study_document(
        bench, name="whitebox", title="What is left under the conformity-loss paper's attacks",
        conclusion=[
            "Whoever holds a device fools it: keys are no defence against attacks on the device's own weights, and "
            "these figures are the ceiling of every other threat."
        ],
        highlights=highlights, budgets=_budgets(bench, spec), sections=sections, command=command,
    )  # fmt: skip


def _suite(spec: WhiteboxSpec, perturbation: Perturbation) -> tuple[Attack, ...]:
    if perturbation.norm is Norm.L2:
        return (
            carlini_wagner(spec.carlini_wagner_steps, searches=3, rate=0.01, constant=spec.carlini_wagner_constant),
        )
    suite = named_attacks(SUITE, pgd_steps=STEPS, momentum_steps=STEPS)
    return (*suite, AutoAttack(norm=perturbation.norm)) if spec.autoattack else suite


def _judge(
    bench: Workbench, arm: ArmSettings, suite: Sequence[Attack], perturbation: Perturbation
) -> list[TargetJudgement]:
    on, members = bench.images(arm), bench.members(arm)
    base = bench.attack(bench.base_source(), suite, perturbation, on)
    found: list[TargetJudgement] = []
    for member in members:
        # Named as a sibling, it is the target itself to itself, the only model that it is judged on.
        itself = Source(member.id, Threat.SIBLING_DEVICE, member.baked, f"{member.id} itself", (member.id,))
        own = bench.attack(itself, suite, perturbation, on)
        found.append(bench.judge(member.id, member.baked, [base, own], on))
    return found


def _table(
    spec: WhiteboxSpec, judged: dict[tuple[str, Perturbation], list[TargetJudgement]], perturbation: Perturbation,
    threat: Threat, title: str,
) -> Table:  # fmt: skip
    names = [attack.name for attack in _suite(spec, perturbation)]
    rows: list[tuple[TableCell, ...]] = []
    for arm in spec.arms:
        found = judged[arm.name, perturbation]
        single = [cell(robust_accuracy(found, worst_over([threat], name))) for name in names]
        rows.append(
            (arm.name, cell(clean_accuracy(found)), *single, cell(robust_accuracy(found, worst_over([threat]))))
        )
    return Table(
        title=title, caption=f"Share of all images that are still classified correctly, {perturbation}.",
        columns=("arm", "no attack", *names, "worst of all"), rows=tuple(rows),
    )  # fmt: skip


def _epsilon_section(
    spec: WhiteboxSpec, judged: dict[tuple[str, Perturbation], list[TargetJudgement]], balls: Sequence[Perturbation]
) -> Section:
    series = [
        Series(
            name=f"{arm.name}, {words}",
            points=tuple(
                CurvePoint(
                    x=255 * ball.size, label=str(ball).removeprefix("L∞ "),
                    figure=cell(fooling(judged[arm.name, ball], worst_over([threat]))),
                )
                for ball in sorted(balls, key=lambda ball: ball.size)
            ),
        )
        for arm in spec.arms[:4]
        for words, threat in (("white-box", Threat.TARGET_ITSELF), ("from the base", Threat.PUBLIC_BASE))
    ]  # fmt: skip
    return Section(
        title="Against ε",
        prose=("The per-image worst over all attacks of the suite.",),
        blocks=(
            Curve(
                title="Fooling rate against ε", caption="L∞, in 255ths.", x_label="ε · 255", y_label="fooling rate",
                x_scale="log", series=tuple(series),
            ),
        ),
    )  # fmt: skip


def gallery_of(bench: Workbench, spec: WhiteboxSpec, perturbation: Perturbation) -> list[tuple[Pictures, GalleryItem]]:
    """The first images that an attack on the base changes into another class for the base, and what devices say."""
    on, labels = bench.images(spec.arms[0]), bench.splits.labels
    made = bench.attack(bench.base_source(), _suite(spec, perturbation), perturbation, on)
    if "pgd" not in made.adversarial.images:
        return []
    attacked = made.adversarial.images["pgd"]
    base = TorchRuntime(bench.base_model)
    shown: list[tuple[Pictures, GalleryItem]] = []
    for arm in spec.arms:
        member = bench.members(arm)[0]
        by_base, by_target = predict(base, attacked), predict(TorchRuntime(member.baked), attacked)
        fooled = np.flatnonzero((predict(base, on.images) == on.labels) & (by_base != on.labels))[:2]
        for index in fooled:
            item = GalleryItem(
                label=labels[int(on.labels[index])], source_prediction=labels[int(by_base[index])],
                target_prediction=labels[int(by_target[index])], note=f"pgd on the base, judged on {member.id}",
            )  # fmt: skip
            shown.append((Pictures(on.images[index], attacked[index]), item))
    return shown


def _gallery_section(bench: Workbench, spec: WhiteboxSpec, perturbation: Perturbation) -> Section:
    items = tuple(item for _, item in gallery_of(bench, spec, perturbation))
    return Section(
        title="Examples",
        prose=("Images that fool the public base, and what a model of each arm says of them.",),
        blocks=(Gallery(name=GALLERY, title=f"Adversarial images, {perturbation}", caption="", items=items),),
    )


def _classes_section(
    bench: Workbench, spec: WhiteboxSpec, judged: dict[tuple[str, Perturbation], list[TargetJudgement]],
    perturbation: Perturbation,
) -> Section:  # fmt: skip
    arms = spec.arms[:4]
    groups: list[BarGroup] = []
    for index, label in enumerate(bench.splits.labels):
        cells: list[Cell] = []
        for arm in arms:
            first = judged[arm.name, perturbation][0]
            wrong = worst_over([Threat.PUBLIC_BASE])(first)
            mask = first.correct & (first.labels == index)
            cells.append(wrong if not isinstance(wrong, np.ndarray) else one_model(wrong, mask))
        groups.append(BarGroup(name=label, cells=tuple(cells)))
    return Section(
        title="Class by class",
        prose=("The first model of each arm, worst case of the attacks made on the base.",),
        blocks=(
            Bars(
                title=f"Fooling rate by class, from the base, {perturbation}", caption="",
                value_label="fooling rate", series=tuple(arm.name for arm in arms), groups=tuple(groups),
            ),
        ),
    )  # fmt: skip


def _budgets(bench: Workbench, spec: WhiteboxSpec) -> list[BudgetLine]:
    images = ", ".join(sorted({str(arm.images or spec.images) for arm in spec.arms}))
    attacks = [*_suite(spec, Perturbation.parse(spec.epsilon)), *_suite(spec, Perturbation.parse(spec.carlini_wagner))]
    return [
        BudgetLine(part=attack.name, images=images, steps=attack.description, restarts="1", queries="none")
        for attack in attacks
    ]
