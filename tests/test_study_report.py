from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from pydantic import ValidationError

from device_tests.evidence import Proportion
from device_tests.report.charts import Pictures
from device_tests.report.document import BaseReport, DataReport, Machine
from device_tests.report.study_document import (
    STUDY_SCHEMA_PATH,
    BarGroup,
    Bars,
    BudgetLine,
    Curve,
    CurvePoint,
    DifferenceFigure,
    FleetFigure,
    Gallery,
    GalleryItem,
    HeatMap,
    HeatRow,
    Highlight,
    Reference,
    Section,
    Series,
    StudyDocument,
    Surface,
    SurfacePanel,
    Table,
    Trend,
    TrendPoint,
    cells_of_block,
    study_schema_json,
    written,
)
from device_tests.report.study_markdown import escaped
from device_tests.report.study_render import figure_files, render_study_html, write_study
from exporters.measured import NotMeasured
from factory.idx import read_idx

GOLDEN = Path(__file__).with_name("golden") / "study-v1.json"
SAMPLE = Path(__file__).parents[1] / "factory/assets/fashion-mnist-sample/t10k-images-idx3-ubyte.xz"
HOSTILE = 'rank <script>alert("16")</script> | *M* = `4` & more'
CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
METHOD = "Cochran-Cox t over devices and images, logit scale, 95 %"


def fleet(mean: float, half: float = 0.031, devices: int = 10, images: int = 1000) -> FleetFigure:
    low, high = max(0.0, round(mean - half, 4)), min(1.0, round(mean + half, 4))
    return FleetFigure(mean=mean, low=low, high=high, devices=devices, images=images, method=METHOD)


def example() -> StudyDocument:
    """A study as it could be: every kind of block, missing figures, a hostile name."""
    recipes = ("plain", "full fine-tune, M = 4", "full fine-tune, M = 16", "LoRA r = 16, M = 4", HOSTILE)
    crashed = NotMeasured("the attack crashed on one batch")
    weak = NotMeasured("MI+DI came only within 9 points of AutoAttack on its own source")
    against_plain = DifferenceFigure(
        difference=-0.03, low=-0.061, high=0.002, devices=(10, 3), images=1000, method="Cochran-Cox t, square-and-add"
    )
    table = Table(
        title="Accuracy under attack by recipe",
        caption="Share of all test images that stay right. Ten targets and 1,000 images; screened rows say so.",
        columns=(
            "Recipe", "Perturbation", "Cells", "Clean", "T0 AutoAttack", "T1 AutoAttack", "T1 ensemble",
            "Against plain", "Budget",
        ),
        rows=tuple(
            (
                recipe, "L∞ 4/255" if index % 2 else "L2 0.5", "screened" if index == 4 else "whole",
                fleet(0.81 - 0.03 * index, 0.012), fleet(0.62 - 0.11 * index),
                Proportion(151 - 30 * index, 300), weak if index == 3 else fleet(0.41 - 0.07 * index, 0.044),
                against_plain if index else "the reference",
                "100 iterations, 4 attacks; 5,000 queries where Square was run",
            )
            for index, recipe in enumerate(recipes)
        ),
    )  # fmt: skip
    ks = (1, 2, 3, 4, 6, 8)
    collusion = Curve(
        title="Fooling rate against colluding devices",
        caption="Ensemble MI+DI on k devices and the base, ε = 8/255; other devices of the fleet are judged.",
        x_label="colluding devices k",
        y_label="fooling rate",
        x_scale="log",
        series=tuple(
            Series(
                name=name,
                points=tuple(
                    CurvePoint(
                        x=k,
                        figure=crashed
                        if (name, k) == ("un-keyed", 6)
                        else fleet(round(start + slope * math.log2(k), 3)),
                    )
                    for k in ks
                ),
            )
            for name, start, slope in (
                ("keyed, LoRA", 0.31, 0.08), ("keyed, whole model", 0.16, 0.055), ("un-keyed", 0.74, 0.03),
            )
        ),
        references=(
            Reference(label="p0, acceptable", at=0.25),
            Reference(label="white-box ceiling", at=Proportion(297, 300)),
        ),
        trends=(
            Trend(
                name="keyed, LoRA trend",
                formula="logit of the rate linear in log k, fitted to k = 1 … 8",
                points=tuple(
                    TrendPoint(
                        x=k,
                        value=(middle := round(1 / (1 + math.exp(0.8 - 0.36 * math.log2(k))), 4)),
                        low=round(max(0.0, middle - 0.01 * math.log2(k)), 4),
                        high=round(min(1.0, middle + 0.01 * math.log2(k)), 4),
                    )
                    for k in (1, 2, 4, 8, 16, 32, 64, 128, 1000, 10_000)
                ),
            ),
        ),
    )  # fmt: skip
    epsilon = Curve(
        title="Fooling rate against ε",
        caption="Per-image worst over MI+DI, PGD and AutoAttack, made on the public base.",
        x_label="ε (L∞)",
        y_label="fooling rate",
        x_scale="linear",
        series=tuple(
            Series(
                name=name,
                points=tuple(
                    CurvePoint(x=e, label=f"{e}/255", figure=Proportion(round(264 * scale * e / (e + 5)), 264))
                    for e in (1, 2, 4, 8, 16)
                ),
            )
            for name, scale in (("device-1", 0.9), ("device-2", 0.82), ("device-3", 1.0), ("un-keyed control", 1.2))
        ),
        references=(Reference(label="chance", at=0.9),),
    )  # fmt: skip
    names = ("device-1", "device-2", "device-3", "camera <b>4</b>", "un-keyed")
    sources = (
        HeatRow(name="base", threat="T0", note="the public base"),
        HeatRow(name="guessed-key", threat="T1", note="the same recipe with a guessed key"),
        HeatRow(name="base + 4 guessed keys", threat="T1", note="ensemble MI+DI"),
        *(HeatRow(name=name, threat="T2", note=f"extracted {name}") for name in names[:-1]),
        HeatRow(name="un-keyed", threat="control", note="the same recipe without a key"),
        HeatRow(name="learned stand-in", threat="T4", note="5,000 scores of the target"),
    )  # fmt: skip
    heat = HeatMap(
        title="Fooling rate, source by target",
        caption="The per-image worst over all attacks made on one source.",
        rows=sources,
        columns=names,
        cells=tuple(
            tuple(
                weak if (row, column) == (2, 3)
                else crashed if row == 8 and column == 4
                else Proportion(263, 264) if source.name == name
                else Proportion(round(264 * (0.12 + 0.09 * row + 0.05 * column)), 264)
                for column, name in enumerate(names)
            )
            for row, source in enumerate(sources)
        ),
    )  # fmt: skip
    bars = Bars(
        title="Which classes fall",
        caption="Per-image worst over all attacks of the threats that the rule counts, one device of ten.",
        value_label="fooling rate",
        series=("keyed", "un-keyed"),
        groups=tuple(
            BarGroup(
                name=name,
                cells=(
                    Proportion(4 + (7 * index) % 23, 31),
                    NotMeasured("fewer than ten images of this class are right when clean")
                    if index == 6
                    else Proportion(20 + (5 * index) % 11, 31),
                ),
            )
            for index, name in enumerate(CLASSES)
        ),
        references=(Reference(label="whole test set, keyed", at=fleet(0.476)),),
    )  # fmt: skip
    grid = [step / 7 - 1 for step in range(15)]
    surface = Surface(
        title="Loss around one image",
        caption="A model that hides its gradients is flat or torn; one that can be attacked is smooth and rises.",
        x_label="along the gradient, in ε",
        y_label="along a random direction, in ε",
        value_label="cross-entropy of the true class, in nats, mean over 32 images",
        x_range=(-1.0, 1.0),
        y_range=(-1.0, 1.0),
        panels=tuple(
            SurfacePanel(
                name=name,
                values=tuple(
                    tuple(
                        round(base + rise * (1 + x) ** 2 + bend * y * y + wave * math.sin(9 * x * y), 4) for x in grid
                    )
                    for y in grid
                ),
            )
            for name, base, rise, bend, wave in (
                ("base", 0.2, 0.9, 0.3, 0.0), ("device-1, keyed", 0.3, 0.55, 0.8, 0.1),
                ("masked on purpose", 1.1, 0.0, 0.0, 0.01),
            )
        ),
    )  # fmt: skip
    gallery = Gallery(
        name="examples",
        title="Adversarial images",
        caption="Made on the public base at ε = 8/255. The difference is ten times the change around mid-grey.",
        items=tuple(
            GalleryItem(
                label=label, source_prediction=source, target_prediction=target, note=f"MI+DI, base → {device}"
            )
            for label, source, target, device in (
                ("Ankle boot", "Sneaker", "Ankle boot", "device-1"), ("Pullover", "Coat", "Coat", "device-2"),
                ("Trouser", "Dress", "Trouser", "camera <b>4</b>"), ("Trouser", "Shirt", "Shirt", "device-3"),
            )
        ),
    )  # fmt: skip
    return StudyDocument(
        schema=1,
        keyfoundry="0.1.0",
        created=datetime(2030, 1, 31, 12, 0, tzinfo=UTC),
        study="table1",
        title="Do attacks made without a device's key carry over to it?",
        conclusion=(
            "The best attack without the key fools keyed devices about half as often as un-keyed ones, and LoRA "
            "devices more often than fully fine-tuned ones: the recipe matters more than the key.",
            "A re-initialised control without a key loses nearly as little, so most of the gain is merely new weights.",
        ),
        highlights=(
            Highlight(label="Worst transfer, keyed", figure=fleet(0.476), note="base + 4 guessed keys, MI+DI"),
            Highlight(label="Worst transfer, un-keyed", figure=fleet(0.812)),
            Highlight(label="White-box ceiling", figure=Proportion(297, 300)),
            Highlight(label="Square, 5,000 queries", figure=crashed),
        ),
        command="keyfoundry study table1 --budget standard --out studies/table1",
        spec={"study": "table1", "budget": "standard", "recipes": list(recipes), "epsilon": ["linf:4/255", "l2:0.5"]},
        versions={"keyfoundry": "0.1.0", "torch": "2.15.0", "numpy": "2.3.5"},
        seed=7,
        machine=Machine(system="Linux x86_64", processor="AMD EPYC", cores=2),
        seconds={"train sources": 5213.2, "attack": 8123.0, "judge": 412.7},
        bases=(
            BaseReport(
                name="cifar10.safetensors", digest="ab" * 32, parameters=2_822_602, clean=Proportion(5225, 8000)
            ),
        ),
        data=(
            DataReport(
                name="cifar10", digest="cd" * 32, train=45_000, validation=5_000, test=8_000, skipped=0, labels=CLASSES
            ),
        ),
        budgets=(
            BudgetLine(part="AutoAttack", images="1,000", steps="100 a restart", restarts="1", queries="none"),
            BudgetLine(part="Square", images="200", steps="none", restarts="1", queries="5,000 an image"),
        ),
        sections=(
            Section(
                title="Table I at this scale",
                prose=("Beside the paper's two attackers stand the ensemble and both controls, which it lacks.",),
                blocks=(table,),
            ),
            Section(title="Transfer", prose=("# not a heading", "1. not a list"), blocks=(heat, epsilon, bars)),
            Section(
                title="Collusion",
                prose=("What more devices buy the attacker. Where the trend runs on to 10,000, nothing is measured.",),
                blocks=(collusion,),
            ),
            Section(title="Canaries", prose=("Run before any figure is believed.",), blocks=(surface,)),
            Section(title="Examples", prose=(), blocks=(gallery,)),
        ),
    )  # fmt: skip


def pictures() -> dict[str, list[Pictures]]:
    images = read_idx(SAMPLE)[:4, None]
    noise = np.random.default_rng(1).choice([-8, 8], images.shape)
    attacked = np.clip(images.astype(np.int16) + noise, 0, 255).astype(np.uint8)
    return {"examples": [Pictures(clean, adversarial) for clean, adversarial in zip(images, attacked, strict=True)]}


class Reader(HTMLParser):
    """Collects the tags with their attributes, and the text, as a browser sees them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._text: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self._text.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self._text).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def document() -> StudyDocument:
    return example()


@pytest.fixture(scope="module")
def folder(document: StudyDocument, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("studies") / "table1"
    write_study(folder, document, pictures())
    return folder


@pytest.fixture(scope="module")
def page(folder: Path) -> Reader:
    return Reader((folder / "study.html").read_text(encoding="utf-8"))


def every_figure(document: StudyDocument) -> list[str]:
    cells = [cell for block in document.blocks for cell in cells_of_block(block)]
    cells += [highlight.figure for highlight in document.highlights]
    return [written(cell) for cell in cells if not isinstance(cell, NotMeasured)]


def changed(path: str, value: Any) -> dict[str, Any]:
    """The example as JSON values with one of them replaced (``sections/0/blocks/0/title``)."""
    values = json.loads(GOLDEN.read_bytes())
    *way, last = [int(part) if part.isdigit() else part for part in path.split("/")]
    place = values
    for part in way:
        place = place[part]
    place[last] = value
    return values


# The document


def test_the_published_schema_is_that_of_the_models() -> None:
    assert STUDY_SCHEMA_PATH.read_text(encoding="utf-8") == study_schema_json()
    jsonschema.Draft202012Validator.check_schema(json.loads(STUDY_SCHEMA_PATH.read_bytes()))


def test_a_study_is_valid_by_its_schema_and_comes_back_as_the_same_bytes(document: StudyDocument) -> None:
    assert document.to_bytes() == GOLDEN.read_bytes()
    jsonschema.validate(json.loads(GOLDEN.read_bytes()), json.loads(STUDY_SCHEMA_PATH.read_bytes()))
    assert StudyDocument.model_validate_json(GOLDEN.read_bytes()) == document


def test_the_statistics_own_value_becomes_a_figure() -> None:
    @dataclass(frozen=True)
    class Rate:
        mean: float = 0.31
        low: float = 0.27
        high: float = 0.35
        devices: int = 10
        images: int = 300
        method: str = "t over devices"

    cell = BarGroup(name="cat", cells=(Rate(), Proportion(3, 4))).cells[0]  # type: ignore[arg-type]
    assert cell == FleetFigure(mean=0.31, low=0.27, high=0.35, devices=10, images=300, method="t over devices")
    assert written(cell) == "0.310 [0.270, 0.350] (10 devices × 300 images)"


@pytest.mark.parametrize("bare", ["0.221", "22.1 %", "22%", ".5", "−0.03", "≈ 0.4", "< 0,5"])
def test_a_rate_without_n_and_interval_cannot_stand_in_a_table(bare: str) -> None:
    with pytest.raises(ValidationError, match="bare number"):
        Table(title="t", caption="", columns=("a",), rows=((bare,),))
    with pytest.raises(ValidationError):
        Table(title="t", caption="", columns=("a",), rows=((0.221,),))  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["16", "8/255", "L2 0.5", "patch 25 %", "0.4 s", "p = 0.03", "1,000 × 20", "", "–"])
def test_names_budgets_and_times_can_stand_in_a_table(text: str) -> None:
    assert Table(title="t", caption="", columns=("a",), rows=((text,),)).rows == ((text,),)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("schema", 2),
        ("surprise", 1),
        ("created", "2030-01-31T12:00:00"),
        ("sections/0/blocks/0/columns", ["one"]),
        ("sections/0/blocks/0/kind", "chart"),
        ("sections/0/blocks/0/rows/0/3/low", 0.9),
        ("sections/0/blocks/0/rows/0/3/mean", "0.81"),
        ("sections/0/blocks/0/rows/0/5/interval", [0.1, 0.2]),
        ("sections/0/title", "Transfer"),
        ("sections/1/blocks/0/cells/0", []),
        ("sections/1/blocks/0/rows", [{"name": "base", "threat": "T0", "note": ""}]),
        ("sections/1/blocks/1/series/0/points/1/x", 1.0),
        ("sections/1/blocks/1/series/1/name", "device-1"),
        ("sections/1/blocks/2/groups/0/cells", []),
        ("sections/2/blocks/0/series/0/points/0/x", 0.0),
        ("sections/3/blocks/0/panels/0/values/3", [1.0]),
        ("sections/3/blocks/0/panels/0/values/3/3", float("nan")),
        ("sections/3/blocks/0/x_range", [1.0, 1.0]),
        ("sections/4/blocks/0/name", "../elsewhere"),
        ("sections", []),
        ("budgets", []),
    ],
)
def test_a_study_that_contradicts_itself_is_refused(path: str, value: Any) -> None:
    with pytest.raises(ValidationError):
        StudyDocument.model_validate(changed(path, value))


# The files


def test_every_file_is_written_and_figures_of_an_earlier_run_are_gone(document: StudyDocument, tmp_path: Path) -> None:
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures/99-old.svg").write_text("old")
    write_study(tmp_path, document, pictures())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figures", "study.html", "study.json", "study.md"]
    assert sorted(f"figures/{path.name}" for path in (tmp_path / "figures").iterdir()) == list(figure_files(document))
    assert len(document.charts) == 6


def test_the_same_study_gives_the_same_bytes(document: StudyDocument, folder: Path, tmp_path: Path) -> None:
    write_study(tmp_path, StudyDocument.model_validate_json(document.to_bytes()), pictures())
    names = ["study.json", "study.md", "study.html", *figure_files(document)]
    assert all((tmp_path / name).read_bytes() == (folder / name).read_bytes() for name in names)


def test_a_gallery_without_its_pictures_is_refused_before_anything_is_written(
    document: StudyDocument, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="4 items and 1 sets of pictures"):
        write_study(tmp_path, document, {"examples": pictures()["examples"][:1]})
    assert list(tmp_path.iterdir()) == []


def test_every_rate_stands_with_its_interval_and_n_in_the_page_and_in_markdown(
    document: StudyDocument, page: Reader, folder: Path
) -> None:
    markdown = (folder / "study.md").read_text(encoding="utf-8")
    figures = every_figure(document)
    assert len(figures) > 100
    for figure in figures:
        assert figure in page.text
        assert figure in markdown


def test_every_rate_stands_in_its_figures_file(document: StudyDocument, folder: Path) -> None:
    for chart, name in zip(document.charts, figure_files(document), strict=True):
        text = " ".join("".join(ET.parse(folder / name).getroot().itertext()).split())
        for cell in cells_of_block(chart):
            assert written(cell) in text, (name, cell)


def test_what_was_not_measured_is_shown_with_its_reason(page: Reader, folder: Path) -> None:
    markdown = (folder / "study.md").read_text(encoding="utf-8")
    for reason in (
        "the attack crashed on one batch",
        "MI+DI came only within 9 points of AutoAttack on its own source",
    ):
        assert f"not measured: {reason}" in page.text
        assert f"not measured: {reason}" in markdown


def test_prose_header_and_budgets_are_there(document: StudyDocument, page: Reader, folder: Path) -> None:
    markdown = (folder / "study.md").read_text(encoding="utf-8")
    for text in (document.title, document.command, *document.conclusion, document.study, document.budgets[1].queries):
        assert text in page.text
        assert text in markdown
    for section in document.sections:
        assert section.title in page.text
        assert f"## {section.title}\n" in markdown
    spec = re.search(r"```json\n(.*?)\n```", markdown, flags=re.DOTALL)
    assert spec is not None
    assert json.loads(spec[1]) == document.spec
    assert "Cochran-Cox t over devices and images, logit scale; Wilson" in page.text


# The page


def test_the_page_asks_the_network_for_nothing_and_runs_no_script(page: Reader, folder: Path) -> None:
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "iframe", "object", "embed", "base", "form"})
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") or name == "style" for name in attributes), (tag, attributes)
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:")), (tag, attributes)
    source = (folder / "study.html").read_text(encoding="utf-8")
    assert "url(" not in source
    assert "@import" not in source


def test_hostile_names_are_text_in_every_file(document: StudyDocument, page: Reader, folder: Path) -> None:
    assert HOSTILE in page.text
    assert "camera <b>4</b>" in page.text
    assert not page.all("b")
    markdown = (folder / "study.md").read_text(encoding="utf-8")
    outside_code = re.sub(r"```.*?```", "", markdown, flags=re.DOTALL)
    assert re.search(r"(?<!\\)<(?!/?sup>)", outside_code) is None
    assert escaped(HOSTILE) in markdown
    assert "\\# not a heading" in markdown
    assert "1\\. not a list" in markdown
    for name in figure_files(document):
        tags = {element.tag.rpartition("}")[2] for element in ET.parse(folder / name).getroot().iter()}
        assert tags <= {"svg", "title", "desc", "style", "rect", "g", "path", "line", "text", "image"}


def test_headings_contents_and_figures_can_be_reached_without_sight(document: StudyDocument, page: Reader) -> None:
    ids = [attributes["id"] for _, attributes in page.tags if attributes.get("id")]
    assert len(ids) == len(set(ids))
    links = {link["href"] for link in page.all("a")}
    assert {f"#block-{index}" for index in range(1, len(document.blocks) + 1)} <= links
    assert {link[1:] for link in links if link} <= set(ids)
    drawn = [attributes for attributes in page.all("svg") if attributes.get("role") == "img"]
    # Two curves, one bar chart, one surface: each for a page and for a phone.
    assert len(drawn) == 8
    for attributes in drawn:
        assert set((attributes["aria-labelledby"] or "").split()) <= set(ids)
    assert all(image["alt"] for image in page.all("img"))
    assert all(heading["scope"] in ("col", "row") for heading in page.all("th"))


def test_a_study_of_one_table_is_rendered(document: StudyDocument) -> None:
    table = Table(title="Only", caption="", columns=("a",), rows=())
    lone = document.model_copy(
        update={"sections": (Section(title="One", prose=(), blocks=(table,)),), "highlights": (), "conclusion": ()}
    )
    assert "Only" in Reader(render_study_html(lone, {})).text
