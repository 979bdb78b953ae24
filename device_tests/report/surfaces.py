"""Loss-surface slices as small multiples: one colour scale for all panels, contour lines with their levels as text.

Rules: the colours run from dark to light, so that they keep their order in grey; the contours say the same in lines,
so that nothing hangs on colour. A flat panel says that it is flat.

>>> contour([[0.0, 0.0], [1.0, 1.0]], 0.5)
[((0.0, 0.5), (1.0, 0.5))]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from device_tests.report.figures import image_uri
from device_tests.report.study_document import Surface, SurfacePanel
from device_tests.report.svg import Canvas, Drawing, number, shorten, wrap

Point = tuple[float, float]

# Lightness rises all the way: 14, 30, 48, 67, 84, 95 (CIE L*).
_RAMP = ("#12233f", "#1f4a70", "#3f7682", "#8fa47a", "#e3cf7b", "#fdf3c4")
_LEVELS = 5


def draw_surface(surface: Surface, width: float) -> Drawing:
    """Lay the panels out in rows; the first row of values is at the bottom of its panel."""
    canvas = Canvas()
    low, high = _value_range(surface)
    columns = min(len(surface.panels), 1 if width < 500 else 3)
    gap, left = 22.0, 34.0
    panel_width = (width - left - gap * (columns - 1)) / columns
    side = min(panel_width, 240.0)
    y = 0.0
    for start in range(0, len(surface.panels), columns):
        heads = [wrap(panel.name, side, 12, 2) for panel in surface.panels[start : start + columns]]
        top = y + 6 + 15 * max(map(len, heads))
        for column, panel in enumerate(surface.panels[start : start + columns]):
            x = left + column * (side + gap)
            canvas.lines("strong", x, top - 8 - 15 * (len(heads[column]) - 1), heads[column], 15)
            _panel(canvas, surface, panel, x, top, side, low, high)
            if column == 0:
                canvas.text("small soft", x - 6, top + 9, _signed(surface.y_range[1]), "end")
                canvas.text("small soft", x - 6, top + side, _signed(surface.y_range[0]), "end")
        y = top + side + 62
    canvas.text("small soft", 0, y, shorten(f"→ {surface.x_label}", width, 11))
    canvas.text("small soft", 0, y + 15, shorten(f"↑ {surface.y_label}", width, 11))
    y = _scale(canvas, surface, y + 28, min(width, 320.0), low, high)
    lines = [f"{panel.name}: {summary(panel)}" for panel in surface.panels]
    description = f"{surface.value_label} over {surface.x_label} and {surface.y_label}. " + "; ".join(lines) + "."
    return Drawing(width, y, canvas.body, surface.title, description)


def summary(panel: SurfacePanel) -> str:
    """Write the lowest, the middle and the highest value of a panel."""
    values = np.array(panel.values)
    middle = values[values.shape[0] // 2, values.shape[1] // 2]
    return f"lowest {values.min():.3g}, middle {middle:.3g}, highest {values.max():.3g}"


def contour(values: Sequence[Sequence[float]], level: float) -> list[tuple[Point, Point]]:
    """Return the line segments along which a grid has this value, by marching squares (Lorensen and Cline 1987, in 2D).

    Points are (column, row) in grid units; a cell with two diagonal corners above is cut by its mean.
    """
    segments: list[tuple[Point, Point]] = []
    for row, (lower, upper) in enumerate(pairwise(values)):
        for column in range(len(lower) - 1):
            corners = (lower[column], lower[column + 1], upper[column + 1], upper[column])
            places: tuple[Point, ...] = (
                (column, row), (column + 1, row), (column + 1, row + 1), (column, row + 1),
            )  # fmt: skip
            crossings = [
                _between(places[edge], places[(edge + 1) % 4], corners[edge], corners[(edge + 1) % 4], level)
                for edge in range(4)
                if (corners[edge] > level) != (corners[(edge + 1) % 4] > level)
            ]
            if len(crossings) == 4 and (sum(corners) / 4 > level) != (corners[0] > level):
                crossings = [crossings[3], crossings[0], crossings[1], crossings[2]]
            pairs = zip(crossings[::2], crossings[1::2], strict=True)
            segments += [(min(pair), max(pair)) for pair in pairs]
    return segments


def _between(first: Point, second: Point, low: float, high: float, level: float) -> Point:
    share = (level - low) / (high - low)
    return (float(first[0] + share * (second[0] - first[0])), float(first[1] + share * (second[1] - first[1])))


def _value_range(surface: Surface) -> tuple[float, float]:
    values = [value for panel in surface.panels for row in panel.values for value in row]
    return min(values), max(values)


def _levels(low: float, high: float) -> tuple[float, ...]:
    """Round values between the ends, about five."""
    span = high - low
    if span <= 0:
        return ()
    unit = 10 ** math.floor(math.log10(span / _LEVELS))
    step = next(factor * unit for factor in (1, 2, 5, 10) if span / (factor * unit) <= _LEVELS + 1)
    first, last = math.floor(low / step + 1e-9) + 1, math.ceil(high / step - 1e-9) - 1
    return tuple(index * step for index in range(first, last + 1))


def _panel(
    canvas: Canvas, surface: Surface, panel: SurfacePanel, x: float, y: float, side: float, low: float, high: float
) -> None:
    values = np.array(panel.values)
    rows, columns = values.shape
    shades = (_refined(values)[::-1] - low) / (high - low) if high > low else np.zeros_like(values)
    canvas.image(x, y, side, side, image_uri(_colors(shades)), pixelated=False)
    labels: list[Point] = []
    for level in _levels(low, high):
        segments = [
            tuple((x + point[0] / (columns - 1) * side, y + side - point[1] / (rows - 1) * side) for point in segment)
            for segment in contour(panel.values, level)
        ]
        if not segments:
            continue
        steps = "".join(
            f"M{number(first[0])} {number(first[1])}L{number(second[0])} {number(second[1])}"
            for first, second in segments
        )
        canvas.path("halo", steps)
        canvas.path("contour", steps)
        _label(canvas, f"{level:g}", [segment[0] for segment in segments], labels, (x, y, side))
    canvas.rect("frame", x, y, side, side)
    canvas.text("small soft", x, y + side + 14, _signed(surface.x_range[0]))
    canvas.text("small soft", x + side, y + side + 14, _signed(surface.x_range[1]), "end")
    numbers = f"{values.min():.3g} to {values.max():.3g}"
    flat = high > low and not any(values.min() < level < values.max() for level in _levels(low, high))
    canvas.text("small", x + side / 2, y + side + 30, f"{numbers}, no contour" if flat else numbers, "middle")


def _label(
    canvas: Canvas, text: str, places: Sequence[Point], labels: list[Point], frame: tuple[float, float, float]
) -> None:
    x, y, side = frame
    inside = [
        place
        for place in places
        if x + 16 < place[0] < x + side - 16 and y + 14 < place[1] < y + side - 14
    ]  # fmt: skip

    def clearance(place: Point) -> float:
        return min((math.dist(place, other) for other in labels), default=side)

    best = max(inside, key=clearance, default=None)
    if best is not None and clearance(best) > 26:
        labels.append(best)
        canvas.text("level", best[0], best[1] + 4, text, "middle")


def _scale(canvas: Canvas, surface: Surface, y: float, width: float, low: float, high: float) -> float:
    """Draw the colour scale and return where it ends."""
    canvas.image(0, y, width, 12, image_uri(_colors(np.linspace(0, 1, 64)[None])), pixelated=True)
    canvas.rect("frame", 0, y, width, 12)
    canvas.text("small soft", 0, y + 26, f"{low:.3g}")
    canvas.text("small soft", width, y + 26, f"{high:.3g}", "end")
    lines = wrap(surface.value_label, max(width, 300.0), 11, 3)
    canvas.lines("small soft", 0, y + 42, lines, 14)
    return y + 44 + 14 * (len(lines) - 1) + 6


def _signed(value: float) -> str:
    return f"{value:g}".replace("-", "−")


def _refined(values: np.ndarray) -> np.ndarray:
    """Fill a grid linearly between its points, so that the picture's corners are the grid's."""

    def along(rows: np.ndarray) -> np.ndarray:
        points = np.linspace(0, rows.shape[1] - 1, max(2, min(96, 6 * (rows.shape[1] - 1))))
        return np.stack([np.interp(points, np.arange(rows.shape[1]), row) for row in rows])

    return along(along(values).T).T


def _colors(shades: np.ndarray) -> np.ndarray:
    """Shades in [0, 1], H×W, as a uint8 picture 3×H×W."""
    anchors = np.array([[int(color[start : start + 2], 16) for start in (1, 3, 5)] for color in _RAMP], dtype=float)
    places = shades * (len(_RAMP) - 1)
    channels = [np.interp(places, np.arange(len(_RAMP)), anchors[:, channel]) for channel in range(3)]
    return np.rint(np.stack(channels)).astype(np.uint8)
