"""report.html: one self-contained page from the fleet document and a few example images.

Rules: everything that came from outside (ids, labels, reasons, paths) is escaped; the page carries a policy that
forbids scripts, remote files and every style but its own; the same document gives the same bytes. A proportion is
shown with its n and its 95 % interval; what was not measured is shown with its reason.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from pydantic import JsonValue

from device_tests.evidence import Measured, Proportion
from device_tests.perturbation import Perturbation
from device_tests.report.document import ParityReport, ReportDocument, TargetReport
from device_tests.report.figure_files import FIGURES, write_figures
from device_tests.report.figures import (
    HEAT_STEPS,
    IntervalPlot,
    IntervalRow,
    Mark,
    heat_colors,
    heat_step,
    image_uri,
)
from device_tests.report.fleet_figures import Example, classes_by_target, fleet_charts
from exporters.measured import NotMeasured
from keys.files import write_atomic

TEMPLATES = Path(__file__).with_name("templates")
REPORT_JSON = "report.json"
REPORT_HTML = "report.html"

_THIN = "\u202f"
_PIXELATED_BELOW = 128
"""Images smaller than this are enlarged on the page, and then by whole pixels."""


class Notes:
    """Reasons that a table refers to by letter, so that each is printed once under it."""

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}

    def mark(self, reason: str) -> str:
        """Return the letter of a reason: a, b, …, z, aa, …"""
        if reason not in self.reasons:
            number, letters = len(self.reasons) + 1, ""
            while number:
                number, digit = divmod(number - 1, 26)
                letters = chr(ord("a") + digit) + letters
            self.reasons[reason] = letters
        return self.reasons[reason]


def render_html(document: ReportDocument, examples: Sequence[Example]) -> str:
    """Return the whole page; it depends on its two arguments alone."""
    environment = page_environment()
    style = styled()
    page = environment.get_template("report.html.j2").render(
        document=document,
        examples=examples,
        style=Markup(style),
        style_hash=policy_hash(style),
        released=sum(device.decision.released for device in document.devices),
        conclusion=conclusion(document),
        control_verdict=control_verdict(document),
        risk_of_any=1 - (1 - document.rule.alpha) ** document.rule.tests,
        accuracy_plot=_accuracy_plot(document),
        worst_plot=_worst_plot(document),
        by_source=_by_source(document),
        attacked=_attacked(document),
        attacks_on=_attacks_on(document),
        classes=classes_by_target(document),
        threat_cells=_threat_cells(document),
        threats={threat.code: threat for threat in document.verification.threats},
        used_threats=_used_threats(document),
        settings=_flat(document.settings),
        agreement=_agreement,
        difference_interval=difference_interval,
        new_notes=Notes,
        heat_steps=HEAT_STEPS,
        json_name=REPORT_JSON,
        figures_name=FIGURES,
    )
    return page.strip() + "\n"


def page_environment() -> Environment:
    """Return what renders the pages: strict about missing values, escaping, with filters that write numbers."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Any] = environment.filters  # annotated with its built-in filters' own types
    filters.update(
        percent=percent, interval=interval, points=points, count=count, duration=duration, image_uri=image_uri,
        heat_step=heat_step, size=_size_class, scientific=scientific,
        perturbation=lambda code: str(Perturbation.parse(code)),
    )  # fmt: skip
    tests: dict[str, Any] = environment.tests
    tests["measured"] = lambda figure: isinstance(figure, Proportion)
    tests["reasoned"] = lambda value: isinstance(value, NotMeasured)
    tests["compared"] = lambda parity: isinstance(parity, ParityReport)
    return environment


def styled(*more: str) -> str:
    """Return the style that all pages share, then that of the further files among the templates."""
    sheets = [(TEMPLATES / name).read_text(encoding="utf-8") for name in ("report.css", *more)]
    return "".join(sheets) + _heat_css()


def policy_hash(style: str) -> str:
    """Return what the page's policy calls its style by: the SHA-256 in base 64."""
    return base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()


def write_report(folder: Path, document: ReportDocument, examples: Sequence[Example]) -> None:
    """Write report.json, report.html and figures/*.svg into ``folder``, each whole or not at all.

    The page is rendered before anything is written. Raises :class:`StorageError` if the disk is full.
    """
    page = render_html(document, examples)
    write_figures(folder / FIGURES, *fleet_charts(document, examples))
    write_atomic(folder / REPORT_JSON, document.to_bytes())
    write_atomic(folder / REPORT_HTML, page.encode())


def conclusion(document: ReportDocument) -> str:
    """Return one sentence on what was decided about the devices."""
    devices = document.devices
    released = [device for device in devices if device.decision.released]
    rejected = [device for device in devices if not device.decision.released]
    meaning = (
        f"clean accuracy no more than {points(document.rule.allowed_accuracy_drop)} below the base, export parity, "
        "and few enough images fooled in the worst case over all attacks that count"
    )
    if not devices:
        return "This fleet has no devices."
    if not rejected:
        return f"Every device met every condition: {meaning}."
    if not released:
        return f"No device met every condition: {meaning}. No package was signed."
    return f"{_listed(released)} met every condition: {meaning}. {_listed(rejected)} did not and got no signed package."


def control_verdict(document: ReportDocument) -> str:
    """Return what the un-keyed control, put through the same rule, says about the rule on this fleet."""
    if not document.controls:
        return (
            "No un-keyed control was put through the rule, so this report cannot say whether it would tell a keyed "
            "device from an un-keyed one."
        )
    released = [control for control in document.controls if control.decision.released]
    if released:
        return (
            f"The rule also releases the un-keyed control ({_listed(released)}): here it could not tell a keyed "
            "device from an un-keyed one, and its decisions say nothing about the keys."
        )
    by_attacks = [
        control for control in document.controls if control.decision.test and not control.decision.test.passed
    ]
    if len(by_attacks) == len(document.controls):
        verdict = f"The un-keyed control ({_listed(by_attacks)}) is rejected because of the attacks, as it should be"
        if any(device.decision.released for device in document.devices):
            return f"{verdict}: a model without a key does not pass what the released devices passed."
        withstood = [device for device in document.devices if device.decision.test and device.decision.test.passed]
        if withstood:
            return (
                f"{verdict}: it fails the acceptance test that {_listed(withstood)} passed. No device is released, for "
                "other reasons."
            )
        return f"{verdict}; but no device withstands them either, so no difference between the two was seen."
    return (
        "The un-keyed control is rejected, but not because of the attacks: that does not show that the rule tells "
        "a keyed device from an un-keyed one."
    )


def percent(share: float, digits: int = 1) -> str:
    """Write a share as a percentage: 0.9123 → ``91.2 %``."""
    return f"{100 * share:.{digits}f}{_THIN}%"


def interval(proportion: Proportion) -> str:
    """Write the 95 % interval: ``90.1–92.1 %``."""
    low, high = proportion.interval
    return f"{100 * low:.1f}–{100 * high:.1f}{_THIN}%"


def points(share: float, *, signed: bool = False) -> str:
    """Write a difference of shares in points: 0.03 → ``3.0 points``."""
    text = f"{100 * share:+.1f}" if signed else f"{100 * share:.1f}"
    return f"{text.replace('-', '−')}\u00a0points"


def difference_interval(base: Proportion, target: Proportion) -> str:
    """Write the 95 % interval of target minus base in points, as if they were measured on different images.

    Newcombe 1998, "Interval estimation for the difference between independent proportions", method 10.
    """
    (base_low, base_high), (low, high) = base.interval, target.interval
    difference = target.value - base.value
    lowest = difference - math.hypot(target.value - low, base_high - base.value)
    highest = difference + math.hypot(high - target.value, base.value - base_low)
    return f"{100 * lowest:+.1f} to {100 * highest:+.1f}".replace("-", "−")


def count(number: int) -> str:
    """Write a whole number with thousands apart: 1383400 → ``1 383 400``."""
    return f"{number:,}".replace(",", _THIN)


def scientific(number: float) -> str:
    """Write a small number with two digits: 0.0000123 → ``1.2·10⁻⁵``."""
    if number == 0:
        return "0"
    digits, exponent = f"{number:.1e}".split("e")
    return f"{digits}·10" + str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def duration(seconds: float) -> str:
    """Write a time: ``0.4 s``, ``1 min 12 s``, ``2 h 05 min``."""
    if seconds < 59.95:
        return f"{seconds:.1f}{_THIN}s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60}{_THIN}min {whole % 60:02d}{_THIN}s"
    return f"{whole // 3600}{_THIN}h {whole % 3600 // 60:02d}{_THIN}min"


def _listed(targets: Iterable[TargetReport]) -> str:
    names = [target.id for target in targets]
    if len(names) > 5:
        return f"{len(names)} devices"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _agreement(parity: ParityReport) -> Proportion:
    return Proportion(round(parity.top1_agreement * parity.n), parity.n)


def _size_class(image: np.ndarray) -> str:
    return "small" if max(image.shape) < _PIXELATED_BELOW else "large"


def _heat_css() -> str:
    def rules(dark: bool) -> str:
        return "".join(
            f".h{step}{{background:{background};color:{ink}}}"
            for step, (background, ink) in enumerate(heat_colors(dark))
        )

    # The dark classes must not reach paper.
    return f"\n{rules(False)}\n@media screen and (prefers-color-scheme: dark){{{rules(True)}}}\n"


def _row(target: TargetReport, figure: Measured) -> IntervalRow:
    note = "un-keyed control" if target.role == "control" else ""
    if isinstance(figure, NotMeasured):
        return IntervalRow(target.id, note, None, figure.reason)
    return IntervalRow(target.id, note, figure)


def _accuracy_plot(document: ReportDocument) -> IntervalPlot:
    base = document.base.clean
    rows = [IntervalRow(document.base.name, "base", base)]
    rows += [_row(target, target.clean) for target in document.targets]
    lowest = max(0.0, base.value - document.rule.allowed_accuracy_drop)
    mark = Mark(lowest, "limit", f"the lowest accuracy that the rule allows, {percent(lowest)}")
    return IntervalPlot.of(rows, [mark], from_zero=False)


def _worst_plot(document: ReportDocument) -> IntervalPlot:
    rows = [_row(target, target.worst_case) for target in document.targets]
    rule = document.rule
    marks = [
        Mark(rule.p0, "p0", f"p0 = {percent(rule.p0)}, acceptable"),
        Mark(rule.p1, "p1", f"p1 = {percent(rule.p1)}, unacceptable"),
    ]
    return IntervalPlot.of(rows, marks, from_zero=True)


def _by_source(document: ReportDocument) -> Mapping[tuple[str, str], object]:
    return {(row.source, target.id): row for target in document.targets for row in target.by_source}


def _attacks_on(document: ReportDocument) -> Mapping[str, list[str]]:
    """Source → names of its attacks: the budget's, also where one was left out, or all others that were run on it."""
    usual = [attack.name for attack in document.verification.attacks]
    run: dict[str, list[str]] = {source.id: [] for source in document.sources}
    for target in document.targets:
        for cell in target.cells:
            if cell.attack not in run.setdefault(cell.source, []):
                run[cell.source].append(cell.attack)
    return {source: found if set(found).isdisjoint(usual) and found else usual for source, found in run.items()}


def _attacked(document: ReportDocument) -> Mapping[tuple[str, str, str], object]:
    return {(cell.source, cell.attack, target.id): cell for target in document.targets for cell in target.cells}


def _threat_cells(document: ReportDocument) -> Mapping[tuple[str, str], object]:
    return {(row.threat, target.id): row for target in document.targets for row in target.threats}


def _used_threats(document: ReportDocument) -> list[str]:
    used = {row.threat for target in document.targets for row in target.threats}
    return [threat.code for threat in document.verification.threats if threat.code in used]


def _flat(settings: Mapping[str, JsonValue], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            rows += _flat(value, f"{prefix}{name}.")
        else:
            rows.append((prefix + name, json.dumps(value, ensure_ascii=False)))
    return rows
