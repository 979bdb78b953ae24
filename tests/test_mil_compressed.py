"""Compressed weights against coremltools' own decompression: operator by operator, type by type, model by model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from exporters.mil.evaluator import Evaluator
from exporters.mil.ops import OPERATORS
from exporters.mil.program import WEIGHTS_PATH, Program, read_program
from exporters.mil.types import ELEMENTS, TensorType
from exporters.mil.weights import WeightFile
from exporters.quiet import import_coremltools, quiet
from keys.errors import InputError

ct = import_coremltools()
mb = import_coremltools("coremltools.converters.mil").Builder
types = import_coremltools("coremltools.converters.mil.mil").types
storage = import_coremltools("coremltools.libmilstoragepython")
cto = import_coremltools("coremltools.optimize.coreml")
TARGETS = {16: ct.target.iOS16, 17: ct.target.iOS17, 18: ct.target.iOS18}

# ---- types narrower than a byte -----------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 7, 8, 9, 64, 1001])
@pytest.mark.parametrize("name", ["uint1", "uint2", "uint3", "uint4", "uint6", "int4"])
def test_narrow_types_are_read_as_coremltools_writes_them(name: str, count: int, tmp_path: Path) -> None:
    element = ELEMENTS[name.upper()]
    signed = element.dtype.kind == "i"
    low, high = (-(1 << element.bits - 1), 1 << element.bits - 1) if signed else (0, 1 << element.bits)
    values = np.random.default_rng(count).integers(low, high, count).astype(element.dtype)
    values[-1] = high - 1
    writer = storage._BlobStorageWriter(str(tmp_path / "weight.bin"))
    offset = getattr(writer, f"write_{name}_data")(values)
    del writer
    found = WeightFile("w", (tmp_path / "weight.bin").read_bytes()).read(offset, TensorType(element, (count,)))
    assert found.dtype == element.dtype
    assert np.array_equal(found, values)


# ---- operators ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """``build`` makes a constant (or two) by the operators named; target 16 goes for 17 as well."""

    name: str
    operators: str
    target: int
    build: Callable[[], Any]


def integers(low: int, high: int, shape: tuple[int, ...], kind: Any) -> np.ndarray:
    return np.random.default_rng(0).integers(low, high, shape).astype(kind)


def floats(*shape: int, kind: Any = np.float32) -> np.ndarray:
    return (np.random.default_rng(1).normal(size=shape) + 0.1).astype(kind)


def affine(kind: Any, axis: int, scale: np.ndarray, zero: np.ndarray, shape: tuple[int, ...] = (5, 3, 7)) -> Any:
    data = integers(-128, 128, shape, np.int64).astype(kind)
    return mb.constexpr_affine_dequantize(quantized_data=data, axis=axis, scale=scale, zero_point=zero)


def old_table(bits: int, kind: Any, shape: tuple[int, ...] = (5, 3, 7)) -> Any:
    count = int(np.prod(shape))
    packed = integers(0, 256, ((count * bits + 7) // 8,), np.uint8)
    if count * bits % 8:
        packed[-1] &= (1 << count * bits % 8) - 1
    table = floats(1 << bits, kind=kind) if np.dtype(kind).kind == "f" else integers(0, 127, (1 << bits,), kind)
    return mb.constexpr_lut_to_dense(indices=packed, lut=table, shape=np.array(shape, np.uint32))


def old_sparse(kind: Any, shape: tuple[int, ...] = (5, 3, 7)) -> Any:
    flags = np.random.default_rng(2).integers(0, 2, int(np.prod(shape)))
    mask = np.packbits(flags, bitorder="little")
    values = floats(int(flags.sum()), kind=kind)
    return mb.constexpr_sparse_to_dense(nonzero_data=values, mask=mask, shape=np.array(shape, np.uint32))


def blocks(kind: Any, low: int, high: int, parts: tuple[int, ...], offset: Any = None, scale: Any = np.float32) -> Any:
    shift = {} if offset is None else {"offset": integers(low, high, parts, offset)}
    data = integers(low, high, (6, 4, 10), kind)
    return mb.constexpr_blockwise_shift_scale(data=data, scale=floats(*parts, kind=scale), **shift)


def table(bits: int, groups: tuple[int, ...], width: int = 1, axis: int | None = None, kind: Any = np.float32) -> Any:
    indices = integers(0, 1 << bits, (6, 4, 10), getattr(types, f"np_uint{bits}_dtype", np.uint8))
    along = {} if axis is None else {"vector_axis": axis}
    return mb.constexpr_lut_to_dense(indices=indices, lut=floats(*groups, 1 << bits, width, kind=kind), **along)


def mask_of(*shape: int) -> np.ndarray:
    return integers(0, 2, shape, types.np_uint1_dtype)


def sparse(kind: Any = np.float32) -> Any:
    mask = mask_of(6, 4, 10)
    return mb.constexpr_sparse_to_dense(nonzero_data=floats(np.count_nonzero(mask), kind=kind), mask=mask)


def sparse_table(width: int = 1, axis: int | None = None) -> Any:
    mask = mask_of(6, 4, 10)
    indices = integers(0, 4, (np.count_nonzero(mask),), types.np_uint2_dtype)
    along = {} if axis is None else {"vector_axis": axis}
    lut = floats(2, 1, 1, 4, width)
    mask, values = mb.constexpr_lut_to_sparse(indices_mask=mask, indices_nonzero_data=indices, lut=lut, **along)
    return mb.constexpr_sparse_to_dense(nonzero_data=values, mask=mask)


def sparse_blocks(offset: bool) -> Any:
    mask = mask_of(6, 4, 10)
    values = integers(-8, 8, (np.count_nonzero(mask),), types.np_int4_dtype)
    shift = {"offset": integers(-8, 8, (3, 1, 5), types.np_int4_dtype)} if offset else {}
    mask, values = mb.constexpr_sparse_blockwise_shift_scale(
        data_mask=mask, nonzero_data=values, scale=floats(3, 1, 5), **shift
    )
    return mb.constexpr_sparse_to_dense(nonzero_data=values, mask=mask)


def scaled_table() -> Any:
    """A table of bytes, whose entries are scaled in turn."""
    indices = integers(0, 16, (6, 4, 10), types.np_uint4_dtype)
    data = mb.constexpr_lut_to_dense(indices=indices, lut=integers(-128, 128, (1, 1, 1, 16, 1), np.int8))
    return mb.constexpr_blockwise_shift_scale(data=data, scale=floats(6, 1, 1))


ONE = np.float32(0.125)
AFFINE, DENSE, SPARSE = "constexpr_affine_dequantize", "constexpr_lut_to_dense", "constexpr_sparse_to_dense"
SHIFT = "constexpr_blockwise_shift_scale"
CASES = [
    Case("affine, one scale", AFFINE, 16, partial(affine, np.int8, 0, ONE, np.int8(-3))),
    Case("affine, last axis", AFFINE, 16, partial(affine, np.uint8, -1, floats(7), integers(0, 256, (7,), np.uint8))),
    Case("affine, middle", AFFINE, 16, partial(affine, np.int8, 1, floats(3), integers(-9, 9, (3,), np.int8))),
    Case("affine, scales only", AFFINE, 16, partial(affine, np.int8, 0, floats(5), np.int8(0))),
    Case("affine to fp16", AFFINE, 16, partial(affine, np.int8, 0, floats(5, kind=np.float16), np.int8(1))),
    *(Case(f"table of {bits} bits", DENSE, 16, partial(old_table, bits, np.float32)) for bits in (1, 2, 4, 6, 8)),
    Case("table of fp16", DENSE, 16, partial(old_table, 6, np.float16)),
    Case("table, one value", DENSE, 16, partial(old_table, 2, np.float32, (1,))),
    Case("sparse, packed", SPARSE, 16, partial(old_sparse, np.float32)),
    Case("sparse, fp16", SPARSE, 16, partial(old_sparse, np.float16, (13,))),
    Case(
        "cast",
        "constexpr_cast",
        16,
        lambda: mb.constexpr_cast(source_val=floats(3, 5, kind=np.float16), output_dtype="fp32"),
    ),
    Case("blocks of int4", SHIFT, 18, partial(blocks, types.np_int4_dtype, -8, 8, (3, 4, 5), types.np_int4_dtype)),
    Case("blocks of uint4", SHIFT, 18, partial(blocks, types.np_uint4_dtype, 0, 16, (6, 1, 2), types.np_uint4_dtype)),
    Case("blocks of int8, no offset", SHIFT, 18, partial(blocks, np.int8, -128, 128, (1, 1, 1))),
    Case("blocks of uint8, float offset", SHIFT, 18, partial(blocks, np.uint8, 0, 256, (6, 4, 10), np.float32)),
    Case("blocks to fp16", SHIFT, 18, partial(blocks, np.int8, -128, 128, (2, 1, 10), np.int8, np.float16)),
    *(Case(f"table of uint{bits}", DENSE, 18, partial(table, bits, (1, 1, 1))) for bits in (1, 2, 3, 4, 6, 8)),
    Case("tables by groups", DENSE, 18, partial(table, 3, (3, 1, 5))),
    Case("vectors, first axis", DENSE, 18, partial(table, 2, (2, 1, 1), 3, 0)),
    Case("vectors, last axis", DENSE, 18, partial(table, 4, (1, 2, 1), 2, -1)),
    Case("vectors, middle", DENSE, 18, partial(table, 6, (1, 1, 2), 4, 1, np.float16)),
    Case("a table of bytes, scaled", f"{DENSE} {SHIFT}", 18, scaled_table),
    Case("sparse", SPARSE, 18, sparse),
    Case("sparse table", f"constexpr_lut_to_sparse {SPARSE}", 18, sparse_table),
    Case("sparse vectors", f"constexpr_lut_to_sparse {SPARSE}", 18, partial(sparse_table, 3, 1)),
    Case("sparse blocks", f"constexpr_sparse_blockwise_shift_scale {SPARSE}", 18, partial(sparse_blocks, False)),
    Case("sparse blocks, offset", f"constexpr_sparse_blockwise_shift_scale {SPARSE}", 18, partial(sparse_blocks, True)),
    Case(
        "cast, iOS 18",
        "constexpr_cast",
        18,
        lambda: mb.constexpr_cast(source_val=floats(3, 5, kind=np.float16), output_dtype="fp32"),
    ),
]
BOTH = [(row, target) for row in CASES for target in ((16, 17) if row.target == 16 else (18,))]


@pytest.mark.parametrize(("row", "target"), BOTH, ids=lambda value: getattr(value, "name", value))
def test_operators_agree_with_coremltools(row: Case, target: int, tmp_path: Path) -> None:
    seen: dict[str, np.ndarray] = {}

    def body(x: Any) -> Any:
        constant = row.build()
        seen["expected"] = np.asarray(constant.op.materialized_val_inference(), np.float32)
        constant = constant if constant.dtype == types.fp32 else mb.cast(x=constant, dtype="fp32")
        return mb.add(x=constant, y=x, name="out")

    with quiet():
        program = mb.program(input_specs=[mb.TensorSpec(shape=(1,))], opset_version=TARGETS[target])(body)
        model = ct.convert(
            program,
            compute_precision=ct.precision.FLOAT32,
            minimum_deployment_target=TARGETS[target],
            skip_model_load=True,
            pass_pipeline=ct.PassPipeline.EMPTY,
        )
        model.save(str(tmp_path / "m.mlpackage"))
    read = read_program(tmp_path / "m.mlpackage")
    assert read.target == target
    assert set(row.operators.split()) <= {operation.type for operation in read.operations}
    evaluator = Evaluator(read)
    (name,) = read.outputs
    found = evaluator.run({"x": np.zeros((2, 1), np.float32)})[name]
    tolerance = 1e-3 if "fp16" in row.name else 1e-6
    np.testing.assert_allclose(found[1], seen["expected"], rtol=tolerance, atol=1e-7)


def test_every_operator_of_compressed_weights_is_tested() -> None:
    tested = {name for row in CASES for name in row.operators.split()}
    assert tested == {name for name in OPERATORS if name.startswith("constexpr_")}


# ---- models -------------------------------------------------------------------------------------------------


class Small(nn.Module):
    """A convolution and linear layers, wide enough for blocks and vectors."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 32, 4, 4)
        self.body = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        self.head = nn.Linear(32, 5)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        tokens = self.stem(image).flatten(2).transpose(1, 2)
        return self.head((tokens + self.body(tokens)).mean(1))


def quantised(**options: Any) -> Callable[[Any], Any]:
    config = cto.OpLinearQuantizerConfig(weight_threshold=0, **options)
    return lambda model: cto.linear_quantize_weights(model, cto.OptimizationConfig(global_config=config))


def palettised(**options: Any) -> Callable[[Any], Any]:
    config = cto.OpPalettizerConfig(weight_threshold=0, **options)
    return lambda model: cto.palettize_weights(model, cto.OptimizationConfig(global_config=config))


def pruned(model: Any) -> Any:
    config = cto.OpMagnitudePrunerConfig(target_sparsity=0.5, weight_threshold=0)
    return cto.prune_weights(model, cto.OptimizationConfig(global_config=config))


MODELS = [
    ("int8 symmetric", (16, 17, 18), quantised(mode="linear_symmetric", dtype="int8"), 0.02),
    ("uint8 by tensor", (16, 18), quantised(mode="linear", dtype="uint8", granularity="per_tensor"), 0.05),
    (
        "int4 by blocks",
        (18,),
        quantised(mode="linear_symmetric", dtype="int4", granularity="per_block", block_size=8),
        0.3,
    ),
    ("6 bits uniform", (16, 17, 18), palettised(mode="uniform", nbits=6), 0.2),
    ("4 bits unique", (16,), palettised(mode="uniform", nbits=4), 0.6),
    (
        "3 bits by groups",
        (18,),
        palettised(mode="uniform", nbits=3, granularity="per_grouped_channel", group_size=8),
        0.9,
    ),
    ("sparse", (16, 17, 18), pruned, 0.9),
]


def by_torch(images: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return Small().eval()(torch.from_numpy(images)).numpy()


def converted(target: int, precision: str) -> Any:
    with quiet(), torch.no_grad():
        traced = torch.jit.trace(Small().eval(), torch.zeros(1, 3, 16, 16))
        return ct.convert(
            traced,
            inputs=[ct.TensorType(name="image", shape=(1, 3, 16, 16))],
            outputs=[ct.TensorType(name="logits", dtype=np.float32)],
            minimum_deployment_target=TARGETS[target],
            compute_precision=ct.precision.FLOAT16 if precision == "fp16" else ct.precision.FLOAT32,
            skip_model_load=True,
        )


def program_of(model: Any, path: Path) -> Program:
    with quiet():
        model.save(str(path))
    return read_program(path)


@pytest.mark.parametrize(
    ("compress", "target", "loss", "precision"),
    [
        pytest.param(row[2], target, row[3], precision, id=f"{row[0]}, iOS {target}, {precision}")
        for row in MODELS
        for target, precision in [*((target, "fp32") for target in row[1]), (row[1][-1], "fp16")]
    ],
)
def test_compressed_models_answer_as_their_decompressed_weights(
    compress: Callable[[Any], Any], target: int, loss: float, precision: str, tmp_path: Path
) -> None:
    model = converted(target, precision)
    with quiet():
        small = compress(model)
        plain = cto.decompress_weights(small)
    program = program_of(small, tmp_path / "small.mlpackage")
    assert any(operation.type.startswith("constexpr_") for operation in program.operations)
    images = np.random.default_rng(0).random((4, 3, 16, 16)).astype(np.float32)
    found = Evaluator(program).run({"image": images[:, np.newaxis]})["logits"][:, 0]
    expected = Evaluator(program_of(plain, tmp_path / "plain.mlpackage")).run({"image": images[:, np.newaxis]})
    tolerance = 1e-6 if precision == "fp32" else 2e-3
    np.testing.assert_allclose(found, expected["logits"][:, 0], atol=tolerance * np.abs(found).max())
    # Compressed at all, and still the same model: what is lost is what the weights lost.
    reference = by_torch(images)
    assert np.abs(found - reference).max() <= loss * np.abs(reference).max()
    sizes = [(tmp_path / f"{name}.mlpackage" / WEIGHTS_PATH).stat().st_size for name in ("small", "plain")]
    assert sizes[0] < sizes[1]


def test_constant_results_are_computed_once(tmp_path: Path) -> None:
    with quiet():
        small = palettised(mode="uniform", nbits=4)(converted(18, "fp32"))
    evaluator = Evaluator(program_of(small, tmp_path / "m.mlpackage"))
    left = {operation.type for operation in evaluator._operations}
    assert "linear" in left
    assert not any(name.startswith("constexpr_") for name in left)
    # The packed weights themselves are not kept next to what they became.
    assert not any(value.data.dtype == np.uint8 for value in evaluator._constants.values())


def test_a_table_that_is_too_short_is_refused(tmp_path: Path) -> None:
    with quiet():
        small = palettised(mode="uniform", nbits=4)(converted(18, "fp32"))
    program = program_of(small, tmp_path / "m.mlpackage")
    name = next(o.inputs["lut"][0] for o in program.operations if o.type == "constexpr_lut_to_dense")
    constants = {**program.constants, name: program.constants[name][..., :2, :]}
    with pytest.raises(InputError, match="looks up entry 15 of a table of 2, unknown here"):
        Evaluator(Program(program.label, 18, program.inputs, constants, program.operations, program.outputs))
