"""Every operator of the evaluator against torch: tiny modules, converted by coremltools, on several examples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from exporters.mil.evaluator import Evaluator
from exporters.mil.ops import OPERATORS
from exporters.mil.program import read_program
from exporters.quiet import import_coremltools, quiet
from keys.errors import InputError

EXAMPLES = 3


class Calls(nn.Module):
    """A function as a module; ``parts`` hold its weights."""

    def __init__(self, function: Callable[..., Tensor], *parts: nn.Module) -> None:
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(parts)

    def forward(self, *values: Tensor) -> Tensor:
        return self.function(*self.parts, *values)


@dataclass(frozen=True)
class Case:
    name: str
    operators: str
    module: nn.Module
    shapes: tuple[tuple[int, ...], ...]


def case(name: str, operators: str, function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> Case:
    return Case(name, operators, Calls(function), shapes)


def layer(name: str, operators: str, module: nn.Module, *shapes: tuple[int, ...]) -> Case:
    torch.manual_seed(1)
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.is_floating_point():
            tensor.data = torch.rand(tensor.shape) + 0.25
    return Case(name, operators, module, shapes)


TWO = ((1, 3, 4), (1, 3, 4))
ROW = (1, 6, 8)
IMAGE = (1, 4, 8, 8)
INDICES = torch.tensor([3, 0, 2])
CASES = [
    case("arithmetic", "add sub mul real_div", lambda x, y: (x + y) * (x - y) / (y + 3), *TWO),
    case("broadcast by rank", "add mul", lambda x, y: x * y + y, (1, 2, 3, 4), (3, 4)),
    case("power", "pow", lambda x, y: torch.pow(x.abs() + 1, y), *TWO),
    case("extremes", "maximum minimum", lambda x, y: torch.maximum(x, 0.5 * y) + torch.minimum(2 * x, y), *TWO),
    case("select greater", "select greater", lambda x, y: torch.where(x > y, x, 2 * y), *TWO),
    case("select less", "select less", lambda x, y: torch.where(x < y, x, 2 * y), *TWO),
    case("unary", "abs exp erf sin cos", lambda x: x.abs() + x.exp() + x.erf() + x.sin() * x.cos(), ROW),
    case("rounding", "floor ceil", lambda x: (3 * x).floor() + 2 * (3 * x).ceil(), ROW),
    case("roots", "sqrt rsqrt", lambda x: (x.abs() + 2).sqrt() + (x.abs() + 1).rsqrt(), ROW),
    case("variance", "square", lambda x: x.var(1), ROW),
    case("logarithm", "log", lambda x: (x.abs() + 1).log(), ROW),
    case("activations", "sigmoid silu tanh relu", lambda x: x.sigmoid() + F.silu(x) + x.tanh() + x.relu(), ROW),
    case("gelu", "gelu", F.gelu, ROW),
    case("gelu tanh", "gelu", lambda x: F.gelu(x, approximate="tanh"), ROW),
    case("clip", "clip", lambda x: x.clamp(-0.5, 0.75), ROW),
    case("cast", "cast", lambda x: (5 * x).int().float(), ROW),
    case("softmax last", "softmax", lambda x: x.softmax(-1), ROW),
    case("softmax middle", "softmax", lambda x: (60 * x).softmax(1), ROW),
    case("matmul", "matmul", lambda x, y: x @ y, (1, 2, 5, 3), (1, 2, 3, 4)),
    case("matmul transposed", "matmul", lambda x, y: x @ y.transpose(-1, -2), (1, 2, 5, 3), (1, 2, 4, 3)),
    case("matmul broadcast", "matmul", lambda x, y: x @ y, (1, 2, 5, 3), (3, 4)),
    layer("linear", "linear", nn.Linear(8, 5), ROW),
    layer("linear without bias", "linear", nn.Linear(8, 5, bias=False), ROW),
    layer("patch embedding", "conv", nn.Conv2d(4, 6, 4, stride=4), IMAGE),
    layer("conv strided, padded", "conv", nn.Conv2d(4, 6, 3, stride=2, padding=(1, 2), bias=False), IMAGE),
    layer("conv grouped, dilated", "conv", nn.Conv2d(4, 6, (3, 2), dilation=(2, 1), groups=2), IMAGE),
    layer("conv same", "conv", nn.Conv2d(4, 6, 2, padding="same"), IMAGE),
    layer("conv 1-D", "conv", nn.Conv1d(6, 3, 3, padding=1), ROW),
    layer("batch norm", "batch_norm", nn.BatchNorm2d(4), IMAGE),
    layer("layer norm", "layer_norm", nn.LayerNorm(8, eps=1e-6), ROW),
    layer("layer norm, two axes", "layer_norm", nn.LayerNorm((6, 8)), ROW),
    layer("layer norm, no weights", "layer_norm", nn.LayerNorm(8, elementwise_affine=False), ROW),
    layer("max pool", "max_pool", nn.MaxPool2d(3, stride=2, padding=1), IMAGE),
    case("pad", "pad", lambda x: F.pad(x, (1, 2, 0, 3), value=0.5), IMAGE),
    case("mean, kept", "reduce_mean", lambda x: x.mean(1, keepdim=True), ROW),
    case("mean of two", "reduce_mean", lambda x: x.mean((2, 3)), IMAGE),
    case("sum", "reduce_sum", lambda x: x.sum(-1), ROW),
    case("maximum", "reduce_max", lambda x: x.amax(-1), ROW),
    case("norm", "reduce_l2_norm", lambda x: x.norm(dim=-1), ROW),
    case("reshape", "reshape", lambda x: x.reshape(1, 4, 2, -1), IMAGE),
    case("transpose", "transpose", lambda x: x.permute(0, 2, 3, 1), IMAGE),
    case("expand, squeeze", "expand_dims squeeze", lambda x, y: (x.unsqueeze(2) + y).sum(1, True).squeeze(1), *TWO),
    case("concat", "concat", lambda x, y: torch.cat([x, y, x], 1), *TWO),
    case("stack", "stack", lambda x, y: torch.stack([x, y], -1), *TWO),
    case("split", "split", lambda x: torch.cat(x.split([1, 3, 2], 1)[::-1], 1), ROW),
    case("slice", "slice_by_index", lambda x: x[:, 1:5:2, -3:] + x[:, :2, 2:5], ROW),
    case("slice, one", "slice_by_index", lambda x: x[:, -2], ROW),
    case("gather", "gather", lambda x: x.index_select(1, INDICES), ROW),
    case("gather channels", "gather", lambda x: x[:, INDICES], IMAGE),
    case("gather along", "gather_along_axis", lambda x: x.gather(2, INDICES.expand(1, 6, 3)), ROW),
    case("tile", "tile", lambda x: x.repeat(1, 2, 3), ROW),
    case("unshuffle", "pixel_unshuffle", lambda x: F.pixel_unshuffle(x, 2), IMAGE),
    case("shuffle", "pixel_shuffle", lambda x: F.pixel_shuffle(x, 2), IMAGE),
    case(
        "blocks by axes of six",
        "reshape transpose",
        lambda x: x.reshape(1, 4, 2, 4, 4, 2).permute(0, 2, 4, 1, 3, 5).reshape(1, 8, -1),
        IMAGE,
    ),
]


def convert(module: nn.Module, shapes: tuple[tuple[int, ...], ...], precision: str, folder: Path) -> Evaluator:
    ct = import_coremltools()
    with quiet(), torch.no_grad():
        traced = torch.jit.trace(module.eval(), tuple(torch.ones(shape) for shape in shapes))
        inputs = [ct.TensorType(name=f"in{i}", shape=shape) for i, shape in enumerate(shapes)]
        model = ct.convert(
            traced,
            inputs=inputs,
            outputs=[ct.TensorType(name="out")],
            minimum_deployment_target=ct.target.iOS16,
            compute_precision=ct.precision.FLOAT16 if precision == "fp16" else ct.precision.FLOAT32,
            skip_model_load=True,
        )
        model.save(str(folder / "model.mlpackage"))
    return Evaluator(read_program(folder / "model.mlpackage"))


def examples(shapes: tuple[tuple[int, ...], ...]) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {f"in{i}": generator.normal(size=(EXAMPLES, *shape)).astype(np.float32) for i, shape in enumerate(shapes)}


def by_torch(module: nn.Module, values: dict[str, np.ndarray]) -> np.ndarray:
    with torch.no_grad():
        results = [module(*(torch.from_numpy(v[i]) for v in values.values())).numpy() for i in range(EXAMPLES)]
    return np.stack(results)


@pytest.mark.parametrize("row", CASES, ids=lambda row: row.name)
def test_fp32_agrees_with_torch(row: Case, tmp_path: Path) -> None:
    evaluator = convert(row.module, row.shapes, "fp32", tmp_path)
    present = {operation.type for operation in evaluator.program.operations}
    assert set(row.operators.split()) <= present, f"coremltools wrote {present}"
    values = examples(row.shapes)
    np.testing.assert_allclose(evaluator.run(values)["out"], by_torch(row.module, values), rtol=2e-5, atol=2e-5)


ROUNDED = ["arithmetic", "gelu", "softmax last", "linear", "patch embedding", "layer norm", "gather", "unshuffle"]


@pytest.mark.parametrize("row", [row for row in CASES if row.name in ROUNDED], ids=lambda row: row.name)
def test_fp16_agrees_to_its_precision(row: Case, tmp_path: Path) -> None:
    evaluator = convert(row.module, row.shapes, "fp16", tmp_path)
    assert evaluator.program.precision == "fp16"
    values = examples(row.shapes)
    found, expected = evaluator.run(values)["out"], by_torch(row.module, values)
    assert np.array_equal(found, found.astype(np.float16)), "a result was not rounded to float16"
    np.testing.assert_allclose(found, expected, rtol=4e-3, atol=4e-3 * np.abs(expected).max())


def test_every_operator_is_tested() -> None:
    tested = {name for row in CASES for name in row.operators.split()}
    # Seen whole in tests/test_to_coreml.py, which only a classifier has.
    assert tested | {"classify"} == set(OPERATORS)


def by_builder(body: Callable[..., object], shape: tuple[int, ...], folder: Path) -> Evaluator:
    """A program of one input ``in0`` for what coremltools' reader of torch models does not write."""
    ct = import_coremltools()
    mb = import_coremltools("coremltools.converters.mil").Builder
    with quiet():
        program = mb.program(input_specs=[mb.TensorSpec(shape=shape)])(lambda in0: body(mb, in0))
        precision, target = ct.precision.FLOAT32, ct.target.iOS16
        model = ct.convert(program, compute_precision=precision, minimum_deployment_target=target, skip_model_load=True)
        model.save(str(folder / "model.mlpackage"))
    return Evaluator(read_program(folder / "model.mlpackage"))


WEIGHT = torch.linspace(-1, 1, 6 * 4 * 2 * 2).reshape(6, 4, 2, 2)
BUILT = [
    (
        lambda mb, x: mb.gelu(x=x, mode="SIGMOID_APPROXIMATION", name="out"),
        lambda x: x * torch.sigmoid(1.702 * x),
    ),
    (
        lambda mb, x: mb.conv(x=x, weight=WEIGHT.numpy(), pad_type="same", strides=[1, 1], name="out"),
        lambda x: F.conv2d(F.pad(x, (0, 1, 0, 1)), WEIGHT),
    ),
    (
        lambda mb, x: mb.conv(x=x, weight=WEIGHT.numpy(), pad_type="same_lower", strides=[1, 1], name="out"),
        lambda x: F.conv2d(F.pad(x, (1, 0, 1, 0)), WEIGHT),
    ),
    (
        lambda mb, x: mb.concat(values=mb.split(x=x, num_splits=2, axis=1)[::-1], axis=1, name="out"),
        lambda x: torch.cat(x.chunk(2, 1)[::-1], 1),
    ),
    (lambda mb, x: mb.squeeze(x=x, name="out"), lambda x: x.squeeze()),
    (
        lambda mb, x: mb.slice_by_index(x=x, begin=[0, 3, 7, 0], end=[1, 0, 1, 8], stride=[1, -1, -2, 3], name="out"),
        lambda x: x.flip(1)[:, 0:3].flip(2)[:, :, 0:6:2, ::3],
    ),
]


@pytest.mark.parametrize(("body", "expected"), BUILT)
def test_built_programs_agree_with_torch(
    body: Callable[..., object], expected: Callable[[Tensor], Tensor], tmp_path: Path
) -> None:
    evaluator = by_builder(body, IMAGE, tmp_path)
    values = examples((IMAGE,))
    (name,) = evaluator.program.outputs
    np.testing.assert_allclose(
        evaluator.run({"in0": values["in0"]})[name], by_torch(Calls(expected), values), atol=2e-5
    )


def test_float16_overflow_becomes_infinite(tmp_path: Path) -> None:
    evaluator = convert(Calls(lambda x: (x * 300) * 300), ((1, 4),), "fp16", tmp_path)
    assert np.isinf(evaluator.run({"in0": np.ones((1, 1, 4), np.float32)})["out"]).all()


def test_examples_do_not_influence_each_other(tmp_path: Path) -> None:
    evaluator = convert(
        nn.Sequential(nn.Conv2d(4, 6, 4, 4), nn.Flatten(2), nn.LayerNorm(4)), (IMAGE,), "fp32", tmp_path
    )
    images = examples((IMAGE,))["in0"]
    together = evaluator.run({"in0": images})["out"]
    alone = np.concatenate([evaluator.run({"in0": images[i : i + 1]})["out"] for i in range(EXAMPLES)])
    np.testing.assert_allclose(together, alone, atol=1e-6)


def test_many_examples_run_in_batches(tmp_path: Path) -> None:
    evaluator = convert(Calls(lambda x: 2 * x), ((1, 4),), "fp32", tmp_path)
    values = np.arange(4 * 1000, dtype=np.float32).reshape(1000, 1, 4)
    assert np.array_equal(evaluator.run({"in0": values})["out"], 2 * values)


def test_an_unknown_operator_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"operator 'cumsum' .* is not known to the evaluator"):
        convert(Calls(lambda x: x.cumsum(1)), (ROW,), "fp32", tmp_path)


def test_an_unknown_use_of_an_operator_is_named(tmp_path: Path) -> None:
    evaluator = convert(Calls(lambda x: F.pad(x, (1, 1), mode="reflect")), (ROW,), "fp32", tmp_path)
    with pytest.raises(InputError, match=r"operator 'pad' .* pads by 'reflect', unknown here"):
        evaluator.run(examples((ROW,)))


@pytest.mark.parametrize(
    "inputs",
    [
        {},
        {"in0": np.zeros((1, 1, 5), np.float32)},
        {"other": np.zeros((1, 1, 4), np.float32)},
        {"in0": np.zeros((0, 1, 4), np.float32)},
    ],
)
def test_wrong_inputs_are_refused(inputs: dict[str, np.ndarray], tmp_path: Path) -> None:
    evaluator = convert(Calls(lambda x: 2 * x), ((1, 4),), "fp32", tmp_path)
    with pytest.raises(InputError, match="for each example; it was given"):
        evaluator.run(inputs)
