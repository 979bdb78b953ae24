"""The key-based paper's Table I at this machine's scale, with the attackers and controls that it lacks.

The paper's columns: clean accuracy, AutoAttack on the pre-trained model (non-adaptive), AutoAttack on a model that was
fine-tuned with a guessed key (adaptive). Beside them: ensembles of the base and several keys under attacks that are
made to transfer, the un-keyed controls, and what the models have in common.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from device_tests.accuracy import predict
from device_tests.attacks.attack import Attack
from device_tests.attacks.autoattack import AutoAttack
from device_tests.attacks.catalogue import named_attacks
from device_tests.fleet_statistics import FleetDifference, FleetRate
from device_tests.perturbation import Norm, Perturbation
from device_tests.report.study_document import BudgetLine, HeatMap, HeatRow, Section, StudyDocument, Table, TableCell
from device_tests.threats import Threat
from device_tests.transfer import TargetJudgement
from exporters.measured import NotMeasured
from exporters.run_torch import TorchRuntime
from factory.device_model import block_size
from factory.keyed_transforms.key_ensemble import DeviceClassifier, behind
from factory.keyless_patterns import TRIES, keyless_patterns
from factory.studies.canary_section import canary_section
from factory.studies.spec import Arm, ArmSettings, Table1Spec
from factory.studies.study_report import cell, complement, difference, study_document, written
from factory.studies.workbench import (
    FleetMeasured,
    Pick,
    Workbench,
    advantage,
    clean_accuracy,
    fooling,
    one_model,
    rate_over_models,
    right,
    robust_accuracy,
    with_base,
    worst_of,
    worst_over,
)
from factory.studies.zoo import Member

NOT_RUN = NotMeasured("this arm was screened without it")


@dataclass(frozen=True, eq=False)
class Attacker:
    """One column: who attacks, with what, and how to read it from a judgement. ``threat``: for the heat map."""

    name: str
    threat: Threat
    pick: Pick


@dataclass(frozen=True)
class Battery:
    """Which attacks were run, within what: AutoAttack, or those that are made to transfer."""

    attacks: Literal["AutoAttack", "transfer attacks"]
    perturbation: Perturbation

    def __str__(self) -> str:
        return f"{self.attacks}, {self.perturbation}"


@dataclass(frozen=True, eq=False)
class Row:
    """One arm: its models, and their judgements under each battery."""

    arm: ArmSettings
    members: list[Member]
    judged: dict[Battery, list[TargetJudgement]]

    def rate(self, battery: Battery, attacker: Attacker) -> FleetMeasured:
        """The fooling rate over the arm's models, or why there is none."""
        found = self.judged.get(battery)
        return NOT_RUN if found is None else fooling(found, attacker.pick)


def table1(bench: Workbench, spec: Table1Spec, command: str) -> StudyDocument:
    """Train what is missing, attack, judge, and write it down."""
    strict = Battery("AutoAttack", Perturbation.parse(spec.perturbation))
    second = Battery("AutoAttack", Perturbation.parse(spec.perturbation_l2)) if spec.perturbation_l2 else None
    transfer = Battery("transfer attacks", Perturbation.parse(spec.perturbation_transfer))
    rows = [_row(bench, spec, arm, strict, second, transfer) for arm in spec.arms]
    non_adaptive = Attacker("base", Threat.PUBLIC_BASE, worst_over([Threat.PUBLIC_BASE]))
    adaptive = Attacker("guessed key", Threat.GUESSED_KEY, worst_over([Threat.GUESSED_KEY]))
    together = {count: _together(count) for count in _ensembles(spec)}
    common = _worst("worst case of what every arm met", [non_adaptive, adaptive, together[spec.screened_ensemble]])
    worst = _worst("worst case, all ensembles", [non_adaptive, adaptive, *together.values()])
    sections = [
        _accuracy_section(bench, spec, rows, strict, second, [non_adaptive, adaptive]),
        _transfer_section(spec, rows, transfer, [non_adaptive, adaptive, *together.values(), common, worst]),
        _controls_section(
            rows,
            {
                strict: [non_adaptive, adaptive],
                transfer: [non_adaptive, adaptive, together[spec.screened_ensemble], common],
            },
        ),
        _why_section(bench, rows),
        canary_section(bench, [arm for arm in spec.arms if arm.in_depth] or spec.arms[:1]),
    ]
    highlights: dict[str, FleetMeasured] = {}
    for row in rows:
        if row.arm.in_depth:
            highlights[f"{row.arm.name}: retention, AutoAttack on a guessed key, {strict.perturbation}"] = complement(
                row.rate(strict, adaptive)
            )
    return study_document(
        bench, name="table1", title="Do keys protect? Table I, with stronger attackers and controls",
        conclusion=_conclusion(rows, strict, transfer, adaptive, common), highlights=highlights,
        budgets=_budgets(bench, spec), sections=sections, command=command,
    )  # fmt: skip


def _ensembles(spec: Table1Spec) -> list[int]:
    return sorted({spec.screened_ensemble, *spec.ensembles})


def _together(count: int) -> Attacker:
    name = f"base and {count} other key{'s' if count > 1 else ''}"
    pick = worst_over([Threat.COLLUDING_DEVICES], source=with_base(count))
    return Attacker(name, Threat.COLLUDING_DEVICES, pick)


def _worst(name: str, attackers: Sequence[Attacker]) -> Attacker:
    return Attacker(name, Threat.COLLUDING_DEVICES, worst_of([attacker.pick for attacker in attackers]))


def autoattack(spec: Table1Spec, perturbation: Perturbation) -> AutoAttack:
    """AutoAttack: the standard version, as in the paper, unless the spec makes it shorter."""
    return AutoAttack(targets=spec.autoattack_targets, queries=spec.autoattack_queries, norm=perturbation.norm)


def _autoattacked(spec: Table1Spec, battery: Battery, arm: ArmSettings | None = None) -> int:
    if battery.perturbation.norm is Norm.L2:
        return spec.autoattack_l2_images
    return (None if arm is None else arm.autoattack_images) or spec.autoattack_images


def transfer_attacks(spec: Table1Spec) -> tuple[Attack, ...]:
    """The attacks that are made to transfer."""
    steps = spec.momentum_steps
    return named_attacks(spec.transfer_attacks, pgd_steps=steps, momentum_steps=steps, bf16=spec.bf16)


def _row(
    bench: Workbench, spec: Table1Spec, arm: ArmSettings, strict: Battery, second: Battery | None,
    transfer: Battery,
) -> Row:  # fmt: skip
    members = bench.members(arm)
    judged: dict[Battery, list[TargetJudgement]] = {}
    for battery in (strict, second if arm.in_depth else None):
        if battery is not None:
            few = bench.images(arm, _autoattacked(spec, battery, arm))
            attacks = (autoattack(spec, battery.perturbation),)
            sources = [bench.base_source(), *bench.other_keys(members)]
            made = [bench.attack(source, attacks, battery.perturbation, few) for source in sources]
            judged[battery] = [bench.judge(member.id, member.baked, made, few) for member in members]
    all_of_them = bench.images(arm)
    sources = [bench.base_source(), *bench.other_keys(members)]
    for count in _ensembles(spec) if arm.in_depth else (spec.screened_ensemble,):
        if count < len(members):
            sources += bench.ensemble_with_base(members, count)
    made = [bench.attack(source, transfer_attacks(spec), transfer.perturbation, all_of_them) for source in sources]
    if attracted := _attracted(spec):  # an arm without attractors too: arms are compared by what every one of them met
        source, patterns = keyless_patterns(bench.base_model, block_size(bench.base, attracted[0].recipe))
        made.append(bench.attack(source, patterns, transfer.perturbation, all_of_them))
    judged[transfer] = [bench.judge(member.id, member.baked, made, all_of_them) for member in members]
    return Row(arm, members, judged)


def _accuracy_section(
    bench: Workbench, spec: Table1Spec, rows: Sequence[Row], strict: Battery, second: Battery | None,
    attackers: Sequence[Attacker],
) -> Section:  # fmt: skip
    batteries = [strict] if second is None else [strict, second]
    few = bench.images(None, spec.autoattack_images)
    plain: list[str | FleetMeasured] = ["plain (the public base)", "none trained"]
    truth = few.labels.astype(np.int64)
    clean = right(bench.base_model, few.images, truth)
    plain.append(one_model(clean, np.ones_like(clean)))
    kept: list[str | FleetMeasured] = ["plain (the public base)"]
    for battery in batteries:
        attacks = (autoattack(spec, battery.perturbation),)
        few = bench.images(None, _autoattacked(spec, battery))
        made = bench.attack(bench.base_source(), attacks, battery.perturbation, few)
        for attacker in attackers:
            if attacker.threat is not Threat.PUBLIC_BASE:
                plain.append("no key to guess")
                kept.append("no key to guess")
                continue
            judgement = bench.judge("plain", bench.base_model, [made], few)
            plain.append(robust_accuracy([judgement], attacker.pick))
            kept.append(complement(fooling([judgement], attacker.pick)))
    body, retained = [tuple(_cell(value) for value in plain)], [tuple(_cell(value) for value in kept)]
    for row in rows:
        line: list[str | FleetMeasured] = [
            row.arm.name, f"{row.members[0].model.trainable_parameters:,} parameters",
            clean_accuracy(row.judged[strict]),
        ]  # fmt: skip
        left: list[str | FleetMeasured] = [row.arm.name]
        for battery in batteries:
            for attacker in attackers:
                found = row.judged.get(battery)
                line.append(NOT_RUN if found is None else robust_accuracy(found, attacker.pick))
                left.append(complement(row.rate(battery, attacker)))
        body.append(tuple(_cell(value) for value in line))
        retained.append(tuple(_cell(value) for value in left))
    heads = [f"AutoAttack on the {a.name}, {battery.perturbation}" for battery in batteries for a in attackers]
    caption = (
        "Accuracy over all attacked images, as in the paper. Adversarial images are rounded to 8 bits; the plain model "
        "is attacked itself. Every model of an arm is a target, and a guessed key to the others."
    )
    return Section(
        title="Table I",
        prose=(
            "Arms are named by how they were adapted and by the block size M of their keys; un-keyed and "
            "re-initialised arms are controls by the same recipe.",
        ),
        blocks=(
            Table(
                title="Accuracy", caption=caption, columns=("model", "trained", "clean", *heads), rows=tuple(body)
            ),
            Table(
                title="Retention", caption="Among the images that a model gets right when clean, the share that it "
                "still gets right when attacked.", columns=("model", *heads), rows=tuple(retained),
            ),
            _clean_table(bench, rows),
        ),
    )  # fmt: skip


def _clean_table(bench: Workbench, rows: Sequence[Row]) -> Table:
    """Accuracy on all test images, which are many more than those that are attacked."""
    test = bench.splits.test
    images, truth = test.images.numpy(), test.labels.numpy()

    def of(row: Row) -> TableCell:
        clean = np.array([right(member.baked, images, truth) for member in row.members])
        return cell(rate_over_models(clean, np.ones_like(clean)))

    return Table(
        title="Clean accuracy", caption=f"On all {len(truth):,} test images.", columns=("model", "clean"),
        rows=(("plain (the public base)", bench.base_clean), *((row.arm.name, of(row)) for row in rows)),
    )  # fmt: skip


def _transfer_section(
    spec: Table1Spec, rows: Sequence[Row], transfer: Battery, attackers: Sequence[Attacker]
) -> Section:
    names = ", ".join(attack.description for attack in transfer_attacks(spec))
    heat = HeatMap(
        title=f"Fooling rate, {transfer.perturbation}",
        caption=f"Attacks: {names}. An arm's column is the mean over its models. A model with another key of the same "
        "arm is at once a guessed key, an extracted sibling and a colluding device: all are made in the same way.",
        row_label="Attacker holds", column_label="Arm attacked",
        rows=tuple(HeatRow(name=a.name, threat=a.threat.code, note=a.threat.sentence) for a in attackers),
        columns=tuple(row.arm.name for row in rows),
        cells=tuple(tuple(cell(row.rate(transfer, a)) for row in rows) for a in attackers),
    )  # fmt: skip
    return Section(
        title="Attacks that are made to transfer",
        prose=(
            "AutoAttack stops at the first success, so that its images hardly cross the boundary.",
            "Arms that were not studied in depth met one size of ensemble. Arms are compared by what every one of them "
            "met.",
            *_met_patterns(spec),
        ),
        blocks=(heat,),
    )


def _attracted(spec: Table1Spec) -> list[Arm]:
    """The arms with attractors."""
    return [arm for arm in map(spec.arm, spec.arms) if arm.recipe.attractors is not None]


def _met_patterns(spec: Table1Spec) -> list[str]:
    names = ", ".join(arm.name for arm in _attracted(spec))
    if not names:
        return []
    return [
        f"All models also met {TRIES} patterns of the frequencies of the attractors of {names}, made "
        "without a model; the base's row and the worst case count them."
    ]


def _controls_section(rows: Sequence[Row], attackers: dict[Battery, list[Attacker]]) -> Section:
    keyed = [row for row in rows if row.arm.keyed]
    controls = [row for row in rows if not row.arm.keyed]
    lines: list[tuple[TableCell, ...]] = []
    for row in keyed:
        for control in controls:
            if control.arm.adapts != row.arm.adapts:
                continue
            for battery, group in attackers.items():
                for attacker in group:
                    gained = difference(_advantage(row, control, battery, attacker))
                    lines.append((row.arm.name, control.arm.name, f"{attacker.name}, {battery}", gained))
    return Section(
        title="What the controls explain",
        prose=(
            "Fooling rate of the un-keyed control minus that of the keyed arm: what the key itself adds. Where the "
            "interval contains zero, the key adds nothing that retraining, or new weights, do not give.",
        ),
        blocks=(
            Table(
                title="Advantage of the key", caption="Positive: the keyed models are fooled less.",
                columns=("keyed arm", "control", "attacker", "advantage"), rows=tuple(lines),
            ),
        ),
    )  # fmt: skip


def _advantage(row: Row, control: Row, battery: Battery, attacker: Attacker) -> FleetDifference | NotMeasured:
    if battery not in row.judged or battery not in control.judged:
        return NOT_RUN
    return advantage(control.judged[battery], row.judged[battery], attacker.pick)


def _why_section(bench: Workbench, rows: Sequence[Row]) -> Section:
    on = bench.images()
    truth = on.labels.astype(np.int64)
    everyone = np.ones(len(truth), dtype=bool)
    base = predict(TorchRuntime(bench.base_model), on.images)
    lines: list[tuple[TableCell, ...]] = []
    for row in rows:
        first, other = row.members[0], row.members[1]
        predicted = predict(TorchRuntime(first.baked), on.images)
        with_key = predicted == truth
        if not row.arm.keyed:
            wrong_key: TableCell = "no key"
            no_key: TableCell = "no key"
        else:
            wrong_key = one_model(_through(first, other.model.classifier, on.images) == truth, everyone)
            no_key = one_model(_through(first, None, on.images) == truth, everyone)
        siblings = predict(TorchRuntime(other.baked), on.images)
        lines.append(
            (
                row.arm.name, one_model(with_key, everyone), wrong_key, no_key,
                one_model(predicted == base, everyone), one_model(predicted == siblings, everyone),
            )
        )  # fmt: skip
    return Section(
        title="Have the models learned their keys?",
        prose=(
            "The first model of each arm on clean images: with its own key, with another model's key in front of it, "
            "and with no shuffle at all. A model that needs its key has learned it. If it agrees with the base and "
            "with its siblings nevertheless, it has learned to undo the shuffle, and computes the base's function "
            "behind it: what fools the base then fools it too.",
        ),
        blocks=(
            Table(
                title="Keys and agreement", caption="Accuracy, then the share of images with the same prediction.",
                columns=(
                    "arm", "own key", "another key", "no shuffle", "same class as the base", "same class as a sibling"
                ),
                rows=tuple(lines),
            ),
        ),
    )  # fmt: skip


def _through(member: Member, other: DeviceClassifier | None, images: np.ndarray) -> np.ndarray:
    """Predictions of a model behind another's transform, or behind none."""
    swapped = behind(member.model.classifier, other)
    return predict(TorchRuntime(swapped), images)


def _conclusion(
    rows: Sequence[Row], strict: Battery, transfer: Battery, adaptive: Attacker, worst: Attacker
) -> list[str]:
    sentences: list[str] = []
    for row in rows:
        if not row.arm.in_depth:
            continue
        kept, strong = complement(row.rate(strict, adaptive)), row.rate(transfer, worst)
        if isinstance(kept, FleetRate) and isinstance(strong, FleetRate):
            sentences.append(
                f"{row.arm.name} keeps {written(kept)} of its correct images under AutoAttack on a guessed key at "
                f"{strict.perturbation}, and is fooled on {written(strong)} in the worst case of the transfer attacks "
                f"that every arm met, at {transfer.perturbation}."
            )
        else:
            sentences.append(f"{row.arm.name}: not everything was measured; see the tables.")
    return sentences or ["No arm was studied in depth; see the tables."]


def _budgets(bench: Workbench, spec: Table1Spec) -> list[BudgetLine]:
    strong = f"{spec.strong_steps} steps, {spec.strong_targets} targets"
    strict = sorted({arm.autoattack_images or spec.autoattack_images for arm in spec.arms})
    return [
        BudgetLine(
            part="AutoAttack", images=f"{', '.join(map(str, strict))} (L2: {spec.autoattack_l2_images})",
            steps=autoattack(spec, Perturbation.parse(spec.perturbation)).description,
            restarts="1", queries="within it",
        ),
        *(
            BudgetLine(
                part=attack.name, images=", ".join(sorted({str(a.images or spec.images) for a in spec.arms})),
                steps=attack.description, restarts="1", queries="none",
            )
            for attack in transfer_attacks(spec)
        ),
        BudgetLine(part="self-check", images=str(spec.strong_images), steps=strong, restarts="1", queries="none"),
    ]  # fmt: skip


def _cell(value: str | FleetMeasured) -> TableCell:
    return value if isinstance(value, str) else cell(value)
