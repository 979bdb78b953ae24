from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from pydantic import ValidationError

from device_tests.evidence import Proportion, ThreatResult, TransferCell
from device_tests.perturbation import Norm, Perturbation
from device_tests.release_rule import ReleaseRule, decide
from device_tests.report.document import (
    SCHEMA_PATH,
    DecisionReport,
    ParityReport,
    ReportDocument,
    RuleReport,
    by_source_of,
    cells_of,
    schema_json,
    threats_of,
)
from device_tests.report.figures import (
    IntervalPlot,
    IntervalRow,
    Mark,
    axis_range,
    contrast,
    difference_times_ten,
    heat_colors,
    heat_step,
)
from device_tests.report.fleet_figures import Example
from device_tests.report.render import (
    conclusion,
    control_verdict,
    count,
    difference_interval,
    duration,
    render_html,
    scientific,
    write_report,
)
from device_tests.threats import Threat
from device_tests.transfer import TargetJudgement
from exporters.measured import NotMeasured
from factory.idx import read_idx

GOLDEN = Path(__file__).with_name("golden") / "report-v1.json"
SAMPLE = Path(__file__).parents[1] / "factory/assets/fashion-mnist-sample/t10k-images-idx3-ubyte.xz"
HOSTILE = 'camera-<script>alert("3")</script>'


@pytest.fixture(scope="module")
def document() -> ReportDocument:
    """Three devices (one rejected, one with a hostile name), an un-keyed control, figures that are not measured."""
    return ReportDocument.model_validate_json(GOLDEN.read_bytes())


@pytest.fixture(scope="module")
def examples() -> tuple[Example, ...]:
    images = read_idx(SAMPLE)[:2, None]
    noise = np.random.default_rng(1).choice([-8, 8], images.shape)
    adversarial = np.clip(images.astype(np.int16) + noise, 0, 255).astype(np.uint8)
    return tuple(
        Example(
            device_id=device,
            source_id="base",
            attack="mi",
            label="Ankle boot",
            predicted="<img src=x onerror=alert(1)>",
            clean=clean,
            keyed=clean[:, ::-1],
            adversarial=attacked,
            difference=difference_times_ten(clean, attacked),
        )
        for device, clean, attacked in zip(("device-1", HOSTILE), images, adversarial, strict=True)
    )


@pytest.fixture(scope="module")
def page(document: ReportDocument, examples: tuple[Example, ...]) -> str:
    return render_html(document, examples)


class Reader(HTMLParser):
    """Collects the tags with their attributes, and the text, as a browser sees them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def changed(**changes: Any) -> dict[str, Any]:
    """The golden report as JSON values, with some of them replaced (``targets__0__clean=…``)."""
    values = json.loads(GOLDEN.read_bytes())
    for path, value in changes.items():
        *way, last = [int(part) if part.isdigit() else part for part in path.split("__")]
        place = values
        for part in way:
            place = place[part]
        place[last] = value
    return values


# The document


def test_the_published_schema_is_that_of_the_models() -> None:
    assert SCHEMA_PATH.read_text(encoding="utf-8") == schema_json()
    assert json.loads(SCHEMA_PATH.read_bytes()) == ReportDocument.model_json_schema()
    jsonschema.Draft202012Validator.check_schema(json.loads(SCHEMA_PATH.read_bytes()))


def test_a_report_is_valid_by_its_schema_and_comes_back_as_the_same_bytes(document: ReportDocument) -> None:
    jsonschema.validate(json.loads(document.to_bytes()), json.loads(SCHEMA_PATH.read_bytes()))
    assert document.to_bytes() == GOLDEN.read_bytes()


def test_figures_have_the_shape_of_the_evidence(document: ReportDocument) -> None:
    values = json.loads(document.to_bytes())
    assert document.base.clean == Proportion(2287, 2500)
    assert values["base"]["clean"] == Proportion(2287, 2500).to_json()
    control = document.sources[-1]
    assert (
        values["sources"][-1]["self_checks"] == NotMeasured("the strong attack was switched off for controls").to_json()
    )
    assert isinstance(control.self_checks, NotMeasured)


@pytest.mark.parametrize(
    "changes",
    [
        {"schema": 2},
        {"surprise": 1},
        {"created": "2030-01-31T12:00:00"},
        {"seconds": {"attack": float("nan")}},
        {"base__clean__successes": 2286},
        {"base__clean__interval": [0.1, 0.2]},
        {"base__clean": {"not_measured": "forgotten"}},
        {"base__digest": "short"},
        {"rule__tests": 1},
        {"sources__1__id": "base"},
        {"targets__1__id": "device-1"},
        {"targets__0__cells__0__source": "nobody"},
        {"targets__0__threats__0__threat": "T9"},
        {"targets__0__package": "../elsewhere"},
        {"targets__0__package": "/root/package"},
        {"targets__1__package": "devices/device-2/package"},
        {"targets__1__decision__released": True},
        {"targets__1__decision__reasons": []},
        {"targets__0__decision__conditions": []},
        {"targets": []},
    ],
)
def test_a_report_that_contradicts_itself_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ReportDocument.model_validate(changed(**changes))


def test_a_parity_that_is_not_finite_is_reported_as_null() -> None:
    parity = ParityReport(
        format="Core ML fp16",
        runtime="coreml-evaluator",
        n=256,
        max_relative_difference=float("inf"),
        limit=0.02,
        top1_agreement=0.5,
        top1_limit=0.995,
        passed=False,
    )
    assert json.loads(parity.model_dump_json())["max_relative_difference"] is None


EIGHT = Perturbation(Norm.LINF, 8 / 255)


def test_a_judgement_becomes_rows_with_the_per_image_worst_of_each_source() -> None:
    labels = np.array([0, 0, 0, 0, 1])
    predictions = {
        ("base", "pgd"): np.array([1, 0, 0, 0, 0]),
        ("base", "mi"): np.array([0, 1, 0, 0, 0]),
        ("twin", "pgd"): np.array([1, 1, 1, 0, 0]),
        ("twin", "mi"): np.array([1, 1, 1, 0, 0]),
    }
    weak, off = NotMeasured("pgd was too weak"), NotMeasured("not self-checked")
    figures = dict(zip(predictions, [weak, Proportion(1, 4), off, off], strict=True))
    base, twin = Threat.PUBLIC_BASE, Threat.SIBLING_DEVICE
    judgement = TargetJudgement(
        target="device-1",
        labels=labels,
        clean_predictions=np.array([0, 0, 0, 0, 0]),
        predictions=predictions,
        cells=tuple(
            TransferCell(source, base if source == "base" else twin, attack, "device-1", EIGHT, fooled)
            for (source, attack), fooled in figures.items()
        ),
        threats=(
            ThreatResult(base, "device-1", ("base",), Proportion(2, 4)),
            ThreatResult(twin, "device-1", ("twin",), off),
        ),
        worst_fooled=off,
    )
    # Two attacks fool one image each, not the same one; the fifth image was wrong before.
    assert [(row.source, row.threat, row.worst) for row in by_source_of(judgement)] == [
        ("base", "T0", Proportion(2, 4)),
        ("twin", "T2", off),
    ]
    assert [cell.fooled for cell in cells_of(judgement)] == list(figures.values())
    assert [(row.threat, row.sources, row.worst) for row in threats_of(judgement)] == [
        ("T0", ("base",), Proportion(2, 4)),
        ("T2", ("twin",), off),
    ]


def test_a_decision_and_its_rule_become_rows() -> None:
    rule = ReleaseRule(0.05, 0.10, 0.05, 0.05)
    row = RuleReport.of(rule, reasons=["because"], tests=2)
    assert (row.images_needed, row.limit, row.reasons, row.tests) == (298, 21, ("because",), 2)
    decision = decide(
        rule,
        base_accuracy=Proportion(95, 100),
        device_accuracy=Proportion(80, 100),
        parities={},
        worst_fooled=NotMeasured("the attack failed"),
    )
    report = DecisionReport.of(decision)
    assert not report.released
    assert report.test is None
    assert report.reasons == decision.reasons
    assert len(report.reasons) == 3


# The page


def test_the_page_asks_the_network_for_nothing_and_runs_no_script(page: str) -> None:
    reader = Reader(page)
    assert {tag for tag, _ in reader.tags}.isdisjoint({"script", "iframe", "object", "embed", "base", "form"})
    for tag, attributes in reader.tags:
        assert not any(name.startswith("on") or name == "style" for name in attributes), (tag, attributes)
        for name in ("src", "href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:")), (tag, attributes)
    assert "url(" not in page
    assert "@import" not in page
    policy = next(meta["content"] for meta in reader.all("meta") if "http-equiv" in meta)
    assert policy is not None
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")


def test_hostile_names_are_text(page: str) -> None:
    reader = Reader(page)
    assert HOSTILE in reader.text
    assert "<img src=x onerror=alert(1)>" in reader.text
    assert "<script" not in page


def test_the_same_report_gives_the_same_page(
    page: str, document: ReportDocument, examples: tuple[Example, ...]
) -> None:
    assert render_html(document, examples) == page


def test_every_section_and_every_target_is_there(page: str) -> None:
    reader = Reader(page)
    assert "2 of 3 devices released" in reader.text
    assert [section["id"] for section in reader.all("section")] == [
        "decisions", "transfer", "accuracy", "threats", "examples", "parity", "canaries", "self-checks", "rule", "run",
    ]  # fmt: skip
    assert [row["data-role"] for row in reader.all("tr") if "data-role" in row] == [*["device"] * 3, "control"]
    assert len(reader.all("img")) == 8
    assert all(image["alt"] for image in reader.all("img"))
    for heading in reader.all("th"):
        assert heading["scope"] in ("col", "row", "rowgroup")


def test_the_page_shows_what_the_document_says(page: str, document: ReportDocument) -> None:
    text = " ".join(Reader(page).text.split())
    for target in document.targets:
        assert target.recipe in text
        for condition in target.decision.conditions:
            assert condition.sentence in text
    for sentence in (*document.rule.reasons, *document.notes, document.command):
        assert sentence in text
    assert "a rule that releases it could not tell a keyed device from an un-keyed one" in text
    assert "verification.epsilon" in text
    for name, version in document.versions.items():
        assert f"{name}{version}" in text.replace(" ", "")


def test_what_was_not_measured_is_shown_with_its_reason(page: str) -> None:
    text = " ".join(Reader(page).text.split())
    assert "not measured: coremltools predicts on macOS only" in text
    assert "not measured: the strong attack was switched off for controls" in text
    # Four targets share the reason, which is printed once in each table that refers to it.
    assert text.count("not measured: mi was too weak on its own source guessed-1") == 1
    assert text.count("not measured: pgd on unkeyed-control was not self-checked") == 3


def test_no_percentage_in_a_table_stands_without_its_interval_and_n(page: str) -> None:
    cells = re.findall(r"<td class=\"(?:number|h\d+[^\"]*)\">(.*?)</td>", page, flags=re.DOTALL)
    measured = [cell for cell in cells if "\u202f%" in cell]
    assert len(measured) > 60
    for cell in measured:
        assert re.search(r"\d–\d+\.\d\u202f%", cell), cell
        assert re.search(r"n = \d", cell), cell


def test_a_report_of_rejected_devices_without_examples_is_rendered(document: ReportDocument) -> None:
    first = document.targets[1]
    unmeasured = first.model_copy(update={"worst_case": NotMeasured("no attack was run"), "cells": (), "by_source": ()})
    unmeasured = unmeasured.model_copy(
        update={"decision": first.decision.model_copy(update={"test": None}), "threats": (), "parity": ()}
    )
    rule = document.rule.model_copy(update={"tests": 1})
    lone = document.model_copy(update={"targets": (unmeasured,), "sources": (), "rule": rule})
    text = " ".join(Reader(render_html(lone, [])).text.split())
    assert "0 of 1 device released" in text
    assert "No device met every condition" in text
    assert "No example images were kept." in text
    assert "not measured: no attack was run" in text
    assert "not measured: no format was compared" in text
    assert "This report makes 1 such test." in text


def test_the_summary_names_who_was_released_and_what_the_control_says(document: ReportDocument) -> None:
    assert conclusion(document).startswith(f"device-1 and {HOSTILE} met every condition")
    assert "device-2 did not and got no signed package" in conclusion(document)
    assert "does not pass what the released devices passed" in control_verdict(document)
    control, device = document.targets[3], document.targets[1]

    def verdict(*targets: object) -> str:
        return control_verdict(document.model_copy(update={"targets": targets}))

    assert "No un-keyed control" in verdict(device)
    assert "no device withstands them either" in verdict(device, control)
    withstood = document.targets[0].decision.model_copy(update={"released": False})
    other = verdict(device.model_copy(update={"decision": withstood}), control)
    assert f"fails the acceptance test that {device.id} passed. No device is released, for other reasons." in other
    released = control.model_copy(update={"decision": document.targets[0].decision})
    assert "could not tell a keyed device from an un-keyed one" in verdict(device, released)
    untested = control.model_copy(update={"decision": control.decision.model_copy(update={"test": None})})
    assert "but not because of the attacks" in verdict(device, untested)


# Files


def test_both_files_are_written_and_hold_the_same_numbers(
    tmp_path: Path, page: str, document: ReportDocument, examples: tuple[Example, ...]
) -> None:
    write_report(tmp_path / "fleet", document, examples)
    assert sorted(path.name for path in (tmp_path / "fleet").iterdir()) == ["figures", "report.html", "report.json"]
    assert (tmp_path / "fleet/report.html").read_text(encoding="utf-8") == page
    assert ReportDocument.model_validate_json((tmp_path / "fleet/report.json").read_bytes()) == document


# Pictures and words


def test_heat_colours_can_be_read_in_light_and_dark() -> None:
    for dark in (False, True):
        colors = heat_colors(dark)
        assert len(set(colors)) == 11
        assert min(contrast(background, ink) for background, ink in colors) >= 4.5
    assert [heat_step(share) for share in (0.0, 0.04, 0.06, 0.98, 1.0)] == [0, 0, 1, 10, 10]
    assert contrast("#000000", "#ffffff") == pytest.approx(21)


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ([], (0.0, 1.0)),
        ([0.0], (0.0, 0.05)),
        ([1.0], (0.95, 1.0)),
        ([0.5], (0.5, 0.55)),
        ([0.885, 0.9255], (0.85, 0.95)),
        ([0.0, 0.518], (0.0, 0.6)),
        ([0.02, 0.99], (0.0, 1.0)),
    ],
)
def test_an_axis_ends_at_round_numbers(shares: list[float], expected: tuple[float, float]) -> None:
    assert axis_range(shares) == expected


def test_every_axis_holds_its_shares_and_has_few_ticks_with_one_at_each_end() -> None:
    for low in range(101):
        for high in range(low, 101):
            axis = axis_range([low / 100, high / 100])
            ticks = IntervalPlot((), (), *axis).ticks
            assert 0 <= axis[0] <= low / 100 + 1e-9
            assert high / 100 - 1e-9 <= axis[1] <= 1
            assert 2 <= len(ticks) <= 6
            assert (ticks[0], ticks[-1]) == pytest.approx(axis)


def test_an_interval_plot_places_the_estimate_between_its_ends_and_escapes_names() -> None:
    row = IntervalRow("device", "", Proportion(50, 100))
    plot = IntervalPlot.of([row], [Mark(0.25, "<p0>", "acceptable")], from_zero=True)
    assert (plot.low, plot.high) == (0.0, 0.6)
    strip = plot.strip(row)
    assert 'cx="83.33%"' in strip
    low, high = (float(end) for end in re.findall(r'class="interval" x1="([\d.]+)%" x2="([\d.]+)%"', strip)[0])
    assert low < 83.33 < high
    assert "&lt;p0&gt;" in plot.heading()
    assert "circle" not in plot.strip(IntervalRow("device", "", None, "not run"))


def test_the_difference_is_ten_times_the_change_around_grey() -> None:
    clean = np.array([[[0, 100, 255, 7]]], dtype=np.uint8)
    adversarial = np.array([[[8, 92, 240, 7]]], dtype=np.uint8)
    assert difference_times_ten(clean, adversarial).tolist() == [[[208, 48, 0, 128]]]


@pytest.mark.parametrize("shape", [(28, 28), (2, 8, 8), (1, 8, 9)])
def test_an_example_with_unlike_images_is_refused(shape: tuple[int, ...]) -> None:
    image, other = np.zeros((1, 8, 8), np.uint8), np.zeros(shape, np.uint8)
    with pytest.raises(ValueError, match="uint8 C×H×W"):
        Example("device-1", "base", "mi", "bag", "boot", image, image, image, other)
    with pytest.raises(ValueError, match="uint8 C×H×W"):
        Example("device-1", "base", "mi", "bag", "boot", image, image, image, image.astype(np.float32))


def test_large_colour_images_are_not_pixelated(document: ReportDocument) -> None:
    image = np.random.default_rng(0).integers(0, 256, (3, 160, 160), dtype=np.uint8)
    example = Example("device-1", "base", "mi", "cat", "dog", image, image, image, image)
    assert {picture["class"] for picture in Reader(render_html(document, [example])).all("img")} == {"large"}


def test_numbers_are_written_for_people() -> None:
    assert [duration(seconds) for seconds in (0.44, 59.96, 72, 7500)] == [
        "0.4\u202fs", "1\u202fmin 00\u202fs", "1\u202fmin 12\u202fs", "2\u202fh 05\u202fmin",
    ]  # fmt: skip
    assert [scientific(number) for number in (0.0, 1.24e-5, 3.9)] == ["0", "1.2·10⁻⁵", "3.9·10⁰"]
    assert count(1383400) == "1\u202f383\u202f400"
    # Newcombe's first example: 56/70 - 48/80 = 0.2, 95 % interval 0.0524 to 0.3339.
    assert difference_interval(Proportion(48, 80), Proportion(56, 70)) == "+5.2 to +33.4"
