"""Curves: rates against a number, each with its interval, with limits, controls and fitted lines beside them.

Rules: the axis of rates begins at zero; series that share a place stand beside each other, so that no interval covers
another; each has a marker of its own; what was not measured is a hatched box on the axis, and the line has a gap there.

>>> log_ticks(1, 10_000)
(1, 10, 100, 1000, 10000)
>>> linear_ticks(0, 16)
(0, 5, 10, 15)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from device_tests.report.figures import IntervalPlot, axis_range
from device_tests.report.study_document import (
    Curve,
    CurvePoint,
    Trend,
    interval_of,
    rates_of,
    reference_share,
    reference_text,
    share_of,
    written,
)
from device_tests.report.svg import Canvas, Drawing, number, shorten, text_width
from exporters.measured import NotMeasured

_LEGEND_ROW = 20.0
_MARKERS = (
    "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0Z",
    "M-4 -4H4V4H-4Z",
    "M0 -5.6L5.6 0L0 5.6L-5.6 0Z",
    "M0 -5.2L5 4H-5Z",
    "M0 5.2L5 -4H-5Z",
    "M-1.8 -5H1.8V-1.8H5V1.8H1.8V5H-1.8V1.8H-5V-1.8H-1.8Z",
    "M-2.5 -4.6H2.5L5 0L2.5 4.6H-2.5L-5 0Z",
    "M-5 -2.6L-2.6 -5L0 -2.4L2.6 -5L5 -2.6L2.4 0L5 2.6L2.6 5L0 2.4L-2.6 5L-5 2.6L-2.4 0Z",
)


@dataclass(frozen=True)
class _Plane:
    """Where x and a share lie on the canvas, in pixels."""

    left: float
    right: float
    top: float
    bottom: float
    x_low: float
    x_high: float
    high: float
    log: bool

    def x(self, value: float) -> float:
        low, high, at = self.x_low, self.x_high, value
        if self.log:
            low, high, at = math.log(low), math.log(high), math.log(at)
        if high == low:
            return (self.left + self.right) / 2
        # The outermost points keep their distance from the frame.
        inset = 18.0
        return self.left + inset + (at - low) / (high - low) * (self.right - self.left - 2 * inset)

    def y(self, share: float) -> float:
        return self.bottom - share / self.high * (self.bottom - self.top)


def draw_curve(curve: Curve, width: float) -> Drawing:
    """Lay a curve out in ``width`` pixels: its legend, the axes, then the lines with their intervals."""
    canvas = Canvas()
    top = _curve_legend(canvas, curve, width) + 26
    high = axis_range([0.0, *_curve_shares(curve)])[1]
    plane = _Plane(
        34, width - 6, top, top + (230 if width < 500 else 320), curve.xs[0], curve.xs[-1], high, curve.x_scale == "log"
    )
    canvas.text("small soft", 0, top - 12, shorten(curve.y_label, width, 11))
    _curve_grid(canvas, curve, plane)
    for trend in curve.trends:
        _trend(canvas, trend, plane)
    for reference in curve.references:
        if not isinstance(reference.at, float | int):
            low, upper = interval_of(reference.at)
            canvas.rect(
                "reference-band", plane.left, plane.y(upper), plane.right - plane.left, plane.y(low) - plane.y(upper)
            )
        at = plane.y(reference_share(reference))
        canvas.line("reference", plane.left, at, plane.right, at)
    obstacles: list[tuple[float, float, float]] = []
    dodge = _dodge(curve, plane)
    for index, series in enumerate(curve.series):
        shift = (index - (len(curve.series) - 1) / 2) * dodge
        obstacles += _series(canvas, series.name, series.points, index, shift, plane)
    _reference_labels(canvas, curve, plane, obstacles)
    lines = [
        f"{series.name}, {curve.x_label} {_tick_label(point)}: {written(point.figure)}"
        for series in curve.series
        for point in series.points
    ]
    lines += [reference_text(reference) for reference in curve.references]
    lines += [f"{trend.name}, fitted: {trend.formula}" for trend in curve.trends]
    description = f"{curve.y_label} against {curve.x_label}. " + "; ".join(lines) + "."
    return Drawing(width, plane.bottom + 42, canvas.body, curve.title, description)


def _curve_shares(curve: Curve) -> Iterable[float]:
    for cell in rates_of(curve):
        if not isinstance(cell, NotMeasured):
            yield interval_of(cell)[1]
    yield from (reference.at for reference in curve.references if isinstance(reference.at, float | int))
    yield from (point.high for trend in curve.trends for point in trend.points)


def _curve_legend(canvas: Canvas, curve: Curve, width: float) -> float:
    """Write the legend and return where it ends."""
    x, y = 0.0, 0.0
    names = [series.name for series in curve.series]
    names += [f"{trend.name} (fitted)" for trend in curve.trends]
    missing = any(isinstance(cell, NotMeasured) for cell in rates_of(curve))
    for index, name in enumerate([*names, *["not measured"] * missing]):
        text = shorten(name, width - 30, 12)
        needed = 30 + text_width(text, 12) + 14
        if x and x + needed > width + 14:
            x, y = 0.0, y + _LEGEND_ROW
        middle = y + 10
        if index < len(curve.series):
            canvas.line(f"line s{index}", x, middle, x + 24, middle)
            _marker(canvas, x + 12, middle, index)
        elif index < len(names):
            canvas.line("trend", x, middle, x + 24, middle)
        else:
            canvas.hatch(x + 3, middle - 6, 18, 12, 5)
        canvas.text("", x + 30, middle + 4, text)
        x += needed
    return y + _LEGEND_ROW


def _curve_grid(canvas: Canvas, curve: Curve, plane: _Plane) -> None:
    for tick in IntervalPlot((), (), 0.0, plane.high).ticks:
        at = plane.y(tick)
        canvas.line("grid" if tick else "axis", plane.left, at, plane.right, at)
        canvas.text("small soft", plane.left - 6, at + 4, f"{tick:.2f}".rstrip("0").rstrip("."), "end")
    labels = {point.x: _tick_label(point) for series in curve.series for point in series.points}
    more = log_ticks if curve.x_scale == "log" else linear_ticks
    for tick in more(plane.x_low, plane.x_high) if curve.trends else ():
        labels.setdefault(tick, _grouped(tick))
    taken: list[tuple[float, float]] = []
    for tick, label in labels.items():
        at, half = plane.x(tick), text_width(label, 11) / 2 + 3
        canvas.line("axis", at, plane.bottom, at, plane.bottom + 4)
        if all(at + half <= left or at - half >= right for left, right in taken):
            taken.append((at - half, at + half))
            canvas.text("small soft", at, plane.bottom + 17, label, "middle")
    scale = ", logarithmic" if plane.log else ""
    middle = (plane.left + plane.right) / 2
    canvas.text(
        "small soft", middle, plane.bottom + 36, shorten(curve.x_label + scale, plane.right - plane.left, 11), "middle"
    )


def _series(
    canvas: Canvas, name: str, points: Sequence[CurvePoint], index: int, shift: float, plane: _Plane
) -> list[tuple[float, float, float]]:
    """Draw one line with its intervals; return what it covers: x, top and bottom of every interval."""
    steps, covered = "", []
    pen = "M"
    for point in points:
        if isinstance(point.figure, NotMeasured):
            pen = "M"
            continue
        steps += f"{pen}{number(plane.x(point.x) + shift)} {number(plane.y(share_of(point.figure)))}"
        pen = "L"
    canvas.path(f"line s{index}", steps)
    for point in points:
        x = plane.x(point.x) + shift
        canvas.open(f"{name}, {_tick_label(point)}: {written(point.figure)}")
        if isinstance(point.figure, NotMeasured):
            canvas.hatch(x - 5, plane.bottom - 22, 10, 22, 5)
        else:
            low, high = (plane.y(end) for end in interval_of(point.figure))
            canvas.line(f"whisker s{index}", x, low, x, high)
            canvas.line(f"whisker s{index}", x - 3.5, low, x + 3.5, low)
            canvas.line(f"whisker s{index}", x - 3.5, high, x + 3.5, high)
            _marker(canvas, x, plane.y(share_of(point.figure)), index)
            covered.append((x, high, low))
        canvas.close()
    return covered


def _trend(canvas: Canvas, trend: Trend, plane: _Plane) -> None:
    upper = [(plane.x(point.x), plane.y(point.high)) for point in trend.points]
    lower = [(plane.x(point.x), plane.y(point.low)) for point in reversed(trend.points)]
    canvas.path("band", _polyline([*upper, *lower]) + "Z")
    canvas.path("trend", _polyline([(plane.x(point.x), plane.y(point.value)) for point in trend.points]))


def _reference_labels(
    canvas: Canvas, curve: Curve, plane: _Plane, obstacles: Sequence[tuple[float, float, float]]
) -> None:
    """Write every reference's label at the end of its line where there is most room."""
    boxes: list[tuple[float, float, float, float]] = [(x - 6, top - 5, x + 6, low + 5) for x, top, low in obstacles]
    for reference in curve.references:
        at = plane.y(reference_share(reference))
        label = shorten(reference_text(reference), plane.right - plane.left - 8, 11)
        if text_width(label, 11) > 0.6 * (plane.right - plane.left):
            label = shorten(reference.label, plane.right - plane.left - 8, 11)
        width = text_width(label, 11) * 0.9
        places = [
            (x, y, (x, y - 11, x + width, y + 3))
            for y in (at - 5, at + 14)
            for x in (plane.right - width - 4, plane.left + 4)
            if plane.top - 8 < y < plane.bottom
        ]
        x, y, box = min(places, key=lambda place: sum(_overlap(place[2], other) for other in boxes))
        boxes.append(box)
        canvas.text("small alarm on-plot", x, y, label)


def _overlap(first: tuple[float, float, float, float], second: tuple[float, float, float, float]) -> float:
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    return max(width, 0) * max(height, 0)


def _dodge(curve: Curve, plane: _Plane) -> float:
    """How far beside each other the series stand, so that their intervals do not cover each other."""
    if len(curve.series) == 1:
        return 0.0
    places = [plane.x(x) for x in sorted({point.x for series in curve.series for point in series.points})]
    closest = min((second - first for first, second in pairwise(places)), default=60.0)
    return min(7.0, 0.6 * closest / len(curve.series))


def _marker(canvas: Canvas, x: float, y: float, index: int) -> None:
    canvas.shape(f"f{index}", x, y, _MARKERS[index])


def _tick_label(point: CurvePoint) -> str:
    return point.label or _grouped(point.x)


def _grouped(value: float) -> str:
    return f"{value:,.0f}".replace(",", "\u202f") if float(value).is_integer() else f"{value:g}"


def _polyline(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{number(x)} {number(y)}" for x, y in points)


def log_ticks(low: float, high: float) -> tuple[float, ...]:
    """Powers of ten from ``low`` to ``high``, both positive."""
    exponents = range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1)
    return tuple(float(10**exponent) if exponent < 0 else 10**exponent for exponent in exponents)


def linear_ticks(low: float, high: float) -> tuple[float, ...]:
    """Six round numbers at most, from ``low`` to ``high``."""
    span = high - low
    if span <= 0:
        return (low,)
    unit = 10 ** math.floor(math.log10(span / 5))
    step = next(factor * unit for factor in (1, 2, 5, 10) if span / (factor * unit) <= 5 + 1e-9)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return tuple(index * step for index in range(first, last + 1))
