from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

from device_tests.evidence import Proportion
from device_tests.report.charts import NARROW, WIDE, Pictures, draw, remarks_of
from device_tests.report.document import ClassResult, ReportDocument
from device_tests.report.figure_files import file_names, write_figures
from device_tests.report.figures import contrast
from device_tests.report.fleet_figures import Example, classes_by_target, fleet_charts
from device_tests.report.render import render_html, write_report
from device_tests.report.study_document import (
    BarGroup,
    Bars,
    Chart,
    Curve,
    CurvePoint,
    FleetFigure,
    HeatMap,
    HeatRow,
    Reference,
    Series,
    StudyDocument,
    Surface,
    SurfacePanel,
    Trend,
    TrendPoint,
    cells_of_block,
    written,
)
from device_tests.report.surfaces import contour, summary
from device_tests.report.svg import DARK, LIGHT, Canvas, chart_css, inline, shorten, standalone, text_width, wrap
from exporters.measured import NotMeasured

GOLDEN = Path(__file__).with_name("golden")
SVG = "{http://www.w3.org/2000/svg}"


def parsed(chart: Chart, width: float = WIDE) -> ET.Element:
    image = np.zeros((1, 28, 28), np.uint8)
    galleries = {chart.name: [Pictures(image, image)] * len(chart.items)} if chart.kind == "gallery" else {}
    return ET.fromstring(standalone(draw(chart, width, galleries), remarks_of(chart)))


def shapes(root: ET.Element, kind: str) -> list[ET.Element]:
    return [element for element in root.iter() if kind in (element.get("class") or "").split()]


def visible(root: ET.Element) -> str:
    return "\n".join(element.text or "" for element in root.iter(f"{SVG}text"))


@pytest.fixture(scope="module")
def study() -> StudyDocument:
    return StudyDocument.model_validate_json((GOLDEN / "study-v1.json").read_bytes())


def curve(*figures: Proportion | NotMeasured, **changes: object) -> Curve:
    """One series at x = 1, 2, 4, … with these rates; ``changes`` replace fields."""
    points = tuple(CurvePoint(x=2.0**index, figure=figure) for index, figure in enumerate(figures))
    values: dict[str, object] = {
        "title": "a curve", "caption": "", "x_label": "k", "y_label": "rate", "x_scale": "log",
        "series": ({"name": "keyed", "points": points},),
    }  # fmt: skip
    return Curve.model_validate(values | changes)


# Every figure


def test_every_kind_of_figure_is_whole_xml_with_a_title_a_description_and_no_reference_outside(
    study: StudyDocument,
) -> None:
    assert {chart.kind for chart in study.charts} == {"curve", "heat", "bars", "gallery", "surface"}
    for chart in study.charts:
        for width in (WIDE, NARROW):
            root = parsed(chart, width)
            assert root.tag == f"{SVG}svg"
            assert [child.tag for child in root[:2]] == [f"{SVG}title", f"{SVG}desc"]
            assert root[0].text == chart.title
            assert root[1].text
            for element in root.iter():
                assert (element.get("href") or "data:").startswith("data:")
                assert element.get("style") is None
            numbers = [float(root.get("width", "0")), float(root.get("height", "0"))]
            assert [float(part) for part in root.get("viewBox", "").split()[2:]] == numbers


def test_no_text_leaves_its_figure(study: StudyDocument) -> None:
    for chart in study.charts:
        for width in (WIDE, NARROW):
            root = parsed(chart, width)
            left, _, across, height = (float(part) for part in root.get("viewBox", "").split())
            for text in root.iter(f"{SVG}text"):
                size = 17 if "heading" in (text.get("class") or "") else 11
                # The estimate is rather too wide, so a little more is allowed for.
                half = 0.85 * text_width(text.text or "", size)
                x, y = float(text.get("x", "0")), float(text.get("y", "0"))
                start = {"start": x, "middle": x - half / 2, "end": x - half}[text.get("text-anchor", "start")]
                assert start >= left - 1, (chart.title, width, text.text)
                assert start + half <= left + across + 1, (chart.title, width, text.text)
                assert y <= height


def test_an_inline_figure_has_ids_of_its_own_and_the_same_body(study: StudyDocument) -> None:
    chart = study.charts[1]
    drawing = draw(chart, WIDE, {})
    text = inline(drawing, "figure-7")
    assert set(re.findall(r' id="([^"]+)"', text)) == {"figure-7-title", "figure-7-text"}
    assert str(drawing.body) in text
    assert str(drawing.body) in standalone(drawing, "")


def test_files_are_numbered_and_named_after_their_titles(study: StudyDocument, tmp_path: Path) -> None:
    charts = study.charts[:2]
    assert file_names(charts) == ("01-fooling-rate-source-by-target.svg", "02-fooling-rate-against.svg")
    strange = charts[0].model_copy(update={"title": "ε → ∞ /../"})
    assert file_names([strange]) == ("01-heat.svg",)
    write_figures(tmp_path / "figures", charts, {})
    first = {path.name: path.read_bytes() for path in (tmp_path / "figures").iterdir()}
    write_figures(tmp_path / "figures", charts, {})
    assert {path.name: path.read_bytes() for path in (tmp_path / "figures").iterdir()} == first
    assert max(map(len, first.values())) < 40_000


def test_hostile_text_stays_text() -> None:
    hostile = '</text><script>alert(1)</script>&"\x00\x1b'
    chart = curve(Proportion(1, 4), title=hostile, caption=hostile, x_label=hostile, y_label=hostile)
    root = parsed(chart)
    assert not [element for element in root.iter() if element.tag.endswith("script")]
    assert root[0].text == hostile.replace("\x00", "\ufffd").replace("\x1b", "\ufffd")


def test_colours_can_be_told_from_the_paper_and_text_can_be_read() -> None:
    for scheme in (LIGHT, DARK):
        for ink in (scheme.ink, scheme.soft, scheme.limit, *scheme.series):
            assert contrast(ink, scheme.paper) >= 4.5
        for back, ink in scheme.heat:
            assert contrast(back, ink) >= 4.5
        assert contrast(scheme.axis, scheme.paper) >= 2.5
        assert len(set(scheme.series)) == 8


def test_the_style_has_both_schemes_and_no_variables() -> None:
    css = chart_css()
    assert "var(" not in css
    assert "url(" not in css
    assert LIGHT.series[0] in css.partition("@media")[0]
    assert DARK.series[0] in css.partition("@media screen and (prefers-color-scheme:dark)")[2]


# Curves


def test_a_curve_shows_values_intervals_and_the_gap_of_what_was_not_measured() -> None:
    chart = curve(Proportion(10, 100), NotMeasured("it crashed"), Proportion(40, 100), Proportion(60, 100))
    root = parsed(chart)
    (line,) = [element for element in shapes(root, "line") if element.tag == f"{SVG}path"]
    assert (line.get("d") or "").count("M") == 2
    tips = [title.text for title in root.iter(f"{SVG}title")][1:]
    assert tips == [f"keyed, {2**index}: {written(cell)}" for index, cell in enumerate(cells_of_block(chart))]
    assert shapes(root, "hatch")
    whiskers = [element for element in shapes(root, "whisker") if element.get("x1") == element.get("x2")]
    assert len(whiskers) == 3
    # Higher rates lie higher, and an interval holds its value.
    heights = [float(element.get("y1", "0")) for element in whiskers]
    assert heights == sorted(heights, reverse=True)
    assert {"0", "1", "2", "4", "8", "k, logarithmic", "rate", "keyed", "not measured"} <= set(
        visible(root).split("\n")
    )


def test_series_that_share_a_place_stand_beside_each_other_with_markers_of_their_own() -> None:
    points = (CurvePoint(x=1, figure=Proportion(1, 2)), CurvePoint(x=2, figure=Proportion(1, 2)))
    names = [f"series {index}" for index in range(8)]
    root = parsed(curve(series=tuple(Series(name=name, points=points) for name in names)))
    whiskers = [element for element in shapes(root, "whisker") if element.get("x1") == element.get("x2")]
    places = [float(element.get("x1", "0")) for element in whiskers]
    assert len(set(places)) == len(places) == 16
    markers = {element.get("d") for index in range(8) for element in shapes(root, f"f{index}")}
    assert len(markers) == 8


def test_dashed_lines_are_labelled_and_a_trend_is_said_to_be_fitted() -> None:
    chart = curve(
        Proportion(1, 4),
        Proportion(1, 2),
        references=(Reference(label="p0", at=0.05), Reference(label="control", at=Proportion(9, 10))),
        trends=(
            Trend(
                name="trend", formula="a line", points=tuple(
                    TrendPoint(x=x, value=0.5, low=0.4, high=0.6) for x in (1, 10_000)
                ),
            ),
        ),
    )  # fmt: skip
    root = parsed(chart)
    assert "p0, 0.05" in visible(root)
    assert f"control, {written(Proportion(9, 10))}" in visible(root)
    assert "trend (fitted)" in visible(root)
    assert "10\u202f000" in visible(root)
    assert "“trend” is fitted, not measured: a line" in remarks_of(chart)
    assert len(shapes(root, "reference")) == 2
    assert len(shapes(root, "reference-band")) == len(shapes(root, "band")) == 1


def test_one_point_is_a_curve_too() -> None:
    assert "0" in visible(parsed(curve(Proportion(0, 5))))


# Heat maps, bars, surfaces, galleries


def test_a_heat_map_marks_the_target_itself_and_hatches_what_is_missing() -> None:
    rate = Proportion(3, 4)
    chart = HeatMap(
        title="h", caption="",
        rows=(HeatRow(name="base", threat="T0"), HeatRow(name="one", threat="T2"), HeatRow(name="self", threat="T5")),
        columns=("one", "two"),
        cells=((rate, NotMeasured("why")), (rate, rate), (rate, rate)),
    )  # fmt: skip
    root = parsed(chart)
    # The diagonal, both cells of T5, and the legend.
    assert len(shapes(root, "ceiling")) == 4
    assert visible(root).count("[0.301, 0.954]") == visible(root).count("n = 4") == 5
    assert visible(root).count("not measured") == 2
    assert "base → two: not measured: why" in [title.text for title in root.iter(f"{SVG}title")]
    # A class that is called like a target is no ceiling.
    plain = chart.model_copy(update={"rows": tuple(HeatRow(name=row.name) for row in chart.rows)})
    assert not shapes(parsed(plain), "ceiling")


def test_bars_are_as_long_as_their_rates() -> None:
    fleet = FleetFigure(mean=0.5, low=0.4, high=0.6, devices=10, images=300, method="t")
    chart = Bars(
        title="b", caption="", value_label="rate", series=("keyed", "un-keyed"),
        groups=(
            BarGroup(name="a class with a rather long name of its own", cells=(Proportion(1, 4), fleet)),
            BarGroup(name="dog", cells=(NotMeasured("few"), Proportion(1, 1))),
        ),
        references=(Reference(label="limit", at=0.25),),
    )  # fmt: skip
    for width in (WIDE, NARROW):
        root = parsed(chart, width)
        bars = [
            float(element.get("width", "0"))
            for group in root.iter(f"{SVG}g")
            if group.get("transform") is None
            for element in group.iter(f"{SVG}rect")
            if "hatch" not in (element.get("class") or "")
        ]
        assert bars == pytest.approx([bars[2] / 4, bars[2] / 2, bars[2]], abs=0.02)
        for words in ("0.250 [0.046, 0.699] n = 4", "0.500 [0.400, 0.600] 10 × 300 img.", "limit, 0.25"):
            assert words in visible(root)


def test_contours_run_where_the_grid_has_their_value() -> None:
    grid = [[float(x + 10 * y) for x in range(4)] for y in range(4)]
    for level in (0.5, 5.0, 17.3):
        for start, end in contour(grid, level):
            for x, y in (start, end):
                assert x + 10 * y == pytest.approx(level)
    assert contour(grid, 100.0) == []
    saddle = [[1.0, 0.0], [0.0, 1.0]]
    assert len(contour(saddle, 0.4)) == len(contour(saddle, 0.6)) == 2
    assert set(contour(saddle, 0.4)) != set(contour(saddle, 0.6))


def test_panels_share_one_scale_and_a_flat_one_says_so() -> None:
    rising = SurfacePanel(name="rising", values=((0.0, 1.0, 2.0), (1.0, 2.0, 3.0), (2.0, 3.0, 4.0)))
    flat = SurfacePanel(name="flat", values=((1.2, 1.2), (1.2, 1.21)))
    chart = Surface(
        title="s", caption="", x_label="x", y_label="y", value_label="loss over 8 images", x_range=(-1, 1),
        y_range=(-2, 2), panels=(rising, flat),
    )  # fmt: skip
    text = visible(parsed(chart)).split("\n")
    assert {"0 to 4", "1.2 to 1.21, no contour", "−1", "−2", "loss over 8 images", "rising", "flat"} <= set(text)
    assert summary(rising) == "lowest 0, middle 2, highest 4"
    level = chart.model_copy(update={"panels": (SurfacePanel(name="level", values=((1.0, 1.0), (1.0, 1.0))),)})
    assert "1 to 1" in visible(parsed(level))


@pytest.mark.parametrize("shape", [(28, 28), (2, 8, 8), (1, 8, 9)])
def test_pictures_that_do_not_fit_each_other_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="uint8 C×H×W"):
        Pictures(np.zeros((1, 8, 8), np.uint8), np.zeros(shape, np.uint8))


def test_a_hatch_stays_in_its_box() -> None:
    canvas = Canvas()
    canvas.hatch(10, 20, 30, 8)
    lines = re.findall(r"M([\d.]+) ([\d.]+)L([\d.]+) ([\d.]+)", str(canvas.body))
    assert len(lines) == 5
    for x1, y1, x2, y2 in (map(float, line) for line in lines):
        assert 10 <= x2 <= x1 <= 40
        assert 20 <= y1 <= y2 <= 28
        assert x1 - x2 == pytest.approx(y2 - y1)


def test_text_is_cut_and_broken_by_its_width() -> None:
    assert shorten("short", 200, 12) == "short"
    assert shorten("a very long label", 50, 12) == "a very…"
    assert wrap("", 100, 12) == ("",)
    assert wrap("unbreakablelongword", 60, 12) == ("unbreaka", "blelongw", "ord")
    assert wrap("one two three four five", 60, 12, 2) == ("one two", "three…")


# The fleet report's figures


@pytest.fixture(scope="module")
def fleet() -> ReportDocument:
    return ReportDocument.model_validate_json((GOLDEN / "report-v1.json").read_bytes())


def test_a_fleet_report_has_its_figures_beside_it(fleet: ReportDocument, tmp_path: Path) -> None:
    image = np.zeros((3, 8, 8), np.uint8)
    example = Example("device-1", "base", "mi", "Bag", "Shirt", image, image, image, image)
    figures = [NotMeasured("too few"), *(Proportion(index, 12) for index in range(1, len(fleet.data.labels)))]
    classes = tuple(
        ClassResult(label=label, worst=worst) for label, worst in zip(fleet.data.labels, figures, strict=True)
    )
    targets = tuple(target.model_copy(update={"by_class": classes}) for target in fleet.targets)
    document = fleet.model_copy(update={"targets": targets})
    write_report(tmp_path, document, [example])
    charts, _ = fleet_charts(document, [example])
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == list(file_names(charts))
    assert [chart.kind for chart in charts] == ["heat", "bars", "bars", "heat", "gallery"]
    for chart, name in zip(charts, file_names(charts), strict=True):
        text = "".join(ET.parse(tmp_path / "figures" / name).getroot().itertext())
        assert all(written(cell) in text for cell in cells_of_block(chart))
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Worst-case fooling rate by class" in page
    assert "not measured: too few" in page


def test_a_fleet_report_without_classes_or_examples_has_fewer_figures(fleet: ReportDocument) -> None:
    targets = tuple(target.model_copy(update={"by_class": ()}) for target in fleet.targets)
    document = fleet.model_copy(update={"targets": targets})
    assert classes_by_target(document) is None
    assert [chart.kind for chart in fleet_charts(document, [])[0]] == ["heat", "bars", "bars"]
    assert "Worst-case fooling rate by class" not in render_html(document, [])
