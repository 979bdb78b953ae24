"""How often the answers of one device give an adversarial image that works on another: HopSkipJump, and replication.

The measure of the papers on different copies for different buyers: an attacker asks one copy for labels until he has an
image of the smallest distance that fools it, and the image is tried on other copies. Only images that both copies get
right when clean and that fool the first one count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from device_tests.attacks.hop_skip_jump import OUTWARD, HopSkipJump
from device_tests.crafting import craft
from device_tests.evidence import Measured
from device_tests.fleet_statistics import FleetDifference, group_difference
from device_tests.images import LEVELS, from_8bit
from device_tests.perturbation import Perturbation
from device_tests.report.study_document import BudgetLine, HeatMap, HeatRow, Section, StudyDocument, Table, TableCell
from device_tests.threats import Source, Threat
from exporters.measured import NotMeasured
from factory.attractors import LowPass
from factory.device_model import block_size
from factory.studies.spec import ArmSettings, ReplicationSpec
from factory.studies.study_report import cell, difference, in_words, study_document, written
from factory.studies.workbench import FleetMeasured, Workbench, one_model, rate_over_models, right
from factory.studies.zoo import Member
from factory.verification import Attacked
from keys.errors import CheckFailed

INDEPENDENT, ATTRACTORS = 0.065, 0.005
"""Replication among independently trained copies, and among copies with attractors, as published (GTSRB, 2021)."""


@dataclass(frozen=True, eq=False)
class Line:
    """One arm. ``fooled``, ``judged``: bool D×N, other device × image; ``on_base``: the same of the public base alone.

    ``found``: share of the images that are right at home for which an adversarial one was found there; ``distance``:
    median L2 of those on inputs in [0, 1], in words.
    """

    arm: ArmSettings
    fooled: np.ndarray
    judged: np.ndarray
    found: Measured
    on_base: Measured
    distance: str

    @property
    def rate(self) -> FleetMeasured:
        """Share of the adversarial images that fool another device too, over devices and images."""
        return rate_over_models(self.fooled, self.judged)


def replication(bench: Workbench, spec: ReplicationSpec, command: str) -> StudyDocument:
    """Ask the first models of every arm, and try what comes of it on its other models."""
    lines = [_line(bench, spec, arm) for arm in spec.arms]
    table = Table(
        title="Replication",
        caption="Found: of the images that the asked device gets right, those for which a fooling one was found. "
        "Replicates: of the found ones, those that fool another device of the arm which gets the clean image right.",
        columns=("arm", "found", "median distance", "replicates on another device", "on the public base"),
        rows=tuple(
            (line.arm.name, line.found, line.distance, cell(line.rate), line.on_base) for line in lines
        ),
    )  # fmt: skip
    controls = [
        (keyed.arm.name, control.arm.name, _gained(control, keyed))
        for keyed in lines
        for control in lines
        if keyed.arm.keyed and not control.arm.keyed and keyed.arm.adapts == control.arm.adapts
    ]
    rows: list[tuple[TableCell, ...]] = [(name, other, difference(gained)) for name, other, gained in controls]
    against = Table(
        title="Against the controls", caption="Positive: images of keyed devices replicate less.",
        columns=("keyed arm", "control", "control minus keyed"), rows=tuple(rows),
    )  # fmt: skip
    said = (
        f"Published, on GTSRB: {INDEPENDENT:.3f} among independently trained copies, {ATTRACTORS:.3f} with attractors. "
        f"The images are shared out among the first {spec.sources} models of an arm, which are asked; the others are "
        "targets."
    )
    if spec.low_frequencies:
        said += " Whoever asks knows of attractors, and takes the frequencies that they are made of out of every image."
    sections = [
        Section(title="HopSkipJump from one device to another", prose=(said,), blocks=(_heat(lines), table, against))
    ]
    return study_document(
        bench, name="replication", title="What one device's answers say about another",
        conclusion=[f"{line.arm.name}: {written(line.rate)} replicate." for line in lines]
        + [f"{other} minus {name}: {in_words(gained)}." for name, other, gained in controls],
        highlights={f"{line.arm.name}: replicates on another device": line.rate for line in lines},
        budgets=[
            BudgetLine(
                part="hop-skip-jump", images=str(spec.images), steps=_attack(spec).description, restarts="1",
                queries=str(spec.queries),
            )
        ],
        sections=sections, command=command,
    )  # fmt: skip


def _heat(lines: Sequence[Line]) -> HeatMap:
    return HeatMap(
        title="Replication rate", caption="Made on one model of the arm by its labels, tried on another.",
        row_label="Tried on", column_label="Arm",
        rows=(
            HeatRow(name="another device", threat=Threat.QUERIES.code, note="a model of the same arm"),
            HeatRow(name="public base", threat=Threat.QUERIES.code, note="what every arm began as"),
        ),
        columns=tuple(line.arm.name for line in lines),
        cells=(tuple(cell(line.rate) for line in lines), tuple(cell(line.on_base) for line in lines)),
    )  # fmt: skip


def _attack(spec: ReplicationSpec) -> HopSkipJump:
    farthest = Perturbation.parse(spec.perturbation)
    return HopSkipJump(norm=farthest.norm, queries=spec.queries, smallest=True)


def _line(bench: Workbench, spec: ReplicationSpec, arm: ArmSettings) -> Line:
    members, on = bench.members(arm), bench.images(arm)
    truth = on.labels.astype(np.int64)
    targets = members[spec.sources :]
    adversarial, at_home, found = on.images.copy(), np.zeros(len(truth), bool), np.zeros(len(truth), bool)
    shares = np.array_split(np.arange(len(truth)), spec.sources)
    for member, share in zip(members[: spec.sources], shares, strict=True):
        adversarial[share] = _ask(bench, spec, arm, member, Attacked(on.images[share], on.labels[share], on.cache))
        at_home[share] = right(member.baked, on.images[share], truth[share])
        found[share] = at_home[share] & ~right(member.baked, adversarial[share], truth[share])
    judged = np.array([right(target.baked, on.images, truth) & found for target in targets])
    fooled = np.array([~right(target.baked, adversarial, truth) for target in targets])
    base = bench.base_model
    on_base = one_model(~right(base, adversarial, truth), right(base, on.images, truth) & found)
    moved = (adversarial[found].astype(np.float64) - on.images[found]).reshape(int(found.sum()), -1) / LEVELS
    distance = f"L2 {np.median(np.linalg.norm(moved, axis=1)):.2f}" if len(moved) else "none"
    return Line(arm, fooled, judged, one_model(found, at_home), on_base, distance)


def _ask(bench: Workbench, spec: ReplicationSpec, arm: ArmSettings, member: Member, on: Attacked) -> np.ndarray:
    """Adversarial images uint8 that the model's answers led to; where none was found, clean ones."""
    attack, farthest = _attack(spec), Perturbation.parse(spec.perturbation)
    low: LowPass | None = None
    if spec.low_frequencies:
        low = LowPass(member.baked, on.images.shape[1], block_size(bench.base, spec.arm(arm).recipe))
    asked = member.baked if low is None else low.eval()
    source = Source(member.id, Threat.QUERIES, asked, f"the answers of {member.id}", differentiable=False)
    with bench.progress.stage(f"ask {member.id}", total=len(on.images) * spec.queries, unit="queries") as stage:
        made = craft(
            source, [attack], on.images, on.labels, perturbation=farthest, seed=spec.seed,
            cache=on.cache / f"asked-{member.id}", progress=stage.advance,
        )  # fmt: skip
    if made.failures:
        raise CheckFailed(made.failures[attack.name])
    found = made.images[attack.name]
    if low is None:
        return found
    clean = from_8bit(on.images)
    change = from_8bit(found) - clean
    shown, still_right = on.images.copy(), np.ones(len(found), bool)
    # Rounding once more makes some images right again; as the search itself does, these are moved outward.
    for scale in OUTWARD:
        moved = torch.from_numpy((clean + np.float32(scale) * change).clip(0, 1))
        rounded = np.round(low.filtered(moved).numpy() * LEVELS).astype(np.uint8)
        shown[still_right] = rounded[still_right]
        still_right = right(member.baked, shown, on.labels)
    return shown


def _gained(control: Line, keyed: Line) -> FleetDifference | NotMeasured:
    if min(len(control.judged), len(keyed.judged)) < 2:
        return NotMeasured("a difference takes two targets of each arm, or more")
    images = min(control.judged.shape[1], keyed.judged.shape[1])
    return group_difference(*(side[:, :images] for line in (control, keyed) for side in (line.fooled, line.judged)))
