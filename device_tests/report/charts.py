"""The figures of a study drawn as SVG: heat maps, bars, galleries; curves and surfaces have files of their own.

Rules: a chart is laid out for a width in pixels and then never shrunk much, so its text stays readable; every value
can be read without colour (series have markers of their own, cells and bars have their numbers); what was not
measured is hatched. Axes of rates begin at zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from device_tests.report.curves import draw_curve
from device_tests.report.figures import IntervalPlot, axis_range, difference_times_ten, heat_step, image_uri
from device_tests.report.study_document import (
    Bars,
    Cell,
    Chart,
    Curve,
    Figure,
    Gallery,
    HeatMap,
    Reference,
    Surface,
    cells_of_block,
    interval_of,
    methods_of,
    rates_of,
    reference_share,
    reference_text,
    said,
    share_of,
    written,
    written_interval,
    written_n,
    written_share,
)
from device_tests.report.surfaces import draw_surface
from device_tests.report.svg import Canvas, Drawing, number, shorten, text_width, wrap
from exporters.measured import NotMeasured

WIDE = 736
"""Pixels: the measure of a page's text."""
NARROW = 300
"""Pixels: what a phone leaves."""

_PIXELATED_BELOW = 128
_LEGEND_ROW = 20.0


@dataclass(frozen=True, eq=False)
class Pictures:
    """The images of one gallery item: uint8 C×H×W of one shape, C = 1 or 3; ``ValueError`` for anything else."""

    clean: np.ndarray
    adversarial: np.ndarray

    def __post_init__(self) -> None:
        shape = self.clean.shape
        for image in (self.clean, self.adversarial):
            if image.dtype != np.uint8 or image.shape != shape or len(shape) != 3 or shape[0] not in (1, 3):
                raise ValueError(f"a gallery's images must be uint8 C×H×W alike, not {image.dtype} {image.shape}")

    @property
    def difference(self) -> np.ndarray:
        """Ten times the change around mid-grey."""
        return difference_times_ten(self.clean, self.adversarial)

    @property
    def named(self) -> tuple[tuple[str, np.ndarray], ...]:
        """The three pictures with what to call them."""
        return ("clean", self.clean), ("adversarial", self.adversarial), ("difference ×10", self.difference)

    @property
    def pixelated(self) -> bool:
        """Whether they are so small that they are enlarged by whole pixels."""
        return max(self.clean.shape) < _PIXELATED_BELOW


def draw(chart: Chart, width: float, galleries: Mapping[str, Sequence[Pictures]]) -> Drawing:
    """Lay a figure out in ``width`` pixels (:data:`WIDE` or :data:`NARROW`); a heat map may need more and takes it.

    ``galleries``: the pictures of each gallery by its name, one for each item; raises ``ValueError`` otherwise.
    """
    if isinstance(chart, Curve):
        return draw_curve(chart, width)
    if isinstance(chart, HeatMap):
        return _draw_heat(chart, width)
    if isinstance(chart, Bars):
        return _draw_bars(chart, width)
    if isinstance(chart, Surface):
        return draw_surface(chart, width)
    return _draw_gallery(chart, width, pictures_of(chart, galleries))


def pictures_of(gallery: Gallery, galleries: Mapping[str, Sequence[Pictures]]) -> Sequence[Pictures]:
    """Return the pictures of a gallery; raises ``ValueError`` unless there is one for each item."""
    pictures = galleries.get(gallery.name, ())
    if len(pictures) != len(gallery.items):
        raise ValueError(
            f"the gallery {gallery.name!r} has {len(gallery.items)} items and {len(pictures)} sets of pictures"
        )
    return pictures


def remarks_of(chart: Chart) -> str:
    """Return the caption of a figure with what else its reader must know: what was fitted, how intervals were made."""
    trends = chart.trends if isinstance(chart, Curve) else ()
    fitted = [f"The line “{trend.name}” is fitted, not measured: {trend.formula}." for trend in trends]
    return " ".join(filter(None, (chart.caption, *fitted, methods_of(cells_of_block(chart)))))


# Heat maps

_CELL_WIDTH, _CELL_HEIGHT, _GAP = 104.0, 58.0, 3.0


def _draw_heat(heat: HeatMap, width: float) -> Drawing:
    canvas = Canvas()
    label_width = 170.0 if width >= 500 else 110.0
    columns = len(heat.columns)
    cell = max(_CELL_WIDTH, min(150.0, (width - label_width) / columns - _GAP))
    heads = [wrap(name, cell - 8, 12, 3) for name in heat.columns]
    top = 22 + 15.0 * max(map(len, heads))
    canvas.text("small soft", 0, 12, f"{heat.row_label} ↓")
    canvas.text("small soft", label_width, 12, f"{heat.column_label} →")
    for index, head in enumerate(heads):
        first = top - 8 - 15 * (len(head) - 1)
        canvas.lines("strong", label_width + index * (cell + _GAP) + cell / 2, first, head, 15, "middle")
    for row_index, (row, cells) in enumerate(zip(heat.rows, heat.cells, strict=True)):
        y = top + row_index * (_CELL_HEIGHT + _GAP)
        name = wrap(row.name, label_width - 14, 12, 2)
        canvas.lines("strong", 0, y + 20, name, 15)
        under = " · ".join(filter(None, (row.threat, row.note)))
        room = 2 if len(name) == 1 else 1
        canvas.lines("small soft", 0, y + 20 + 15 * len(name), wrap(under, label_width - 14, 11, room), 13)
        for index, (column, figure) in enumerate(zip(heat.columns, cells, strict=True)):
            x = label_width + index * (cell + _GAP)
            _heat_cell(canvas, x, y, cell, f"{row.name} → {column}", figure, heat.is_ceiling(row, column))
    bottom = top + len(heat.rows) * (_CELL_HEIGHT + _GAP)
    needed = label_width + columns * (cell + _GAP) - _GAP
    bottom = _heat_legend(canvas, heat, bottom + 12)
    description = f"{heat.row_label} by {heat.column_label.lower()}, each cell with its rate, interval and n."
    return Drawing(max(needed, 300), bottom, canvas.body, heat.title, description)


def _heat_cell(canvas: Canvas, x: float, y: float, width: float, what: str, cell: Cell, ceiling: bool) -> None:
    canvas.open(f"{what}: {written(cell)}")
    middle = x + width / 2
    if isinstance(cell, NotMeasured):
        canvas.hatch(x, y, width, _CELL_HEIGHT)
        canvas.text("small soft on-plot", middle, y + _CELL_HEIGHT / 2 + 4, "not measured", "middle")
    else:
        step = heat_step(share_of(cell))
        canvas.rect(f"h{step}", x, y, width, _CELL_HEIGHT, 5)
        if ceiling:
            canvas.rect(f"ceiling c{step}", x + 2.5, y + 2.5, width - 5, _CELL_HEIGHT - 5, 3)
        canvas.text(f"value i{step}", middle, y + 21, written_share(cell), "middle")
        canvas.text(f"small i{step}", middle, y + 36, written_interval(cell), "middle")
        canvas.text(f"small i{step}", middle, y + 49, shorten(_short_n(cell), width, 10), "middle")
    canvas.close()


def _short_n(figure: Figure) -> str:
    return written_n(figure).replace(" devices", "").replace(" device", "").replace(" images", " img.")


def _heat_legend(canvas: Canvas, heat: HeatMap, y: float) -> float:
    ceiling = any(heat.is_ceiling(row, column) for row in heat.rows for column in heat.columns)
    missing = any(isinstance(cell, NotMeasured) for row in heat.cells for cell in row)
    x = 0.0
    if ceiling:
        canvas.rect("h5", x, y, 24, 14, 3)
        canvas.rect("ceiling c5", x + 2, y + 2, 20, 10, 2)
        canvas.text("small soft", x + 30, y + 11, "the target itself (T5)")
        x += 170
    if missing:
        canvas.hatch(x, y, 24, 14, 5)
        canvas.text("small soft", x + 30, y + 11, "not measured")
    return y + 16 if ceiling or missing else y - 12


# Bars


def _draw_bars(bars: Bars, width: float) -> Drawing:
    canvas = Canvas()
    narrow, several = width < 500, len(bars.series) > 1
    names = 0.0 if narrow else 130.0
    texts = 0.0 if narrow else 205.0
    left, right = names, width - texts - (0 if narrow else 12)
    y = _bars_legend(canvas, bars, width) if several or bars.references else 0.0
    canvas.text("small soft", left, y + 11, shorten(bars.value_label, width - left, 11))
    y += 22
    ends = [line.at for line in bars.references if isinstance(line.at, float | int)]
    ends += [interval_of(cell)[1] for cell in rates_of(bars) if not isinstance(cell, NotMeasured)]
    high = axis_range([0.0, *ends])[1]
    top = y
    places: list[tuple[float, float]] = []
    rows = Canvas()
    for group in bars.groups:
        end = y
        if narrow:
            rows.text("strong", 0, y + 14, shorten(group.name, width, 12))
            y += 20
        else:
            heading = wrap(group.name, names - 10, 12, 2)
            rows.lines("strong", 0, y + 15, heading, 14)
            end = y + 10 + 14 * len(heading)
        for index, cell in enumerate(group.cells):
            rows.open(f"{group.name}, {bars.series[index]}: {written(cell)}")
            _bar(rows, cell, index, left, y + 3, (right - left) / high)
            rows.text("small", left if narrow else right + 12, y + (30 if narrow else 15), _bar_words(cell))
            rows.close()
            places.append((y + 1, y + 19))
            y += 34 if narrow else 22
        y = max(y, end) + (6 if several or narrow else 2)
    for tick in IntervalPlot((), (), 0.0, high).ticks:
        at = left + tick / high * (right - left)
        canvas.line("grid" if tick else "axis", at, top - 2, at, y)
        anchor = "start" if tick == 0 else "end" if tick == high else "middle"
        canvas.text("small soft", at, y + 14, f"{tick:.2f}".rstrip("0").rstrip("."), anchor)
    canvas.place(rows.body, 0)
    for line in bars.references:
        at = left + reference_share(line) / high * (right - left)
        # On a phone the numbers stand between the bars, and no line may cross them.
        for start, stop in places if narrow else [(top - 2, y)]:
            canvas.line("bar-halo", at, start, at, stop)
            canvas.line("reference", at, start, at, stop)
    lines = [f"{bars.value_label} of each of {len(bars.groups)} groups, each with its rate, interval and n"]
    description = "; ".join([*lines, *map(reference_text, bars.references)]) + "."
    return Drawing(width, y + 20, canvas.body, bars.title, description)


def _bar(canvas: Canvas, cell: Cell, index: int, left: float, y: float, scale: float) -> None:
    if isinstance(cell, NotMeasured):
        canvas.hatch(left, y, 60, 14, 6)
        return
    canvas.rect(_bar_kind(index), left, y, share_of(cell) * scale, 14, 2)
    low, high = (left + end * scale for end in interval_of(cell))
    for layer in ("bar-halo", "bar-interval"):
        canvas.path(layer, f"M{number(low)} {number(y + 7)}H{number(high)}")
        canvas.path(layer, "".join(f"M{number(end)} {number(y + 3)}v8" for end in (low, high)))


def _reference_label(reference: Reference, width: float) -> str:
    # Rather no number than one without its interval; the table below has both.
    text = reference_text(reference)
    return text if text_width(text, 12) <= width else reference.label


def _bar_kind(index: int) -> str:
    """Solid, outlined, tinted: told apart without colour."""
    return ("f0", "open o1", "open o-tint s2", "open o-tint s3")[index]


def _bar_words(cell: Cell) -> str:
    if isinstance(cell, NotMeasured):
        return "not measured"
    return f"{written_share(cell)} {written_interval(cell)} {_short_n(cell)}"


def _bars_legend(canvas: Canvas, bars: Bars, width: float) -> float:
    x, y = 0.0, 0.0
    names = bars.series if len(bars.series) > 1 else ()
    for index, name in enumerate((*names, *(_reference_label(line, width - 30) for line in bars.references))):
        text = shorten(name, width - 30, 12)
        needed = 30 + text_width(text, 12) + 14
        if x and x + needed > width + 14:
            x, y = 0.0, y + _LEGEND_ROW
        if index < len(names):
            canvas.rect(_bar_kind(index), x, y + 3, 24, 14, 2)
        else:
            canvas.line("reference", x, y + 10, x + 24, y + 10)
        canvas.text("", x + 30, y + 14, text)
        x += needed
    return y + _LEGEND_ROW + 8


# Galleries


def _draw_gallery(gallery: Gallery, width: float, pictures: Sequence[Pictures]) -> Drawing:
    canvas = Canvas()
    columns = 1 if width < 500 else 2
    item_width = (width - 28 * (columns - 1)) / columns
    side = (item_width - 2 * 8) / 3
    y = 0.0
    for start in range(0, len(gallery.items), columns):
        tallest = 0.0
        for column, (item, pair) in enumerate(
            zip(gallery.items[start : start + columns], pictures[start : start + columns], strict=True)
        ):
            x = column * (item_width + 28)
            height = side * pair.clean.shape[1] / pair.clean.shape[2]
            for index, (name, picture) in enumerate(pair.named):
                at = x + index * (side + 8)
                canvas.image(at, y, side, height, image_uri(picture), pixelated=pair.pixelated)
                canvas.text("small soft", at, y + height + 14, name)
            below = y + height + 34
            for kind, step, text in (
                ("name", 17, item.label),
                ("small", 14, said(item)),
                ("small soft", 14, item.note),
            ):
                lines = wrap(text, item_width, 13 if kind == "name" else 11, 2)
                canvas.lines(kind, x, below, lines, step)
                below += step * len(lines)
            tallest = max(tallest, below - y + 16)
        y += tallest
    if not gallery.items:
        canvas.text("soft", 0, 14, "No example images were kept.")
        y = 24
    lines = [f"{item.label}: {said(item)} ({item.note})" for item in gallery.items]
    return Drawing(width, y, canvas.body, gallery.title, "; ".join(lines) + ".")
