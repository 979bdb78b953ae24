"""The larger budgets: every threat, control and canary on a tiny fleet, through the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from device_tests.report.document import ReportDocument
from device_tests.threats import Threat
from exporters.measured import NotMeasured
from factory.settings import BUDGETS, FleetSettings, VerificationSettings, parse
from keys.errors import InputError

WIDE = {
    "attacks": ["pgd", "mi-fgsm"], "guessed_keys": 2, "colluding": [1, 5], "query_images": 30, "queries": 110,
    "bypass_queries": 1700, "true_key_ceiling": True, "canaries": True, "reinitialised_control": True,
    "self_check_images": 25, "images": 60, "coreml_images": 5,
}  # fmt: skip


@pytest.fixture(scope="module")
def wide_report(
    tiny_settings: Path,
    start_keyfoundry: Callable[..., Any],
    with_fixed_secrets: Callable[[Path], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> ReportDocument:
    folder = tmp_path_factory.mktemp("wide")
    with_fixed_secrets(folder / "fleet")
    settings = yaml.safe_load(tiny_settings.read_text())
    settings["verification"] |= WIDE
    (folder / "wide.yaml").write_text(json.dumps(settings))
    process = start_keyfoundry("provision", "--config", folder / "wide.yaml", "--out", folder / "fleet")
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert "Attacks on 13 sources: at most" in err
    assert out.count("device-") >= 2
    return ReportDocument.model_validate_json((folder / "fleet" / "report.json").read_bytes())


def test_every_threat_has_a_figure_on_every_device(wide_report: ReportDocument) -> None:
    for device in wide_report.devices:
        threats = {row.threat: row.worst for row in device.threats}
        assert set(threats) == {threat.code for threat in Threat}
        assert not isinstance(threats["T4"], NotMeasured)
        assert threats["T4"].n <= 30
    sources = {source.id: source.threat for source in wide_report.sources}
    assert sources == {
        "base": "T0", "guessed-key": "T1", "guessed-key-2": "T1", "base-and-1-guesses": "T1",
        "base-and-2-guesses": "T1", "device-1": "T2", "device-2": "T2", "1-devices-1": "T3", "1-devices-2": "T3",
        "true-key-device-1": "T5", "true-key-device-2": "T5", "un-keyed": "control", "re-initialised": "control",
        **{f"{kind}-{name}": "T4" for kind in ("queries", "bypass")
           for name in ("device-1", "device-2", "un-keyed", "re-initialised")},
    }  # fmt: skip


def test_sources_are_judged_only_where_they_belong(wide_report: ReportDocument) -> None:
    first, second = wide_report.devices
    for device, other in ((first, second), (second, first)):
        seen = {cell.source for cell in device.cells}
        assert f"true-key-{device.id}" in seen
        assert f"true-key-{other.id}" not in seen
        assert f"queries-{other.id}" not in seen
        colluding = next(row for row in device.threats if row.threat == "T3")
        assert len(colluding.sources) == 1


def test_both_controls_are_judged_and_canaries_and_formats_are_there(wide_report: ReportDocument) -> None:
    assert [control.id for control in wide_report.controls] == ["un-keyed", "re-initialised"]
    for target in wide_report.targets:
        assert not isinstance(target.canaries, NotMeasured)
        assert len(target.canaries.results) == 7
        assert not isinstance(target.formats, NotMeasured)
        assert [row.format for row in target.formats] == ["ONNX fp32", "Core ML fp32", "Core ML fp16"]
        onnx, coreml = target.formats[0], target.formats[1]
        assert onnx.differing.n == 60  # type: ignore[union-attr]
        assert onnx.differing.successes == 0  # type: ignore[union-attr]
        assert coreml.images == 5  # type: ignore[union-attr]
        assert len(target.by_class) == 10


def test_a_budget_sets_what_is_not_named_and_a_name_wins() -> None:
    standard = parse(VerificationSettings, {"budget": "standard"}, "here")
    assert (standard.images, standard.guessed_keys, standard.colluding, standard.canaries) == (1000, 4, (2, 4), True)
    assert parse(VerificationSettings, {"budget": "standard", "images": 7}, "here").images == 7
    assert parse(VerificationSettings, {}, "here") == VerificationSettings()
    full = FleetSettings.model_validate({"verification": {"budget": "full"}})
    assert FleetSettings.model_validate(full.model_dump(mode="json")) == full
    assert set(BUDGETS) == {"quick", "standard", "full"}
    with pytest.raises(InputError, match="budget"):
        parse(VerificationSettings, {"budget": "huge"}, "here")


def test_verify_takes_another_budget_and_says_what_was_run(fleet_copy: Path, keyfoundry: Callable[..., Any]) -> None:
    report = ReportDocument.model_validate_json((fleet_copy / "report.json").read_bytes())
    assert report.verification.budget == "quick"
    assert any("Query attacks on the target (T4) are not measured" in note for note in report.notes)
    refused = keyfoundry("verify", "--out", fleet_copy, "--budget", "huge")
    assert refused.code == 3
    assert refused.err.count("\n") == 1
    refused = keyfoundry("verify", "--out", fleet_copy, "--adversarial", "attacked.npz", "--epsilon", "0.1")
    assert refused.code == 2
    done = keyfoundry("verify", "--out", fleet_copy, "--images", "90")
    assert done.code == 0, done.err
    assert "Changed: verification.images = 90 (was 100)." in done.err
    assert done.err.count("Changed: ") == 1
    assert ReportDocument.model_validate_json((fleet_copy / "report.json").read_bytes()).verification.images == 90
    # No line of the table is cropped: each ends with its frame.
    rows = [line for line in done.out.splitlines() if line.startswith(("│", "├", "┃"))]
    assert len({len(row) for row in rows}) == 1
    assert any(str(Path("devices") / "device-1" / "package") in row for row in rows)


def test_images_go_out_and_attacked_ones_come_in(
    fleet_copy: Path, keyfoundry: Callable[..., Any], tmp_path: Path
) -> None:
    import numpy as np

    done = keyfoundry("verify", "--out", fleet_copy, "--clean-images", tmp_path / "clean.npz", "--quiet")
    assert done.code == 0, done.err
    with np.load(tmp_path / "clean.npz", allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in stored.files}
    moved = np.clip(arrays["clean"].astype(int) + 4, 0, 255).astype(np.uint8)
    np.savez(tmp_path / "attacked.npz", adversarial=moved, **arrays)
    done = keyfoundry("verify", "--out", fleet_copy, "--adversarial", tmp_path / "attacked.npz", "--json", "--quiet")
    assert done.code == 0, done.err
    assert len(json.loads(done.out)["devices"]) == 2
    np.savez(tmp_path / "far.npz", adversarial=255 - arrays["clean"], **arrays)
    refused = keyfoundry("verify", "--out", fleet_copy, "--adversarial", tmp_path / "far.npz", "--quiet")
    assert refused.code == 3
    assert refused.err.count("\n") == 1


def test_a_source_of_ones_own_is_attacked_and_judged(
    fleet_copy: Path, keyfoundry: Callable[..., Any], tiny_fleet: Path
) -> None:
    model = tiny_fleet / "devices" / "device-1" / "package" / "model.onnx"
    done = keyfoundry("verify", "--out", fleet_copy, "--source", model, "--json", "--quiet")
    assert done.code == 0, done.err
    report = ReportDocument.model_validate_json(done.out)
    (brought,) = [source for source in report.sources if "onnx" in source.description]
    assert brought.threat == "T0"
    assert all(any(cell.source == brought.id for cell in device.cells) for device in report.devices)
