"""A study's files: study.json, study.html (one self-contained page), study.md and every figure as an SVG file.

Rules: as for the fleet report – everything from outside is escaped, the page asks the network for nothing and runs no
script, the same study gives the same bytes. All files hold the same numbers, written the same way.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from device_tests.report.charts import NARROW, WIDE, draw, pictures_of, remarks_of
from device_tests.report.figure_files import FIGURES, Galleries, file_names, write_figures
from device_tests.report.figures import heat_step
from device_tests.report.render import Notes, page_environment, policy_hash, styled
from device_tests.report.study_document import (
    Bars,
    Block,
    Chart,
    Curve,
    Section,
    StudyDocument,
    Surface,
    Table,
    cells_of_block,
    methods_of,
    said,
    share_of,
    written_interval,
    written_n,
    written_share,
)
from device_tests.report.study_markdown import grid_of, references_of, render_markdown
from device_tests.report.svg import chart_css, inline
from exporters.measured import NotMeasured
from keys.files import write_atomic

STUDY_JSON = "study.json"
STUDY_HTML = "study.html"
STUDY_MARKDOWN = "study.md"


def write_study(folder: Path, document: StudyDocument, galleries: Galleries) -> None:
    """Write study.json, study.md, study.html and figures/*.svg into ``folder``, each whole or not at all.

    Everything is rendered before anything is written; figures of an earlier run are replaced. Raises ``ValueError`` for
    a gallery without its pictures and :class:`StorageError` if the disk is full.
    """
    page, text = render_study_html(document, galleries), render_markdown(document, figure_files(document))
    write_figures(folder / FIGURES, document.charts, galleries)
    write_atomic(folder / STUDY_JSON, document.to_bytes())
    write_atomic(folder / STUDY_MARKDOWN, text.encode())
    write_atomic(folder / STUDY_HTML, page.encode())


def figure_files(document: StudyDocument) -> tuple[str, ...]:
    """The path of every figure's file, relative to the study's folder, in the order of the figures."""
    return tuple(f"{FIGURES}/{name}" for name in file_names(document.charts))


def render_study_html(document: StudyDocument, galleries: Galleries) -> str:
    """Return the whole page; it depends on its two arguments alone."""
    environment = page_environment()
    filters: dict[str, Any] = environment.filters
    filters.update(
        share=written_share, bounds=written_interval, counted=written_n,
        said=said, step=lambda figure: heat_step(share_of(figure)),
        budget=lambda line: (line.part, line.images, line.steps, line.restarts, line.queries),
    )  # fmt: skip
    tests: dict[str, Any] = environment.tests
    tests["missing"] = lambda cell: isinstance(cell, NotMeasured)
    style = styled("study.css") + chart_css()
    page = environment.get_template("study.html.j2").render(
        document=document,
        style=Markup(style),
        style_hash=policy_hash(style),
        sections=_placed(document, galleries),
        pictures_of=lambda gallery: pictures_of(gallery, galleries),
        grid_of=grid_of,
        references_of=references_of,
        remarks_of=remarks_of,
        methods_of=lambda block: methods_of(cells_of_block(block)),
        new_notes=Notes,
        spec=json.dumps(document.spec, indent=2, ensure_ascii=False),
        json_name=STUDY_JSON,
    )
    return page.strip() + "\n"


@dataclass(frozen=True)
class _Placed:
    """A block on the page: its anchor, the file of its figure, and the figure for a page and for a phone."""

    block: Block
    anchor: str
    file: str
    frames: Markup


def _placed(document: StudyDocument, galleries: Galleries) -> list[tuple[Section, list[_Placed]]]:
    files = iter(figure_files(document))
    sections: list[tuple[Section, list[_Placed]]] = []
    index = 0
    for section in document.sections:
        places: list[_Placed] = []
        for block in section.blocks:
            index += 1
            file = "" if isinstance(block, Table) else next(files)
            # Heat maps and galleries are made of the page's own boxes, which suit any width.
            drawn = isinstance(block, Curve | Bars | Surface)
            frames = _frames(block, f"figure-{index}", galleries) if drawn else Markup("")
            places.append(_Placed(block, f"block-{index}", file, frames))
        sections.append((section, places))
    return sections


def _frames(chart: Chart, name: str, galleries: Galleries) -> Markup:
    wide, narrow = (inline(draw(chart, width, galleries), f"{name}-{width}") for width in (WIDE, NARROW))
    return Markup('<div class="wide">{}</div>\n<div class="narrow">{}</div>').format(wide, narrow)
