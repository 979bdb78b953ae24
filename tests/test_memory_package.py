"""A package that is opened from memory: verified as on disk, run as on disk, and never written to one."""

from __future__ import annotations

import ast
import gc
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from onnx import helper, numpy_helper
from timm.layers import set_fused_attn

from exporters.contract import InputContract
from exporters.golden import GOLDEN_NAME, read_golden
from exporters.manifest import MANIFEST_NAME, SIGNATURE_NAME, Manifest
from exporters.onnx_file import split
from exporters.package import MemoryPackage, open_package, open_package_bytes, sign_package, write_package
from exporters.run_onnx import OnnxRuntime
from exporters.to_onnx import export_onnx
from factory.data import SAMPLE
from factory.idx import find_idx, read_idx
from keys.errors import InputError, PackageError
from keys.files import folder_being_written
from keys.signing import SigningKey

ROOT = Path(__file__).resolve().parent.parent
CONTRACT = InputContract(channels=1, height=28, width=28, resize="bicubic to 28x28, no crop")
# A folder as Core ML's: only its files' paths matter here.
NESTED = {"Manifest.json": b"{}", "Data/com.apple.CoreML/weights/weight.bin": bytes(70), "Data/empty": b""}


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def files(device_package: Path, manifest: Manifest, signing_key: SigningKey) -> dict[str, bytes]:
    """The content of a signed package with a model, golden images and a folder."""
    (device_package / MANIFEST_NAME).unlink()
    (device_package / SIGNATURE_NAME).unlink()
    for name, data in NESTED.items():
        (device_package / "model.mlpackage" / name).parent.mkdir(parents=True, exist_ok=True)
        (device_package / "model.mlpackage" / name).write_bytes(data)
    write_package(device_package, manifest)
    sign_package(device_package, signing_key)
    return content_of(device_package)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    path = find_idx(SAMPLE, "t10k-images-idx3-ubyte")
    assert path is not None
    return read_idx(path)[:8, np.newaxis].astype(np.float32) / 255


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported ViT of two blocks."""
    set_fused_attn(False)
    torch.manual_seed(0)
    sizes = {"img_size": 28, "patch_size": 7, "embed_dim": 64, "depth": 2, "num_heads": 2}
    module = timm.create_model("vit_tiny_patch16_224", in_chans=1, num_classes=10, pretrained=False, **sizes).eval()
    path = tmp_path_factory.mktemp("model") / "model.onnx"
    export_onnx(module, path, CONTRACT, [str(number) for number in range(10)])
    return path


@pytest.fixture(scope="module")
def ort_model(model: Path) -> bytes:
    """The same in onnxruntime's own format."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(model.with_suffix(".ort"))
    options.add_session_config_entry("session.save_model_format", "ORT")
    onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    return model.with_suffix(".ort").read_bytes()


# Verified as on disk


def test_it_opens_as_from_disk(files: dict[str, bytes], device_package: Path, signing_key: SigningKey) -> None:
    public = signing_key.public_bytes
    on_disk = open_package(device_package, public)
    package = open_package_bytes(files, public, device_id="camera-01", fleet_id="00112233445566ff")
    assert (package.manifest, package.digest) == (on_disk.manifest, on_disk.digest)
    for name in package.manifest.files:
        assert package.read(name) == on_disk.read(name)
    assert package.folder("model.mlpackage") == NESTED
    golden = read_golden(package.read(GOLDEN_NAME), package.manifest.input, 3)
    logits = OnnxRuntime(package.read("model.onnx")).logits(golden.images.astype(np.float32) / 255)
    assert np.allclose(logits, golden.logits, atol=1e-5)


def test_what_the_caller_does_afterwards_changes_nothing(files: dict[str, bytes], signing_key: SigningKey) -> None:
    before = files["model.onnx"]
    package = open_package_bytes(files, signing_key.public_bytes)
    files["model.onnx"] = b"another"
    files["extra"] = b"another"
    assert package.read("model.onnx") == before
    with pytest.raises(PackageError, match="no file 'extra'"):
        package.read("extra")


def flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


FAULTS: dict[str, tuple[Callable[[dict[str, bytes]], dict[str, object]], str]] = {
    "nothing": (lambda files: {}, "is not a package, without manifest.json"),
    "no manifest": (lambda files: {n: d for n, d in files.items() if n != MANIFEST_NAME}, "without manifest.json"),
    "no signature": (lambda files: {n: d for n, d in files.items() if n != SIGNATURE_NAME}, "has no manifest.sig"),
    "short signature": (lambda files: files | {SIGNATURE_NAME: bytes(63)}, "63 bytes, not 64"),
    "another signature": (lambda files: files | {SIGNATURE_NAME: bytes(64)}, "does not fit manifest.json"),
    "altered manifest": (lambda files: files | {MANIFEST_NAME: flipped(files[MANIFEST_NAME], 40)}, "does not fit"),
    "missing file": (lambda files: {n: d for n, d in files.items() if n != "model.onnx"}, "'model.onnx' is missing"),
    "added file": (lambda files: files | {"added": b""}, "'added' is in the package but not in its manifest"),
    "file above": (lambda files: files | {"../up": b""}, "not in its manifest"),
    "longer file": (lambda files: files | {"model.onnx": files["model.onnx"] + b"\0"}, "not the .* that were signed"),
    "altered file": (
        lambda files: files | {"model.onnx": flipped(files["model.onnx"], 99)},
        "'model.onnx' was changed",
    ),
    "mutable bytes": (lambda files: files | {"model.onnx": bytearray(files["model.onnx"])}, "immutable bytes"),
    "a number as name": (lambda files: {**files, 7: b""}, "immutable bytes"),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_refused_on_disk_is_refused_in_memory(
    files: dict[str, bytes], signing_key: SigningKey, fault: str
) -> None:
    change, sentence = FAULTS[fault]
    with pytest.raises(PackageError, match=sentence):
        open_package_bytes(change(files), signing_key.public_bytes)  # type: ignore[arg-type]


def test_another_device_fleet_or_key_is_refused(files: dict[str, bytes], signing_key: SigningKey) -> None:
    with pytest.raises(PackageError, match="not for 'camera-02'"):
        open_package_bytes(files, signing_key.public_bytes, device_id="camera-02")
    with pytest.raises(PackageError, match="belongs to fleet"):
        open_package_bytes(files, signing_key.public_bytes, fleet_id="0" * 16)
    with pytest.raises(PackageError, match="another factory's key"):
        open_package_bytes(files, SigningKey(bytes(32)).public_bytes)


@pytest.mark.parametrize("name", ["model", "model.onnx", "model.mlpackage/", "", ".."])
def test_a_folder_that_is_none_is_refused(files: dict[str, bytes], signing_key: SigningKey, name: str) -> None:
    with pytest.raises(PackageError, match="has no folder"):
        open_package_bytes(files, signing_key.public_bytes).folder(name)


# Run as on disk


def test_the_weights_may_go_once_the_model_is_made(model: Path, images: np.ndarray) -> None:
    expected = OnnxRuntime(model, threads=1).logits(images)
    data = bytes(bytearray(model.read_bytes()))
    runtime = OnnxRuntime(data, threads=1)
    del data
    gc.collect()
    # Other values where the weights may have lain.
    taken = [np.full(size, np.nan, np.float32) for size in (2**8, 2**12, 2**16, 2**18) for _ in range(50)]
    assert np.array_equal(runtime.logits(images), expected)
    assert taken


@pytest.mark.parametrize("level", ["ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_ALL"])
def test_onnxruntime_copies_what_it_is_handed(model: Path, images: np.ndarray, level: str) -> None:
    """What :mod:`exporters.run_onnx` relies on: the values may be overwritten as soon as the session is made."""
    graph, weights = split(model.read_bytes())
    buffers = {name: value.copy() for name, value in weights.items()}
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    values = [onnxruntime.OrtValue.ortvalue_from_numpy(buffer) for buffer in buffers.values()]
    options.add_external_initializers(list(buffers), values)
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    expected = session.run(["logits"], {"image": images})[0]
    # No copy until then: this overwrites what the values are made of.
    for buffer in buffers.values():
        buffer.fill(np.nan if buffer.dtype == np.float32 else 0)
    assert any(np.isnan(value.numpy()).any() for value in values)
    del values, options
    gc.collect()
    assert np.isfinite(expected).all()
    assert np.array_equal(session.run(["logits"], {"image": images})[0], expected)


def test_onnxruntimes_own_format_runs_from_bytes(ort_model: bytes, model: Path, images: np.ndarray) -> None:
    assert ort_model[4:8] == b"ORTM"
    runtime = OnnxRuntime(bytes(bytearray(ort_model)), threads=1)
    gc.collect()
    assert np.allclose(runtime.logits(images), OnnxRuntime(model).logits(images), atol=1e-5)
    for damaged in (ort_model[:8], ort_model[: len(ort_model) // 2], ort_model[:9] + bytes(2000)):
        with pytest.raises(InputError, match="onnxruntime cannot load the ONNX model"):
            OnnxRuntime(damaged)


# Never written to disk

# Opens a package from standard input, runs it, and prints every event by which Python could touch the disk. With
# --positive, it also writes a file, as a check of the check.
WATCHED = """
import os, struct, sys, tempfile
import numpy as np
from exporters.package import open_package_bytes
from exporters.run_onnx import OnnxRuntime
OnnxRuntime  # imported before the watch begins
public, count = sys.stdin.buffer.read(32), struct.unpack("<I", sys.stdin.buffer.read(4))[0]
files = {}
for _ in range(count):
    name, size = struct.unpack("<II", sys.stdin.buffer.read(8))
    path = sys.stdin.buffer.read(name).decode()
    files[path] = sys.stdin.buffer.read(size)
def written():
    lines = dict(line.split(": ") for line in open("/proc/self/io").read().splitlines())
    return {name: int(lines[name]) for name in ("wchar", "write_bytes", "syscw")}
linux = sys.platform == "linux"
images = np.zeros((2, 1, 28, 28), np.float32)
events, watching = [], False
reading = ("os.listdir", "os.scandir")  # as imports do
def watch(event, arguments):
    if not watching or event in reading:
        return
    writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC)
    if writes or event.split(".")[0] in ("os", "shutil", "tempfile", "subprocess", "mmap", "sqlite3", "socket"):
        events.append((event, [str(a)[:60] for a in arguments]))
sys.addaudithook(watch)
before = written() if linux else None
watching = True
package = open_package_bytes(files, public)
runtime = OnnxRuntime(package.read("model.onnx"), threads=1)
other = OnnxRuntime(package.read("model.ort"), threads=1)
logits = runtime.logits(images), other.logits(images)
if "--positive" in sys.argv:
    with open(os.path.join(tempfile.gettempdir(), "left"), "wb") as stream:
        stream.write(b"left")
watching = False
after = written() if linux else None
assert np.isfinite(logits).all()
print(repr((events, before == after)))
"""


def watched(
    files: dict[str, bytes], public: bytes, place: Path, *arguments: str
) -> tuple[list[object], bool, set[str]]:
    """Python's events, whether the system saw no write, and the names that appeared in the folders it could use."""
    message = public + struct.pack("<I", len(files))
    for name, data in files.items():
        message += struct.pack("<II", len(name), len(data)) + name.encode() + data
    # Without what turns onnxruntime's telemetry off on machines for tests: this project must do that by itself.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("CI", "ORT_", "GITHUB_"))}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    for variable in ("TMPDIR", "TMP", "TEMP", "HOME", "XDG_CACHE_HOME"):
        environment[variable] = str(place)
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, *arguments], cwd=place, env=environment, input=message, capture_output=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    events, silent = ast.literal_eval(done.stdout.decode())
    return events, silent, {path.name for path in place.rglob("*")}


@pytest.fixture
def exported(
    model: Path, ort_model: bytes, manifest: Manifest, signing_key: SigningKey, tmp_path: Path
) -> dict[str, bytes]:
    """The content of a signed package with both forms of the exported model."""
    path = tmp_path / "exported"
    with folder_being_written(path) as folder:
        (folder / "model.onnx").write_bytes(model.read_bytes())
        (folder / "model.ort").write_bytes(ort_model)
        write_package(folder, manifest)
    sign_package(path, signing_key)
    return content_of(path)


def test_nothing_is_written_to_disk(exported: dict[str, bytes], signing_key: SigningKey, tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    assert watched(exported, signing_key.public_bytes, place) == ([], True, set())


def test_the_watch_sees_a_file_that_is_written(
    exported: dict[str, bytes], signing_key: SigningKey, tmp_path: Path
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    events, silent, left = watched(exported, signing_key.public_bytes, place, "--positive")
    assert any(event[0] == "open" for event in events if isinstance(event, tuple))
    assert silent is (sys.platform != "linux")
    assert left == {"left"}


@pytest.mark.parametrize("module", ["exporters.run_onnx", "device_tests.validate", "device_tests.foreign_source"])
def test_onnxruntimes_telemetry_is_off_before_it_is_imported(module: str, tmp_path: Path) -> None:
    code = f"import {module}\nimport onnxruntime"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("CI", "ORT_", "GITHUB_"))}
    environment |= {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    for variable in ("TMPDIR", "TMP", "TEMP", "HOME", "XDG_CACHE_HOME"):
        environment[variable] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.rglob("*")] == []


# Memory

MEASURED = """
import sys
from pathlib import Path
from exporters.run_onnx import OnnxRuntime
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
data = Path(sys.argv[1]).read_bytes()
before = peak()
runtime = OnnxRuntime(data, threads=1)
print(peak() - before, len(data))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of one process is read from Linux's /proc")
def test_loading_takes_little_more_than_the_model(tmp_path: Path) -> None:
    """Beyond the bytes themselves: one copy in the session and a little, not a second whole model."""
    weights = [numpy_helper.from_array(np.eye(1024, dtype=np.float32), f"w{number}") for number in range(16)]
    nodes = [helper.make_node("Flatten", ["image"], ["h0"])]
    nodes += [helper.make_node("MatMul", [f"h{n}", f"w{n}"], [f"h{n + 1}" if n < 15 else "logits"]) for n in range(16)]
    ports = [
        helper.make_tensor_value_info(*port) for port in (("image", 1, ["n", 1, 32, 32]), ("logits", 1, ["n", 1024]))
    ]
    graph = helper.make_graph(nodes, "g", ports[:1], ports[1:], weights)
    opset = [helper.make_opsetid("", 20)]
    path = tmp_path / "model.onnx"
    path.write_bytes(helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString())
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    grown, size = map(int, done.stdout.split())
    assert 0.9 * size < grown < 1.5 * size


def test_the_class_says_what_it_is(files: dict[str, bytes], signing_key: SigningKey) -> None:
    package = open_package_bytes(files, signing_key.public_bytes)
    assert isinstance(package, MemoryPackage)
    with pytest.raises(AttributeError):
        package.digest = ""  # type: ignore[misc]
