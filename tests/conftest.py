"""What several test files share: a package built without torch, and a tiny base, data set and fleet that are real.

What needs torch is imported inside its fixture, so that the tests of ``keys/`` start at once.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from exporters.contract import InputContract
from exporters.golden import GOLDEN_NAME, Golden
from exporters.manifest import Manifest
from exporters.package import sign_package, write_package
from keys.files import folder_being_written
from keys.signing import SigningKey

if TYPE_CHECKING:
    from factory.base import Base
    from factory.data import Splits
    from factory.progress import Progress

if "PYTEST_XDIST_WORKER" in os.environ:  # as many workers as cores: more threads would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent
_LONG = ("test_readme.py", "test_template.py")
GREY_8X8 = InputContract(channels=1, height=8, width=8, resize="bicubic to 8x8, no crop")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take minutes begin first, so that no worker is left alone with one at the end."""
    items.sort(key=lambda item: item.path.name not in _LONG)  # stable: else the order stays


@pytest.fixture(scope="session")
def signing_key() -> SigningKey:
    return SigningKey(bytes(range(32)))


@pytest.fixture(scope="session")
def manifest() -> Manifest:
    """A valid manifest but for its files, which ``write_package`` fills in."""
    return Manifest(
        device_id="camera-01",
        generation=1,
        fleet_id="00112233445566ff",
        base_digest="a" * 64,
        adapter_digest="b" * 64,
        recipe={"mode": "lora", "rank": 16, "block_size": 4},
        labels=("bag", "boot", "coat"),
        input=GREY_8X8,
        files={},
        evidence={"clean_accuracy": {"successes": 90, "n": 100}},
        created="2030-01-31T12:00:00Z",
        tools={"keyfoundry": "0.1.0", "onnx": "1.23.2"},
    )


@pytest.fixture
def device_package(tmp_path: Path, manifest: Manifest, signing_key: SigningKey) -> Path:
    """A signed package with a real ONNX model (8×8 grey, three classes) and golden logits by NumPy."""
    path = tmp_path / "package"
    with folder_being_written(path) as folder:
        model, golden = linear_model()
        (folder / "model.onnx").write_bytes(model)
        (folder / GOLDEN_NAME).write_bytes(golden.to_bytes())
        write_package(folder, manifest)
    sign_package(path, signing_key)
    return path


def linear_model() -> tuple[bytes, Golden]:
    """ONNX bytes of one linear layer on 8×8 grey images, and its logits for eight images by NumPy."""
    from onnx import TensorProto, helper, numpy_helper

    generator = np.random.default_rng(1)
    weight = generator.normal(size=(64, 3)).astype(np.float32)
    bias = generator.normal(size=3).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["image"], ["flat"]),
            helper.make_node("Gemm", ["flat", "weight", "bias"], ["logits"]),
        ],
        "linear",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 1, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 3])],
        [numpy_helper.from_array(weight, "weight"), numpy_helper.from_array(bias, "bias")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    images = generator.integers(0, 256, size=(8, 1, 8, 8), dtype=np.uint8)
    logits = (images.reshape(8, -1) / 255) @ weight + bias
    return model.SerializeToString(), Golden(images, logits.astype(np.float32))


# A tiny base on real images: 16 tokens of 48 values, two blocks, trained for two epochs.

TINY_MODEL = {"img_size": 28, "patch_size": 7, "in_chans": 1, "embed_dim": 48, "depth": 2, "num_heads": 2}
# Quick, and with risks so wide that a handful of images decides; what is decided is not what these tests are about.
TINY_FLEET = """\
devices: 2
data: {{name: idx, root: {data}, validation: 300}}
base: {{name: {base}}}
recipe:
  rank: 4
  training: {{epochs: 1, batch_size: 25, learning_rate: 0.01, shift: 0, flip: false, precision: fp32}}
export:
  adapters: true
verification:
  epsilon: 0.016
  images: 100
  parity_images: 16
  pgd_steps: 2
  momentum_steps: 2
  self_check_images: 8
  self_check_steps: 2
  self_check_targets: 1
  self_check_margin: 1.0
release:
  allowed_accuracy_drop: 0.9
  acceptable_fooling: 0.9
  unacceptable_fooling: 0.99
  alpha: 0.4
  beta: 0.4
"""


@dataclass(frozen=True)
class Finished:
    """What a command did: its exit code and what it printed."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def sample_images() -> tuple[np.ndarray, np.ndarray]:
    """2,500 real images uint8 N×28×28 of the shipped sample, and their labels uint8 N."""
    from factory.data import SAMPLE
    from factory.idx import read_idx

    return read_idx(SAMPLE / "t10k-images-idx3-ubyte.xz"), read_idx(SAMPLE / "t10k-labels-idx1-ubyte.xz")


@pytest.fixture(scope="session")
def write_idx() -> Callable[[Path, np.ndarray], None]:
    """A writer of plain IDX files, so that the reader is not tested with its own writer."""

    def write(path: Path, array: np.ndarray) -> None:
        sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
        path.write_bytes(bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes())

    return write


@pytest.fixture(scope="session")
def idx_folder(
    sample_images: tuple[np.ndarray, np.ndarray],
    write_idx: Callable[[Path, np.ndarray], None],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A data set of IDX files: 2,000 training and 500 test images."""
    folder = tmp_path_factory.mktemp("idx")
    images, labels = sample_images
    for stem, part in (("train", slice(2000)), ("t10k", slice(2000, None))):
        write_idx(folder / f"{stem}-images-idx3-ubyte", images[part])
        write_idx(folder / f"{stem}-labels-idx1-ubyte", labels[part])
    return folder


@pytest.fixture(scope="session")
def silent() -> Progress:
    """Progress that prints nothing."""
    from factory.progress import Progress

    return Progress(quiet=True)


@pytest.fixture(scope="session")
def tiny_splits(idx_folder: Path, silent: Progress, tmp_path_factory: pytest.TempPathFactory) -> Splits:
    """The splits of ``idx_folder``: 1,700 training, 300 validation, 500 test images."""
    from factory.base import contract_for
    from factory.data import load_splits
    from factory.settings import DataSettings

    settings = DataSettings(name="idx", root=idx_folder, validation=300)
    return load_splits(settings, contract_for(1, 28), tmp_path_factory.mktemp("cache"), silent)


@pytest.fixture(scope="session")
def tiny_base_path(tiny_splits: Splits, silent: Progress, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base pre-trained for two epochs, as a checkpoint."""
    from factory.base import timm_architecture
    from factory.pretrain import pretrain
    from factory.recipes.training import TrainingSettings

    path = tmp_path_factory.mktemp("base") / "tiny.safetensors"
    architecture = timm_architecture("vit_tiny_patch16_224", tiny_splits.labels, None, TINY_MODEL)
    training = TrainingSettings(epochs=2, batch_size=25, learning_rate=3e-3, shift=0, flip=False, precision="fp32")
    pretrain(architecture, tiny_splits, training, seed=0, out=path, progress=silent)
    return path


@pytest.fixture(scope="session")
def tiny_base(tiny_base_path: Path) -> Base:
    """The tiny base, read back from its checkpoint."""
    from factory.base import read_checkpoint

    return read_checkpoint(tiny_base_path)


@pytest.fixture(scope="session")
def tiny_settings(idx_folder: Path, tiny_base_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fleet file (YAML) of two devices on the tiny base."""
    path = tmp_path_factory.mktemp("settings") / "tiny.yaml"
    path.write_text(TINY_FLEET.format(data=idx_folder, base=tiny_base_path))
    return path


@pytest.fixture(scope="session")
def subprocess_environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """This process's environment with a compile cache, one thread as here, and no model hub."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment.setdefault("PYTHONPYCACHEPREFIX", str(tmp_path_factory.mktemp("pycache")))
    return environment | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """One thread everywhere: the same number of threads gives the same sums, bit for bit, in every process."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def start_keyfoundry(subprocess_environment: dict[str, str]) -> Callable[..., subprocess.Popen[str]]:
    """Start a command in a process of its own; its output is piped."""

    def start(*arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "factory.cli.main", *map(str, arguments)]
        return subprocess.Popen(
            command, cwd=ROOT, env=subprocess_environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            # A shell's background job ignores SIGINT, and so would every process below it.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip

    return start


@pytest.fixture
def keyfoundry(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Finished]:
    """Run a command in this process, through the installed entry point."""
    from factory.cli.main import run

    def call(*arguments: object) -> Finished:
        out, err = io.StringIO(), io.StringIO()
        monkeypatch.setattr(sys, "argv", ["keyfoundry", *map(str, arguments)])
        code: object = 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                run()
            except SystemExit as stop:
                code = stop.code
        return Finished(int(code or 0) if isinstance(code, int | None) else 1, out.getvalue(), err.getvalue())

    return call


@pytest.fixture(scope="session")
def tiny_run(
    tiny_settings: Path,
    start_keyfoundry: Callable[..., subprocess.Popen[str]],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Finished]:
    """A whole fleet made by the command line in a process of its own, and what the command printed.

    Its secrets are the same in every run of the tests: one in forty of these half-trained models has a tie among the
    few images of its parity test, and is rejected.
    """
    folder = tmp_path_factory.mktemp("tiny") / "fleet"
    create_vault_with_fixed_secrets(folder)
    process = start_keyfoundry("provision", "--config", tiny_settings, "--out", folder)
    out, err = process.communicate()
    assert process.returncode == 0, err
    return folder, Finished(process.returncode, out, err)


@pytest.fixture(scope="session")
def with_fixed_secrets() -> Callable[[Path], Path]:
    """Give a new fleet's folder the same secrets in every run: what half-trained models do depends on their keys."""
    return create_vault_with_fixed_secrets


def create_vault_with_fixed_secrets(root: Path) -> Path:
    """The vault and the passphrase of a new fleet, as the first command would make them but for their randomness."""
    from factory.fleet_folder import FleetFolder

    drawn = random.Random(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(secrets, "token_bytes", drawn.randbytes)
        patch.setattr(secrets, "token_hex", lambda size: drawn.randbytes(size).hex())
        patch.delenv("KEYFOUNDRY_PASSPHRASE", raising=False)
        FleetFolder(root).open_vault()
    return root


@pytest.fixture(scope="session")
def tiny_fleet(tiny_run: tuple[Path, Finished]) -> Path:
    """The folder of the tiny fleet; not to be changed."""
    return tiny_run[0]


@pytest.fixture
def fleet_copy(tiny_fleet: Path, tmp_path: Path) -> Path:
    """A copy of the tiny fleet that a test may change."""
    return shutil.copytree(tiny_fleet, tmp_path / "fleet")
