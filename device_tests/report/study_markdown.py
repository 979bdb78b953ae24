"""study.md: the study for GitHub and for a terminal – the same numbers as the page, figures as links to their files.

Rules: what came from outside is escaped, so that no name becomes markup; a rate is written with its interval and n;
why something was not measured stands under its table.

>>> escaped("a|b <i> *c*")
'a\\\\|b \\\\<i\\\\> \\\\*c\\\\*'
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence

from device_tests.report.charts import remarks_of
from device_tests.report.render import Notes, count, duration
from device_tests.report.study_document import (
    Bars,
    Block,
    Cell,
    Chart,
    Curve,
    DifferenceFigure,
    Gallery,
    HeatMap,
    StudyDocument,
    Surface,
    Table,
    TableCell,
    cells_of_block,
    methods_of,
    reference_text,
    said,
    written,
)
from device_tests.report.surfaces import summary
from exporters.measured import NotMeasured

_SPECIAL = re.compile(r"([\\`*_\[\]<>|~$&])")
_AT_START = re.compile(r"^(\d*)([#+=.)-])")


def render_markdown(document: StudyDocument, files: Sequence[str]) -> str:
    """Return the text; ``files`` are the paths of the figures in their order, relative to it."""
    paths = iter(files)
    parts = [f"# {escaped(document.title)}"]
    parts.append(
        f"Study `{_code(document.study)}`, {document.created:%Y-%m-%d %H:%M} UTC, Keyfoundry "
        f"{escaped(document.keyfoundry)}, seed {document.seed}."
    )
    parts += [_paragraph(sentence) for sentence in document.conclusion]
    parts += _highlights(document)
    for section in document.sections:
        parts.append(f"## {escaped(section.title)}")
        parts += [_paragraph(paragraph) for paragraph in section.prose]
        for block in section.blocks:
            parts += _block(block, "" if isinstance(block, Table) else next(paths))
    parts += _made(document)
    return "\n\n".join(filter(None, parts)) + "\n"


def escaped(text: str) -> str:
    """Write a text so that Markdown takes nothing in it for markup, on one line."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))


def grid_of(chart: Chart) -> tuple[tuple[str, ...], tuple[tuple[str | Cell | None, ...], ...]]:
    """Return a curve's, a bar chart's or a surface's numbers as a table: its columns, and rows of text and rates.

    None where a series has no point.
    """
    if isinstance(chart, Curve):
        labels = {point.x: point.label or f"{point.x:g}" for line in chart.series for point in line.points}
        by_series = [{point.x: point.figure for point in line.points} for line in chart.series]
        rows = [(labels[x], *(points.get(x) for points in by_series)) for x in sorted(labels)]
        return (chart.x_label, *(line.name for line in chart.series)), tuple(rows)
    if isinstance(chart, Bars):
        return ("", *chart.series), tuple((group.name, *group.cells) for group in chart.groups)
    if isinstance(chart, Surface):
        return ("Panel", "Values"), tuple((panel.name, summary(panel)) for panel in chart.panels)
    return (), ()


def references_of(chart: Chart) -> tuple[str, ...]:
    """Say what each dashed line of a figure stands for."""
    return tuple(map(reference_text, chart.references)) if isinstance(chart, Curve | Bars) else ()


def _paragraph(text: str) -> str:
    return _AT_START.sub(r"\1\\\2", escaped(text))


def _figure(cell: Cell | DifferenceFigure) -> str:
    # A rate's own brackets make no link: a space follows them.
    return escaped(written(cell)) if isinstance(cell, NotMeasured) else written(cell)


def _code(text: str) -> str:
    return " ".join(text.replace("`", "\u2019").split())


def _fenced(text: str, language: str = "") -> str:
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _highlights(document: StudyDocument) -> list[str]:
    lines = [
        f"- {escaped(item.label)}: **{_figure(item.figure)}**" + (f", {escaped(item.note)}" if item.note else "")
        for item in document.highlights
    ]
    return ["\n".join(lines)] if lines else []


def _block(block: Block, file: str) -> list[str]:
    heading = f"### {escaped(block.title)}"
    if isinstance(block, Table):
        remarks = " ".join(filter(None, (block.caption, methods_of(cells_of_block(block)))))
        return [heading, _table(block.columns, block.rows), _paragraph(remarks)]
    parts = [heading, f"![{escaped(block.title)}]({file})", _paragraph(remarks_of(block))]
    if isinstance(block, HeatMap):
        names = [f"{row.name} ({row.threat})" if row.threat else row.name for row in block.rows]
        rows = [(name, *cells) for name, cells in zip(names, block.cells, strict=True)]
        return [*parts, _table((f"{block.row_label} ↓ {block.column_label} →", *block.columns), rows)]
    if isinstance(block, Gallery):
        lines = [f"- {escaped(f'{item.label}: {said(item)} ({item.note})')}" for item in block.items]
        return [*parts, "\n".join(lines)]
    columns, rows = grid_of(block)
    references = [f"- {escaped(text)}" for text in references_of(block)]
    return [*parts, _table(columns, rows), "\n".join(references)]


def _table(columns: Sequence[str], rows: Iterable[Sequence[TableCell | None]]) -> str:
    notes = Notes()

    def cell(value: TableCell | None) -> str:
        if value is None:
            return "not run"
        if isinstance(value, str):
            return escaped(value)
        if isinstance(value, NotMeasured):
            return f"not measured<sup>{notes.mark(value.reason)}</sup>"
        return _figure(value)

    lines = [[escaped(column) for column in columns], ["---"] * len(columns), *([cell(v) for v in row] for row in rows)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    reasons = [f"<sup>{letters}</sup> not measured: {escaped(reason)}" for reason, letters in notes.reasons.items()]
    return "\n\n".join([table, *reasons])


def _made(document: StudyDocument) -> list[str]:
    machine = document.machine
    lines = [
        f"- Base: {escaped(base.name)}, {count(base.parameters)} parameters, clean accuracy {_figure(base.clean)}, "
        f"SHA-256 `{base.digest[:16]}…`"
        for base in document.bases
    ]
    lines += [
        f"- Data: {escaped(data.name)}, {count(data.train)} training, {count(data.validation)} validation, "
        f"{count(data.test)} test images, {count(data.skipped)} skipped, SHA-256 `{data.digest[:16]}…`"
        for data in document.data
    ]
    lines.append(
        f"- Machine: {escaped(machine.system)}, {escaped(machine.processor)}, {machine.cores} "
        f"core{'' if machine.cores == 1 else 's'}"
    )
    lines.append("- Versions: " + ", ".join(f"{escaped(name)} {escaped(v)}" for name, v in document.versions.items()))
    budgets = [(line.part, line.images, line.steps, line.restarts, line.queries) for line in document.budgets]
    times = [(stage, duration(seconds)) for stage, seconds in document.seconds.items()]
    times.append(("total", duration(sum(document.seconds.values()))))
    return [
        "## How this was made",
        _fenced(document.command, "sh"),
        "\n".join(lines),
        "### Budgets",
        _table(("Part", "Images", "Steps", "Restarts", "Queries"), budgets),
        "### Time",
        _table(("Stage", "Time"), times),
        "### Spec",
        _fenced(json.dumps(document.spec, indent=2, ensure_ascii=False), "json"),
    ]
