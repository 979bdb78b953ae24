"""Sorted volumes as ONNX and Core ML: the same orders and logits as torch, on real images, in every precision."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from exporters.contract import InputContract
from exporters.parity import COREML_FP16, COREML_FP32, ONNX_FP32, measure_parity
from exporters.run_coreml import CoreMLEvaluator
from exporters.run_onnx import OnnxRuntime
from exporters.run_torch import TorchRuntime
from exporters.to_coreml import Precision, Target, export_coreml
from exporters.to_onnx import export_onnx
from factory.data import FASHION_MNIST_LABELS, SAMPLE
from factory.idx import find_idx, read_idx
from factory.volumization.metrics import METRICS
from factory.volumization.networks import build_network
from factory.volumization.order import ORDERS
from factory.volumization.volumize import Volumize
from keys.errors import InputError
from keys.permutation import permutation

GREY = InputContract(channels=1, height=28, width=28, resize="none")
LABELS = list(FASHION_MNIST_LABELS)
PATCHES = 16


@functools.cache
def images() -> np.ndarray:
    """Real images, and some on which orders are decided by ties and by single levels."""
    path = find_idx(SAMPLE, "t10k-images-idx3-ubyte")
    assert path is not None
    real = read_idx(path)[:64, np.newaxis]
    generator = np.random.default_rng(0)
    flat = generator.integers(0, 256, (16, 1, 1, 1)) + generator.integers(-1, 2, (16, 1, 28, 28))
    levels = np.arange(28 * 28).reshape(1, 1, 28, 28) % 256
    return np.concatenate([real, flat.clip(0, 255), levels, np.zeros_like(levels)]).astype(np.float32) / 255


def transform(order: str) -> Volumize:
    return Volumize(7, order, permutation=permutation(bytes(32), PATCHES) if order == "key" else None)


class OrdersAsLogits(nn.Module):
    """All orders themselves as outputs: logit 16·o + j is the index of the patch at place j in order o."""

    def __init__(self) -> None:
        super().__init__()
        self.transforms = nn.ModuleList(transform(order) for order in ORDERS)
        # A package of Core ML holds weights, and logits must come from the image.
        self.nothing = nn.Linear(28 * 28, 1, bias=False)
        nn.init.zeros_(self.nothing.weight)

    def forward(self, image: Tensor) -> Tensor:
        found = torch.cat([volumize.orders(image) for volumize in self.transforms], 1)
        return found.to(image.dtype) + self.nothing(image.flatten(1))


class Volumized(nn.Module):
    """Transform, normalisation and network, as the factory puts them together."""

    def __init__(self, volumize: Volumize, network: nn.Module) -> None:
        super().__init__()
        self.volumize, self.network = volumize, network

    def forward(self, image: Tensor) -> Tensor:
        return self.network((self.volumize(image) - 0.3) / 0.4)


def network(kind: str, aggregate: str = "mean-logits", depth: int = 4) -> nn.Module:
    torch.manual_seed(0)
    built = build_network(
        kind, channels=1, patches=PATCHES, side=7, classes=10, width=4, depth_kernel=depth, aggregate=aggregate
    )
    built.train()
    # Running statistics that are those of the images, as after training.
    with torch.no_grad():
        for _ in range(30):
            built((Volumize(7)(torch.from_numpy(images())) - 0.3) / 0.4)
    return built.eval()


SORTS = [f"{order}, place {place}" for order in ORDERS for place in range(PATCHES)]


@pytest.fixture(scope="module")
def sorts() -> tuple[nn.Module, np.ndarray]:
    """A module that gives every order, and what it gives."""
    module = OrdersAsLogits().eval()
    expected = TorchRuntime(module).logits(images())
    by_metric = expected.reshape(len(expected), len(ORDERS), PATCHES)[:, : len(METRICS)]
    # All metrics sort these images, and no two of them in the same way, or agreement would show little.
    assert (by_metric != np.arange(PATCHES)).any(axis=(0, 2)).all()
    assert len({row.tobytes() for row in by_metric.swapaxes(0, 1)}) == len(METRICS)
    return module, expected


@pytest.mark.parametrize("opset", [20, 17])
def test_onnx_sorts_as_torch_does(opset: int, sorts: tuple[nn.Module, np.ndarray], tmp_path: Path) -> None:
    module, expected = sorts
    export_onnx(module, tmp_path / "m.onnx", GREY, SORTS, opset=opset)
    assert np.array_equal(OnnxRuntime(tmp_path / "m.onnx").logits(images()), expected)


@pytest.mark.parametrize(("precision", "target"), [("fp32", "iOS16"), ("fp16", "iOS16"), ("fp16", "iOS18")])
def test_core_ml_sorts_as_torch_does(
    precision: Precision, target: Target, sorts: tuple[nn.Module, np.ndarray], tmp_path: Path
) -> None:
    module, expected = sorts
    export_coreml(module, tmp_path / "m.mlpackage", GREY, SORTS, precision=precision, target=target)
    # In float16 too, to the last place: scores are whole numbers there as well.
    assert np.array_equal(CoreMLEvaluator(tmp_path / "m.mlpackage").logits(images()), expected)


@pytest.mark.parametrize(
    ("kind", "order", "aggregate", "opset", "precision"),
    [
        ("vgg3d", "entropy", "mean-logits", 20, "fp16"),
        ("resnet3d", "key", "mean-probabilities", 17, "fp32"),
        ("efficientnet3d", "mutual-information", "mean-probabilities", 17, "fp16"),
    ],
)
def test_networks_agree_with_torch(
    kind: str, order: str, aggregate: str, opset: int, precision: Precision, tmp_path: Path
) -> None:
    module = Volumized(transform(order), network(kind, aggregate)).eval()
    reference = TorchRuntime(module)
    export_onnx(module, tmp_path / "m.onnx", GREY, LABELS, opset=opset)
    parity = measure_parity(reference, OnnxRuntime(tmp_path / "m.onnx"), images(), ONNX_FP32)
    assert parity.passed, parity
    export_coreml(module, tmp_path / "m.mlpackage", GREY, LABELS, precision=precision)
    limits = COREML_FP32 if precision == "fp32" else COREML_FP16
    parity = measure_parity(reference, CoreMLEvaluator(tmp_path / "m.mlpackage"), images(), limits)
    # Classes of untrained networks may be as close as rounding; where orders differed, logits would be far apart.
    assert parity.max_relative_difference <= limits.difference, parity


@pytest.mark.parametrize("opset", [17, 20])
def test_a_convolution_in_three_dimensions_without_bias_is_exported(opset: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = (nn.Conv3d(1, 4, 3, bias=False), nn.Conv3d(4, 2, 1), nn.Flatten(), nn.Linear(2 * 2 * 5 * 5, 3))
    module = nn.Sequential(Volumize(7, "raster"), *layers[:1], nn.AvgPool3d((7, 1, 1)), *layers[1:]).eval()
    export_onnx(module, tmp_path / "m.onnx", GREY, LABELS[:3], opset=opset)
    model = onnx.load(tmp_path / "m.onnx")
    assert [len(node.input) for node in model.graph.node if node.op_type == "Conv"] == [2, 3]
    parity = measure_parity(TorchRuntime(module), OnnxRuntime(tmp_path / "m.onnx"), images(), ONNX_FP32)
    assert parity.passed, parity


def test_a_free_batch_size_is_recorded() -> None:
    module = transform("mutual-information")
    example = torch.from_numpy(images()[:3])
    program = torch.export.export(module, (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    for count in (1, 2, 7):
        given = torch.from_numpy(images()[:count])
        assert torch.equal(program.module()(given), module(given))


def test_images_that_do_not_fit_are_refused_when_a_model_is_exported(tmp_path: Path) -> None:
    module = Volumized(Volumize(5), nn.Flatten()).eval()
    with pytest.raises(InputError, match="do not tile"):
        export_onnx(module, tmp_path / "m.onnx", GREY, LABELS)
