"""The pictures of the report: interval plots as inline SVG, heat colours, images as PNG data URIs.

Rules: made by hand rather than by a plotting library, so that they follow the page's width and its light or dark
colours, need no style attribute (the page's policy forbids them), and the same numbers give the same bytes.

>>> heat_step(0.0), heat_step(0.5), heat_step(1.0)
(0, 5, 10)
>>> axis_range([0.912, 0.947])
(0.9, 0.95)
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from PIL import Image

from device_tests.evidence import Proportion

HEAT_STEPS = 11
"""Classes of the heat map: 0, 10, …, 100 %."""

# Low, middle and high fooling rates. High is the most saturated in both: darkest on paper, brightest at night.
_LIGHT = ("#f6f3ec", "#e9a268", "#8f1d1a")
_DARK = ("#23272f", "#87452a", "#ffb27a")
_INKS = ("#0b0d10", "#ffffff")


@dataclass(frozen=True)
class Mark:
    """A limit drawn across an interval plot; ``share`` in [0, 1], ``name`` short, ``meaning`` for the key below."""

    share: float
    name: str
    meaning: str


@dataclass(frozen=True)
class IntervalRow:
    """One line of an interval plot. ``reason`` says why there is no proportion, where there is none."""

    name: str
    note: str
    proportion: Proportion | None
    reason: str = ""


@dataclass(frozen=True)
class IntervalPlot:
    """Proportions with their intervals on one axis from ``low`` to ``high``, shares in [0, 1]."""

    rows: tuple[IntervalRow, ...]
    marks: tuple[Mark, ...]
    low: float
    high: float

    @classmethod
    def of(cls, rows: Sequence[IntervalRow], marks: Sequence[Mark], *, from_zero: bool) -> IntervalPlot:
        """Choose an axis that shows every interval and every mark, and zero where asked to."""
        shares = [mark.share for mark in marks] + [0.0] * from_zero
        for row in rows:
            if row.proportion is not None:
                shares.extend(row.proportion.interval)
        return cls(tuple(rows), tuple(marks), *axis_range(shares))

    @property
    def ticks(self) -> tuple[float, ...]:
        """Round shares along the axis, both ends among them."""
        steps = round((self.high - self.low) / 0.05)
        stride = next(stride for stride in (1, 2, 4, 5, 10, 20) if steps / stride <= 5 and steps % stride == 0)
        return tuple(self.low + 0.05 * index for index in range(0, steps + 1, stride))

    def strip(self, row: IntervalRow) -> Markup:
        """Draw one row: the axis, the limits, the interval, and the point at the estimate."""
        parts = [_line("axis", 0.0, 1.0, "50%", "50%")]
        parts += [_line("tick", self._at(tick), self._at(tick), "36%", "64%") for tick in self.ticks]
        parts += [_line("limit", self._at(mark.share), self._at(mark.share), "0", "100%") for mark in self.marks]
        if row.proportion is not None:
            low, high = row.proportion.interval
            parts.append(_line("interval", self._at(low), self._at(high), "50%", "50%"))
            parts.append(
                Markup('<circle class="point" cx="{}" cy="50%" r="5"/>').format(
                    _percent(self._at(row.proportion.value))
                )
            )
        return _svg("strip", 24, parts)

    def heading(self) -> Markup:
        """Name the limits, above the first row."""
        text = Markup('<text class="over" x="{}" y="14" text-anchor="middle">{}</text>')
        return _svg("scale", 18, [text.format(_percent(self._at(mark.share)), mark.name) for mark in self.marks])

    def scale(self) -> Markup:
        """Label the axis, below the last row."""
        parts = []
        for index, tick in enumerate(self.ticks):
            anchor = "start" if index == 0 else "end" if index == len(self.ticks) - 1 else "middle"
            label = f"{100 * tick:.0f}\u202f%"
            parts.append(
                Markup('<text x="{}" y="14" text-anchor="{}">{}</text>').format(_percent(self._at(tick)), anchor, label)
            )
        return _svg("scale", 18, parts)

    def _at(self, share: float) -> float:
        return (share - self.low) / (self.high - self.low)


def axis_range(shares: Iterable[float]) -> tuple[float, float]:
    """Return ends at whole steps of 5 % around the shares, inside [0, 1] and at least one step apart."""
    listed = list(shares) or [0.0, 1.0]
    low = math.floor(min(listed) / 0.05 + 1e-9)
    high = math.ceil(max(listed) / 0.05 - 1e-9)
    if high <= low:
        low, high = (low - 1, high) if high >= 20 else (low, low + 1)
    while (high - low) > 5 and not any((high - low) % s == 0 and (high - low) / s <= 5 for s in (2, 4, 5, 10)):
        low, high = (low - 1, high) if low > 0 else (low, high + 1)
    return round(low * 0.05, 10), round(high * 0.05, 10)


def heat_step(share: float) -> int:
    """Return the class of a share in [0, 1]: the nearest tenth."""
    return round(share * (HEAT_STEPS - 1))


def heat_colors(dark: bool) -> tuple[tuple[str, str], ...]:
    """Background and text colour of every heat class; the text is the ink with the greater contrast."""
    anchors = [_channels(color) for color in (_DARK if dark else _LIGHT)]
    colors = []
    for step in range(HEAT_STEPS):
        place = 2 * step / (HEAT_STEPS - 1)
        first = min(int(place), 1)
        mixed = anchors[first] + (anchors[first + 1] - anchors[first]) * (place - first)
        background = "#" + "".join(f"{round(channel):02x}" for channel in mixed)
        colors.append((background, max(_INKS, key=lambda ink: contrast(background, ink))))
    return tuple(colors)


def contrast(first: str, second: str) -> float:
    """Contrast ratio of two ``#rrggbb`` colours, 1 … 21 (WCAG 2.2, "relative luminance")."""
    levels = []
    for color in (first, second):
        channels = _channels(color) / 255
        linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        levels.append(float(linear @ np.array([0.2126, 0.7152, 0.0722])))
    return (max(levels) + 0.05) / (min(levels) + 0.05)


def image_uri(image: np.ndarray) -> str:
    """Return a ``data:`` URI with the PNG of a uint8 image C×H×W, C = 1 (grey) or 3 (RGB)."""
    picture = image[0] if image.shape[0] == 1 else np.moveaxis(image, 0, -1)
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(stream, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def difference_times_ten(clean: np.ndarray, adversarial: np.ndarray) -> np.ndarray:
    """Ten times the change of every value around mid-grey (128 = unchanged), clipped to uint8."""
    change = adversarial.astype(np.int16) - clean.astype(np.int16)
    return np.clip(128 + 10 * change, 0, 255).astype(np.uint8)


def _channels(color: str) -> np.ndarray:
    return np.array([int(color[index : index + 2], 16) for index in (1, 3, 5)], dtype=np.float64)


def _percent(share: float) -> str:
    return f"{100 * share:.2f}%"


def _line(kind: str, x1: float, x2: float, y1: str, y2: str) -> Markup:
    return Markup('<line class="{}" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(kind, _percent(x1), _percent(x2), y1, y2)


def _svg(kind: str, height: int, parts: Iterable[Markup]) -> Markup:
    # Hidden from screen readers: the numbers stand beside every strip as text.
    return Markup('<svg class="{}" width="100%" height="{}" aria-hidden="true" focusable="false">{}</svg>').format(
        kind, height, Markup("").join(parts)
    )
