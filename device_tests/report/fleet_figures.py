"""The fleet report's figures as files, drawn like those of a study from what the report holds anyway."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from device_tests.report.charts import Pictures
from device_tests.report.document import ReportDocument
from device_tests.report.figure_files import Galleries
from device_tests.report.study_document import (
    BarGroup,
    Bars,
    Chart,
    Gallery,
    GalleryItem,
    HeatMap,
    HeatRow,
    Reference,
)
from exporters.measured import NotMeasured

_EXAMPLES = "examples"


@dataclass(frozen=True, eq=False)
class Example:
    """One attacked image: what it was, what the device's model sees of it, what became of it.

    ``label``: the true class; ``predicted``: the class that the device gives to the adversarial image.
    ``clean``, ``keyed`` (the clean image behind a block shuffle by a key that is no secret), ``adversarial`` and
    ``difference`` (ten times the change): uint8 C×H×W of one shape, C = 1 or 3. Raises ``ValueError`` for
    anything else.
    """

    device_id: str
    source_id: str
    attack: str
    label: str
    predicted: str
    clean: np.ndarray
    keyed: np.ndarray
    adversarial: np.ndarray
    difference: np.ndarray

    def __post_init__(self) -> None:
        shape = self.clean.shape
        for image in (self.clean, self.keyed, self.adversarial, self.difference):
            if image.dtype != np.uint8 or image.shape != shape or len(shape) != 3 or shape[0] not in (1, 3):
                raise ValueError(
                    f"an example image must be uint8 C×H×W like the others, not {image.dtype} {image.shape}"
                )


def classes_by_target(document: ReportDocument) -> HeatMap | None:
    """Return the worst case of every class on every target, or nothing where no target has it."""
    by_target = {target.id: {row.label: row.worst for row in target.by_class} for target in document.targets}
    judged = {name: rows for name, rows in by_target.items() if rows}
    if not judged:
        return None
    missing = NotMeasured("not run")
    return HeatMap(
        title="Worst-case fooling rate by class",
        caption="Among a class's images that the target gets right when clean, the share that any attack of the "
        "threats that the rule counts makes it get wrong.",
        row_label="Class",
        rows=tuple(HeatRow(name=label) for label in document.data.labels),
        columns=tuple(judged),
        cells=tuple(tuple(rows.get(label, missing) for rows in judged.values()) for label in document.data.labels),
    )


def fleet_charts(document: ReportDocument, examples: Sequence[Example]) -> tuple[tuple[Chart, ...], Galleries]:
    """Return every figure of a fleet report, and the pictures of its gallery."""
    targets, rule = document.targets, document.rule
    rates = {(row.source, target.id): row.worst for target in targets for row in target.by_source}
    charts: list[Chart] = []
    if document.sources:
        charts.append(
            HeatMap(
                title="Fooling rate, source by target",
                caption="The per-image worst over all attacks made on one source.",
                rows=tuple(HeatRow(name=row.id, threat=row.threat, note=row.description) for row in document.sources),
                columns=tuple(target.id for target in targets),
                cells=tuple(
                    tuple(rates.get((source.id, target.id), NotMeasured("not run")) for target in targets)
                    for source in document.sources
                ),
            )
        )
    base = document.base
    lowest = max(0.0, base.clean.value - rule.allowed_accuracy_drop)
    charts.append(
        Bars(
            title="Clean accuracy",
            caption="The rule allows a device to fall as far behind the base as the dashed line.",
            value_label="share of test images that are right",
            series=("clean accuracy",),
            groups=(
                BarGroup(name=f"{base.name} (base)", cells=(base.clean,)),
                *(BarGroup(name=target.id, cells=(target.clean,)) for target in targets),
            ),
            references=(Reference(label="lowest that the rule allows", at=round(lowest, 4)),),
        )
    )
    charts.append(
        Bars(
            title="Fooling rate in the worst case",
            caption="The per-image worst over every attack of every threat that the rule counts.",
            value_label="fooling rate",
            series=("fooling rate",),
            groups=tuple(BarGroup(name=target.id, cells=(target.worst_case,)) for target in targets),
            references=(
                Reference(label="p0, acceptable", at=rule.p0),
                Reference(label="p1, unacceptable", at=rule.p1),
            ),
        )
    )
    classes = classes_by_target(document)
    if classes is not None:
        charts.append(classes)
    if examples:
        charts.append(
            Gallery(
                name=_EXAMPLES,
                title="Adversarial images",
                caption="The difference is ten times the change around mid-grey.",
                items=tuple(
                    GalleryItem(
                        label=example.label,
                        source_prediction="",
                        target_prediction=example.predicted,
                        note=f"{example.attack}, {example.source_id} → {example.device_id}",
                    )
                    for example in examples
                ),
            )
        )
    return tuple(charts), {_EXAMPLES: [Pictures(example.clean, example.adversarial) for example in examples]}
