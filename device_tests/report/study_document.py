"""study.json: one study as frozen values – a header, then sections of prose, tables and figures in their order.

Rules: as in :mod:`device_tests.report.document` (nothing secret, UTC, no unknown field, shares in [0, 1]). A rate is a
:data:`Figure` and so never stands without its n and its interval: a text cell that is nothing but a fraction or a
percentage is refused. Pictures of a gallery are not in here but beside it. The JSON Schema is published as
study-schema.json beside this file.

>>> written(Proportion(58, 264)), written(NotMeasured("the attack crashed"))
('0.220 [0.174, 0.273] (n = 264)', 'not measured: the attack crashed')
>>> written(FleetFigure(mean=0.31, low=0.27, high=0.35, devices=10, images=1000, method="two-way bootstrap"))
'0.310 [0.270, 0.350] (10 devices × 1000 images)'
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from datetime import UTC
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    model_validator,
)

from device_tests.evidence import Proportion
from device_tests.report.document import BaseReport, DataReport, Machine, NotMeasuredJSON, ProportionJSON
from exporters.measured import NotMeasured
from keys.files import write_atomic

STUDY_SCHEMA_PATH = Path(__file__).with_name("study-schema.json")

WILSON = "Wilson"
"""How the interval of a :class:`~device_tests.evidence.Proportion` is made."""

CEILING = "T5"
"""Code of the threat that is expected to win: the target itself."""

_BARE_RATE = re.compile(r"\s*[-+−±≈<>≤≥]?\s*(\d*[.,]\d+|\d+([.,]\d+)?\s*%)\s*")


class _Model(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True, serialize_by_alias=True
    )


Share = Annotated[float, Field(ge=0, le=1, strict=True)]
SignedShare = Annotated[float, Field(ge=-1, le=1, strict=True)]
Number = Annotated[float, Field(strict=True)]
Positive = Annotated[int, Field(ge=1, strict=True)]
Name = Annotated[str, Field(min_length=1)]


def _no_bare_rate(text: str) -> str:
    if _BARE_RATE.fullmatch(text):
        raise ValueError(
            f"the cell {text!r} is a bare number: give a rate with its n and interval, and say of any other number "
            "what it is or in which unit"
        )
    return text


Text = Annotated[str, AfterValidator(_no_bare_rate)]
"""Names, budgets, times: anything but a rate."""


class FleetFigure(_Model):
    """A rate over a fleet: the mean over ``devices`` × ``images`` with its 95 % interval, and how that was made.

    Reads any object with these attributes, so that ``FleetFigure.model_validate(rate)`` takes the statistics'
    own value.
    """

    model_config = ConfigDict(from_attributes=True)

    mean: Share
    low: Share
    high: Share
    devices: Positive
    images: Positive
    method: Name
    """How the interval was made, as a noun: "two-way bootstrap over devices and images"."""

    @model_validator(mode="after")
    def _ordered(self) -> FleetFigure:
        if not self.low - 1e-9 <= self.mean <= self.high + 1e-9:
            raise ValueError(f"the mean {self.mean} lies outside its interval [{self.low}, {self.high}]")
        return self


Figure = ProportionJSON | FleetFigure
"""A rate with its n and its interval."""

Cell = Figure | NotMeasuredJSON
"""A rate, or the reason why there is none."""


class DifferenceFigure(_Model):
    """One rate minus another, in [-1, 1], with its 95 % interval; reads any object with these attributes.

    ``devices``: of the first and of the second group; for two attacks on the same devices both are that number.
    """

    model_config = ConfigDict(from_attributes=True)

    difference: SignedShare
    low: SignedShare
    high: SignedShare
    devices: tuple[Positive, Positive]
    images: Positive
    method: Name

    @model_validator(mode="after")
    def _ordered(self) -> DifferenceFigure:
        if not self.low - 1e-9 <= self.difference <= self.high + 1e-9:
            raise ValueError(f"the difference {self.difference} lies outside its interval [{self.low}, {self.high}]")
        return self


TableCell = Text | Cell | DifferenceFigure
"""What stands in a table."""


class Table(_Model):
    """Rows of names, budgets and rates; every row has a cell for each column."""

    kind: Literal["table"] = "table"
    title: Name
    caption: str
    columns: tuple[str, ...] = Field(min_length=1)
    rows: tuple[tuple[TableCell, ...], ...]

    @model_validator(mode="after")
    def _rectangular(self) -> Table:
        _same_length(self.title, self.columns, self.rows)
        return self


class CurvePoint(_Model):
    """A rate at one place along the x axis; ``label`` is what the axis says there (``8/255``), else the number."""

    x: Number
    label: str = ""
    figure: Cell


class Series(_Model):
    """One line of a curve."""

    name: Name
    points: tuple[CurvePoint, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _sorted(self) -> Series:
        _increasing(f"the series {self.name!r}", [point.x for point in self.points])
        return self


class Reference(_Model):
    """A dashed line across a curve or through bars: a limit or a chance level as a plain share, or a measured rate."""

    label: Name
    at: Share | Figure


class TrendPoint(_Model):
    """A fitted value with its band; not a measurement."""

    x: Number
    value: Share
    low: Share
    high: Share


class Trend(_Model):
    """A line fitted to the measurements, which may run on beyond them; ``formula`` says in words what was fitted."""

    name: Name
    formula: Name
    points: tuple[TrendPoint, ...] = Field(min_length=2)

    @model_validator(mode="after")
    def _sorted(self) -> Trend:
        _increasing(f"the trend {self.name!r}", [point.x for point in self.points])
        return self


class Curve(_Model):
    """Rates against a number (ε, colluding devices, changed pixels), with their intervals."""

    kind: Literal["curve"] = "curve"
    title: Name
    caption: str
    x_label: Name
    y_label: Name
    x_scale: Literal["linear", "log"]
    series: tuple[Series, ...] = Field(min_length=1, max_length=8)
    """At most eight: no more can be told apart."""
    references: tuple[Reference, ...] = ()
    trends: tuple[Trend, ...] = ()

    @property
    def xs(self) -> tuple[float, ...]:
        """Every place along the x axis, in order."""
        lines = (*self.series, *self.trends)
        return tuple(sorted({point.x for line in lines for point in line.points}))

    @model_validator(mode="after")
    def _drawable(self) -> Curve:
        _unique(self.title, [line.name for line in (*self.series, *self.trends)])
        if self.x_scale == "log" and self.xs[0] <= 0:
            raise ValueError(f"{self.title!r} has a logarithmic x axis and a point at {self.xs[0]}")
        return self


class HeatRow(_Model):
    """One source: its name, its threat code (or nothing), and what it is."""

    name: Name
    threat: str = ""
    note: str = ""


class HeatMap(_Model):
    """Rates of every row on every column: sources × targets, or classes × targets."""

    kind: Literal["heat"] = "heat"
    title: Name
    caption: str
    row_label: str = "Source"
    column_label: str = "Target"
    rows: tuple[HeatRow, ...] = Field(min_length=1)
    columns: tuple[Name, ...] = Field(min_length=1)
    cells: tuple[tuple[Cell, ...], ...]

    def is_ceiling(self, row: HeatRow, column: str) -> bool:
        """Whether the attacker of this cell holds the target itself."""
        return row.threat == CEILING or (bool(row.threat) and row.name == column)

    @model_validator(mode="after")
    def _rectangular(self) -> HeatMap:
        if len(self.cells) != len(self.rows):
            raise ValueError(f"{self.title!r} has {len(self.rows)} rows and cells for {len(self.cells)}")
        _same_length(self.title, self.columns, self.cells)
        return self


class BarGroup(_Model):
    """The rates of one class: one for each series of the chart."""

    name: Name
    cells: tuple[Cell, ...]


class Bars(_Model):
    """Rates side by side, such as those of single classes."""

    kind: Literal["bars"] = "bars"
    title: Name
    caption: str
    value_label: Name
    series: tuple[Name, ...] = Field(min_length=1, max_length=4)
    groups: tuple[BarGroup, ...] = Field(min_length=1)
    references: tuple[Reference, ...] = ()

    @model_validator(mode="after")
    def _rectangular(self) -> Bars:
        _unique(self.title, self.series)
        _same_length(self.title, self.series, [group.cells for group in self.groups])
        return self


class GalleryItem(_Model):
    """What one picture shows; the pictures themselves are given to the renderer, in the same order."""

    label: str
    """The true class."""
    source_prediction: str
    """What the model that the attack was made on says of the adversarial image; empty where that was not kept."""
    target_prediction: str
    """What the attacked device says of it."""
    note: str
    """Attack, source and target."""


class Gallery(_Model):
    """Clean image, adversarial image and ten times their difference, a few times over."""

    kind: Literal["gallery"] = "gallery"
    name: Annotated[str, Field(pattern="^[a-z0-9][a-z0-9-]*$")]
    """Under which the renderer finds the pictures; unique in the study."""
    title: Name
    caption: str
    items: tuple[GalleryItem, ...]


class SurfacePanel(_Model):
    """Values on a grid: ``values[row][column]``, the first row at the low end of y."""

    name: Name
    values: tuple[tuple[Number, ...], ...] = Field(min_length=2)


class Surface(_Model):
    """Slices through a loss surface, one panel per model, all on one scale."""

    kind: Literal["surface"] = "surface"
    title: Name
    caption: str
    x_label: Name
    y_label: Name
    value_label: Name
    """What the values are and over how many images they were taken."""
    x_range: tuple[Number, Number]
    y_range: tuple[Number, Number]
    panels: tuple[SurfacePanel, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _rectangular(self) -> Surface:
        for panel in self.panels:
            _same_length(f"{self.title}, {panel.name}", panel.values[0], panel.values)
            if len(panel.values[0]) < 2:
                raise ValueError(f"the surface {panel.name!r} needs two columns at least")
        for low, high in (self.x_range, self.y_range):
            if not low < high:
                raise ValueError(f"{self.title!r} has an axis from {low} to {high}")
        return self


Chart = Curve | HeatMap | Bars | Gallery | Surface
"""Every block that is drawn."""

Block = Annotated[Table | Chart, Field(discriminator="kind")]


class Section(_Model):
    """A title, paragraphs of plain text, then tables and figures."""

    title: Name
    prose: tuple[str, ...]
    blocks: tuple[Block, ...]


class BudgetLine(_Model):
    """What one part of the study spends, each in words: ``100 × 4 attacks``, ``5,000 per image``, ``none``."""

    part: Name
    images: str
    steps: str
    restarts: str
    queries: str


class Highlight(_Model):
    """A rate to be seen first."""

    label: Name
    figure: Cell | DifferenceFigure
    note: str = ""


class StudyDocument(_Model):
    """One study: what was asked, how it was run, what came out."""

    model_config = ConfigDict(json_schema_extra={"$schema": "https://json-schema.org/draft/2020-12/schema"})

    schema_version: Literal[1] = Field(alias="schema")
    keyfoundry: str
    """Version of Keyfoundry."""
    created: Annotated[AwareDatetime, AfterValidator(lambda time: time.astimezone(UTC))]
    study: Name
    """The name it is run by."""
    title: Name
    """What it answers, in a few words."""
    conclusion: tuple[str, ...]
    """What came out, in plain sentences; the first is the most important."""
    highlights: tuple[Highlight, ...]
    command: str
    """The resolved command line, without secrets."""
    spec: dict[str, JsonValue]
    """The study's spec as it was resolved."""
    versions: dict[str, str]
    seed: Annotated[int, Field(strict=True)]
    machine: Machine
    seconds: dict[str, Annotated[float, Field(ge=0)]]
    """Seconds of each stage, in the order of the stages."""
    bases: tuple[BaseReport, ...] = Field(min_length=1)
    data: tuple[DataReport, ...] = Field(min_length=1)
    budgets: tuple[BudgetLine, ...] = Field(min_length=1)
    sections: tuple[Section, ...] = Field(min_length=1)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """Every table and figure, in order."""
        return tuple(block for section in self.sections for block in section.blocks)

    @property
    def charts(self) -> tuple[Chart, ...]:
        """Every figure, in order."""
        return tuple(block for block in self.blocks if not isinstance(block, Table))

    def to_bytes(self) -> bytes:
        """Return the bytes of study.json."""
        return self.model_dump_json(indent=2).encode() + b"\n"

    @model_validator(mode="after")
    def _consistent(self) -> StudyDocument:
        _unique("the study", [section.title for section in self.sections])
        _unique("the study", [block.name for block in self.blocks if isinstance(block, Gallery)])
        return self


def cells_of_block(block: Block) -> Iterator[Cell | DifferenceFigure]:
    """Yield every rate of a table or a figure, and every reason for a missing one."""
    if isinstance(block, Table):
        yield from (cell for row in block.rows for cell in row if not isinstance(cell, str))
    elif isinstance(block, Curve | Bars | HeatMap):
        yield from rates_of(block)


def rates_of(chart: Curve | Bars | HeatMap) -> Iterator[Cell]:
    """Yield every rate of a figure, those of its dashed lines too, and every reason for a missing one."""
    if isinstance(chart, HeatMap):
        yield from (cell for row in chart.cells for cell in row)
        return
    if isinstance(chart, Curve):
        yield from (point.figure for line in chart.series for point in line.points)
    else:
        yield from (cell for group in chart.groups for cell in group.cells)
    yield from (line.at for line in chart.references if not isinstance(line.at, float | int))


def methods_of(cells: Iterable[Cell | DifferenceFigure]) -> str:
    """Say how the 95 % intervals of these rates were made; empty where there is none."""
    methods = dict.fromkeys(
        WILSON if isinstance(figure, Proportion) else figure.method.removesuffix(", 95 %")
        for figure in cells
        if not isinstance(figure, NotMeasured)
    )
    return f"95 % intervals: {'; '.join(methods)}." if methods else ""


def share_of(figure: Figure) -> float:
    """The point estimate, in [0, 1]."""
    return figure.mean if isinstance(figure, FleetFigure) else figure.value


def interval_of(figure: Figure) -> tuple[float, float]:
    """The ends of the 95 % interval, in [0, 1]."""
    return (figure.low, figure.high) if isinstance(figure, FleetFigure) else figure.interval


def written_share(figure: Figure | DifferenceFigure) -> str:
    """Write the estimate: ``0.220``; a difference with its sign: ``+0.031``."""
    if isinstance(figure, DifferenceFigure):
        return _signed(figure.difference)
    return f"{share_of(figure):.3f}"


def written_interval(figure: Figure | DifferenceFigure) -> str:
    """Write the interval: ``[0.174, 0.273]``."""
    if isinstance(figure, DifferenceFigure):
        return f"[{_signed(figure.low)}, {_signed(figure.high)}]"
    low, high = interval_of(figure)
    return f"[{low:.3f}, {high:.3f}]"


def written_n(figure: Figure | DifferenceFigure) -> str:
    """Write what was counted: ``n = 264``, ``10 devices × 1000 images``."""
    if isinstance(figure, Proportion):
        return f"n = {figure.n}"
    images = f"{figure.images} image{'' if figure.images == 1 else 's'}"
    groups = figure.devices if isinstance(figure, DifferenceFigure) else (figure.devices,)
    counts = " and ".join(map(str, dict.fromkeys(groups)))
    return f"{counts} device{'' if counts == '1' else 's'} × {images}"


def written(cell: Cell | DifferenceFigure) -> str:
    """Write a rate in full, or why there is none."""
    if isinstance(cell, NotMeasured):
        return f"not measured: {cell.reason}"
    return f"{written_share(cell)} {written_interval(cell)} ({written_n(cell)})"


def reference_text(reference: Reference) -> str:
    """Write what a dashed line stands for: its label, then a plain share or a rate in full."""
    at = reference.at
    return f"{reference.label}, {at:g}" if isinstance(at, float | int) else f"{reference.label}, {written(at)}"


def reference_share(reference: Reference) -> float:
    """Where a dashed line lies, in [0, 1]."""
    return reference.at if isinstance(reference.at, float | int) else share_of(reference.at)


def said(item: GalleryItem) -> str:
    """Write what became of an adversarial image: what its source and its target take it for."""
    source = f"the source says {item.source_prediction}, " if item.source_prediction else ""
    fooled = "" if item.target_prediction == item.label else " (fooled)"
    return f"{source}the target {'' if source else 'says '}{item.target_prediction}{fooled}"


def study_schema_json() -> str:
    """Return the text of the published JSON Schema."""
    return json.dumps(StudyDocument.model_json_schema(), indent=2) + "\n"


def write_study_schema(path: Path = STUDY_SCHEMA_PATH) -> None:
    """Write the published JSON Schema; run it after every change of the models."""
    write_atomic(path, study_schema_json().encode())


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def _same_length(title: str, columns: Iterable[object], rows: Iterable[tuple[object, ...]]) -> None:
    width = len(tuple(columns))
    for index, row in enumerate(rows):
        if len(row) != width:
            raise ValueError(f"{title!r} has {width} columns and {len(row)} cells in row {index + 1}")


def _increasing(what: str, xs: list[float]) -> None:
    if any(second <= first for first, second in pairwise(xs)):
        raise ValueError(f"{what} must go from left to right, once per place: {xs}")


def _unique(what: str, names: Iterable[str]) -> None:
    listed = list(names)
    repeated = sorted({name for name in listed if listed.count(name) > 1})
    if repeated:
        raise ValueError(f"{what!r} names {repeated[0]!r} twice")
