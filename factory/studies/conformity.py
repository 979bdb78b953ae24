"""The conformity-loss paper's Tables 2, 3, 6 and 7 (Mustafa et al., ICCV 2019), with AutoAttack beside every attack.

Table 2: each way to train, attacked itself (white-box) and through another architecture (black-box). Table 3: the same
attacks on the joint loss. Table 6: who fools whom. Table 7: the loss at one depth after the other. Whether the paper's
orders hold is decided by paired intervals.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor, nn

from device_tests.attacks.adaptive import AdaptiveAttack, Method
from device_tests.attacks.attack import Attack
from device_tests.attacks.autoattack import AutoAttack
from device_tests.attacks.catalogue import named_attacks
from device_tests.attacks.foolbox_attack import carlini_wagner
from device_tests.perturbation import Norm, Perturbation
from device_tests.report.study_document import (
    BudgetLine,
    Curve,
    CurvePoint,
    Section,
    Series,
    StudyDocument,
    Table,
    TableCell,
)
from device_tests.threats import Source, Threat
from device_tests.transfer import TargetJudgement
from exporters.measured import NotMeasured
from factory.adaptation import read_learned
from factory.base import load_base
from factory.classifier import ImageClassifier
from factory.prototypes.objective import ConformityObjective
from factory.recipes.prototype_conformity import PrototypeConformityPart
from factory.recipes.recipe import RecipeSettings
from factory.studies.canary_section import canary_section
from factory.studies.order import gain, order_verdict
from factory.studies.spec import Arm, ConformityArm, ConformitySpec
from factory.studies.study_report import cell, study_document
from factory.studies.workbench import FleetMeasured, Pick, Workbench, clean_accuracy, robust_accuracy, worst_over
from factory.studies.zoo import Member, Zoo
from factory.verification import AttackedSource
from keys.errors import InputError

STEPS = 10
"""Of BIM, MIM and PGD, as in the paper."""

SUITE = ("fgsm", "bim", "mi-fgsm", "pgd")
ADAPTIVE: tuple[Method, ...] = ("fgsm", "bim", "mi-fgsm", "pgd")
SURROGATE = "surrogate"

Judged = Mapping[tuple[str, Perturbation], list[TargetJudgement]]


def conformity(bench: Workbench, spec: ConformitySpec, command: str) -> StudyDocument:
    """Train what is missing, attack, judge, and write it down."""
    balls = [Perturbation.parse(text) for text in (spec.epsilon, *spec.further)]
    distance = Perturbation.parse(spec.carlini_wagner)
    trained = [arm for arm in spec.arms if "training" in arm.tables]
    by_depth = [arm for arm in spec.arms if "depths" in arm.tables]
    surrogate = _surrogate(bench, spec)
    judged: dict[tuple[str, Perturbation], list[TargetJudgement]] = {}
    for ball in (*balls, distance):
        for arm in spec.arms if ball == balls[0] else trained:
            others = trained if ball == balls[0] and arm in trained else []
            judged[arm.name, ball] = _judge(bench, spec, arm, surrogate, others, ball)
    sections = [
        *(_training_section(spec, trained, judged, ball, distance) for ball in balls),
        _adaptive_section(trained, judged, balls[0]),
        _transfer_section(bench, spec, trained, judged, surrogate, balls[0]),
        _depths_section(by_depth, judged, balls[0]),
    ]
    if len(balls) > 1:
        sections.append(_epsilon_section(trained, judged, balls))
    sections.append(canary_section(bench, trained[:4], surrogate))
    highlights: dict[str, FleetMeasured] = {
        f"{arm.name}: accuracy left under AutoAttack, white-box, {balls[0]}": robust_accuracy(
            judged[arm.name, balls[0]], _itself("autoattack")
        )
        for arm in trained
    }
    return study_document(
        bench, name="conformity", title="Does prototype conformity protect? The paper's tables, with AutoAttack",
        conclusion=_conclusion(trained, by_depth, judged, balls[0]), highlights=highlights,
        budgets=_budgets(spec, balls[0], distance), sections=sections, command=command,
    )  # fmt: skip


def _surrogate(bench: Workbench, spec: ConformitySpec) -> Source:
    """The model of another architecture that black-box attacks are made on."""
    base = load_base(spec.surrogate, bench.splits.labels, spec.seed)
    if base.architecture.contract.shape != bench.base.architecture.contract.shape:
        raise InputError(
            f"The surrogate {spec.surrogate.name} takes images of another shape than the base {spec.base.name}; choose "
            "one that takes the same."
        )
    model = ImageClassifier(base.network, base.architecture.mean, base.architecture.std)
    if spec.surrogate_training is not None:
        zoo = Zoo(bench.shared / SURROGATE, base, bench.splits, seed=spec.seed, progress=bench.progress)
        recipe = RecipeSettings(adaptation="full", training=spec.surrogate_training)
        model = zoo.member(Arm(SURROGATE, recipe, keyed=False), 1).model.classifier
    return Source(SURROGATE, Threat.PUBLIC_BASE, model, f"another architecture, {base.architecture.name}")


def _suite(spec: ConformitySpec, perturbation: Perturbation) -> tuple[Attack, ...]:
    if perturbation.norm is Norm.L2:
        return (
            carlini_wagner(spec.carlini_wagner_steps, searches=3, rate=0.01, constant=spec.carlini_wagner_constant),
        )
    strongest = AutoAttack(
        steps=spec.autoattack_steps, targets=spec.autoattack_targets, queries=spec.autoattack_queries
    )
    return (*named_attacks(SUITE, pgd_steps=STEPS, momentum_steps=STEPS), strongest)


def adaptive_attacks(bench: Workbench, member: Member) -> tuple[AdaptiveAttack, ...]:
    """FGSM, BIM, MIM and PGD on the joint loss with the prototypes that ``member`` learned; none without prototypes."""
    recipe = member.arm.recipe
    if not isinstance(recipe.objective, PrototypeConformityPart):
        return ()
    network, classes = bench.base.network, len(bench.splits.labels)
    objective = recipe.objective.build(network, classes, recipe.training.label_smoothing, network)
    learned = read_learned(member.folder / "adapter")
    objective.load_state_dict(learned)
    assert isinstance(objective, ConformityObjective)
    objective.eval().requires_grad_(False)

    def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        return objective.joint_loss(model, images, labels)

    digest = hashlib.sha256(recipe.objective.model_dump_json().encode())
    for name, tensor in sorted(learned.items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    words = f"cross-entropy and prototype conformity ({digest.hexdigest()[:16]})"
    return tuple(AdaptiveAttack(method, loss, words, steps=STEPS) for method in ADAPTIVE)


def _source(member: Member) -> Source:
    # The trained model and not what is exported: fused layers have no place for the hooks of the joint loss.
    return Source(member.id, Threat.SIBLING_DEVICE, member.model.classifier, f"{member.id} itself")


def _judge(
    bench: Workbench, spec: ConformitySpec, arm: ConformityArm, surrogate: Source, others: Sequence[ConformityArm],
    perturbation: Perturbation,
) -> list[TargetJudgement]:  # fmt: skip
    on, suite = bench.images(arm), _suite(spec, perturbation)
    linf = perturbation.norm is Norm.LINF
    black_box = bench.attack(surrogate, suite, perturbation, on)
    found: list[TargetJudgement] = []
    for member in bench.members(arm):
        sources = {member.id: member} | {first.id: first for first in (bench.members(other)[0] for other in others)}
        made = [
            bench.attack(_source(one), (*suite, *(adaptive_attacks(bench, one) if linf else ())), perturbation, on)
            for one in sources.values()
        ]
        found.append(bench.judge(member.id, member.baked, [black_box, *made], on))
    return found


def _itself(attack: str | None) -> Pick:
    return worst_over([Threat.TARGET_ITSELF], attack)


def _from(source: str, attack: str) -> Pick:
    """What one attack made on one source does; the source's whole id counts."""

    def pick(judgement: TargetJudgement) -> np.ndarray | NotMeasured:
        for one in judgement.cells:
            if (one.source, one.attack) == (source, attack):
                return one.fooled if isinstance(one.fooled, NotMeasured) else judgement.wrong(source, attack)
        return NotMeasured("no such attack was run")

    return pick


def _training_section(
    spec: ConformitySpec, arms: Sequence[ConformityArm], judged: Judged, ball: Perturbation, distance: Perturbation
) -> Section:
    tables: list[Table] = []
    for words, threat in (("white-box", Threat.TARGET_ITSELF), ("black-box", Threat.PUBLIC_BASE)):
        rows: list[tuple[TableCell, ...]] = []
        for arm in arms:
            near, far = judged[arm.name, ball], judged[arm.name, distance]
            figures = [robust_accuracy(near, worst_over([threat], name)) for name in ("fgsm", "bim")]
            figures.append(robust_accuracy(far, worst_over([threat])))
            figures += [robust_accuracy(near, worst_over([threat], name)) for name in ("mi-fgsm", "pgd", "autoattack")]
            rows.append((arm.name, cell(clean_accuracy(near)), *(cell(figure) for figure in figures)))
        tables.append(
            Table(
                title=f"Table 2, {words}, {ball}",
                caption=f"Share of all images that are still classified correctly. C&W: within {distance}.",
                columns=("training", "no attack", "FGSM", "BIM", "C&W", "MIM", "PGD", "AutoAttack"), rows=tuple(rows),
            )
        )  # fmt: skip
    return Section(
        title=f"Ways to train, {ball}",
        prose=(
            f"White-box attacks are made on the model itself, black-box ones on {spec.surrogate.name}. C&W has no "
            "budget of its own: what it finds beyond the distance counts as not found.",
        ),
        blocks=tuple(tables),
    )


def _adaptive_section(arms: Sequence[ConformityArm], judged: Judged, ball: Perturbation) -> Section:
    rows: list[tuple[TableCell, ...]] = []
    for arm in arms:
        if not isinstance(arm.objective, PrototypeConformityPart):
            continue
        found = judged[arm.name, ball]
        pairs = [(_itself(f"adaptive-{method}"), _itself(method)) for method in ADAPTIVE]
        figures = [cell(robust_accuracy(found, pick)) for pair in pairs for pick in pair]
        last = (cell(robust_accuracy(found, _itself("autoattack"))), cell(robust_accuracy(found, _itself(None))))
        rows.append((arm.name, cell(clean_accuracy(found)), *figures, *last))
    heads = [head for method in ("FGSM", "BIM", "MIM", "PGD") for head in (f"{method}, joint loss", f"{method}")]
    return Section(
        title="Adaptive attacks",
        prose=("The attacks climb the joint loss, with the prototypes that were learned; beside each the plain one.",),
        blocks=(
            Table(
                title=f"Table 3, {ball}", caption="Accuracy, white-box.",
                columns=("training", "no attack", *heads, "AutoAttack", "worst of all"), rows=tuple(rows),
            ),
        ),
    )  # fmt: skip


def _transfer_section(
    bench: Workbench, spec: ConformitySpec, arms: Sequence[ConformityArm], judged: Judged, surrogate: Source,
    ball: Perturbation,
) -> Section:  # fmt: skip
    on = bench.images()
    own = bench.judge(SURROGATE, surrogate.model, _all_attacked(bench, spec, arms, surrogate, ball), on)
    targets = {SURROGATE: [own]} | {arm.name: judged[arm.name, ball] for arm in arms}
    sources = {SURROGATE: SURROGATE} | {arm.name: bench.members(arm)[0].id for arm in arms}
    tables = tuple(
        Table(
            title=f"Table 6, {title}, {ball}",
            caption="Accuracy of the target (column) on what was made on the first model of the source (row).",
            columns=("source", *targets),
            rows=tuple(
                (name, *(cell(robust_accuracy(found, _from(source, attack))) for found in targets.values()))
                for name, source in sources.items()
            ),
        )
        for title, attack in (("PGD", "pgd"), ("AutoAttack", "autoattack"))
    )
    words = (
        "Where the source is the target, its first model is attacked white-box, and others of the arm meet the same "
        "images; AutoAttack's images hardly cross the boundary."
    )
    return Section(title="Who fools whom", prose=(words,), blocks=tables)


def _all_attacked(
    bench: Workbench, spec: ConformitySpec, arms: Sequence[ConformityArm], surrogate: Source, ball: Perturbation
) -> list[AttackedSource]:
    on, suite = bench.images(), _suite(spec, ball)
    made = [bench.attack(surrogate, suite, ball, on)]
    for arm in arms:
        first = bench.members(arm)[0]
        made.append(bench.attack(_source(first), (*suite, *adaptive_attacks(bench, first)), ball, on))
    return made


def _depths_section(arms: Sequence[ConformityArm], judged: Judged, ball: Perturbation) -> Section:
    names = ("fgsm", "pgd", "autoattack")
    rows: list[tuple[TableCell, ...]] = []
    for arm in arms:
        found = judged[arm.name, ball]
        figures = (cell(robust_accuracy(found, _itself(name))) for name in names)
        rows.append((arm.name, cell(clean_accuracy(found)), *figures))
    verdicts = [_order_sentence(arms, judged, ball, name) for name in ("pgd", "autoattack")]
    return Section(
        title="The loss at one depth after the other",
        prose=tuple(verdicts),
        blocks=(
            Table(
                title=f"Table 7, {ball}", caption="Accuracy, white-box; the paper's weakest first, its strongest last.",
                columns=("depths", "no attack", "FGSM", "PGD", "AutoAttack"), rows=tuple(rows),
            ),
        ),
    )  # fmt: skip


def _epsilon_section(arms: Sequence[ConformityArm], judged: Judged, balls: Sequence[Perturbation]) -> Section:
    series = [
        Series(
            name=f"{arm.name}, {title}",
            points=tuple(
                CurvePoint(
                    x=255 * ball.size, label=str(ball).removeprefix("L∞ "),
                    figure=cell(robust_accuracy(judged[arm.name, ball], _itself(attack))),
                )
                for ball in sorted(balls, key=lambda ball: ball.size)
            ),
        )
        for arm in arms[:4]
        for title, attack in (("PGD", "pgd"), ("AutoAttack", "autoattack"))
    ]  # fmt: skip
    return Section(
        title="Against ε",
        prose=("The paper's Figure 4, for the first four ways to train.",),
        blocks=(
            Curve(
                title="Accuracy against ε", caption="White-box, L∞, in 255ths.", x_label="ε · 255",
                y_label="accuracy under attack", x_scale="linear", series=tuple(series),
            ),
        ),
    )  # fmt: skip


def _right(judged: Judged, arm: ConformityArm, ball: Perturbation, attack: str) -> np.ndarray | NotMeasured:
    """Which images the first model of an arm gets right under a white-box attack."""
    first = judged[arm.name, ball][0]
    wrong = _itself(attack)(first)
    return wrong if isinstance(wrong, NotMeasured) else first.correct & ~wrong


def _order_sentence(arms: Sequence[ConformityArm], judged: Judged, ball: Perturbation, attack: str) -> str:
    title = {"pgd": "PGD", "autoattack": "AutoAttack"}[attack]
    right: list[np.ndarray] = []
    for arm in arms:
        one = _right(judged, arm, ball, attack)
        if isinstance(one, NotMeasured):
            return f"Under {title} the order of Table 7 is not measured: {one.reason}."
        right.append(one)
    if len({len(one) for one in right}) > 1 or len(right) < 2:
        return f"Under {title} the order of Table 7 is not measured: it takes two arms or more, on the same images."
    verdict = order_verdict(right)
    ends = [f"{one.mean():.3f} of {arm.name}" for one, arm in ((right[0], arms[0]), (right[-1], arms[-1]))]
    return (
        f"Under {title} at {ball} the order of Table 7 {verdict}: accuracy {ends[0]} and {ends[1]}, on "
        f"{len(right[0])} images (first model of each)."
    )


def _conclusion(
    trained: Sequence[ConformityArm], by_depth: Sequence[ConformityArm], judged: Judged, ball: Perturbation
) -> list[str]:
    sentences: list[str] = []
    for arm in trained[1:]:
        parts: list[str] = []
        for title, attack in (("PGD", "pgd"), ("AutoAttack", "autoattack")):
            first, second = (_right(judged, one, ball, attack) for one in (trained[0], arm))
            if isinstance(first, NotMeasured) or isinstance(second, NotMeasured) or len(first) != len(second):
                parts.append(f"under {title} not measured")
                continue
            by, low, high = gain(first, second)
            said = "more than" if low > 0 else "less than" if high < 0 else "not to be told from"
            parts.append(
                f"under {title} {said} {trained[0].name}: {second.mean():.3f} against {first.mean():.3f} "
                f"(difference {by:+.3f} [{low:+.3f}, {high:+.3f}])"
            )
        sentences.append(f"{arm.name} keeps, white-box at {ball}, {'; '.join(parts)}.")
    if len(by_depth) > 1:
        sentences += [_order_sentence(by_depth, judged, ball, attack) for attack in ("pgd", "autoattack")]
    return sentences or ["Only one way to train was studied; see the tables."]


def _budgets(spec: ConformitySpec, ball: Perturbation, distance: Perturbation) -> list[BudgetLine]:
    images = ", ".join(sorted({str(arm.images or spec.images) for arm in spec.arms}))
    return [
        BudgetLine(part=attack.name, images=images, steps=attack.description, restarts="1", queries="none")
        for attack in (*_suite(spec, ball), *_suite(spec, distance))
    ]
