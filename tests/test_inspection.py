"""``info`` and ``diff``: what real packages and models hold, what differs, and that no tensor's values are told."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from onnx import numpy_helper
from timm.layers import set_fused_attn
from torch import nn

from exporters.contract import InputContract
from exporters.inspect_diff import compare_models, compare_tensors
from exporters.inspection import Model, read_model
from exporters.manifest import MANIFEST_NAME, SIGNATURE_NAME, FormatEntry, Manifest
from exporters.package import sign_package, write_package
from exporters.quiet import import_coremltools
from exporters.to_coreml import MODEL_PATH, WEIGHTS_PATH, export_coreml
from exporters.to_onnx import export_onnx
from keys.errors import CheckFailed, InputError
from keys.files import folder_being_written
from keys.signing import SigningKey, write_public_key

Run = Callable[..., Any]
CONTRACT = InputContract(channels=1, height=28, width=28, resize="bicubic to 28x28, no crop")
LABELS = ["bag", "boot", "coat"]
FORMATS = {
    "onnx-fp32": FormatEntry("model.onnx", "onnxruntime", "fp32", {"opset": 20}),
    "ort-fp32": FormatEntry("model.ort", "onnxruntime", "fp32", {}),
    "coreml-fp16": FormatEntry("model.mlpackage", "coreml", "fp16", {}),
}
PARITY = {
    "passed": True, "top1_agreement": 1.0, "top1_limit": 1.0, "max_relative_difference": 1e-6, "limit": 1e-3, "n": 64,
    "runtime": "onnxruntime",
}  # fmt: skip
PROPORTION = {"successes": 90, "n": 100, "value": 0.9, "interval": [0.825, 0.944]}
EVIDENCE = {
    "accuracy": PROPORTION, "worst_case": {"not_measured": "no image was attacked"}, "parity": {"ONNX fp32": PARITY},
    "decision": {"released": True, "conditions": [{"name": "accuracy", "met": True, "sentence": "It is [high]."}]},
}  # fmt: skip


class Shuffled(nn.Module):
    """A ViT behind an order of blocks that stays in the graph as a tensor of whole numbers."""

    def __init__(self, device: int) -> None:
        super().__init__()
        set_fused_attn(False)
        torch.manual_seed(0)
        sizes = {"img_size": 28, "patch_size": 7, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 3}
        self.vit = timm.create_model("vit_tiny_patch16_224", in_chans=1, pretrained=False, **sizes)
        self.order: torch.Tensor
        self.register_buffer("order", torch.from_numpy(np.random.default_rng(device).permutation(49)))
        with torch.no_grad():
            self.vit.head.weight += 0.01 * device

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        blocks = nn.functional.pixel_unshuffle(image, 7).index_select(1, self.order)
        return self.vit(nn.functional.pixel_shuffle(blocks, 7))


def write_ort(source: Path, target: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(target)
    options.add_session_config_entry("session.save_model_format", "ORT")
    onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def packages(
    manifest: Manifest, signing_key: SigningKey, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """Signed packages of two devices in three formats; not to be changed."""
    paths = []
    for device in (1, 2):
        path = tmp_path_factory.mktemp("packages") / f"device-{device}"
        module = Shuffled(device).eval()
        with folder_being_written(path) as folder:
            export_onnx(module, folder / "model.onnx", CONTRACT, LABELS)
            write_ort(folder / "model.onnx", folder / "model.ort")
            export_coreml(module, folder / "model.mlpackage", CONTRACT, LABELS, precision="fp16")
            changed: dict[str, Any] = {"device_id": f"device-{device}", "formats": FORMATS, "input": CONTRACT}
            evidence = EVIDENCE | {"accuracy": PROPORTION | {"value": 0.9 - device / 100}}
            write_package(folder, dataclasses.replace(manifest, evidence=evidence, **changed))
        sign_package(path, signing_key)
        paths.append(path)
    return paths[0], paths[1]


@pytest.fixture
def package(packages: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return shutil.copytree(packages[0], tmp_path / "package")


def parsed(result: Any, code: int = 0) -> Any:
    assert result.code == code, result.err
    return json.loads(result.out)


def refused(result: Any, code: int, *words: str) -> None:
    """One sentence on standard error, and nothing else anywhere."""
    assert result.code == code, result.out + result.err
    assert result.out == ""
    lines = result.err.splitlines()
    assert len(lines) == 1, result.err
    assert lines[0].startswith("Error: ")
    for word in words:
        assert word in lines[0]


# info


def test_an_onnx_file_is_read_as_it_is(packages: tuple[Path, Path]) -> None:
    path = packages[0] / "model.onnx"
    model, expected = read_model(path), onnx.load(path)
    assert [dataclasses.astuple(port) for port in model.inputs] == [("image", "float32", ("batch", 1, 28, 28))]
    assert [dataclasses.astuple(port) for port in model.outputs] == [("logits", "float32", ("batch", 3))]
    assert model.batch == "any"
    assert sum(model.operators.values()) == len(expected.graph.node)
    assert model.operators["MatMul"] == sum(node.op_type == "MatMul" for node in expected.graph.node)
    assert model.versions == {"opset ai.onnx": "20", "IR version": str(expected.ir_version)}
    assert model.graph_bytes + model.weight_bytes == path.stat().st_size
    assert model.weight_bytes == sum(len(tensor.raw_data) for tensor in expected.graph.initializer)
    # The module's own count, and the pixel scale and other constants that the graph brings along.
    parameters = sum(value.numel() for value in Shuffled(1).parameters())
    assert parameters <= model.parameters < parameters + 20
    assert set(model.metadata) == {"keyfoundry.input", "keyfoundry.labels"}
    assert model.precision["float32"] == 4 * sum(v.size for v in model.tensors.values() if v.dtype == np.float32)


def test_onnxruntimes_format_is_read_as_onnxruntime_does(packages: tuple[Path, Path]) -> None:
    path = packages[0] / "model.ort"
    model = read_model(path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [(port.name, port.shape) for port in model.inputs] == [("image", ("batch", 1, 28, 28))]
    assert model.versions["ORT format version"].isdigit()
    assert model.versions["opset ai.onnx"] == "20"
    assert dict(model.metadata) == dict(session.get_modelmeta().custom_metadata_map)
    assert model.operators["Softmax"] == 1
    assert model.graph_bytes + model.weight_bytes == path.stat().st_size
    plain = read_model(packages[0] / "model.onnx")
    for name in ("patch_embed.proj.bias", "vit.patch_embed.proj.bias"):
        if name in plain.tensors and name in model.tensors:
            assert np.array_equal(model.tensors[name], plain.tensors[name])
            break
    else:
        pytest.fail("both formats have the bias of the patches")


def test_a_coreml_package_is_read_as_it_is(packages: tuple[Path, Path]) -> None:
    path = packages[0] / "model.mlpackage"
    model = read_model(path)
    messages = import_coremltools("coremltools.proto.Model_pb2")
    specification = messages.Model.FromString((path / MODEL_PATH).read_bytes())
    assert [dataclasses.astuple(port) for port in model.inputs] == [("image", "image, grayscale", (28, 28))]
    assert {port.name for port in model.outputs} == {"classLabel", "classLabel_probs", "logits"}
    assert model.batch == "1"
    block = next(iter(specification.mlProgram.functions["main"].block_specializations.values()))
    assert sum(model.operators.values()) == sum(operation.type != "const" for operation in block.operations)
    assert model.versions["specification version"] == str(specification.specificationVersion)
    assert model.versions["oldest iOS"] == str(specification.specificationVersion + 9)
    assert model.weight_bytes == (path / WEIGHTS_PATH).stat().st_size
    assert next(iter(model.precision)) == "float16"
    # Counted in another format by another library.
    assert model.parameters == pytest.approx(read_model(packages[0] / "model.onnx").parameters, abs=20)


def test_info_speaks_json_that_is_complete(packages: tuple[Path, Path], keyfoundry: Run) -> None:
    shown = parsed(keyfoundry("info", packages[0], "--json"))
    assert shown["state"] == "has a signature; nothing was verified"
    assert shown["manifest"] == json.loads((packages[0] / MANIFEST_NAME).read_text())
    assert set(shown["models"]) == set(FORMATS)
    for model in shown["models"].values():
        assert {"inputs", "outputs", "batch", "operators", "parameters", "sizes", "precision", "versions"} <= set(model)
        assert sum(tensor["bytes"] for tensor in model["tensors"]) >= sum(model["precision"].values())
        assert all(set(tensor) == {"name", "dtype", "shape", "bytes"} for tensor in model["tensors"])


def test_info_shows_tables(packages: tuple[Path, Path], keyfoundry: Run) -> None:
    out = keyfoundry("info", packages[0]).out
    for words in ("nothing was verified", "onnx-fp32", "float16", "oldest iOS", "opset ai.onnx", "MatMul", "layer_norm",
                  "model.mlpackage/Manifest.json", "0.890 [0.825, 0.944] (n = 100)", "released",
                  "not measured: no image was attacked", "It is [high].", "passed: same class 1.0000"):  # fmt: skip
        assert words in out, words
    assert max(len(line) for line in out.splitlines()) < 2_000


def test_info_verifies_first(package: Path, keyfoundry: Run, signing_key: SigningKey, tmp_path: Path) -> None:
    write_public_key(tmp_path / "key.pub", signing_key.public_bytes)
    key = ["--public-key", tmp_path / "key.pub"]
    assert parsed(keyfoundry("info", package, *key, "--json"))["state"] == "signature and digests verified"
    with (package / "model.onnx").open("r+b") as stream:
        stream.write(b"\x09")
    refused(keyfoundry("info", package, *key), 5, "model.onnx")
    refused(keyfoundry("info", package / "model.onnx", *key), 3, "only packages are signed")


def test_info_of_an_unsigned_adapter_says_what_it_needs(
    device_package: Path, manifest: Manifest, keyfoundry: Run
) -> None:
    adapter = dataclasses.replace(manifest, kind="adapter", requires="c" * 64)
    write_package(device_package, adapter)
    out = keyfoundry("info", device_package).out
    assert f"the base package with the digest {'c' * 64}" in out
    assert "unsigned (rejected, or not judged yet); nothing was verified" in out


def test_an_adapter_is_read_and_other_forms_are_files(
    device_package: Path, manifest: Manifest, keyfoundry: Run, tmp_path: Path
) -> None:
    values = {name: np.arange(size, dtype=np.float32) for name, size in (("layer.b", 6), ("layer.a", 8))}
    adapter = onnxruntime.AdapterFormat()
    adapter.set_parameters({name: onnxruntime.OrtValue.ortvalue_from_numpy(value) for name, value in values.items()})
    path = device_package / "adapter.onnx_adapter"
    adapter.export_adapter(str(path))
    (device_package / "delta.bin").write_bytes(b"delta")
    formats = {
        "onnx-adapter": FormatEntry(path.name, "onnxruntime", "fp32", {}),
        "coreml-delta": FormatEntry("delta.bin", "coreml", "as the base", {}),
    }
    write_package(device_package, dataclasses.replace(manifest, kind="adapter", requires="c" * 64, formats=formats))
    shown = parsed(keyfoundry("info", device_package, "--json"))
    assert list(shown["models"]) == ["onnx-adapter"]
    assert shown["models"]["onnx-adapter"]["parameters"] == 14
    assert "layer" not in keyfoundry("info", device_package).out
    assert {name: value.tolist() for name, value in read_model(path).tensors.items()} == {
        name: value.tolist() for name, value in sorted(values.items())
    }
    adapter.set_parameters({"layer.a": onnxruntime.OrtValue.ortvalue_from_numpy(values["layer.a"] + 1)})
    adapter.export_adapter(str(tmp_path / "other.onnx_adapter"))
    found = compare_models(read_model(path), read_model(tmp_path / "other.onnx_adapter"))
    assert ([change.name for change in found.changed], found.only_a) == (["layer.a"], ("layer.b",))
    path.write_bytes(path.read_bytes()[:50])
    refused(keyfoundry("info", path), 3, "adapter.onnx_adapter")


def test_info_of_an_old_package(device_package: Path, keyfoundry: Run) -> None:
    document = json.loads((device_package / MANIFEST_NAME).read_text())
    for name in ("formats", "kind", "requires"):
        del document[name]
    (device_package / MANIFEST_NAME).write_text(json.dumps(document | {"schema": 1}))
    shown = parsed(keyfoundry("info", device_package, "--json"))
    assert shown["models"]["onnx-fp32"]["operators"] == {"Flatten": 1, "Gemm": 1}
    assert shown["models"]["onnx-fp32"]["parameters"] == 64 * 3 + 3


@pytest.mark.parametrize("name", ["model.onnx", "model.ort", "model.mlpackage"])
def test_info_of_one_model(packages: tuple[Path, Path], keyfoundry: Run, name: str) -> None:
    path = packages[0] / name
    assert parsed(keyfoundry("info", path, "--json"))["model"] == read_model(path).to_json()
    assert "Softmax" in keyfoundry("info", path).out or "softmax" in keyfoundry("info", path).out


# diff


def test_two_devices_share_a_graph_and_differ_in_tensors(packages: tuple[Path, Path], keyfoundry: Run) -> None:
    result = keyfoundry("diff", *packages)
    assert result.code == CheckFailed.exit_code
    total = len(read_model(packages[0] / "model.onnx").tensors)
    assert f"onnx-fp32: same graph; 2 of {total} tensors differ" in result.out
    assert "They differ; nothing was verified." in result.out
    assert "0.890 [0.825, 0.944] (n = 100)" in result.out
    assert "0.880 [0.825, 0.944] (n = 100)" in result.out
    shown = parsed(keyfoundry("diff", *packages, "--json"), CheckFailed.exit_code)
    assert shown["equal"] is False
    fields = {change["name"]: (change["a"], change["b"]) for change in shown["manifest"]}
    assert fields["device_id"] == ("device-1", "device-2")
    assert set(fields) == {"device_id", "evidence.accuracy.value"}
    changed = {change["name"] for change in shown["files"]}
    assert changed == {"model.onnx", "model.ort", f"model.mlpackage/{WEIGHTS_PATH}"} or changed == {
        "model.onnx", "model.ort", f"model.mlpackage/{WEIGHTS_PATH}", f"model.mlpackage/{MODEL_PATH}",
    }  # fmt: skip
    for model in shown["models"].values():
        assert model["same_graph"] is True
        assert len(model["changed"]) == 2
        order, head = sorted(model["changed"], key=lambda tensor: tensor["max_absolute"] is not None)
        assert order["a"].split()[0] in ("int64", "int32", "uint16", "int16", "uint8")
        assert 30 < order["differing"] <= order["size"] == 49
        assert (order["max_absolute"], order["max_relative"], order["cosine"]) == (None, None, None)
        assert head["max_absolute"] == pytest.approx(0.01, rel=0.1)
        assert 0.5 < head["cosine"] < 1


def test_no_order_is_told(packages: tuple[Path, Path], keyfoundry: Run) -> None:
    """Neither its values nor anything that singles it out: all other orders with as many differences look the same."""
    orders = [np.random.default_rng(device).permutation(49) for device in (1, 2)]
    printed = [keyfoundry("diff", *packages, *more).out for more in ([], ["--json"])]
    printed += [keyfoundry("info", packages[0], *more).out for more in ([], ["--json"])]
    for out in printed:
        for order in orders:
            for text in (", ".join(map(str, order[:4])), " ".join(map(str, order[:4])), order[:8].tobytes().hex()):
                assert text not in out
    first, second = compare_tensors("order", *orders), compare_tensors("order", orders[0], np.roll(orders[0], 1))
    assert first.differing is not None
    assert dataclasses.replace(second, differing=first.differing) == first


def test_equal_packages_are_equal(packages: tuple[Path, Path], package: Path, keyfoundry: Run) -> None:
    result = keyfoundry("diff", packages[0], package)
    assert (result.code, result.err) == (0, "")
    assert "They are equal." in result.out
    assert parsed(keyfoundry("diff", packages[0], package, "--json"))["equal"] is True
    (package / SIGNATURE_NAME).unlink()
    (package / "model.mlpackage" / "Manifest.json").write_text("{}")
    shown = parsed(keyfoundry("diff", packages[0], package, "--json"), 6)
    assert [change["name"] for change in shown["manifest"]] == ["manifest.sig"]
    assert [change["name"] for change in shown["files"]] == ["model.mlpackage/Manifest.json"]
    assert all(model["equal"] for model in shown["models"].values())


@pytest.fixture
def changed_model(packages: tuple[Path, Path], tmp_path: Path) -> Callable[[Callable[[Any], None]], Model]:
    def change(edit: Callable[[Any], None]) -> Model:
        message = onnx.load(packages[0] / "model.onnx")
        edit(message.graph)
        (tmp_path / "changed.onnx").write_bytes(message.SerializeToString())
        return read_model(tmp_path / "changed.onnx")

    return change


def test_a_changed_graph_is_found(
    packages: tuple[Path, Path], changed_model: Callable[[Callable[[Any], None]], Model]
) -> None:
    whole = read_model(packages[0] / "model.onnx")
    norm = next(
        i for i, node in enumerate(onnx.load(packages[0] / "model.onnx").graph.node) if node.op_type == "Softmax"
    )
    found = compare_models(whole, changed_model(lambda graph: setattr(graph.node[norm], "op_type", "LogSoftmax")))
    assert [(c.name, c.a, c.b) for c in found.operators] == [("LogSoftmax", None, 1), ("Softmax", 1, None)]
    assert not found.same_graph
    found = compare_models(whole, changed_model(lambda graph: setattr(graph.node[norm].attribute[0], "i", 0)))
    assert (found.operators, found.rewired, found.same_graph) == ((), 1, False)
    found = compare_models(whole, changed_model(lambda graph: setattr(graph.output[0], "name", "scores")))
    assert [change.name for change in found.ports] == ["output logits", "output scores"]

    def rename(graph: Any) -> None:
        graph.initializer[0].name = "another"

    found = compare_models(whole, changed_model(rename))
    assert found.only_b == ("another",)
    assert len(found.only_a) == 1

    def reshape(graph: Any) -> None:
        tensor = graph.initializer[0]
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16).ravel(), tensor.name))

    (change,) = compare_models(whole, changed_model(reshape)).changed
    assert (change.a.split()[0], change.b.split()[0], change.differing) == ("float32", "float16", None)
    assert compare_models(whole, whole).equal


def test_a_difference_is_measured_as_by_hand() -> None:
    a, b = np.float32([[1, -4], [2, 0]]), np.float32([[1, -3], [2, 1]])
    change = compare_tensors("w", a, b)
    assert (change.differing, change.size, change.max_absolute, change.max_relative) == (2, 4, 1.0, 0.25)
    assert change.cosine == pytest.approx(17 / np.sqrt(21 * 15), rel=1e-3)
    assert compare_tensors("w", a, a.copy()).differing == 0
    broken = np.float32([[np.nan, -4], [2, 0]])
    assert (compare_tensors("w", a, broken).differing, compare_tensors("w", a, broken).cosine) == (1, None)
    assert compare_tensors("w", broken, broken.copy()).differing == 0
    zero = compare_tensors("w", np.zeros(2, np.float32), np.ones(2, np.float32))
    assert (zero.max_absolute, zero.max_relative, zero.cosine) == (1.0, None, None)


# What cannot be used


def test_what_is_no_package_and_no_model(packages: tuple[Path, Path], keyfoundry: Run, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("text")
    (tmp_path / "empty.mlpackage").mkdir()
    (tmp_path / "folder.onnx").mkdir()
    (tmp_path / "onnx.ort").write_bytes((packages[0] / "model.onnx").read_bytes())
    (tmp_path / "ort.onnx").write_bytes((packages[0] / "model.ort").read_bytes())
    for name, code in (
        ("none", 5), ("none.onnx", 3), ("none.mlpackage", 3), ("text.txt", 5), ("empty.mlpackage", 3),
        ("folder.onnx", 3), ("onnx.ort", 3), ("ort.onnx", 3), (".", 5),
    ):  # fmt: skip
        refused(keyfoundry("info", tmp_path / name), code)
        refused(keyfoundry("diff", tmp_path / name, tmp_path / name), code)
    refused(keyfoundry("diff", packages[0], packages[0] / "model.onnx"), 3, "compare two packages or two models")
    refused(keyfoundry("diff", packages[0] / "model.ort", packages[0] / "model.onnx"), 3, "one format")


def test_a_package_whose_model_is_missing_or_cut(package: Path, keyfoundry: Run) -> None:
    (package / "model.onnx").unlink()
    refused(keyfoundry("info", package), 3, "model.onnx")
    refused(keyfoundry("diff", package, package), 3, "model.onnx")
    (package / "model.mlpackage" / WEIGHTS_PATH).write_bytes(b"")
    refused(keyfoundry("info", package), 3, "weights")
    (package / MANIFEST_NAME).write_text("{")
    refused(keyfoundry("info", package), 5, MANIFEST_NAME)


def test_weights_in_another_file_are_refused(packages: tuple[Path, Path], tmp_path: Path) -> None:
    path = tmp_path / "outside.onnx"
    onnx.save_model(onnx.load(packages[0] / "model.onnx"), path, save_as_external_data=True, location="weights.bin")
    with pytest.raises(InputError, match="in another file"):
        read_model(path)


@pytest.mark.parametrize("name", ["model.onnx", "model.ort"])
def test_damage_is_refused_or_read_and_never_a_fault(packages: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    chance = random.Random(5)
    data = (packages[0] / name).read_bytes()
    path = tmp_path / name
    refusals = 0
    for _ in range(60):
        altered = bytearray(data[: chance.choice((len(data), len(data), chance.randrange(len(data))))])
        for _ in range(chance.choice((1, 4, 60))):
            altered[chance.randrange(len(altered))] ^= 1 << chance.randrange(8)
        path.write_bytes(altered)
        try:
            json.dumps(read_model(path).to_json())
        except InputError:
            refusals += 1
    assert refusals > 10


@pytest.mark.parametrize(
    "evidence",
    [
        {"accuracy": {"successes": 1, "n": 1, "value": 10**400, "interval": [0, 1]}},
        {"parity": {"ONNX fp32": {**PARITY, "top1_agreement": 10**400}}},
        {"decision": {"released": True, "conditions": 5}},
    ],
)  # fmt: skip
def test_evidence_of_another_shape_is_no_fault_of_the_program(
    evidence: dict[str, object], device_package: Path, manifest: Manifest, keyfoundry: Run
) -> None:
    write_package(device_package, dataclasses.replace(manifest, evidence=evidence))
    assert keyfoundry("info", device_package).code == 0
    assert keyfoundry("diff", device_package, device_package).code == 0


def test_nothing_in_a_package_commands_the_terminal(device_package: Path, manifest: Manifest, keyfoundry: Run) -> None:
    labels = ("\x1b]0;title\x07\x1b[31mbag", "b\u202eoot", "coat")
    write_package(device_package, dataclasses.replace(manifest, labels=labels))
    out = keyfoundry("info", device_package).out
    assert "\\x1b[31mbag" in out
    assert not set(out) & {"\x1b", "\x07", "\u202e"}


@pytest.mark.parametrize("name", ["model.onnx", "model.ort", "a.onnx_adapter", f"model.mlpackage/{MODEL_PATH}"])
def test_a_pipe_in_place_of_a_model_is_refused_and_not_waited_for(name: str, tmp_path: Path, keyfoundry: Run) -> None:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(path)
    refused(keyfoundry("info", tmp_path / name.split("/")[0]), 3, path.name)
