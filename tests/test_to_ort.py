"""onnxruntime's own format: made by onnxruntime, the same bytes each time, loadable from a path and from bytes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from timm.layers import set_fused_attn
from torch import nn

from exporters.contract import InputContract
from exporters.ort_order import in_order
from exporters.run_onnx import OnnxRuntime
from exporters.run_torch import TorchRuntime
from exporters.to_onnx import INPUT_KEY, LABELS_KEY, export_onnx
from exporters.to_ort import export_ort
from factory.data import SAMPLE
from factory.idx import find_idx, read_idx
from keys.errors import InputError, StorageError

CONTRACT = InputContract(channels=1, height=28, width=28, resize="bicubic to 28x28, no crop")
LABELS = [f"class {index}" for index in range(10)]


@pytest.fixture(scope="module")
def module() -> nn.Module:
    set_fused_attn(False)
    torch.manual_seed(0)
    sizes = {"img_size": 28, "patch_size": 7, "embed_dim": 64, "depth": 1, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", in_chans=1, num_classes=10, **sizes).eval()


@pytest.fixture(scope="module", params=["dynamic", "static"])
def model(module: nn.Module, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    export_onnx(module, path, CONTRACT, LABELS, batch=request.param)
    return path.read_bytes()


def real_images(count: int) -> np.ndarray:
    path = find_idx(SAMPLE, "t10k-images-idx3-ubyte")
    assert path is not None
    return read_idx(path)[:count, np.newaxis].astype(np.float32) / 255


def test_answers_as_torch_does_from_path_and_bytes(module: nn.Module, model: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.ort"
    export_ort(model, path)
    images = real_images(5)
    expected = TorchRuntime(module).logits(images)
    for source in (path, path.read_bytes()):
        np.testing.assert_allclose(OnnxRuntime(source).logits(images), expected, atol=2e-5)
    assert path.read_bytes()[4:8] == b"ORTM"


def test_keeps_labels_and_contract_and_nothing_of_the_machine(model: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.ort"
    export_ort(model, path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert set(session.get_modelmeta().custom_metadata_map) == {INPUT_KEY, LABELS_KEY}
    assert not [
        text for text in (str(tmp_path), str(Path.home()), str(Path.cwd())) if text.encode() in path.read_bytes()
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["model.ort"]


def test_operators_are_not_fused_into_onnxruntimes_own(module: nn.Module, tmp_path: Path) -> None:
    export_onnx(module, tmp_path / "model.onnx", CONTRACT, LABELS, opset=17)
    export_ort((tmp_path / "model.onnx").read_bytes(), tmp_path / "model.ort")
    content = (tmp_path / "model.ort").read_bytes()
    assert b"Erf" in content
    assert not [name for name in (b"BiasGelu", b"FusedMatMul", b"SkipLayerNormalization") if name in content]


def test_another_process_and_folder_give_the_same_bytes(model: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(model)
    program = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); "
        "from exporters.to_ort import export_ort; "
        "export_ort(Path('model.onnx').read_bytes(), Path('elsewhere') / 'other-name.ort')"
    )
    subprocess.run(
        [sys.executable, "-c", program, str(Path(__file__).parents[1])],
        check=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONHASHSEED": "7"},
    )
    export_ort(model, tmp_path / "model.ort")
    assert (tmp_path / "model.ort").read_bytes() == (tmp_path / "elsewhere" / "other-name.ort").read_bytes()


def test_what_is_in_order_stays_as_it_is(model: bytes, tmp_path: Path) -> None:
    export_ort(model, tmp_path / "model.ort")
    content = (tmp_path / "model.ort").read_bytes()
    assert in_order(content) == content


@pytest.mark.parametrize("cut", [0, 10, 1000])
def test_a_damaged_model_is_refused(model: bytes, cut: int, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="onnxruntime cannot write this model in its own format"):
        export_ort(model[:cut], tmp_path / "model.ort")
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_place_of_the_folder_is_named(model: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="a file stands where a folder belongs"):
        export_ort(model, tmp_path / "file" / "model.ort")
