"""Convert once, patch per device: the same bytes as a full conversion, or a full conversion and a word about it."""

from __future__ import annotations

import copy
import errno
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
import torch
from onnx import numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic
from timm.layers import set_fused_attn
from torch import nn

from exporters import export as export_module
from exporters import template as template_module
from exporters.contract import InputContract
from exporters.encodings import ENCODINGS, Weight, encode
from exporters.export import ExportPlan, Templates, convert, digests_of, export
from exporters.formats import FORMATS
from exporters.manifest import FileDigest
from exporters.mil.program import read_program
from exporters.quiet import import_coremltools
from exporters.run_onnx import OnnxRuntime
from exporters.run_torch import TorchRuntime
from exporters.template import TemplateError, device_tensors, load_template, make_template, patch, probe_of, prove
from factory.block_shuffle import BlockShuffle
from factory.classifier import ImageClassifier
from keys.errors import InputError

CONTRACT = InputContract(channels=3, height=32, width=32, resize="none")
LABELS = ("bag", "boot", "coat")
PATCHED = ("onnx-fp32", "onnx-fp16", "onnx-int8", "coreml-fp32", "coreml-fp16", "coreml-int8")
PLAN = ExportPlan(CONTRACT, LABELS, PATCHED)
SMALL = ExportPlan(CONTRACT, LABELS, ("onnx-fp32",))


def vit(seed: int, **sizes: int) -> nn.Module:
    """A ViT with weights of many sizes, some of them below what float16 holds, and vectors that are equal."""
    set_fused_attn(False)
    torch.manual_seed(seed)
    chosen = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2} | sizes
    return timm.create_model("vit_tiny_patch16_224", num_classes=3, pretrained=False, **chosen).eval()


def gathered(seed: int) -> nn.Module:
    """A ViT behind a shuffle that stays in the graph: blocks of 16 pixels, patches of 8."""
    permutation = np.random.default_rng(seed).permutation(3 * 16 * 16)
    shuffle = BlockShuffle(permutation, channels=3, block_size=16)
    return ImageClassifier(vit(seed), (0.5, 0.4, 0.3), (0.2, 0.2, 0.3), shuffle).eval()


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def templates(tmp_path: Path, told: list[str]) -> Templates:
    return Templates(tmp_path / "templates", {"fleet_id": "0" * 16}, told.append)


def exported(module: nn.Module, folder: Path, plan: ExportPlan, templates: Templates | None) -> dict[str, FileDigest]:
    folder.mkdir()
    digests = dict(export(module, folder, plan, templates).digests)
    assert digests == digests_of(folder)
    return digests


def conversions(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """Every module that is converted in full from now on."""
    seen: list[nn.Module] = []

    def watched(module: nn.Module, folder: Path, plan: ExportPlan) -> None:
        seen.append(module)
        convert(module, folder, plan)

    monkeypatch.setattr(export_module, "convert", watched)
    return seen


@pytest.mark.parametrize("target", ["iOS16", "iOS18"])
@pytest.mark.parametrize("make", [vit, gathered], ids=["folded", "gathered"])
def test_a_patched_device_has_the_bytes_of_a_full_conversion(
    make: Callable[[int], nn.Module], target: str, templates: Templates, told: list[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    plan = replace(PLAN, target=target)
    seen = conversions(monkeypatch)
    first = exported(make(1), tmp_path / "1", plan, templates)
    assert told == []
    assert len(seen) == 2  # the first device, and the probe that becomes the template
    second = exported(make(2), tmp_path / "2", plan, templates)
    assert len(seen) == 2
    assert told == []
    full = exported(make(2), tmp_path / "full", plan, None)
    assert second == full
    same = {name for name in first if first[name] == second[name]}
    assert same >= {f"{one}.mlpackage/Manifest.json" for one in ("model", "model-fp32", "model-int8")}
    assert not any(name.endswith(("weight.bin", ".onnx")) for name in same)
    assert len(second) == 12


def test_what_the_plan_says_is_what_is_written(templates: Templates, tmp_path: Path) -> None:
    """Operator set, batch and target, in formats from the template and in those that are made anew."""
    names = ("onnx-fp32", "onnx-int8", "onnx-int8-static", "ort-fp32", "coreml-fp16")
    images = np.random.default_rng(0).integers(0, 256, (4, *CONTRACT.shape), np.uint8)
    plan = replace(PLAN, formats=names, opset=18, batch="static", target="iOS17", calibration=images)
    exported(vit(1), tmp_path / "1", plan, templates)
    assert exported(vit(2), tmp_path / "2", plan, templates) == exported(vit(2), tmp_path / "full", plan, None)
    floats = images.astype(np.float32) / 255
    logits = TorchRuntime(vit(2)).logits(floats)
    for name in names[:-1]:
        path = tmp_path / "2" / FORMATS[name].path
        if path.suffix == ".onnx":
            model = onnx.load(path)
            assert {entry.version for entry in model.opset_import if not entry.domain} == {18}
            assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1
        assert np.abs(OnnxRuntime(path).logits(floats) - logits).max() < 0.2 * np.abs(logits).max()
    program = read_program(tmp_path / "2" / FORMATS["coreml-fp16"].path)
    assert program.target == 17
    without = replace(plan, formats=("onnx-int8-static",), calibration=None)
    (tmp_path / "3").mkdir()
    with pytest.raises(InputError, match="Static int8 needs images to calibrate on"):
        export(vit(1), tmp_path / "3", without, None)


def test_a_template_holds_no_weights_of_a_device(templates: Templates, tmp_path: Path) -> None:
    module = vit(1)
    exported(module, tmp_path / "1", PLAN, templates)
    kept = b"".join(path.read_bytes() for path in templates.folder.rglob("*") if path.is_file())
    weights = [values for values in device_tensors(module).values() if values.size >= 64 and len(np.unique(values)) > 9]
    assert len(weights) >= 8
    for values in weights:
        for dtype in (np.float32, np.float16):
            assert values.astype(dtype).tobytes()[:64] not in kept


def other_depth() -> nn.Module:
    return vit(2, depth=1)


def other_width() -> nn.Module:
    return vit(2, embed_dim=32)


def other_epsilon() -> nn.Module:
    """The same tensors in another graph."""
    module = vit(2)
    for part in module.modules():
        if isinstance(part, nn.LayerNorm):
            part.eps = 1e-3
    return module


@pytest.mark.parametrize("make", [other_depth, other_width, other_epsilon])
def test_another_model_is_never_written_from_the_template(
    make: Callable[[], nn.Module], templates: Templates, tmp_path: Path
) -> None:
    exported(vit(1), tmp_path / "1", SMALL, templates)
    assert exported(make(), tmp_path / "2", SMALL, templates) == exported(make(), tmp_path / "full", SMALL, None)


def test_a_tensor_of_another_name_shape_or_type_is_named(tmp_path: Path) -> None:
    module = vit(1)
    (tmp_path / "converted").mkdir()
    convert(module, tmp_path / "converted", SMALL)
    tensors = device_tensors(module)
    template = make_template(tmp_path / "converted", tensors, "")
    faults = {
        "head.bias": {**tensors, "head.bias": np.zeros(4, np.float32)},
        "cls_token": {name: values for name, values in tensors.items() if name != "cls_token"},
        "extra": {**tensors, "extra": np.zeros(1, np.float32)},
        "pos_embed": {**tensors, "pos_embed": tensors["pos_embed"].astype(np.int64)},
    }
    for name, faulty in faults.items():
        with pytest.raises(TemplateError, match=f"the tensor {name} is"):
            patch(template, faulty, tmp_path / "patched")
    assert not (tmp_path / "patched").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda templates: replace(templates, made_from={"fleet_id": "f" * 16}), "another base, fleet or settings"),
        (lambda templates: replace(templates, made_from={"coremltools": "8.0"}), "other versions of tools"),
    ],
)
def test_a_template_of_another_fleet_or_tool_is_refused_aloud(
    change: Callable[[Templates], Templates], words: str, templates: Templates, told: list[str], tmp_path: Path
) -> None:
    exported(vit(1), tmp_path / "1", SMALL, templates)
    assert exported(vit(2), tmp_path / "2", SMALL, change(templates)) == exported(vit(2), tmp_path / "3", SMALL, None)
    assert len(told) == 1
    assert words in told[0]
    assert "converted in full" in told[0]


def test_any_damage_to_a_template_is_found(templates: Templates, told: list[str], tmp_path: Path) -> None:
    exported(vit(1), tmp_path / "1", SMALL, templates)
    full = exported(vit(2), tmp_path / "full", SMALL, None)
    (place,) = [path.parent for path in templates.folder.rglob("template.json")]
    whole = {path.name: path.read_bytes() for path in place.iterdir()}
    record = json.loads(whole["template.json"])
    made_from = record["body"]["made_from"]
    assert load_template(place, made_from) is not None
    generator = np.random.default_rng(0)
    for name, data in whole.items():
        cases = [data[: len(data) // 2], data[:-1], b"", data + b"x" if name.endswith("skeleton") else data[1:]]
        for position in generator.integers(len(data), size=40):
            flipped = bytearray(data)
            flipped[position] ^= 1 << int(generator.integers(8))
            cases.append(bytes(flipped))
        for damaged in cases:
            (place / name).write_bytes(damaged)
            with pytest.raises(TemplateError):
                load_template(place, made_from)
        (place / name).write_bytes(data)
    (place / "0.skeleton").write_bytes(b"")
    assert exported(vit(2), tmp_path / "2", SMALL, templates) == full
    assert len(told) == 1
    assert "damaged" in told[0]
    # It was made again, and serves the next device.
    assert exported(vit(2), tmp_path / "3", SMALL, templates) == full
    assert len(told) == 1


def test_a_template_that_does_not_give_the_bytes_is_never_used(
    templates: Templates, told: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if a converter looked at values: an encoding is taken away, so that one tensor's place is not found."""
    known = dict(template_module.ENCODINGS)
    monkeypatch.delitem(template_module.ENCODINGS, "float32")
    assert known["float32"]
    full = exported(vit(2), tmp_path / "full", SMALL, None)
    exported(vit(1), tmp_path / "1", SMALL, templates)
    assert len(told) == 1
    assert "Every device is converted in full" in told[0]
    seen = conversions(monkeypatch)
    assert exported(vit(2), tmp_path / "2", SMALL, templates) == full
    assert len(seen) == 1  # and no second attempt at a template
    assert len(told) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_named(value: float, templates: Templates, tmp_path: Path) -> None:
    exported(vit(1), tmp_path / "1", SMALL, templates)
    broken = vit(2)
    with torch.no_grad():
        broken.get_parameter("blocks.1.attn.qkv.weight")[3, 5] = value
    (tmp_path / "2").mkdir()
    with pytest.raises(InputError, match=r"blocks\.1\.attn\.qkv\.weight holds NaN or infinite"):
        export(broken, tmp_path / "2", SMALL, templates)


@pytest.mark.parametrize("name", ["onnx-fp16", "coreml-fp16", "coreml-int8"])
def test_a_weight_beyond_float16_is_named(name: str, templates: Templates, tmp_path: Path) -> None:
    plan = replace(SMALL, formats=(name,))
    exported(vit(1), tmp_path / "1", plan, templates)
    broken = vit(2)
    with torch.no_grad():
        broken.get_parameter("head.weight")[0, 0] = 70_000
    for where in (templates, None):
        folder = tmp_path / f"broken-{where is None}"
        folder.mkdir()
        with pytest.raises(InputError, match=r"head\.weight holds 70000, more than float16 can"):
            export(broken, folder, plan, where)


def test_a_full_disk_leaves_neither_a_template_nor_a_device(
    templates: Templates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object, **named: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "1").mkdir()
    with monkeypatch.context() as patched:
        patched.setattr(export_module, "save_template", full)
        with pytest.raises(OSError, match="No space left"):
            export(vit(1), tmp_path / "1", SMALL, templates)
    assert not list(templates.folder.rglob("template.json"))
    assert not list(templates.folder.rglob("*.probe"))
    shutil.rmtree(tmp_path / "1")
    first = exported(vit(1), tmp_path / "1", SMALL, templates)
    assert first == exported(vit(1), tmp_path / "full", SMALL, None)


def test_the_proof_finds_any_change(tmp_path: Path) -> None:
    probe, module = probe_of(vit(1)), vit(1)
    for name, one in (("probe", probe), ("device", module)):
        (tmp_path / name).mkdir()
        convert(one, tmp_path / name, SMALL)
    template = make_template(tmp_path / "probe", device_tensors(probe), "")
    tensors = device_tensors(module)
    assert prove(template, tensors, tmp_path / "device") is None
    path = tmp_path / "device" / "model.onnx"
    data = bytearray(path.read_bytes())
    for position in (0, len(data) // 2, len(data) - 1):
        data[position] ^= 1
        path.write_bytes(data)
        assert "model.onnx differs" in str(prove(template, tensors, tmp_path / "device"))
        data[position] ^= 1
    path.write_bytes(data + b"x")
    assert prove(template, tensors, tmp_path / "device") == "model.onnx has another length"
    path.rename(path.with_name("other.onnx"))
    assert "other files" in str(prove(template, tensors, tmp_path / "device"))


# ---- encodings against the libraries that they stand for -----------------------------------------------------------


def matrices() -> Iterator[np.ndarray]:
    generator = np.random.default_rng(0)
    for rows, columns in ((3, 5), (64, 48), (7, 1)):
        yield generator.standard_normal((rows, columns), np.float32)
    odd = generator.standard_normal((6, 8), np.float32)
    odd[0], odd[1], odd[2], odd[3] = 0, 1e-9, 3e4, np.linspace(-0.5, 0.5, 8)
    yield odd
    yield np.round(generator.standard_normal((16, 16)) * 4).astype(np.float32) / 4  # many ties


@pytest.mark.parametrize("weight", list(matrices()), ids=lambda weight: str(weight.shape))
def test_int8_is_onnxruntimes(weight: np.ndarray, tmp_path: Path) -> None:
    inputs = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, weight.shape[1]])
    outputs = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, weight.shape[0]])
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"])
    initializer = numpy_helper.from_array(np.ascontiguousarray(weight.T), "w")
    graph = onnx.helper.make_graph([node], "one", [inputs], [outputs], [initializer])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    quantize_dynamic(model, tmp_path / "q.onnx", per_channel=True, weight_type=QuantType.QInt8)
    stored = {one.name: numpy_helper.to_array(one) for one in onnx.load(tmp_path / "q.onnx").graph.initializer}
    assert bytes(encode("onnxruntime int8 transposed", Weight("w", weight))) == stored["w_quantized"].tobytes()
    assert bytes(encode("onnxruntime int8 scale per row", Weight("w", weight))) == stored["w_scale"].tobytes()
    assert not stored["w_zero_point"].any()


def test_quantising_writes_no_log_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "1").mkdir()
    convert(vit(1, depth=1), tmp_path / "1", replace(SMALL, formats=("onnx-int8",)))
    assert [record.name for record in caplog.records if record.levelno >= logging.WARNING] == []
    logging.getLogger("afterwards").warning("is heard")
    assert caplog.records[-1].message == "is heard"


@pytest.mark.parametrize("weight", list(matrices()), ids=lambda weight: str(weight.shape))
def test_int8_is_coremltools(weight: np.ndarray) -> None:
    quantise = import_coremltools("coremltools.optimize._utils").compute_qparams_by_dtype
    types = import_coremltools("coremltools.converters.mil.mil").types
    with np.errstate(invalid="ignore"):
        values, scales, zero = quantise(weight.astype(np.float16), types.int8, "LINEAR_SYMMETRIC", [1, 0])
    assert zero is None
    assert bytes(encode("coremltools int8", Weight("w", weight))) == values.tobytes()
    assert bytes(encode("coremltools int8 scale per row", Weight("w", weight))) == scales.tobytes()


def test_small_float16_tensors_are_coremltools(tmp_path: Path) -> None:
    """coremltools keeps small numbers of small tensors from becoming zero; an exported bias shows it."""
    module = vit(1)
    with torch.no_grad():
        module.get_parameter("head.bias").copy_(torch.tensor([1e-9, -1e-9, 0.0]))
    plan = replace(SMALL, formats=("coreml-fp16",))
    (tmp_path / "1").mkdir()
    convert(module, tmp_path / "1", plan)
    tensors = device_tensors(module)
    expected = bytes(encode("coremltools float16", Weight("head.bias", tensors["head.bias"])))
    assert expected == np.array([6e-8, -6e-8, 0], np.float16).tobytes()
    assert any(expected in path.read_bytes() for path in (tmp_path / "1").rglob("*") if path.is_file())


def test_every_encoding_says_its_length() -> None:
    generator = np.random.default_rng(0)
    floats = [generator.standard_normal(shape).astype(np.float32) for shape in ((5,), (3, 4), (2, 3, 4, 4))]
    tensors = [*floats, generator.permutation(300).astype(np.int64)]
    used = set()
    for name, encoding in ENCODINGS.items():
        for values in tensors:
            length = encoding.length(values)
            if length is not None:
                used.add(name)
                assert len(encode(name, Weight("w", values))) == length or encoding.size == 0
    assert used == set(ENCODINGS)


def test_a_probe_has_the_shapes_and_none_of_the_values() -> None:
    module = gathered(1)
    before = copy.deepcopy(module.state_dict())
    probe = probe_of(module)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    for name, value in probe.state_dict().items():
        assert (value.shape, value.dtype) == (before[name].shape, before[name].dtype)
        assert not torch.equal(value, before[name])
    permutation = probe.state_dict()["transform.permutation"]
    assert torch.equal(permutation.sort().values, torch.arange(3 * 16 * 16))
    again = probe_of(gathered(2)).state_dict()
    assert all(torch.equal(again[name], value) for name, value in probe.state_dict().items())


class Odd(nn.Module):
    """A linear layer with a tensor of a kind that ViTs rarely have; ``seed`` 1 is a device whose gains are equal."""

    def __init__(self, seed: int, kind: str) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.fc = nn.Linear(3 * 32 * 32, 3)
        self.gain, self.offset = (nn.Parameter(torch.full((1,), float(value))) for value in (seed, seed**2))
        odd = {
            "gains": torch.arange(4), "matrix": torch.arange(4).view(2, 2), "count": torch.tensor(0),
            "bool": torch.ones(3, dtype=torch.bool), "empty": torch.zeros(0, 5),
        }  # fmt: skip
        self.register_buffer("odd", odd[kind])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(images.flatten(1) * self.gain + self.offset)


@pytest.mark.parametrize("kind", ["gains", "matrix", "count", "bool", "empty"])
def test_odd_tensors_are_told_apart_or_the_model_is_converted_in_full(
    kind: str, templates: Templates, tmp_path: Path
) -> None:
    exported(Odd(1, kind).eval(), tmp_path / "1", SMALL, templates)
    patched = exported(Odd(2, kind).eval(), tmp_path / "2", SMALL, templates)
    assert patched == exported(Odd(2, kind).eval(), tmp_path / "full", SMALL, None)
