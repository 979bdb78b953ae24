"""Reading a Core ML package: weight.bin byte by byte, and a sentence for every kind of damage."""

from __future__ import annotations

import contextlib
import random
import resource
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.layers import set_fused_attn
from torch import nn

from exporters.contract import InputContract
from exporters.mil.program import MODEL_PATH, WEIGHTS_PATH, read_program
from exporters.mil.types import ELEMENTS, TensorType
from exporters.mil.weights import WeightFile
from exporters.quiet import import_coremltools, quiet
from exporters.run_coreml import CoreMLEvaluator
from exporters.to_coreml import export_coreml
from keys.errors import InputError

# Two float32 values in one entry: header, metadata, values, each at a multiple of 64.
KNOWN = (
    struct.pack("<II", 1, 2).ljust(64, b"\0")
    + struct.pack("<IIQQ", 0xDEADBEEF, 2, 8, 128).ljust(64, b"\0")
    + bytes.fromhex("0000803f000000c0")
)
FLOAT = ELEMENTS["FLOAT32"]
FLIPS = 250


def test_known_bytes_are_read() -> None:
    values = WeightFile("weight.bin", KNOWN).read(64, TensorType(FLOAT, (2, 1)))
    assert np.array_equal(values, np.array([[1.0], [-2.0]], np.float32))


WEIGHTS = [
    ("empty", lambda data: b"", "0 bytes are less than a header"),
    ("another version", lambda data: data[:4] + b"\3" + data[5:], "of version 3"),
    ("no sentinel", lambda data: data[:64] + b"\0" + data[65:], "no entry at byte 64"),
    ("unknown type", lambda data: data[:68] + b"\x63" + data[69:], "unknown type 99"),
    ("another type", lambda data: data[:68] + b"\1" + data[69:], "is FLOAT16, the program wants FLOAT32"),
    ("another size", lambda data: data[:72] + b"\4" + data[73:], "has 4 bytes, the program wants 8"),
    ("unused bits", lambda data: data[:88] + b"\4" + data[89:], "does not end where the program's 2 values do"),
    ("values cut off", lambda data: data[:-1], "lie outside of the file"),
    ("values far away", lambda data: data[:80] + b"\0" * 7 + b"\x7f" + data[88:], "lie outside of the file"),
    ("values in the header", lambda data: data[:80] + b"\0" * 8 + data[88:], "lie outside of the file"),
    ("metadata cut off", lambda data: data[:100], "no entry can start at byte 64"),
]


@pytest.mark.parametrize(("damage", "sentence"), [row[1:] for row in WEIGHTS], ids=[row[0] for row in WEIGHTS])
def test_damaged_weights_are_refused(damage: Callable[[bytes], bytes], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        WeightFile("weight.bin", damage(KNOWN)).read(64, TensorType(FLOAT, (2,)))


@pytest.mark.parametrize("offset", [0, 65, 128, 1 << 40])
def test_offsets_without_an_entry_are_refused(offset: int) -> None:
    with pytest.raises(InputError, match="no entry"):
        WeightFile("weight.bin", KNOWN).read(offset, TensorType(FLOAT, (2,)))


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("coreml") / "m.mlpackage"
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 4)).eval()
    contract = InputContract(channels=1, height=8, width=8, resize="none")
    export_coreml(module, path, contract, list("abcd"), precision="fp32")
    return path


@pytest.fixture
def copy(package: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(package, tmp_path / "copy.mlpackage"))


def change(package: Path, edit: Callable[[Any], object]) -> None:
    messages = import_coremltools("coremltools.proto.Model_pb2")
    spec = messages.Model.FromString((package / MODEL_PATH).read_bytes())
    edit(spec)
    (package / MODEL_PATH).write_bytes(spec.SerializeToString())


def operations(spec: Any) -> Any:
    (block,) = spec.mlProgram.functions["main"].block_specializations.values()
    return block.operations


def rename_use(spec: Any) -> None:
    operation = next(operation for operation in operations(spec) if operation.type == "linear")
    operation.inputs["x"].arguments[0].name = "nowhere"


def widen_output(spec: Any) -> None:
    operation = next(operation for operation in operations(spec) if operation.type == "linear")
    operation.outputs[0].type.tensorType.dimensions[1].constant.size = 5


def grow_output(spec: Any) -> None:
    operation = next(operation for operation in operations(spec) if operation.type == "linear")
    operation.outputs[0].type.tensorType.dimensions[1].constant.size = 1 << 40


def unknown_type(spec: Any) -> None:
    operation = next(operation for operation in operations(spec) if operation.type == "linear")
    operation.outputs[0].type.tensorType.dataType = 99


def other_operators(spec: Any) -> None:
    function = spec.mlProgram.functions["main"]
    function.block_specializations["CoreML5"].CopyFrom(function.block_specializations[function.opset])
    function.opset = "CoreML5"


def made_twice(spec: Any) -> None:
    operation = next(operation for operation in operations(spec) if operation.type == "linear")
    operations(spec).add().CopyFrom(operation)


def drop_logits(spec: Any) -> None:
    (block,) = spec.mlProgram.functions["main"].block_specializations.values()
    block.outputs.remove("logits")


def other_weights(spec: Any) -> None:
    for operation in operations(spec):
        value = operation.attributes["val"] if operation.type == "const" else None
        if value is not None and value.HasField("blobFileValue"):
            value.blobFileValue.fileName = "@model_path/../../secret"


EDITS = [
    ("not a program", lambda spec: spec.neuralNetwork.SetInParent(), "holds a neuralNetwork, not an ML Program"),
    ("two functions", lambda spec: spec.mlProgram.functions["more"].SetInParent(), "functions .'main', 'more'."),
    ("unknown operator", lambda spec: setattr(operations(spec)[-1], "type", "fly"), "operator 'fly'"),
    ("a name that nothing makes", rename_use, "'nowhere' is used before it is made"),
    ("another shape", widen_output, "the program declares \\(1, 5\\)"),
    ("a shape beyond memory", grow_output, "has 1099511627776 values; at most 268435456 are evaluated here"),
    ("an unknown type", unknown_type, "is of the unknown type number 99"),
    ("an older set of operators", other_operators, "operator set 'CoreML5'; only CoreML6, CoreML7, CoreML8"),
    ("a variable made twice", made_twice, "is made twice"),
    ("no logits", drop_logits, "Expected .* to map an 'image'"),
    ("weights elsewhere", other_weights, "lies in an unknown file"),
    ("control flow", lambda spec: operations(spec)[-1].blocks.add(), "uses control flow"),
]


@pytest.mark.parametrize(("edit", "sentence"), [row[1:] for row in EDITS], ids=[row[0] for row in EDITS])
def test_changed_programs_are_refused(edit: Callable[[Any], object], sentence: str, copy: Path) -> None:
    change(copy, edit)
    with pytest.raises(InputError, match=sentence):
        CoreMLEvaluator(copy).logits(np.zeros((1, 1, 8, 8), np.float32))


@pytest.mark.parametrize(
    ("name", "sentence"),
    [(MODEL_PATH, "is not a Core ML package"), (WEIGHTS_PATH, "no weights at .*; the Core ML package is incomplete")],
)
def test_missing_files_are_named(name: str, sentence: str, copy: Path) -> None:
    (copy / name).unlink()
    with pytest.raises(InputError, match=sentence):
        read_program(copy)


def test_a_truncated_program_is_refused(copy: Path) -> None:
    data = (copy / MODEL_PATH).read_bytes()
    (copy / MODEL_PATH).write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match="is damaged"):
        read_program(copy)


def test_a_file_instead_of_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.mlpackage").write_bytes(b"")
    with pytest.raises(InputError, match="is not a Core ML package"):
        read_program(tmp_path / "m.mlpackage")


def test_weights_are_what_the_module_holds(package: Path) -> None:
    torch.manual_seed(0)
    expected = nn.Linear(64, 4).weight.detach().numpy()
    found = [value for value in read_program(package).constants.values() if value.shape == (4, 64)]
    assert len(found) == 1
    assert np.array_equal(found[0], expected)


# ---- from memory --------------------------------------------------------------------------------------------


def in_memory(package: Path) -> dict[str, bytes]:
    return {p.relative_to(package).as_posix(): p.read_bytes() for p in package.rglob("*") if p.is_file()}


def test_a_package_in_memory_answers_as_its_folder(package: Path) -> None:
    images = np.random.default_rng(0).random((3, 1, 8, 8)).astype(np.float32)
    from_memory, from_folder = CoreMLEvaluator(in_memory(package)), CoreMLEvaluator(package)
    assert np.array_equal(from_memory.logits(images), from_folder.logits(images))
    assert from_memory.classes(images) == from_folder.classes(images)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (MODEL_PATH, "the package in memory is not a Core ML package: .* is missing"),
        (WEIGHTS_PATH, "no weights at .*weight.bin of the package in memory"),
    ],
)
def test_files_missing_in_memory_are_named(name: str, sentence: str, package: Path) -> None:
    files = in_memory(package)
    del files[name]
    with pytest.raises(InputError, match=sentence):
        CoreMLEvaluator(files)


def test_the_first_overflow_of_a_package_is_named(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 4)).eval()
    with torch.no_grad():
        module[1].weight.fill_(4000)
        module[1].bias.zero_()
    contract = InputContract(channels=1, height=8, width=8, resize="none")
    export_coreml(module, tmp_path / "m.mlpackage", contract, list("abcd"), precision="fp16")
    evaluator = CoreMLEvaluator(tmp_path / "m.mlpackage")
    assert evaluator.first_overflow(np.zeros((1, 1, 8, 8), np.float32)) is None
    white = np.ones((1, 1, 8, 8), np.float32)
    assert not np.isfinite(evaluator.logits(white)).all()
    found = evaluator.first_overflow(white)
    assert found is not None
    assert "which the operator 'linear' makes of finite values: it gives values up to 256000" in found


# ---- damage by chance ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["fp32", "int8 for iOS 16", "4 bits for iOS 18"])
def transformer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A tiny ViT, compressed or not, as the bytes of its files."""
    ct = import_coremltools()
    cto = import_coremltools("coremltools.optimize.coreml")
    set_fused_attn(request.param.endswith("18"))
    torch.manual_seed(0)
    sizes = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 1, "num_heads": 2}
    module = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=4, **sizes).eval()
    with quiet(), torch.no_grad():
        model = ct.convert(
            torch.jit.trace(module, torch.zeros(1, 1, 8, 8), check_trace=False),
            inputs=[ct.ImageType(name="image", shape=(1, 1, 8, 8), color_layout=ct.colorlayout.GRAYSCALE)],
            outputs=[ct.TensorType(name="logits", dtype=np.float32)],
            minimum_deployment_target=ct.target.iOS18 if request.param.endswith("18") else ct.target.iOS16,
            compute_precision=ct.precision.FLOAT32 if request.param == "fp32" else ct.precision.FLOAT16,
            skip_model_load=True,
        )
        if request.param.startswith("int8"):
            quantizer = cto.OpLinearQuantizerConfig(mode="linear_symmetric", weight_threshold=0)
            model = cto.linear_quantize_weights(model, cto.OptimizationConfig(global_config=quantizer))
        elif request.param.startswith("4 bits"):
            palettizer = cto.OpPalettizerConfig(mode="uniform", nbits=4, weight_threshold=0)
            model = cto.palettize_weights(model, cto.OptimizationConfig(global_config=palettizer))
        path = tmp_path_factory.mktemp("damage") / "m.mlpackage"
        model.save(str(path))
    return in_memory(path)


def outcome(files: dict[str, bytes]) -> str:
    """``"answered"`` or the sentence of the refusal; any other exception is the failure that is looked for."""
    try:
        CoreMLEvaluator(files).logits(np.zeros((1, 1, 8, 8), np.float32))
    except InputError as error:
        return str(error)
    return "answered"


@contextlib.contextmanager
def limited_memory() -> Iterator[None]:
    """At most 1 GB more of address space than now (on Linux), so that a huge allocation fails here and is seen."""
    used = Path("/proc/self/statm")
    if not used.exists():
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(used.read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (1 << 30), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.parametrize("name", [MODEL_PATH, WEIGHTS_PATH])
def test_flipped_bits_are_an_answer_or_a_sentence(name: str, transformer: dict[str, bytes]) -> None:
    assert outcome(transformer) == "answered"
    chance = random.Random(7)
    refused = 0
    with limited_memory():
        for _ in range(FLIPS):
            data = bytearray(transformer[name])
            for _ in range(chance.choice((1, 1, 3))):
                data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            sentence = outcome({**transformer, name: bytes(data)})
            assert "MemoryError" not in sentence
            assert "allocate" not in sentence
            assert "\n" not in sentence
            refused += sentence != "answered"
    assert refused > (FLIPS // 10 if name == MODEL_PATH else 0)


@pytest.mark.parametrize("name", [MODEL_PATH, WEIGHTS_PATH])
def test_truncated_files_are_refused(name: str, transformer: dict[str, bytes]) -> None:
    data = transformer[name]
    for keep in sorted({0, 1, 63, 64, 100, *range(0, len(data), max(1, len(data) // 40)), len(data) - 1}):
        sentence = outcome({**transformer, name: data[:keep]})
        assert sentence != "answered", f"{keep} of {len(data)} bytes of {name} were enough"
