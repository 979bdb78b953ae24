"""ONNX files split without the onnx library: the weights that it reads, the same logits, and no damage gets through."""

from __future__ import annotations

import random
import resource
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from google.protobuf.message import DecodeError
from onnx import TensorProto, helper, numpy_helper
from timm.layers import set_fused_attn

from exporters.contract import InputContract
from exporters.onnx_file import IN_MEMORY, encoded_varint, split, stored_tensors
from exporters.run_onnx import OnnxRuntime
from exporters.to_onnx import export_onnx
from factory.data import SAMPLE
from factory.idx import find_idx, read_idx
from keys.errors import InputError

CONTRACT = InputContract(channels=1, height=28, width=28, resize="bicubic to 28x28, no crop")
TYPES = ["f4", "u1", "i1", "u2", "i2", "i4", "i8", "?", "f2", "f8"]
SHAPES = [(), (1,), (7,), (0,), (3, 0, 2), (5, 13), (2, 3, 4, 5), (300,)]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real export: a ViT of one block."""
    set_fused_attn(False)
    torch.manual_seed(0)
    sizes = {"img_size": 28, "patch_size": 7, "embed_dim": 48, "depth": 1, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", in_chans=1, num_classes=10, pretrained=False, **sizes).eval()
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    export_onnx(model, path, CONTRACT, [str(number) for number in range(10)])
    return path


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    path = find_idx(SAMPLE, "t10k-images-idx3-ubyte")
    assert path is not None
    return read_idx(path)[:8, np.newaxis].astype(np.float32) / 255


def model_of(*tensors: TensorProto) -> onnx.ModelProto:
    """A model that passes its image through, with initializers beside it."""
    value = helper.make_tensor_value_info
    ports = [value(name, TensorProto.FLOAT, ["n", 1, 2, 2]) for name in ("image", "logits")]
    graph = helper.make_graph([helper.make_node("Identity", ["image"], ["logits"])], "g", ports[:1], ports[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def every_tensor() -> list[TensorProto]:
    generator = np.random.default_rng(0)
    return [
        numpy_helper.from_array(np.asarray(generator.integers(0, 2, shape)).astype(kind), f"{kind} {shape}")
        for kind in TYPES
        for shape in SHAPES
    ]


def agrees_with_onnx(data: bytes) -> int:
    """Compare with the onnx library; return how many initializers there are."""
    expected = onnx.load_model_from_string(data).graph.initializer
    found = stored_tensors(data)
    assert [tensor.name for tensor in found] == [tensor.name for tensor in expected]
    for tensor, message in zip(found, expected, strict=True):
        values, wanted = tensor.read(data), numpy_helper.to_array(message)
        assert (values.dtype, values.shape) == (wanted.dtype, wanted.shape), tensor.name
        assert values.tobytes() == wanted.tobytes() == message.raw_data, tensor.name
        assert tensor.length == 0 or data[tensor.offset : tensor.offset + tensor.length] == message.raw_data
        assert not values.flags.writeable or values.size == 0
    return len(found)


# Reading


def test_a_real_export_reads_as_with_the_onnx_library(exported: Path) -> None:
    assert agrees_with_onnx(exported.read_bytes()) > 15


def test_every_type_and_shape_reads_as_with_the_onnx_library() -> None:
    assert agrees_with_onnx(model_of(*every_tensor()).SerializeToString()) == len(TYPES) * len(SHAPES)


def test_dimensions_are_read_packed_and_one_by_one() -> None:
    message = numpy_helper.from_array(np.arange(600, dtype=np.int32).reshape(2, 300), "weight")
    plain = message.SerializeToString()
    dims = encoded_varint(2) + encoded_varint(300)
    one_by_one = b"\x08" + encoded_varint(2) + b"\x08" + encoded_varint(300)
    packed = b"\x0a" + encoded_varint(len(dims)) + dims
    rest = plain.replace(one_by_one, b"").replace(packed, b"")
    assert len(rest) < len(plain)
    for form in (one_by_one, packed):
        tensor = form + rest
        graph = b"\x2a" + encoded_varint(len(tensor)) + tensor
        data = b"\x3a" + encoded_varint(len(graph)) + graph
        assert agrees_with_onnx(data) == 1
        assert stored_tensors(data)[0].shape == (2, 300)


def test_a_graph_in_two_fields_is_one_graph() -> None:
    first, second = (numpy_helper.from_array(np.full(64, value, np.float32), str(value)) for value in (1, 2))
    data = (
        model_of(first).SerializeToString()
        + onnx.ModelProto(graph=onnx.GraphProto(initializer=[second])).SerializeToString()
    )
    assert agrees_with_onnx(data) == 2
    graph, weights = split(data)
    assert list(weights) == ["1", "2"]
    assert len(onnx.load_model_from_string(graph).graph.initializer) == 2


# Splitting


def test_the_graph_refers_to_the_weights_and_holds_none(exported: Path) -> None:
    data = exported.read_bytes()
    graph, weights = split(data)
    assert sum(value.nbytes for value in weights.values()) > 0.8 * len(data)
    assert len(graph) < 0.2 * len(data)
    whole, rest = onnx.load_model_from_string(data), onnx.load_model_from_string(graph)
    for tensor in rest.graph.initializer:
        if tensor.name in weights:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            assert entries == {
                "location": IN_MEMORY.decode(),
                "offset": "0",
                "length": str(weights[tensor.name].nbytes),
            }
            assert (tensor.data_location, tensor.HasField("raw_data")) == (TensorProto.EXTERNAL, False)
            assert weights[tensor.name].nbytes >= 128
        else:
            assert len(tensor.raw_data) < 128
    # With the values put back, it is the same model.
    for tensor in rest.graph.initializer:
        if tensor.name in weights:
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
            tensor.raw_data = weights[tensor.name].tobytes()
    assert rest == whole


def test_the_weights_are_views_and_no_copies(exported: Path) -> None:
    data = exported.read_bytes()
    place = np.frombuffer(data, np.uint8)
    assert all(np.shares_memory(place, value) for value in split(data)[1].values())


def test_a_split_model_gives_the_same_logits_bit_for_bit(exported: Path, images: np.ndarray) -> None:
    expected = OnnxRuntime(exported, threads=1).logits(images)
    assert np.array_equal(OnnxRuntime(exported.read_bytes(), threads=1).logits(images), expected)
    whole = onnxruntime.InferenceSession(exported.read_bytes(), providers=["CPUExecutionProvider"])
    assert np.array_equal(whole.run(None, {"image": images})[0], expected)


def test_what_cannot_be_split_stays_in_the_graph() -> None:
    typed = helper.make_tensor("typed", TensorProto.FLOAT, [64], np.arange(64.0))
    short = numpy_helper.from_array(np.ones(4, np.float32), "short")
    bfloat = TensorProto(name="bfloat", data_type=TensorProto.BFLOAT16, dims=[128], raw_data=bytes(256))
    large = numpy_helper.from_array(np.ones(64, np.float32), "large")
    only_small = model_of(typed, short, bfloat).SerializeToString()
    assert split(only_small) == (only_small, {})
    data = model_of(typed, short, bfloat, large).SerializeToString()
    graph, weights = split(data)
    assert list(weights) == ["large"]
    kept = {tensor.name: tensor for tensor in onnx.load_model_from_string(graph).graph.initializer}
    assert (kept["typed"], kept["short"], kept["bfloat"]) == (typed, short, bfloat)
    with pytest.raises(InputError, match="'typed' are not stored as bytes"):
        stored_tensors(model_of(typed).SerializeToString())
    with pytest.raises(InputError, match="'bfloat' are of the unknown type 16"):
        stored_tensors(model_of(bfloat).SerializeToString())


# Refusals


def test_a_model_with_weights_in_another_file_is_refused(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnx.save_model(
        onnx.load(exported), tmp_path / "outside.onnx", save_as_external_data=True, location="weights.bin",
        size_threshold=0,
    )  # fmt: skip
    data = (tmp_path / "outside.onnx").read_bytes()
    # There, onnxruntime by itself would find the file: what bytes name must not decide what is read from the disk.
    monkeypatch.chdir(tmp_path)
    assert onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"]).get_inputs()
    for read in (stored_tensors, split, OnnxRuntime):
        with pytest.raises(InputError, match=r"has the weights '\S+' in another file"):
            read(data)


def changed(**fields: object) -> bytes:
    """A model with one initializer whose message is changed."""
    tensor = numpy_helper.from_array(np.ones(64, np.float32), "weight")
    for name, value in fields.items():
        if isinstance(value, list):
            tensor.ClearField(name)
            getattr(tensor, name).extend(value)
        else:
            setattr(tensor, name, value)
    return model_of(tensor).SerializeToString()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "it holds no graph"),
        (b"\x00", "a field without a number"),
        (b"\x3b", "an unknown kind of field"),
        (b"\x38\x05", "of another kind"),
        (b"\x3a\x05\x00", "longer than what it lies in"),
        (b"\x3a" + b"\xff" * 12, "has no end"),
        (changed(dims=[65]), "256 bytes for the shape"),
        (changed(dims=[-64]), "impossible shape"),
        (changed(dims=[2**62, 2**62]), "impossible shape"),
        (changed(dims=[2**62, 0], raw_data=b""), "impossible shape|shape"),
        (changed(dims=[1] * 65), "more than 64 dimensions"),
        (changed(name="weiXht").replace(b"weiXht", b"wei\xffht"), "not UTF-8"),
        (model_of(*[numpy_helper.from_array(np.ones(64, np.float32), "twice")] * 2).SerializeToString(), "one name"),
    ],
)
def test_damage_has_a_sentence(data: bytes, reason: str) -> None:
    with pytest.raises(InputError, match=f"damaged or was not written here: .*({reason})"):
        stored_tensors(data)


def read_damaged(data: bytes) -> bool:
    """Read it both ways; return whether it was accepted. What is accepted must be what the onnx library reads."""
    try:
        graph, weights = split(data)
        tensors = stored_tensors(data)
    except InputError:
        return False
    assert all(weights[tensor.name].nbytes == tensor.length for tensor in tensors if tensor.name in weights)
    try:
        messages = onnx.load_model_from_string(data).graph.initializer
    except DecodeError:  # Damage in a part that is passed over here: onnxruntime refuses it, as it would the whole.
        return True
    assert [tensor.name for tensor in tensors] == [message.name for message in messages]
    assert [tensor.read(data).tobytes() for tensor in tensors] == [message.raw_data for message in messages]
    assert len(graph) < len(data) + 200 * len(weights)
    return True


def test_no_truncation_does_harm() -> None:
    data = model_of(*every_tensor()[:12]).SerializeToString()
    accepted = [length for length in range(len(data)) if read_damaged(data[:length])]
    # A file can only end between two fields, and the graph is one of them.
    graph = onnx.load_model_from_string(data).graph.ByteSize()
    assert all(length > graph for length in accepted)
    assert len(accepted) < 5


def test_no_altered_bits_do_harm(exported: Path) -> None:
    chance = random.Random(20)
    small, real = model_of(*every_tensor()).SerializeToString(), exported.read_bytes()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    accepted = []
    for data, rounds in ((small, 1500), (real, 150)):
        # What matters lies around the weights, which are most of a file.
        around = [place for tensor in stored_tensors(data) for place in range(tensor.offset - 40, tensor.offset)]
        for _ in range(rounds):
            altered = bytearray(data)
            for place in chance.choices(around, k=chance.choice((1, 1, 2, 8))):
                altered[place] ^= 1 << chance.randrange(8)
            accepted.append(read_damaged(bytes(altered)))
    assert 100 < sum(accepted) < len(accepted) - 500
    unit = 1 if sys.platform == "darwin" else 1024
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit < 200 * 2**20
