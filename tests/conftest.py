"""What several test files share: a manifest, a signing key, and a real package built without torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from exporters.contract import InputContract
from exporters.golden import GOLDEN_NAME, Golden
from exporters.manifest import Manifest
from exporters.package import sign_package, write_package
from keys.files import folder_being_written
from keys.signing import SigningKey

GREY_8X8 = InputContract(channels=1, height=8, width=8, resize="bicubic to 8x8, no crop")


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
