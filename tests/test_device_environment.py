"""What a device installs is enough: the validator runs without torch and everything else of the factory."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from keys.signing import SigningKey, write_public_key

ROOT = Path(__file__).resolve().parent.parent

# What the validator may import besides the standard library and this project; the command line adds typer.
DEVICE = ["numpy", "onnxruntime", "cryptography"]
FACTORY_ONLY = [
    "torch",
    "torchvision",
    "timm",
    "peft",
    "coremltools",
    "onnx",
    "onnxscript",
    "scipy",
    "PIL",
    "matplotlib",
]
# typer may bring pydantic onto a device, but the validator must not use it.
NOT_IMPORTED = [*FACTORY_ONLY, "pydantic", "typer"]

VALIDATE = """
import json, sys
from pathlib import Path
from device_tests.validate import ONNXRUNTIME, validate
receipt = validate(Path(sys.argv[1]), bytes.fromhex(sys.argv[2]), device_id="camera-01", runtime=ONNXRUNTIME)
used = sorted({name.split(".")[0] for name in sys.modules})
print(json.dumps({"passed": receipt.passed, "reasons": receipt.reasons, "used": used}))
"""

BLOCK = """
import sys

class Blocker:
    def __init__(self, allowed):
        self.allowed = allowed

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in self.allowed:
            raise ModuleNotFoundError(f"{name} is not installed on a device", name=name)

allowed = set(sys.argv.pop().split(",")) | sys.stdlib_module_names
sys.meta_path.insert(0, Blocker(allowed))
"""


def test_the_validator_runs_where_only_its_three_dependencies_can_be_imported(
    device_package: Path, signing_key: SigningKey, tmp_path: Path
) -> None:
    allowed = {"keys", "exporters", "device_tests", *_modules_of(_with_requirements(DEVICE))}
    command = [sys.executable, "-c", BLOCK + VALIDATE]
    result = _run(command, device_package, signing_key, tmp_path, ",".join(allowed))
    assert result["passed"] is True, result["reasons"]
    assert not set(NOT_IMPORTED) & set(result["used"])


def test_the_blocker_blocks(device_package: Path, signing_key: SigningKey, tmp_path: Path) -> None:
    """Without numpy the validator cannot run, so the test above would notice a missing dependency."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            BLOCK + VALIDATE,
            str(device_package),
            "",
            "keys,exporters,device_tests,cryptography",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "numpy is not installed on a device" in done.stderr


def test_the_validator_runs_in_a_real_environment_without_the_factory(
    device_package: Path, signing_key: SigningKey, tmp_path: Path
) -> None:
    python = _device_environment(tmp_path / "venv")
    find = "import importlib.util, sys; print([n for n in sys.argv[1:] if importlib.util.find_spec(n)])"
    found = subprocess.run(
        [python, "-c", find, *FACTORY_ONLY], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"
    result = _run([str(python), "-c", VALIDATE], device_package, signing_key, tmp_path)
    assert result["passed"] is True, result["reasons"]
    assert not set(NOT_IMPORTED) & set(result["used"])
    write_public_key(tmp_path / "signing-key.pub", signing_key.public_bytes)
    command = [python.with_name("keyfoundry"), "device", "validate", device_package]
    options = ["--public-key", tmp_path / "signing-key.pub", "--device-id", "camera-01", "--json"]
    done = subprocess.run([*command, *options], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["passed"] is True


def _run(command: list[str], package: Path, key: SigningKey, folder: Path, *extra: str) -> dict:
    done = subprocess.run(
        [*command, str(package), key.public_bytes.hex(), *extra],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _device_environment(path: Path) -> Path:
    """A virtual environment with this project and its core dependencies, as a device has it; its Python."""
    uv = os.environ.get("UV") or shutil.which("uv")
    if uv is None:
        pytest.skip("uv is not installed, so no device environment can be made")
    python = path / "bin" / "python"
    _uv(uv, "venv", "--python", sys.executable, str(path))
    _uv(uv, "pip", "install", "--python", str(python), str(ROOT))
    return python


def _uv(uv: str, *arguments: str) -> None:
    done = subprocess.run([uv, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    # Anything but a network that cannot be reached is a fault of the project's own dependencies.
    if re.search(r"(?i)sending request|failed to fetch|dns error|connection (refused|reset)", done.stderr):
        pytest.skip("no package index can be reached, so no device environment can be made")
    assert done.returncode == 0, done.stderr


def _with_requirements(names: list[str]) -> set[str]:
    """The distributions and all that they require without extras, by normalised name."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        try:
            requirements = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # Required on other systems only.
        found.add(name)
        for requirement in requirements:
            match = re.match(r"[A-Za-z0-9][A-Za-z0-9._-]*", requirement)
            if match and "extra ==" not in requirement:
                waiting.append(match.group())
    return found


def _modules_of(distributions: set[str]) -> set[str]:
    """The top-level modules that the distributions install."""
    return {
        module
        for module, owners in importlib.metadata.packages_distributions().items()
        if any(re.sub(r"[-_.]+", "-", owner).lower() in distributions for owner in owners)
    }
