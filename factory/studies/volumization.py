"""The volumization paper's Table 2 and Figure 3, with what they leave out beside it (BMVC 2023, section 5).

The paper averages the five attacked classifications of every image. That is a rule of the evaluation which no device
follows, and it flatters every defence, so each averaged figure stands beside the plain worst of the five. Patches have
a grey patch of the same size and places beside them, and every network is attacked as a whole, too: by its own
gradient, by BPDA where something stands in front of it, and by its order where it puts patches in order.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from torch import nn

from device_tests.attacks.autoattack import AutoAttack
from device_tests.attacks.patch import PatchExamples, UniversalPatch
from device_tests.attacks.pgd import PGD
from device_tests.attacks.pixels import SparseSearch
from device_tests.attacks.regions import Region
from device_tests.defences.jpeg import JpegCompression
from device_tests.defences.local_gradient_smoothing import LocalGradientSmoothing
from device_tests.defences.total_variation import TotalVariation
from device_tests.fleet_statistics import arm_difference
from device_tests.perturbation import Norm, Perturbation
from device_tests.region_judgement import RegionJudgement, accuracy_of, robustness
from device_tests.report.document import BaseReport
from device_tests.report.study_document import (
    BudgetLine,
    Cell,
    Curve,
    CurvePoint,
    DifferenceFigure,
    Section,
    Series,
    StudyDocument,
    Table,
    TableCell,
)
from exporters.measured import NotMeasured
from factory.base import contract_for, weights_digest
from factory.data import Splits, load_splits
from factory.progress import Progress
from factory.studies.spec import VolumizationSpec, VolumizedArmSettings
from factory.studies.study_report import cell, difference, document_of, written
from factory.studies.volumized_judgement import (
    GREY,
    PATCH,
    Judged,
    NetworkFindings,
    TrainArm,
    TrainedArm,
    defended,
    judge_network,
)
from factory.studies.workbench import FleetMeasured, rate_over_models, studies_folder

DEFENCES: dict[str, Callable[[], nn.Module]] = {
    "lgs": LocalGradientSmoothing, "jpeg": JpegCompression, "total-variation": TotalVariation,
}  # fmt: skip
"""Defences of the input that stand before a network which was trained without them, with their own defaults."""

AVERAGED, WORST = "averaged", "worst of five"
_MOST_SERIES = 8
_CAVEAT = (
    "Every image is attacked in five regions (four quadrants and the centre; what does not fit into a quadrant goes to "
    "the centre). Averaged is the paper's protocol: the class of the mean softmax over the five attacked images. No "
    "device sees one image five times with the attack elsewhere each time, so that four answers outvote the one that "
    "was broken: this belongs to the evaluation and flatters every defence. The worst of five counts an image as "
    "right only if it is right in all five."
)


class VolumizationBench:
    """An open studies folder with the data of one spec."""

    def __init__(self, folder: Path, spec: VolumizationSpec, progress: Progress) -> None:
        self.spec, self.progress = spec, progress
        contract = contract_for(spec.channels, spec.image_size)
        self.splits: Splits = load_splits(spec.data, contract, folder / "data", progress)
        identity = "\0".join(["volumization", self.splits.digest, str(spec.seed)])
        self.shared = folder / "shared" / hashlib.sha256(identity.encode()).hexdigest()[:12]

    def judged(self) -> Judged:
        """The first test images, and the first training images for the universal patches."""
        test = self.splits.test.take(self.spec.images)
        train = self.splits.train.take(self.spec.patch_images)
        examples = PatchExamples(train.images.numpy(), train.labels.numpy())
        return Judged(test.images.numpy(), test.labels.numpy(), examples, self.shared)


@contextlib.contextmanager
def open_volumization(folder: Path, spec: VolumizationSpec, progress: Progress) -> Iterator[VolumizationBench]:
    """Hold the studies' folder for one run; raises BusyError if another run has it."""
    with studies_folder(folder):
        yield VolumizationBench(folder, spec, progress)


Findings = dict[str, list[NetworkFindings]]
"""What became of the networks of each arm."""


def volumization(bench: VolumizationBench, train_arm: TrainArm, command: str) -> StudyDocument:
    """Train every arm by ``train_arm``, attack it, judge it, and say what came out."""
    spec, on = bench.spec, bench.judged()
    found: Findings = {}
    bases: list[BaseReport] = []
    for arm in spec.arms:
        found[arm.name] = []
        for index in range(1, arm.models + 1):
            trained = trained_arm(arm, index, train_arm)
            name = f"{arm.name}-{index}"
            found[arm.name].append(judge_network(name, trained, spec, on, bench.progress))
            if index == 1:
                bases.append(_report(name, trained, found[arm.name][0]))
    sections = [
        Section(
            title="N pixels",
            prose=(_CAVEAT, *_places_in_words(spec)),
            blocks=(_first_table(spec, found), *_pixel_curves(spec, found), _pixel_table(spec, found)),
        ),
        Section(
            title="Patches",
            prose=(
                "One universal patch per network and size, fitted on training images over random places, through "
                "whatever defence the network has, and pasted in the five regions of test images.",
            ),
            blocks=(*_patch_curves(spec, found), _patch_table(spec, found)),
        ),
        Section(
            title="The whole image",
            prose=(
                f"Attacks that the paper does not run, {Perturbation.parse(spec.perturbation)}: PGD with the network's "
                "own gradient, PGD through an identity in place of the defence (BPDA), AutoAttack, gradients from "
                "several orders of the patches (order flip), and a search by queries for small changes that move "
                "patches (order search). A fixed order is the control of the last two.",
            ),
            blocks=(_whole_table(spec, found),),
        ),
    ]
    highlights = {
        f"{arm.name}: β, {Perturbation(Norm.PATCH, spec.patches[-1])}, {answer}": _success(
            _patches(found[arm.name], PATCH, spec.patches[-1]), answer
        )
        for arm in spec.arms
        for answer in (AVERAGED, WORST)
    }
    return document_of(
        spec, spec.seed, bench.splits, bases, bench.progress, name="volumization",
        title="Volumized networks under localized attacks", conclusion=_conclusion(spec, found),
        highlights=highlights, budgets=_budgets(bench), sections=sections, command=command,
    )  # fmt: skip


def trained_arm(arm: VolumizedArmSettings, index: int, train_arm: TrainArm) -> TrainedArm:
    """The network of an arm; a defence of the input is put before the undefended network of the same seed."""
    if arm.defence not in DEFENCES:
        return train_arm(arm, index)
    return defended(train_arm(arm.model_copy(update={"defence": "none"}), index).model, DEFENCES[arm.defence]())


# Rates over the networks of an arm. A network's answers are bool N, an arm's D×N.

Rows = list[RegionJudgement] | NotMeasured


def _rows(judgements: Sequence[RegionJudgement | NotMeasured]) -> Rows:
    missing = dict.fromkeys(one.reason for one in judgements if isinstance(one, NotMeasured))
    if missing:
        return NotMeasured("; ".join(missing))
    return [one for one in judgements if isinstance(one, RegionJudgement)]


def _pixels(networks: Sequence[NetworkFindings], places: str, count: int) -> Rows:
    return _rows([network.pixels[places, count] for network in networks])


def _patches(networks: Sequence[NetworkFindings], kind: str, share: float) -> Rows:
    return _rows([network.patches[kind, share] for network in networks])


def _rate(hits: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> FleetMeasured:
    return rate_over_models(np.array(hits), np.array(masks))


def _clean(networks: Sequence[NetworkFindings]) -> FleetMeasured:
    right = [network.clean for network in networks]
    return _rate(right, [np.ones_like(row) for row in right])


def _accuracy(rows: Rows, answer: str) -> FleetMeasured:
    if isinstance(rows, NotMeasured):
        return rows
    right = [one.answers[answer] for one in rows]
    return _rate(right, [np.ones_like(row) for row in right])


def _success(rows: Rows, answer: str) -> FleetMeasured:
    """β: of the images that are right when clean."""
    if isinstance(rows, NotMeasured):
        return rows
    return _rate([one.answers[answer] for one in rows], [one.clean for one in rows])


def _robustness(rows: Rows, answer: str) -> DifferenceFigure | NotMeasured:
    """δ: accuracy under attack minus clean accuracy."""
    if isinstance(rows, NotMeasured):
        return rows
    if len(rows) == 1:
        pairs = robustness(rows[0].clean, rows[0].answers[answer])
        low, high = pairs.interval
        return DifferenceFigure(
            difference=pairs.difference, low=low, high=high, devices=(1, 1), images=pairs.n,
            method="Newcombe's interval of paired shares",
        )  # fmt: skip
    clean = np.array([one.clean for one in rows])
    return difference(arm_difference(np.array([one.answers[answer] for one in rows]), clean, np.ones_like(clean)))


def _measures(rows: Rows) -> tuple[TableCell, ...]:
    """Accuracy, β and δ, each averaged and in the worst of five."""
    return (
        *(cell(_accuracy(rows, answer)) for answer in (AVERAGED, WORST)),
        *(cell(_success(rows, answer)) for answer in (AVERAGED, WORST)),
        *(_robustness(rows, answer) for answer in (AVERAGED, WORST)),
    )


_MEASURES = (
    "accuracy, averaged", "accuracy, worst of five", "β, averaged", "β, worst of five", "δ, averaged",
    "δ, worst of five",
)  # fmt: skip


def _first_table(spec: VolumizationSpec, found: Findings) -> Table:
    count = spec.pixels[0]
    return Table(
        title=f"Accuracy under {_counted(count)}",
        caption="The top of the paper's Table 2. All images are attacked; clean mistakes count as wrong.",
        columns=("arm", "places", "clean", "attacked, averaged", "attacked, worst of five"),
        rows=tuple(
            (
                arm.name, places, cell(_clean(found[arm.name])),
                *(cell(_accuracy(_pixels(found[arm.name], places, count), answer)) for answer in (AVERAGED, WORST)),
            )
            for arm in spec.arms for places in spec.places
        ),
    )  # fmt: skip


def _pixel_table(spec: VolumizationSpec, found: Findings) -> Table:
    return Table(
        title="N pixels in numbers",
        caption="δ: accuracy under attack minus clean accuracy. β: of the images right when clean, those that stay so.",
        columns=("arm", "places", "N", *_MEASURES),
        rows=tuple(
            (arm.name, places, _counted(count), *_measures(_pixels(found[arm.name], places, count)))
            for arm in spec.arms for places in spec.places for count in spec.pixels
        ),
    )  # fmt: skip


def _patch_table(spec: VolumizationSpec, found: Findings) -> Table:
    return Table(
        title="Patches in numbers",
        caption="The bottom of the paper's Table 2 is β. The grey patch is of the same size at the same places.",
        columns=("arm", "patch", "size", *_MEASURES),
        rows=tuple(
            (arm.name, kind, str(Perturbation(Norm.PATCH, share)), *_measures(_patches(found[arm.name], kind, share)))
            for arm in spec.arms for share in spec.patches for kind in (PATCH, GREY)
        ),
    )  # fmt: skip


def _pixel_curves(spec: VolumizationSpec, found: Findings) -> list[Curve]:
    places = spec.places[0]

    def rows(arm: str, count: float) -> Rows:
        return _pixels(found[arm], places, int(count))

    return _curves(spec, rows, f"N pixels at {places} places", "pixels", spec.pixels, 1.0)


def _patch_curves(spec: VolumizationSpec, found: Findings) -> list[Curve]:
    def rows(arm: str, share: float) -> Rows:
        return _patches(found[arm], PATCH, share)

    return _curves(spec, rows, "a universal patch", "% of the area", spec.patches, 100.0)


def _curves(
    spec: VolumizationSpec, rows: Callable[[str, float], Rows], what: str, x_label: str, sizes: Sequence[float],
    scale: float,
) -> list[Curve]:  # fmt: skip
    """Accuracy and β against the size of the attack, each averaged and in the worst of five (Figure 3, a to d)."""
    measures: list[tuple[str, Callable[[Rows, str], FleetMeasured], str]] = [
        ("Accuracy", _accuracy, "Share of all images that are right under attack; from the clean accuracy, δ goes down "
         "to here."),
        ("Defence success rate β", _success, "Share of the images right when clean that stay right."),
    ]  # fmt: skip
    return [
        Curve(
            title=f"{title} under {what}, {answer}", caption=caption, x_label=x_label, y_label=title, x_scale="linear",
            series=tuple(
                Series(
                    name=arm.name,
                    points=tuple(_point(size * scale, measure(rows(arm.name, size), answer)) for size in sizes),
                )
                for arm in spec.arms[:_MOST_SERIES]
            ),
        )
        for title, measure, caption in measures
        for answer in (AVERAGED, WORST)
    ]  # fmt: skip


def _point(x: float, value: FleetMeasured) -> CurvePoint:
    return CurvePoint(x=x, figure=cell(value))


_WHOLE = ("PGD", "BPDA-PGD", "AutoAttack", "order flip", "order search")


def _whole_table(spec: VolumizationSpec, found: Findings) -> Table:
    rows: list[tuple[TableCell, ...]] = []
    for arm in spec.arms:
        networks = found[arm.name]
        cells: list[Cell] = [cell(_whole_accuracy(networks, attack)) for attack in _WHOLE]
        rows.append((arm.name, cell(_clean(networks)), *cells, _moved(networks)))
    return Table(
        title="Accuracy under attacks of the whole image",
        caption="All images are attacked. Moved: patches that the order search put elsewhere, mean over the images.",
        columns=("arm", "clean", *_WHOLE, "moved by the order search"), rows=tuple(rows),
    )  # fmt: skip


def _whole_accuracy(networks: Sequence[NetworkFindings], attack: str) -> FleetMeasured:
    right: list[np.ndarray] = []
    for network in networks:
        row = network.whole[attack]
        if isinstance(row, NotMeasured):
            return row
        right.append(row)
    return _rate(right, [np.ones_like(row) for row in right])


def _moved(networks: Sequence[NetworkFindings]) -> TableCell:
    shares: list[float] = []
    for network in networks:
        if isinstance(network.moved, NotMeasured):
            return network.moved
        shares.append(network.moved)
    return f"{100 * float(np.mean(shares)):.1f} % of the patches"


def _conclusion(spec: VolumizationSpec, found: Findings) -> list[str]:
    said: list[str] = []
    most, largest = spec.pixels[-1], spec.patches[-1]
    for arm in spec.arms:
        networks = found[arm.name]
        pixels, patch = _pixels(networks, spec.places[0], most), _patches(networks, PATCH, largest)
        grey = _patches(networks, GREY, largest)
        said.append(
            f"{arm.name}: clean accuracy {written(_clean(networks))}; {_counted(most)} at {spec.places[0]} places "
            f"leave β = {written(_success(pixels, AVERAGED))} averaged and {written(_success(pixels, WORST))} in the "
            f"worst of five; a {Perturbation(Norm.PATCH, largest)} {written(_success(patch, AVERAGED))} and "
            f"{written(_success(patch, WORST))}, a grey one {written(_success(grey, WORST))} in the worst of five."
        )
    said.append(
        "Averaging five attacked images is a rule of the paper's evaluation, not of any device; compare defences by "
        "the worst of five."
    )
    return said


def _places_in_words(spec: VolumizationSpec) -> tuple[str, ...]:
    words = {
        "drawn": "Drawn: the pixels of a region are chosen at random and only their colours are searched, as in the "
        "paper.",
        "searched": "Searched: places and colours are searched together inside the region, a stronger attack.",
    }
    end = (
        "An attack ends where its own image is wrong and so barely crosses the boundary, which the average forgives."
        if spec.stops
        else "Every attack spends all of its queries on lowering the margin, which leaves the average less to forgive."
    )
    return (" ".join([*(words[places] for places in spec.places), end]),)


def _counted(count: int) -> str:
    return f"{count} pixel{'' if count == 1 else 's'}"


def _report(name: str, trained: TrainedArm, findings: NetworkFindings) -> BaseReport:
    return BaseReport(
        name=name, digest=weights_digest(trained.model, str(trained.model)),
        parameters=sum(parameter.numel() for parameter in trained.model.parameters()),
        clean=accuracy_of(findings.clean),
    )  # fmt: skip


def _budgets(bench: VolumizationBench) -> list[BudgetLine]:
    spec = bench.spec
    images = f"{spec.images} in five regions"
    pixels = [
        SparseSearch(spec.queries, Region.CENTRE, "drawn" if places == "drawn" else "searched", spec.stops)
        for places in spec.places
    ]
    patch = UniversalPatch(bench.judged().examples, steps=spec.patch_steps)
    return [
        *(
            BudgetLine(
                part=f"N pixels, places {places}", images=images, steps=attack.description, restarts="1",
                queries=f"{spec.queries} per image and region",
            )
            for places, attack in zip(spec.places, pixels, strict=True)
        ),
        BudgetLine(part="universal patch", images=images, steps=patch.description, restarts="3", queries="none"),
        BudgetLine(
            part="PGD and BPDA-PGD", images=str(spec.images), steps=PGD(spec.pgd_steps).description, restarts="1",
            queries="none",
        ),
        BudgetLine(
            part="AutoAttack", images=str(spec.images),
            steps=AutoAttack(spec.autoattack_steps, spec.autoattack_targets, spec.autoattack_queries).description,
            restarts="1", queries="none",
        ),
        BudgetLine(
            part="order search", images=str(spec.images), steps="random search", restarts="1",
            queries=f"{spec.order_queries} per image",
        ),
    ]  # fmt: skip
