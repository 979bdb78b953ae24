"""The project as a tree: its four packages are found, nothing shadows them, and nothing private lies in it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("factory", "exporters", "device_tests", "keys")


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    """The files of the project, as git lists them (those not added yet, too)."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    if listed.returncode:
        pytest.skip("this is no git checkout, so the project's files are not known")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.mark.parametrize("package", PACKAGES)
def test_no_installed_distribution_shadows_a_package(package: str) -> None:
    """``keys`` and ``factory`` are names that others could install as well."""
    owners = importlib.metadata.packages_distributions().get(package, [])
    assert set(owners) <= {"keyfoundry"}
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    assert Path(spec.origin).parent == ROOT / package


def test_the_command_is_installed_under_the_distributions_name() -> None:
    entries = importlib.metadata.distribution("keyfoundry").entry_points
    assert [(entry.name, entry.value) for entry in entries] == [("keyfoundry", "factory.cli.main:run")]


def test_importing_a_package_imports_nothing_heavy() -> None:
    script = "import sys\nfor name in sys.argv[1:]:\n    __import__(name)\nprint(*sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script, *PACKAGES], cwd=ROOT, capture_output=True, text=True, check=True
    )
    heavy = {"torch", "timm", "peft", "onnx", "onnxruntime", "coremltools", "numpy", "cryptography"}
    assert not heavy & set(done.stdout.split())


def test_the_keys_package_holds_code_only(tracked: list[Path]) -> None:
    files = [path for path in (ROOT / "keys").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert files
    assert {path.suffix for path in files} <= {".py", ".md"}
    # No ignore rule drops any of it from git.
    assert set(files) <= set(tracked)


def test_no_vault_and_no_private_key_is_in_the_project(tracked: list[Path]) -> None:
    names = {"vault.json", "passphrase", "registry.sqlite", "fleet.toml"}
    assert not [path for path in tracked if path.name in names]
    marks = (rb"PRIVATE " + rb"KEY-----", rb'"master_secret": ' + rb'"[0-9a-f]{80}"')
    for path in tracked:
        if path.parent == ROOT / "tests":
            continue  # known answers of keys that protect nothing
        data = path.read_bytes()
        assert not [mark for mark in marks if re.search(mark, data)], path


def test_no_file_names_a_place_on_the_machine_it_was_written_on(tracked: list[Path]) -> None:
    places = ("wo" + r"rk/\w", "ho" + r"me/\w+/\w", "Us" + r"ers/\w+/\w", "ro" + r"ot/\.?\w+/")
    pattern = re.compile(rb"(?<![\w.>\])}*-])/(" + "|".join(places).encode() + rb")|" + re.escape(str(ROOT).encode()))
    found = [
        f"{path.relative_to(ROOT)}: {match.group().decode()}"
        for path in tracked
        for match in pattern.finditer(path.read_bytes())
        if path.suffix not in {".xz", ".safetensors", ".png", ".npz", ".onnx"}
    ]
    assert not found


def test_what_is_generated_is_ignored() -> None:
    ignored = subprocess.run(
        ["git", "check-ignore", "fleet/secrets/vault.json", ".venv/bin/python", "keys/__pycache__/x.pyc"], cwd=ROOT,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if ignored.returncode not in (0, 1):
        pytest.skip("this is no git checkout")
    assert len(ignored.stdout.splitlines()) == 3
    kept = subprocess.run(["git", "check-ignore", "keys/vault.py"], cwd=ROOT, capture_output=True, check=False)
    assert kept.stdout == b""
