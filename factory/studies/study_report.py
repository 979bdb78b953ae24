"""From what a study found to its document: the header that all studies share, and cells with their intervals."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence

from pydantic import BaseModel

from device_tests.evidence import Proportion
from device_tests.fleet_statistics import FleetDifference, FleetRate
from device_tests.report.document import BaseReport, DataReport, now
from device_tests.report.study_document import (
    BudgetLine,
    Cell,
    DifferenceFigure,
    FleetFigure,
    Highlight,
    Section,
    StudyDocument,
)
from exporters.measured import NotMeasured
from factory.data import Splits
from factory.fleet_report import this_machine
from factory.packaging import tool_versions
from factory.progress import Progress
from factory.studies.workbench import FleetMeasured, Workbench


def cell(value: FleetMeasured) -> Cell:
    """A figure as a cell of a document."""
    return FleetFigure.model_validate(value) if isinstance(value, FleetRate) else value


def complement(value: FleetMeasured) -> FleetMeasured:
    """One minus a rate: retention for fooling, success of the defence for success of the attack."""
    if isinstance(value, NotMeasured):
        return value
    if isinstance(value, Proportion):
        return Proportion(value.n - value.successes, value.n)
    return FleetRate(1 - value.mean, 1 - value.high, 1 - value.low, value.devices, value.images, value.method)


def difference(value: FleetDifference | NotMeasured) -> DifferenceFigure | NotMeasured:
    """A difference as a cell of a document."""
    return value if isinstance(value, NotMeasured) else DifferenceFigure.model_validate(value)


def in_words(value: FleetDifference | NotMeasured) -> str:
    """A difference with its interval, for a sentence."""
    if isinstance(value, NotMeasured):
        return f"not measured: {value.reason}"
    return (
        f"{value.difference:+.3f} [{value.low:+.3f}, {value.high:+.3f}] ({value.devices[0]} and {value.devices[1]} "
        f"devices × {value.images} images)"
    )


def written(value: FleetMeasured) -> str:
    """A rate with its interval, for a sentence."""
    if isinstance(value, NotMeasured):
        return "– (not measured)"
    if isinstance(value, Proportion):
        low, high = value.interval
        return f"{value.value:.3f} [{low:.3f}, {high:.3f}]"
    return f"{value.mean:.3f} [{value.low:.3f}, {value.high:.3f}]"


def study_document(
    bench: Workbench, *, name: str, title: str, conclusion: Sequence[str], highlights: Mapping[str, FleetMeasured],
    budgets: Sequence[BudgetLine], sections: Sequence[Section], command: str,
) -> StudyDocument:  # fmt: skip
    """The document of one study on one base and data set."""
    spec = bench.spec
    base = BaseReport(
        name=spec.base.name, digest=bench.base.digest,
        parameters=sum(p.numel() for p in bench.base.network.parameters()), clean=bench.base_clean,
    )  # fmt: skip
    return document_of(
        spec, spec.seed, bench.splits, (base,), bench.progress, name=name, title=title, conclusion=conclusion,
        highlights=highlights, budgets=budgets, sections=sections, command=command,
    )  # fmt: skip


def document_of(
    spec: BaseModel, seed: int, splits: Splits, bases: Sequence[BaseReport], progress: Progress, *, name: str,
    title: str, conclusion: Sequence[str], highlights: Mapping[str, FleetMeasured], budgets: Sequence[BudgetLine],
    sections: Sequence[Section], command: str,
) -> StudyDocument:  # fmt: skip
    """The document of a study on whatever networks ``bases`` names."""
    test = splits.test
    data = DataReport(
        name=splits.name, digest=splits.digest, train=len(splits.train), validation=len(splits.validation),
        test=len(test), skipped=splits.train.skipped + test.skipped, labels=splits.labels,
    )  # fmt: skip
    return StudyDocument(
        schema=1, keyfoundry=importlib.metadata.version("keyfoundry"), created=now(), study=name, title=title,
        conclusion=tuple(conclusion),
        highlights=tuple(Highlight(label=label, figure=cell(value)) for label, value in highlights.items()),
        command=command, spec=spec.model_dump(mode="json"), versions=tool_versions(), seed=seed,
        machine=this_machine(),
        seconds={stage: round(seconds, 2) for stage, seconds in progress.seconds.items()},
        bases=tuple(bases), data=(data,), budgets=tuple(budgets), sections=tuple(sections),
    )  # fmt: skip
