"""The README can't rot: its tables are compared with the program, and its main command is run as it stands."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
from typer.main import get_command

from device_tests.report.document import SCHEMA_PATH
from exporters.package import open_package
from factory.cli.main import app
from keys.errors import PackageError, exit_codes
from keys.signing import read_public_key

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def commands_in(fence: str) -> list[list[str]]:
    joined = fence.replace("\\\n", " ")
    return [shlex.split(line, comments=True) for line in joined.splitlines() if line and not line.startswith("#")]


FENCES = [commands_in(fence) for fence in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)]


def test_the_two_commands_are_the_promised_ones() -> None:
    assert FENCES[0] == [shlex.split("pip install uv && uv run keyfoundry provision")]
    assert FENCES[1] == [shlex.split("pip install uv && uv run pytest")]
    assert "uv run pytest" in (ROOT / ".ci" / "run").read_text().splitlines()


def test_the_command_list_is_the_programs() -> None:
    listed = re.findall(r"^\| `([a-z]+)` \| (.*?) \|$", README, re.MULTILINE)
    program = get_command(app)
    assert [name for name, _ in listed] == list(program.commands)  # type: ignore[attr-defined]
    for name in ("keys", "device"):
        text = dict(listed)[name]
        assert re.findall(r"`([a-z]+)`", text) == list(program.commands[name].commands)  # type: ignore[attr-defined]


def test_the_exit_codes_are_the_programs() -> None:
    listed = re.findall(r"^\| (\d+) \| (.*?) \|$", README, re.MULTILINE)
    assert {int(code): meaning for code, meaning in listed} == exit_codes()


@pytest.mark.parametrize("command", [c for fence in FENCES for c in fence if "keyfoundry" in c], ids=" ".join)
def test_every_command_and_option_in_the_readme_exists(command: list[str]) -> None:
    words = command[command.index("keyfoundry") + 1 :]
    group = get_command(app)
    while words and words[0] in getattr(group, "commands", {}):
        group = group.commands[words.pop(0)]  # type: ignore[attr-defined]
    known = {option for parameter in group.params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The README's first command, on the embedded default; only the folder is another."""
    out = tmp_path_factory.mktemp("quickstart") / "fleet"
    command = [sys.executable, "-m", "factory.cli.main", "provision", "--out", str(out)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return out, result.stdout


def test_the_quickstart_ends_with_a_table_and_the_promised_files(quickstart: tuple[Path, str]) -> None:
    out, printed = quickstart
    for heading in ("clean accuracy", "parity", "T0 fooled", "T1 fooled", "T2 fooled", "decision", "package"):
        assert all(word in printed for word in heading.split()), heading
    for name in ("fleet.toml", "registry.sqlite", "signing-key.pub", "report.html", "report.json"):
        assert (out / name).is_file(), name
    for number in (1, 2, 3):
        package = out / "devices" / f"device-{number}" / "package"
        assert f"device-{number}" in printed
        assert {"manifest.json", "model.onnx", "model.mlpackage"} <= {path.name for path in package.iterdir()}


def test_the_quickstarts_report_is_measured_whole_and_says_what_its_control_means(quickstart: tuple[Path, str]) -> None:
    report = json.loads((quickstart[0] / "report.json").read_text())
    jsonschema.validate(report, json.loads(SCHEMA_PATH.read_text()))
    targets = {target["id"]: target for target in report["targets"]}
    assert set(targets) == {"device-1", "device-2", "device-3", "un-keyed"}
    # Where the recipe without a key would be released too, a release says nothing about the key: the report says so.
    page = (quickstart[0] / "report.html").read_text()
    assert ("say nothing about the keys" in page) == targets["un-keyed"]["decision"]["released"]
    assert max(target["worst_case"]["value"] for target in targets.values()) < 0.2
    for target in targets.values():
        assert "not_measured" not in target["worst_case"], target["id"]
        assert {parity["passed"] for parity in target["parity"]} == {True}, target["id"]
        assert {threat["threat"] for threat in target["threats"]} >= {"T0", "T1", "T2"}


def test_exactly_the_released_devices_are_signed(quickstart: tuple[Path, str]) -> None:
    out, _ = quickstart
    public = read_public_key(out / "signing-key.pub")
    released = {
        target["id"]: target["decision"]["released"]
        for target in json.loads((out / "report.json").read_text())["targets"]
        if target["role"] == "device"
    }
    for device_id, is_released in released.items():
        package = out / "devices" / device_id / "package"
        if is_released:
            assert open_package(package, public, device_id=device_id).manifest.device_id == device_id
        else:
            with pytest.raises(PackageError):
                open_package(package, public, device_id=device_id)
