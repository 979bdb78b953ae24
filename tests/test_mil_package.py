"""Reading a Core ML package: weight.bin byte by byte, and a sentence for every kind of damage."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from exporters.contract import InputContract
from exporters.mil.program import MODEL_PATH, WEIGHTS_PATH, read_program
from exporters.mil.weights import read_weight_file
from exporters.quiet import import_coremltools
from exporters.run_coreml import CoreMLEvaluator
from exporters.to_coreml import export_coreml
from keys.errors import InputError

# Two float32 values in one entry: header, metadata, values, each at a multiple of 64.
KNOWN = (
    struct.pack("<II", 1, 2).ljust(64, b"\0")
    + struct.pack("<IIQQ", 0xDEADBEEF, 2, 8, 128).ljust(64, b"\0")
    + bytes.fromhex("0000803f000000c0")
)
FLOAT = np.dtype("<f4")


def weight_file(folder: Path, data: bytes) -> Path:
    path = folder / "weight.bin"
    path.write_bytes(data)
    return path


def test_known_bytes_are_read(tmp_path: Path) -> None:
    values = read_weight_file(weight_file(tmp_path, KNOWN)).read(64, FLOAT, (2, 1))
    assert np.array_equal(values, np.array([[1.0], [-2.0]], np.float32))


WEIGHTS = [
    ("empty", lambda data: b"", "0 bytes are less than a header"),
    ("another version", lambda data: data[:4] + b"\3" + data[5:], "of version 3"),
    ("no sentinel", lambda data: data[:64] + b"\0" + data[65:], "no entry at byte 64"),
    ("unknown type", lambda data: data[:68] + b"\x63" + data[69:], "unknown type 99"),
    ("another type", lambda data: data[:68] + b"\1" + data[69:], "is float16, the program wants float32"),
    ("another size", lambda data: data[:72] + b"\4" + data[73:], "has 4 bytes, the program wants 8"),
    ("values cut off", lambda data: data[:-1], "lie outside of the file"),
    ("values far away", lambda data: data[:80] + b"\0" * 7 + b"\x7f" + data[88:], "lie outside of the file"),
    ("values in the header", lambda data: data[:80] + b"\0" * 8 + data[88:], "lie outside of the file"),
    ("metadata cut off", lambda data: data[:100], "no entry can start at byte 64"),
]


@pytest.mark.parametrize(("damage", "sentence"), [row[1:] for row in WEIGHTS], ids=[row[0] for row in WEIGHTS])
def test_damaged_weights_are_refused(damage: Callable[[bytes], bytes], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=sentence):
        read_weight_file(weight_file(tmp_path, damage(KNOWN))).read(64, FLOAT, (2,))


@pytest.mark.parametrize("offset", [0, 65, 128, 1 << 40])
def test_offsets_without_an_entry_are_refused(offset: int, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no entry"):
        read_weight_file(weight_file(tmp_path, KNOWN)).read(offset, FLOAT, (2,))


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
