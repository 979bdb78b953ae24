"""Figures as SVG files: what they are called and how a folder of them is replaced.

>>> from device_tests.report.study_document import Gallery
>>> file_names([Gallery(name="a", title="Images at ε = 8/255", caption="", items=())])
('01-images-at-8-255.svg',)
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from device_tests.report.charts import WIDE, Pictures, draw, remarks_of
from device_tests.report.study_document import Chart
from device_tests.report.svg import standalone
from keys.files import folder_being_written

FIGURES = "figures"
"""Name of the folder, beside the page."""

Galleries = Mapping[str, Sequence[Pictures]]
"""The pictures of each gallery by its name, one for each of its items."""


def write_figures(folder: Path, charts: Sequence[Chart], galleries: Galleries) -> None:
    """Write every figure as an SVG file; what else was in the folder is gone afterwards."""
    files = {
        name: standalone(draw(chart, WIDE, galleries), remarks_of(chart))
        for name, chart in zip(file_names(charts), charts, strict=True)
    }
    with folder_being_written(folder) as part:
        for name, text in files.items():
            (part / name).write_text(text, encoding="utf-8")


def file_names(charts: Sequence[Chart]) -> tuple[str, ...]:
    """Name the files of these figures: a number, then the title in plain letters."""
    slugs = [re.sub(r"[^a-z0-9]+", "-", chart.title.lower())[:48].strip("-") or chart.kind for chart in charts]
    return tuple(f"{index:02d}-{slug}.svg" for index, slug in enumerate(slugs, start=1))
