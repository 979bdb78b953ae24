from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from device_tests.report.charts import Pictures
from device_tests.report.document import ReportDocument
from device_tests.report.figures import contrast, difference_times_ten
from device_tests.report.fleet_figures import Example
from device_tests.report.render import write_report
from device_tests.report.study_document import StudyDocument
from device_tests.report.study_render import write_study
from factory.idx import read_idx

GOLDEN = Path(__file__).with_name("golden") / "report-v1.json"
STUDY = Path(__file__).with_name("golden") / "study-v1.json"
SAMPLE = Path(__file__).parents[1] / "factory/assets/fashion-mnist-sample/t10k-images-idx3-ubyte.xz"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on the PATH"),
]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The report's address on disk: three devices and a control, one grey and one colour example."""
    folder = tmp_path_factory.mktemp("fleet")
    document = ReportDocument.model_validate_json(GOLDEN.read_bytes())
    grey = read_idx(SAMPLE)[0][None]
    color = np.random.default_rng(0).integers(0, 256, (3, 160, 160), dtype=np.uint8)
    examples = [
        Example(
            "device-1", "base", "mi", "Bag", "Shirt", image, image[:, ::-1], image, difference_times_ten(image, image)
        )
        for image in (grey, color)
    ]
    write_report(folder, document, examples)
    return (folder / "report.html").as_uri()


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study with every kind of figure."""
    folder = tmp_path_factory.mktemp("study")
    images = read_idx(SAMPLE)[:4, None]
    pictures = [Pictures(image, np.roll(image, 1)) for image in images]
    write_study(folder, StudyDocument.model_validate_json(STUDY.read_bytes()), {"examples": pictures})
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield started
        started.close()


@pytest.fixture(params=[(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")], ids=str)
def page(request: pytest.FixtureRequest, browser: Browser) -> Iterator[Page]:
    width, scheme = request.param
    opened = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
    yield opened
    opened.close()


def test_the_report_opens_from_disk_whole_and_quietly(page: Page, report: str) -> None:
    complaints: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(report, wait_until="load")

    assert complaints == []
    assert [url for url in requests if not url.startswith("data:")] == [report]
    assert page.title() == "Fleet 00112233445566ff · Keyfoundry report"
    assert page.locator("h1").inner_text() == "Keyfoundry fleet report"
    assert page.locator("h2").all_inner_texts() == [
        "Decisions", "Transfer, source by target", "Clean accuracy", "Threats and the worst case", "Examples",
        "Export parity", "Signs of gradient masking", "Self-checks of the attacks", "Release rule", "How this was made",
    ]  # fmt: skip
    assert page.locator(".headline").inner_text() == "2 of 3 devices released"
    assert page.locator("tr[data-role=device]").count() == 3
    assert page.locator("tr[data-role=control]").count() == 1
    assert page.locator("table.heat tbody tr").count() == 6
    assert page.locator("script").count() == 0

    images = page.locator("img")
    assert images.count() == 8
    assert images.evaluate_all("all => all.every(image => image.complete && image.naturalWidth > 0)")


def test_the_page_never_scrolls_sideways(page: Page, report: str) -> None:
    page.goto(report)
    overflow = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert overflow == 0
    # Nothing is cut off either: whatever is wider than the page stands in a box that scrolls by itself.
    outside = page.evaluate(
        """[...document.querySelectorAll("main *, header *, footer *")].filter(element =>
            !element.closest(".scroll") && !element.closest("svg") && !element.closest(".hidden") &&
            element.getBoundingClientRect().right > document.documentElement.clientWidth + 0.5
        ).map(element => element.outerHTML.slice(0, 80))"""
    )
    assert outside == []


def test_the_style_is_applied_and_its_colours_follow_the_scheme(
    page: Page, report: str, request: pytest.FixtureRequest
) -> None:
    page.goto(report)
    # A page whose style the policy refused would be white; a heat cell without its class would be transparent.
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    cell = page.locator("table.heat td").first.evaluate("cell => getComputedStyle(cell).backgroundColor")
    dark = "dark" in request.node.name
    assert (sum(map(int, re.findall(r"\d+", background))) < 150) == dark
    assert re.fullmatch(r"rgb\(\d+, \d+, \d+\)", cell)


def test_the_page_prints_in_light_colours_and_fits_a_sheet(browser: Browser, report: str) -> None:
    # The width of A4 less 12 mm on either side, at 96 pixels per inch.
    page = browser.new_page(viewport={"width": 703, "height": 1032}, color_scheme="dark")
    page.goto(report)
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("document.documentElement.scrollWidth") <= 703
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    page.close()


@pytest.fixture(params=[(1280, "light"), (1280, "dark"), (360, "light"), (360, "dark")], ids=str)
def study_page(request: pytest.FixtureRequest, browser: Browser, study: Path) -> Iterator[Page]:
    """The study's page, opened without a complaint of the browser or a request for anything else."""
    width, scheme = request.param
    opened = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
    complaints: list[str] = []
    requests: list[str] = []
    opened.on("console", lambda message: complaints.append(message.text))
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("request", lambda request: requests.append(request.url))
    address = (study / "study.html").as_uri()
    opened.goto(address, wait_until="load")
    assert complaints == []
    assert [url for url in requests if not url.startswith("data:")] == [address]
    yield opened
    opened.close()


def test_a_study_can_be_read_at_any_width_and_in_both_schemes(study_page: Page, request: pytest.FixtureRequest) -> None:
    sideways = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert study_page.evaluate(sideways) == 0
    study_page.evaluate("document.querySelectorAll('details').forEach(element => { element.open = true })")
    assert study_page.evaluate(sideways) == 0
    outside = study_page.evaluate(
        """[...document.querySelectorAll("main *, header *, footer *")].filter(element =>
            !element.closest(".scroll") && element.checkVisibility() &&
            element.getBoundingClientRect().right > document.documentElement.clientWidth + 0.5
        ).map(element => element.outerHTML.slice(0, 80))"""
    )
    assert outside == []

    # Of the two layouts of every figure one is shown, with text that can be read.
    shown = study_page.evaluate("[...document.querySelectorAll('svg.chart')].map(chart => chart.checkVisibility())")
    assert (len(shown), sum(shown)) == (8, 4)
    heights = study_page.evaluate(
        """[...document.querySelectorAll("svg.chart text")].filter(text => text.checkVisibility())
            .map(text => text.getBoundingClientRect().height)"""
    )
    assert min(heights) >= 10
    assert study_page.evaluate("[...document.images].every(image => image.naturalWidth > 0)")

    # Every text against what is painted behind it; a chart's text stands on the card that holds the chart.
    pairs = study_page.evaluate(
        """[...document.querySelectorAll("body *")].filter(element => element.checkVisibility() &&
            !element.closest(".level, td.blank, title, desc") &&
            [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim())
        ).map(element => {
            const chart = element.closest("svg");
            let behind = chart || element;
            while (getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
            const style = getComputedStyle(element);
            return [chart ? style.fill : style.color, getComputedStyle(behind).backgroundColor, element.textContent];
        })"""
    )
    assert len(pairs) > 300
    for ink, back, text in pairs:
        assert contrast(_hex(ink), _hex(back)) >= 4.5, (ink, back, text)
    page_color = _hex(study_page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert (contrast(page_color, "#000000") < 2) == ("dark" in request.node.name)


def test_every_figure_of_a_study_opens_as_a_file(study: Path, browser: Browser) -> None:
    page = browser.new_page(color_scheme="dark")
    for path in sorted((study / "figures").iterdir()):
        page.goto(path.as_uri())
        assert page.evaluate("document.documentElement.tagName") == "svg", path.name
        paper = page.locator(".paper").evaluate("paper => getComputedStyle(paper).fill")
        assert contrast(_hex(paper), "#000000") < 2
    page.close()


def _hex(color: str) -> str:
    return "#" + "".join(f"{int(channel):02x}" for channel in re.findall(r"\d+", color)[:3])
