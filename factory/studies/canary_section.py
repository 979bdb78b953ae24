"""The section that every study ends with: signs of gradient masking, and slices through loss surfaces."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from device_tests.attacks.pgd import PGD
from device_tests.attacks.square import Square
from device_tests.canaries import Canaries, canary_cost, loss_slice, run_canaries
from device_tests.crafting import content_key, craft
from device_tests.perturbation import Norm, Perturbation
from device_tests.report.study_document import Section, Surface, SurfacePanel, Table, TableCell
from device_tests.self_check import StrongBudget
from device_tests.threats import Source, Threat
from exporters.measured import NotMeasured
from factory.record import kept
from factory.studies.spec import ArmSettings
from factory.studies.workbench import Workbench, right
from factory.studies.zoo import Member

EPSILON = 8 / 255
IMAGES, QUERIES, POINTS = 48, 200, 15


def canary_section(bench: Workbench, arms: Sequence[ArmSettings], black_box: Source | None = None) -> Section:
    """Run the canaries on the first model of each arm; its black box is ``black_box``, or the arm's second model."""
    first = [bench.members(arm)[0] for arm in arms]
    rows: list[tuple[TableCell, ...]] = []
    for index, member in enumerate(first):
        other = black_box or _second(bench.members(arms[index])[1])
        found = _canaries(bench, member, other)
        for canary in found.results:
            if isinstance(canary.verdict, NotMeasured):
                verdict: TableCell = canary.verdict
            else:
                verdict = "passed" if canary.verdict else "FAILED"
            rows.append((member.id, canary.name, verdict, canary.sentence))
    failed = sorted({str(row[0]) for row in rows if row[2] == "FAILED"})
    unseen = sorted({str(row[0]) for row in rows if isinstance(row[2], NotMeasured)})
    if failed:
        said = f"Failed on {', '.join(failed)}: every figure of these models looks better than it is."
    elif unseen:
        said = f"None failed, but on {', '.join(unseen)} not every sign of gradient masking could be looked for."
    else:
        said = "None failed: nothing here says that gradients mislead the attacks."
    table = Table(
        title="Gradient-masking canaries",
        caption=f"The first model of each arm, {IMAGES} images, {Perturbation(Norm.LINF, EPSILON)}.",
        columns=("model", "canary", "verdict", "what was seen"), rows=tuple(rows),
    )  # fmt: skip
    return Section(title="Canaries", prose=(said,), blocks=(table, _surfaces(bench, first)))


def _second(member: Member) -> Source:
    return Source(member.id, Threat.SIBLING_DEVICE, member.baked, "another model of the arm")


def _canaries(bench: Workbench, member: Member, other: Source) -> Canaries:
    on = bench.images(at_most=IMAGES)
    square, strong = Square(queries=QUERIES), StrongBudget(steps=20, targets=2, images=IMAGES)
    key = content_key(
        member.baked, on.images, on.labels, "canaries", EPSILON, square.description, strong, bench.spec.seed,
        content_key(other.model, on.images, on.labels),
    )  # fmt: skip
    path = bench.shared / "canaries" / f"{member.id}.json"

    def run() -> Canaries:
        work = 2 * len(on.images) * canary_cost(strong, square)
        with bench.progress.stage(f"canaries {member.id} (at most)", total=work, unit="gradients") as stage:
            ball = Perturbation(Norm.LINF, EPSILON)
            made = craft(other, [PGD(steps=10)], on.images, on.labels, perturbation=ball, seed=bench.spec.seed)
            return run_canaries(
                member.baked, on.images, on.labels, epsilon=EPSILON, seed=bench.spec.seed, black_box=made.images,
                square=square, source=member.id, strong=strong, progress=stage.advance,
            )  # fmt: skip

    return kept(path, key, compute=run, to_json=Canaries.to_json, from_json=Canaries.from_json)


def _surfaces(bench: Workbench, members: Sequence[Member]) -> Surface:
    on = bench.images(at_most=IMAGES)
    by_all = np.all([right(member.baked, on.images, on.labels) for member in members], axis=0)
    chosen = int(np.argmax(by_all))
    panels: list[SurfacePanel] = []
    for member in members:
        grid = loss_slice(
            member.baked, on.images[chosen], int(on.labels[chosen]), epsilon=EPSILON, points=POINTS,
            seed=bench.spec.seed,
        )  # fmt: skip
        values = tuple(tuple(float(value) for value in row) for row in grid)
        panels.append(SurfacePanel(name=member.id, values=values))
    return Surface(
        title="Loss around one image",
        caption="Upwards: the sign of the gradient; sideways: a random sign. A masked model shows a plain, stairs or "
        "noise.",
        x_label="random direction, in 255ths", y_label="gradient's sign, in 255ths",
        value_label="cross-entropy of one test image",
        x_range=(-8.0, 8.0), y_range=(-8.0, 8.0), panels=tuple(panels),
    )  # fmt: skip
