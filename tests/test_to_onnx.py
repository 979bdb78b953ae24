"""ONNX export: one checked file with the contract inside, nothing of the machine, the same bytes each time."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from timm.layers import SwiGLUPacked, set_fused_attn
from torch import nn

from exporters.contract import InputContract
from exporters.onnx_lowering import lower_to_17
from exporters.run_onnx import OnnxRuntime
from exporters.run_torch import TorchRuntime
from exporters.to_onnx import INPUT_KEY, LABELS_KEY, export_onnx
from factory.data import FASHION_MNIST_LABELS, SAMPLE
from factory.idx import find_idx, read_idx
from keys.errors import InputError

CONTRACT = InputContract(channels=1, height=28, width=28, resize="bicubic to 28x28, no crop")
LABELS = list(FASHION_MNIST_LABELS)


class Shuffled(nn.Module):
    """A shuffle that stays in the graph: blocks to channels, gather, back."""

    def __init__(self, module: nn.Module, order: torch.Tensor, block: int) -> None:
        super().__init__()
        self.module, self.block = module, block
        self.register_buffer("order", order)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        blocks = nn.functional.pixel_unshuffle(image, self.block).index_select(1, self.order)
        return self.module(nn.functional.pixel_shuffle(blocks, self.block))


def tiny_vit(**changes: object) -> nn.Module:
    set_fused_attn(False)
    torch.manual_seed(0)
    settings: dict = {
        "img_size": 28,
        "patch_size": 7,
        "in_chans": 1,
        "embed_dim": 64,
        "depth": 2,
        "num_heads": 2,
        "num_classes": 10,
        **changes,
    }
    return timm.create_model("vit_tiny_patch16_224", pretrained=False, **settings).eval()


def gated_vit() -> nn.Module:
    """A gated MLP and average pooling: a mean besides what every ViT has."""
    return tiny_vit(depth=1, mlp_layer=SwiGLUPacked, global_pool="avg")


def real_images(count: int) -> np.ndarray:
    path = find_idx(SAMPLE, "t10k-images-idx3-ubyte")
    assert path is not None
    return read_idx(path)[:count, np.newaxis].astype(np.float32) / 255


@pytest.fixture(scope="module")
def module() -> nn.Module:
    return tiny_vit()


@pytest.fixture(scope="module")
def exported(module: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    export_onnx(module, path, CONTRACT, LABELS)
    return path


def strings(message: object) -> list[str]:
    """Every text in a protobuf message."""
    found = []
    for field, value in message.ListFields():  # type: ignore[attr-defined]
        for part in value if field.is_repeated else [value]:
            if field.message_type is not None:
                found += strings(part)
            elif isinstance(part, str):
                found.append(part)
    return found


def test_answers_as_torch_does_for_any_batch(module: nn.Module, exported: Path) -> None:
    images = real_images(70)
    expected = TorchRuntime(module).logits(images)
    runtime = OnnxRuntime(exported, threads=1)
    for count in (1, 3, 70):
        np.testing.assert_allclose(runtime.logits(images[:count]), expected[:count], atol=2e-5)


def test_loads_from_verified_bytes(module: nn.Module, exported: Path) -> None:
    images = real_images(2)
    assert np.array_equal(OnnxRuntime(exported.read_bytes()).logits(images), OnnxRuntime(exported).logits(images))


def test_input_output_opset_and_free_batch(exported: Path) -> None:
    model = onnx.load(exported)
    onnx.checker.check_model(model, full_check=True)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 20)]
    (image,), (logits,) = model.graph.input, model.graph.output
    assert (image.name, logits.name) == ("image", "logits")
    assert image.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    sizes = image.type.tensor_type.shape.dim
    assert sizes[0].dim_param
    assert [size.dim_value for size in sizes[1:]] == [1, 28, 28]


def test_carries_labels_and_contract(exported: Path) -> None:
    values = {entry.key: entry.value for entry in onnx.load(exported).metadata_props}
    assert set(values) == {LABELS_KEY, INPUT_KEY}
    assert json.loads(values[LABELS_KEY]) == LABELS
    assert InputContract.from_json(json.loads(values[INPUT_KEY])) == CONTRACT


def test_initializers_keep_the_parameters_names_and_values(module: nn.Module, exported: Path) -> None:
    found = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(exported).graph.initializer}
    expected = {name: value.detach().numpy() for name, value in module.named_parameters()}
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_tells_nothing_of_the_machine(exported: Path) -> None:
    model = onnx.load(exported)
    del model.metadata_props[:]
    assert [text for text in strings(model) if "/" in text or ".py" in text or "timm" in text] == []
    assert str(Path.home()).encode() not in exported.read_bytes()


def test_same_module_same_bytes(module: nn.Module, exported: Path, tmp_path: Path) -> None:
    export_onnx(module, tmp_path / "again.onnx", CONTRACT, LABELS)
    assert (tmp_path / "again.onnx").read_bytes() == exported.read_bytes()


def test_prints_nothing(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    export_onnx(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval(), tmp_path / "m.onnx", small(), ["a", "b"])
    assert capfd.readouterr() == ("", "")


def test_a_gather_in_front_keeps_its_meaning(module: nn.Module, tmp_path: Path) -> None:
    keyed = Shuffled(module, torch.randperm(16), 4).eval()
    export_onnx(keyed, tmp_path / "keyed.onnx", CONTRACT, LABELS)
    images = real_images(5)
    np.testing.assert_allclose(
        OnnxRuntime(tmp_path / "keyed.onnx").logits(images), TorchRuntime(keyed).logits(images), atol=2e-5
    )


def small(channels: int = 1) -> InputContract:
    return InputContract(channels=channels, height=2, width=2, resize="none")


def broken(value: float) -> nn.Module:
    module = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval()
    with torch.no_grad():
        module[1].weight[0, 1] = value
    return module


REFUSED = [
    ("NaN weight", broken(float("nan")), small(), ["a", "b"], r"tensor 1\.weight holds NaN or infinite"),
    ("infinite weight", broken(float("inf")), small(), ["a", "b"], r"tensor 1\.weight holds NaN or infinite"),
    ("one label too many", broken(1), small(), ["a", "b", "c"], "2 logits and there are 3 class names"),
    ("a label twice", broken(1), small(), ["a", "a"], "'a' is used 2 times"),
    ("an empty label", broken(1), small(), ["a", " "], "name of class 1 is empty"),
    ("one label", broken(1), small(), ["a"], "at least two class names"),
    ("another image size", broken(1), small(3), ["a", "b"], "does not take an image of size 3×2×2"),
    ("training mode", broken(1).train(), small(), ["a", "b"], r"training mode; call eval\(\)"),
    ("bfloat16", broken(1).bfloat16(), small(), ["a", "b"], r"torch\.bfloat16; convert the model to float32"),
    ("no logits", nn.Identity().eval(), small(), ["a", "b"], "one tensor of logits N×K"),
]


@pytest.mark.parametrize(("module", "contract", "labels", "sentence"), [row[1:] for row in REFUSED])
def test_refuses_with_a_sentence(
    module: nn.Module, contract: InputContract, labels: list[str], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=sentence):
        export_onnx(module, tmp_path / "model.onnx", contract, labels)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("opset", [16, 23, 20.0, True])
def test_refuses_another_opset(opset: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"a whole number from 17 to 22; got {opset}"):
        export_onnx(broken(1), tmp_path / "model.onnx", small(), ["a", "b"], opset=opset)


def test_refuses_another_batch(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'dynamic' or 'static'; got '8'"):
        export_onnx(broken(1), tmp_path / "model.onnx", small(), ["a", "b"], batch="8")  # type: ignore[arg-type]


@pytest.mark.parametrize("opset", range(17, 23))
def test_every_opset_loads_and_answers_alike(opset: int, tmp_path: Path) -> None:
    module = gated_vit()
    path = tmp_path / "model.onnx"
    export_onnx(module, path, CONTRACT, LABELS, opset=opset)
    model = onnx.load(path)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", opset)]
    # The file versions of ONNX 1.12 to 1.17, which brought these opsets: what an old runtime looks at first.
    assert model.ir_version == {17: 8, 18: 8, 19: 9, 20: 9, 21: 10, 22: 10}[opset]
    assert {name for name, _ in module.named_parameters()} <= {tensor.name for tensor in model.graph.initializer}
    kinds = {node.op_type for node in model.graph.node}
    assert {"LayerNormalization", "ReduceMean"} <= kinds
    images = real_images(5)
    np.testing.assert_allclose(OnnxRuntime(path).logits(images), TorchRuntime(module).logits(images), atol=2e-5)


@pytest.mark.parametrize(("opset", "kind"), [(19, "Erf"), (20, "Gelu")])
def test_gelu_is_spelled_out_where_the_opset_lacks_it(module: nn.Module, opset: int, kind: str, tmp_path: Path) -> None:
    export_onnx(module, tmp_path / "model.onnx", CONTRACT, LABELS, opset=opset)
    kinds = {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}
    assert kinds & {"Erf", "Gelu"} == {kind}


class Padded(nn.Module):
    """An operator whose form changed in opset 18 and that is not rewritten for 17."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return nn.functional.pad(image.flatten(1), (1, 1))


def test_what_an_opset_lacks_is_named(tmp_path: Path) -> None:
    labels = list("abcdef")
    export_onnx(Padded().eval(), tmp_path / "model.onnx", small(), labels, opset=18)
    with pytest.raises(InputError, match="opset 17: its operator 'Pad' needs 18; choose opset 18 or newer"):
        export_onnx(Padded().eval(), tmp_path / "older.onnx", small(), labels, opset=17)
    assert not (tmp_path / "older.onnx").exists()


def test_an_equal_split_is_lowered() -> None:
    halves = onnx.helper.make_node("Split", ["image"], ["left", "right"], axis=1, num_outputs=2)
    total = onnx.helper.make_node("Sub", ["left", "right"], ["logits"])
    image = onnx.helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, [1, 4])
    logits = onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, [1, 2])
    graph = onnx.helper.make_graph([halves, total], "graph", [image], [logits])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8)
    lower_to_17(model)
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert np.array_equal(session.run(None, {"image": np.array([[5, 6, 1, 3]], np.float32)})[0], [[4, 3]])


@pytest.mark.parametrize("opset", [17, 20])
def test_a_static_batch_is_one_image(module: nn.Module, opset: int, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    export_onnx(module, path, CONTRACT, LABELS, opset=opset, batch="static")
    model = onnx.load(path)
    (image,), (logits,) = model.graph.input, model.graph.output
    assert [size.dim_value for size in image.type.tensor_type.shape.dim] == [1, 1, 28, 28]
    assert [size.dim_value for size in logits.type.tensor_type.shape.dim] == [1, 10]
    # Nothing is computed from a shape any more.
    assert not {node.op_type for node in model.graph.node} & {"Shape", "Size"}
    images = real_images(3)
    np.testing.assert_allclose(OnnxRuntime(path).logits(images), TorchRuntime(module).logits(images), atol=2e-5)


def test_another_fixed_batch_is_refused(exported: Path) -> None:
    model = onnx.load(exported)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    with pytest.raises(InputError, match="it takes 4 at a time"):
        OnnxRuntime(model.SerializeToString())


@pytest.mark.parametrize("cut", [0, 10, 1000])
def test_a_damaged_model_does_not_load(exported: Path, cut: int) -> None:
    with pytest.raises(InputError, match="onnxruntime cannot load the ONNX model"):
        OnnxRuntime(exported.read_bytes()[:cut])


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=re.escape(str(tmp_path / "none.onnx"))):
        OnnxRuntime(tmp_path / "none.onnx")


def test_another_model_is_refused(tmp_path: Path) -> None:
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    result = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "g", [value], [result])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    with pytest.raises(InputError, match=r"found inputs \['x'\]"):
        OnnxRuntime(model.SerializeToString())


WRONG_IMAGES = [
    (np.zeros((1, 1, 27, 28), np.float32), "takes images N×1×28×28"),
    (np.zeros((1, 28, 28), np.float32), "takes images N×1×28×28"),
    (np.zeros((0, 1, 28, 28), np.float32), "no images"),
    (np.zeros((1, 1, 28, 28), np.uint8), "divide 8-bit images by 255"),
    (np.full((1, 1, 28, 28), 1.5, np.float32), "from 1.5 to 1.5"),
    (np.full((1, 1, 28, 28), np.nan, np.float32), "must lie in"),
]


@pytest.mark.parametrize(("images", "sentence"), WRONG_IMAGES)
def test_wrong_images_are_refused(exported: Path, images: np.ndarray, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        OnnxRuntime(exported).logits(images)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"channels": 2}, "1 channel"),
        ({"channels": True}, "1 channel"),
        ({"height": 0}, "height must be between"),
        ({"width": 28.0}, "width must be between"),
        ({"resize": " "}, "must name the resize"),
    ],
)
def test_contract_is_strict(fields: dict[str, object], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        InputContract.from_json({**CONTRACT.to_json(), **fields})


@pytest.mark.parametrize("value", [None, [], {}, {**CONTRACT.to_json(), "more": 1}])
def test_contract_has_exactly_its_fields(value: object) -> None:
    with pytest.raises(InputError, match="exactly the fields"):
        InputContract.from_json(value)
