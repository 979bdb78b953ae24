"""SVG by hand: shapes and text with classes, one style for pages and for files, and the two frames they stand in.

Rules: text stays text; no ids but those of the title and the description; no style attribute, which a page's policy
forbids; the same input gives the same bytes. A file carries its own opaque paper and both colour schemes as plain
values, so that it can be read on any background and in viewers that know no CSS variables.

>>> wrap("a longer name than fits", 100, 12)
('a longer name', 'than fits')
>>> number(12.0), number(0.25), number(-0.04)
('12', '0.25', '-0.04')
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from markupsafe import Markup

from device_tests.report.figures import heat_colors

# Okabe and Ito's hues, which colour-blind readers can tell apart, moved to at least 4.5 : 1 against either paper.
SERIES_LIGHT = ("#0065a3", "#b84a00", "#00725a", "#96357a", "#7a6000", "#4a5362", "#00717d", "#8f1d1a")
SERIES_DARK = ("#6cb6f5", "#ff9a5c", "#4fd1a5", "#e9a0cf", "#e6cf5a", "#b9c2cf", "#63d3e0", "#ff9d92")

_FONT = '-apple-system,"Segoe UI",Roboto,"Noto Sans","Helvetica Neue","Liberation Sans",Arial,sans-serif'
_WIDE = 0.56
"""Width of a character in em, rather too much: nothing can be measured here."""
_PADDING = 20.0
_INVALID = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")


@dataclass(frozen=True)
class Scheme:
    """The colours of one scheme, ``#rrggbb``; every text colour reaches 4.5 : 1 on ``paper``."""

    paper: str
    ink: str
    soft: str
    grid: str
    axis: str
    limit: str
    stripe: str
    tint: str
    series: tuple[str, ...]
    heat: tuple[tuple[str, str], ...]


LIGHT = Scheme(
    "#ffffff", "#171c24", "#525c6b", "#e6e9ee", "#949dab", "#9c2118", "#949dab", "#dbe7f3", SERIES_LIGHT,
    heat_colors(False),
)  # fmt: skip
DARK = Scheme(
    "#171b21", "#e8ebf0", "#a6b0be", "#2b323c", "#6b7686", "#ff9d92", "#6b7686", "#223a52", SERIES_DARK,
    heat_colors(True),
)  # fmt: skip


@dataclass(frozen=True)
class Drawing:
    """A chart before it is framed: its size in pixels, its body, and what it says to whoever cannot see it."""

    width: float
    height: float
    body: Markup
    title: str
    description: str


class Canvas:
    """Collects shapes; positions are pixels from the top left corner, ``kind`` is one or more classes."""

    def __init__(self) -> None:
        self._parts: list[Markup] = []

    def line(self, kind: str, x1: float, y1: float, x2: float, y2: float) -> None:
        """Draw a straight line."""
        self._add('<line class="{}" x1="{}" y1="{}" x2="{}" y2="{}"/>', kind, *map(number, (x1, y1, x2, y2)))

    def rect(self, kind: str, x: float, y: float, width: float, height: float, radius: float = 0) -> None:
        """Draw a rectangle; ``radius`` rounds its corners."""
        sizes = map(number, (x, y, max(width, 0), max(height, 0), radius))
        self._add('<rect class="{}" x="{}" y="{}" width="{}" height="{}" rx="{}"/>', kind, *sizes)

    def path(self, kind: str, steps: str) -> None:
        """Draw a path; ``steps`` as in the attribute ``d``."""
        self._add('<path class="{}" d="{}"/>', kind, steps)

    def text(self, kind: str, x: float, y: float, text: str, anchor: str = "start") -> None:
        """Write a line of text; ``y`` is its base line."""
        self._add(
            '<text class="{}" x="{}" y="{}" text-anchor="{}">{}</text>', kind, number(x), number(y), anchor, plain(text)
        )

    def lines(self, kind: str, x: float, y: float, lines: tuple[str, ...], step: float, anchor: str = "start") -> None:
        """Write lines of text below each other, ``step`` pixels apart."""
        for index, text in enumerate(lines):
            self.text(kind, x, y + index * step, text, anchor)

    def image(self, x: float, y: float, width: float, height: float, uri: str, *, pixelated: bool) -> None:
        """Place a picture given as a ``data:`` URI."""
        kind = "pixels" if pixelated else "picture"
        places = map(number, (x, y, width, height))
        self._add(
            '<image class="{}" x="{}" y="{}" width="{}" height="{}" preserveAspectRatio="none" href="{}"/>',
            kind, *places, uri,
        )  # fmt: skip

    def hatch(self, x: float, y: float, width: float, height: float, step: float = 7) -> None:
        """Draw an outlined box full of diagonal lines: not measured."""
        strokes: list[str] = []
        for index in range(1, math.ceil((width + height) / step)):
            reach = index * step
            x1, y1 = (reach, 0.0) if reach <= width else (width, reach - width)
            x2, y2 = (0.0, reach) if reach <= height else (reach - height, height)
            strokes.append(f"M{number(x + x1)} {number(y + y1)}L{number(x + x2)} {number(y + y2)}")
        self.path("hatch", "".join(strokes))
        self.rect("hatch", x, y, width, height, 2)

    def shape(self, kind: str, x: float, y: float, steps: str) -> None:
        """Draw a path whose origin is moved to (x, y)."""
        self._add('<path class="{}" transform="translate({} {})" d="{}"/>', kind, number(x), number(y), steps)

    def open(self, tip: str) -> None:
        """Begin a group that shows ``tip`` where a pointer rests on it."""
        self._add("<g><title>{}</title>", plain(tip))

    def close(self) -> None:
        """End the group."""
        self._parts.append(Markup("</g>"))

    def place(self, body: Markup, y: float) -> None:
        """Add what another canvas drew, ``y`` pixels further down."""
        self._add('<g transform="translate(0 {})">{}</g>', number(y), body)

    @property
    def body(self) -> Markup:
        """Everything drawn so far."""
        return Markup("\n").join(self._parts)

    def _add(self, template: str, *values: object) -> None:
        self._parts.append(Markup(template).format(*values))


def number(value: float) -> str:
    """Write a position with two decimals at most."""
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def plain(text: str) -> str:
    """Leave out what no XML file may hold: control characters."""
    return _INVALID.sub("\ufffd", text)


def text_width(text: str, size: float) -> float:
    """Estimate the width of a text in pixels at this font size, rather too wide."""
    return _WIDE * size * len(text)


def shorten(text: str, width: float, size: float) -> str:
    """Cut a text that is wider than ``width`` and end it in an ellipsis."""
    fitting = max(1, int(width / (_WIDE * size)))
    return text if len(text) <= fitting else text[: fitting - 1].rstrip() + "…"


def wrap(text: str, width: float, size: float, limit: int = 99) -> tuple[str, ...]:
    """Break a text into at most ``limit`` lines of ``width`` pixels, between words and inside words that are too long.

    The last line ends in an ellipsis if there was more.
    """
    fitting = max(2, int(width / (_WIDE * size)))
    lines: list[str] = []
    for word in text.split():
        if lines and len(lines[-1]) + 1 + len(word) <= fitting:
            lines[-1] += f" {word}"
        else:
            lines += [word[start : start + fitting] for start in range(0, len(word), fitting)]
    if len(lines) > limit:
        rest = lines[limit - 1]
        lines = [*lines[: limit - 1], (rest if len(rest) < fitting else rest[: fitting - 1]) + "…"]
    return tuple(lines) or ("",)


def chart_css() -> str:
    """The rules of a chart inside a page: light, and dark on dark screens but not on paper."""
    dark = _rules(DARK, ".chart ")
    return f"{_FIXED}{_rules(LIGHT, '.chart ')}@media screen and (prefers-color-scheme:dark){{{dark}}}\n"


def inline(drawing: Drawing, name: str) -> Markup:
    """Frame a drawing for a page; ``name`` is unique on it."""
    return Markup(
        '<svg class="chart" viewBox="0 0 {} {}" role="img" aria-labelledby="{}-title {}-text" focusable="false">\n'
        '<title id="{}-title">{}</title>\n<desc id="{}-text">{}</desc>\n{}\n</svg>'
    ).format(
        number(drawing.width), number(drawing.height), name, name,
        name, plain(drawing.title), name, plain(drawing.description), drawing.body,
    )  # fmt: skip


def standalone(drawing: Drawing, caption: str) -> str:
    """Frame a drawing as a file of its own, with its title above and its caption below."""
    canvas = Canvas()
    heading, remarks = wrap(drawing.title, drawing.width, 17), wrap(caption, drawing.width, 11) if caption else ()
    top = _PADDING + 17 + 22 * (len(heading) - 1)
    below = top + 18 + drawing.height
    canvas.lines("heading", 0, _PADDING + 15, heading, 22)
    canvas.place(drawing.body, top + 16)
    canvas.lines("small soft", 0, below + 18, remarks, 15)
    width, height = drawing.width + 2 * _PADDING, below + (14 + 15 * len(remarks) if remarks else 0) + _PADDING
    style = f"{_FIXED}{_rules(LIGHT, '')}@media (prefers-color-scheme:dark){{{_rules(DARK, '')}}}"
    page = Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" class="chart" width="{}" height="{}" viewBox="{} 0 {} {}" '
        'role="img" aria-labelledby="title text">\n<title id="title">{}</title>\n<desc id="text">{}</desc>\n'
        '<style>{}</style>\n<rect class="paper" x="{}" y="0" width="{}" height="{}" rx="10"/>\n{}\n</svg>\n'
    ).format(
        number(width), number(height), number(-_PADDING), number(width), number(height),
        plain(drawing.title), plain(drawing.description), Markup(style),
        number(-_PADDING), number(width), number(height), canvas.body,
    )  # fmt: skip
    return str(page)


# Sizes and strokes, which are the same in both schemes.
_FIXED = (
    f".chart{{font:12px {_FONT.replace(chr(34), chr(39))};font-variant-numeric:tabular-nums}}"
    ".chart .heading{font-size:17px;font-weight:650}.chart .name{font-size:13px;font-weight:600}"
    ".chart .value{font-size:15px;font-weight:650}.chart .small{font-size:11px}.chart .strong{font-weight:650}"
    ".chart .line,.chart .trend,.chart .contour,.chart .halo{fill:none;stroke-linejoin:round}"
    ".chart .line{stroke-width:2}.chart .whisker,.chart .bar-interval{stroke-width:1.5}"
    ".chart .bar-halo{stroke-width:4.5;opacity:.85}"
    ".chart .trend{stroke-width:1.75;stroke-dasharray:2 4;stroke-linecap:round}"
    ".chart .band{opacity:.14}.chart .reference{stroke-width:1.5;stroke-dasharray:6 4}"
    ".chart .reference-band{opacity:.1}.chart .on-plot{paint-order:stroke;stroke-width:4;stroke-linejoin:round}"
    ".chart .hatch{fill:none;stroke-width:1}.chart .pixels{image-rendering:pixelated}"
    ".chart .ceiling{fill:none;stroke-width:2;stroke-dasharray:5 4}"
    ".chart .contour{stroke-width:1.25;stroke:#101317}.chart .halo{stroke-width:3;stroke:#ffffff;opacity:.75}"
    ".chart .level{fill:#101317;stroke:#ffffff;stroke-width:3;paint-order:stroke;font-size:11px;font-weight:650}"
    ".chart .frame{fill:none}.chart .open{stroke-width:1.5}\n"
)


def _rules(scheme: Scheme, scope: str) -> str:
    rules = {
        ".paper": f"fill:{scheme.paper}",
        "text": f"fill:{scheme.ink}",
        "text.soft": f"fill:{scheme.soft}",
        "text.alarm": f"fill:{scheme.limit}",
        ".on-plot": f"stroke:{scheme.paper}",
        ".grid": f"stroke:{scheme.grid}",
        ".axis": f"stroke:{scheme.axis}",
        ".frame": f"stroke:{scheme.axis}",
        ".hatch": f"stroke:{scheme.stripe}",
        ".reference": f"stroke:{scheme.limit}",
        ".reference-band": f"fill:{scheme.limit}",
        ".trend": f"stroke:{scheme.ink}",
        ".band": f"fill:{scheme.ink}",
        ".ceiling": f"stroke:{scheme.paper}",
        ".bar-interval": f"stroke:{scheme.ink}",
        ".bar-halo": f"stroke:{scheme.paper}",
    }
    css = "".join(f"{scope}{name}{{{rule}}}" for name, rule in rules.items())
    for index, color in enumerate(scheme.series):
        css += f"{scope}.s{index}{{stroke:{color}}}{scope}.f{index}{{fill:{color};stroke:{scheme.paper}}}"
        css += f"{scope}.o{index}{{fill:{scheme.paper};stroke:{color}}}"
    css += f"{scope}.o-tint{{fill:{scheme.tint}}}"
    for step, (back, ink) in enumerate(scheme.heat):
        css += f"{scope}.h{step}{{fill:{back}}}{scope}text.i{step}{{fill:{ink}}}"
        # The ceiling's dashes lie on the cell's own colour.
        css += f"{scope}.c{step}{{stroke:{ink}}}"
    return css
