"""Every operator of the evaluator against torch: tiny modules, converted by coremltools, on several examples."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
VOLUME = (1, 4, 5, 7, 6)
_AVERAGE_OF_WHAT_IS_THERE = nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False)
INDICES = torch.tensor([3, 0, 2])
LOOKED_UP = torch.tensor([5.0, -1.0, 0.5, 3.0, 8.0, 2.0, 7.0, 1.0])
TABLE = torch.arange(10) ** 2
CUBE = torch.arange(3 * 6 * 2).reshape(3, 6, 2).float()


def whole(x: Tensor) -> Tensor:
    return (10 * x).floor().to(torch.int32)


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
    case("whole division", "floor_div", lambda x: ((9 * x).int() % 4).float(), ROW),
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
    layer("conv grouped, strided, padded", "conv", nn.Conv2d(4, 8, 5, stride=2, padding=2, groups=4), IMAGE),
    layer("conv depthwise, same", "conv", nn.Conv2d(4, 4, 5, padding="same", groups=4), IMAGE),
    layer("conv 1×1, strided", "conv", nn.Conv2d(4, 6, 1, stride=2, bias=False), IMAGE),
    layer("max pool", "max_pool", nn.MaxPool2d(3, stride=2, padding=1), IMAGE),
    layer("conv 3-D", "conv", nn.Conv3d(4, 6, 3, padding=1), VOLUME),
    layer("conv 3-D, deep and odd", "conv", nn.Conv3d(4, 6, (4, 3, 2), (1, 2, 1), (2, 1, 0), bias=False), VOLUME),
    layer("conv 3-D, depthwise", "conv", nn.Conv3d(4, 4, (3, 3, 1), groups=4, dilation=(1, 2, 1)), VOLUME),
    layer("batch norm 3-D", "batch_norm", nn.Sequential(nn.ReLU(), nn.BatchNorm3d(4)), VOLUME),
    layer("max pool 3-D", "max_pool", nn.MaxPool3d((3, 2, 2), (1, 2, 2), (1, 0, 0)), VOLUME),
    case("whole numbers", "floor_div cast", lambda x: whole(x) // 7 * 1.0, ROW),
    case("rounding to even", "round", lambda x: (2 * x).round() + (x * 0 + 2.5).round(), ROW),
    case("log of sum of exponentials", "reduce_log_sum_exp", lambda x: (90 * x).logsumexp((1, 2)), ROW),
    case("minimum", "reduce_min", lambda x: x.amin(1, keepdim=True), ROW),
    case("sorting", "argsort gather_along_axis", lambda x: x.gather(1, x.argsort(1)), ROW),
    case("sorting whole numbers", "argsort", lambda x: (whole(x) * 8 + torch.arange(8)).argsort(2).float(), ROW),
    case("largest", "topk", lambda x: torch.cat([x.topk(3, 1)[0], x.topk(2, 1, False)[1].float()], 1), ROW),
    case("marks", "one_hot", lambda x: F.one_hot(whole(x).long().clamp(0, 4), 5) * 2.0, ROW),
    case("extremes", "reduce_argmax reduce_argmin", lambda x: (x.argmax(1) * 9 + x.argmin(-1).sum()) * 1.0, ROW),
    case("looked up", "gather", lambda x: TABLE.index_select(0, whole(x).clamp(0, 9).flatten()) * 1.0, ROW),
    layer("average pool", "avg_pool", nn.AvgPool2d(2), IMAGE),
    layer("average pool, padded", "avg_pool", nn.AvgPool2d(3, stride=2, padding=1), IMAGE),
    layer("average pool, padding not counted", "avg_pool", _AVERAGE_OF_WHAT_IS_THERE, IMAGE),
    case("average over space", "reduce_mean", lambda x: F.adaptive_avg_pool2d(x, 1), IMAGE),
    layer("prelu", "prelu", nn.PReLU(4), IMAGE),
    case("leaky relu", "leaky_relu", lambda x: F.leaky_relu(x, 0.3), IMAGE),
    case("relu6", "relu6", lambda x: F.relu6(9 * x), ROW),
    case("hard sigmoid", "sigmoid_hard", lambda x: F.hardsigmoid(4 * x), ROW),
    case("hard swish", "sigmoid_hard thresholded_relu", lambda x: F.hardswish(4 * x), ROW),
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
    case("look up", "gather cast", lambda x: LOOKED_UP[(x.abs() * 2).clamp(0, 7).to(torch.int64)], ROW),
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


ROUNDED = [
    "arithmetic", "gelu", "softmax last", "linear", "patch embedding", "layer norm", "gather", "unshuffle", "prelu",
    "average pool, padded",
]  # fmt: skip


@pytest.mark.parametrize("row", [row for row in CASES if row.name in ROUNDED], ids=lambda row: row.name)
def test_fp16_agrees_to_its_precision(row: Case, tmp_path: Path) -> None:
    evaluator = convert(row.module, row.shapes, "fp16", tmp_path)
    assert evaluator.program.precision == "fp16"
    values = examples(row.shapes)
    found, expected = evaluator.run(values)["out"], by_torch(row.module, values)
    assert np.array_equal(found, found.astype(np.float16)), "a result was not rounded to float16"
    np.testing.assert_allclose(found, expected, rtol=4e-3, atol=4e-3 * np.abs(expected).max())


@dataclass(frozen=True)
class Built:
    """A program written operator by operator, for what coremltools' reader of torch models does not write."""

    name: str
    operators: str
    body: Callable[..., object]
    expected: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]
    target: int = 16


def built(name: str, operators: str, body: Any, expected: Any, *shapes: tuple[int, ...], target: int = 16) -> Built:
    return Built(name, operators, body, expected, shapes, target)


WEIGHT = torch.linspace(-1, 1, 6 * 4 * 2 * 2).reshape(6, 4, 2, 2)
ODD = (3, 1, 5, 7)
WIDE = (2, 3, 11)
SCALES = torch.tensor([0.01, 0.02, 0.05, 0.1, 0.2])
ZEROS = torch.tensor([-100, -1, 0, 1, 100], dtype=torch.int8)
PLACES = np.array([[2, 0, 1], [1, 1, 2]])
BOOLEAN = torch.arange(5 * 4).reshape(5, 4) % 3 != 0
HEADS = ((2, 3, 5, 8), (2, 3, 4, 8), (2, 3, 4, 6))


def levels(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return ((x / scale).round() + zero).clamp(-128, 127)


def reduced(name: str, function: Callable[..., Tensor]) -> list[Built]:
    def all_axes(mb: Any, x: Any) -> object:
        return getattr(mb, f"reduce_{name}")(x=x, keep_dims=False)

    def two_axes(mb: Any, x: Any) -> object:
        return getattr(mb, f"reduce_{name}")(x=x, axes=[-1, -4], keep_dims=True)

    return [
        built(f"{name}, all", f"reduce_{name}", all_axes, lambda x: function(x, (0, 1, 2, 3), False), ODD),
        built(f"{name}, negative axes", f"reduce_{name}", two_axes, lambda x: function(x, (0, 3), True), ODD),
    ]


def compared(name: str, function: Callable[[Tensor, Tensor], Tensor]) -> Built:
    """Both against a constant that some values are equal to, and between ranks."""

    def body(mb: Any, x: Any, y: Any) -> object:
        rounded, other = mb.floor(x=x), mb.floor(x=y)
        return mb.cast(x=getattr(mb, name)(x=rounded, y=other), dtype="fp32")

    return built(name, name, body, lambda x, y: function(x.floor(), y.floor()).float(), ODD, (5, 1))


def logical(name: str, function: Callable[[Tensor, Tensor], Tensor]) -> Built:
    def body(mb: Any, x: Any, y: Any) -> object:
        result = getattr(mb, name)(x=mb.greater(x=x, y=0.0), y=mb.greater(x=y, y=0.0))
        return mb.cast(x=result, dtype="fp32")

    return built(name, name, body, lambda x, y: function(x > 0, y > 0).float(), WIDE, WIDE)


def attention(mask: Tensor | None) -> Built:
    def body(mb: Any, q: Any, k: Any, v: Any) -> object:
        given = {} if mask is None else {"attn_mask": mask.numpy()}
        return mb.scaled_dot_product_attention(query=q, key=k, value=v, **given)

    def expected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask)

    kind = "no mask" if mask is None else f"{mask.dtype} mask"
    return built(f"attention, {kind}", "scaled_dot_product_attention", body, expected, *HEADS, target=18)


def cast_to(dtype: str, kind: torch.dtype, target: int) -> Built:
    def body(mb: Any, x: Any) -> object:
        return mb.cast(x=mb.cast(x=mb.mul(x=mb.abs(x=x), y=20.0), dtype=dtype), dtype="fp32")

    return built(f"cast to {dtype}", "cast", body, lambda x: (x.abs() * 20).to(kind).float(), WIDE, target=target)


BUILT = [
    *(row for name, f in (("mean", torch.mean), ("sum", torch.sum), ("max", torch.amax)) for row in reduced(name, f)),
    *reduced("l2_norm", lambda x, dim, keepdim: x.square().sum(dim, keepdim).sqrt()),
    *(compared(name, getattr(torch, short)) for name, short in (("equal", "eq"), ("not_equal", "ne"))),
    *(compared(name, getattr(torch, name)) for name in ("greater", "greater_equal", "less", "less_equal")),
    *(logical(name, getattr(torch, name)) for name in ("logical_and", "logical_or")),
    built(
        "logical not",
        "logical_not",
        lambda mb, x: mb.cast(x=mb.logical_not(x=mb.greater(x=x, y=0.0)), dtype="fp32"),
        lambda x: (x <= 0).float(),
        WIDE,
    ),
    *(attention(mask) for mask in (None, BOOLEAN, torch.linspace(-2, 2, 20).reshape(1, 1, 5, 4))),
    *(cast_to(name, kind, 16) for name, kind in (("int32", torch.int32), ("bool", torch.bool), ("fp16", torch.half))),
    *(cast_to(name, getattr(torch, name), 17) for name in ("int8", "uint8", "int16", "uint16")),
    built(
        "quantize",
        "quantize dequantize",
        lambda mb, x: mb.dequantize(input=mb.quantize(input=x, scale=0.02, output_dtype="int8"), scale=0.02),
        lambda x: levels(x, torch.tensor(0.02), torch.tensor(0)) * 0.02,
        ODD,
        target=17,
    ),
    built(
        "quantize along an axis",
        "quantize dequantize",
        lambda mb, x: mb.dequantize(
            input=mb.quantize(input=x, scale=SCALES.numpy(), zero_point=ZEROS.numpy(), output_dtype="int8", axis=-2),
            scale=SCALES.numpy(),
            zero_point=ZEROS.numpy(),
            axis=2,
        ),
        lambda x: (levels(x, SCALES[:, None], ZEROS[:, None]) - ZEROS[:, None]) * SCALES[:, None],
        ODD,
        target=17,
    ),
    built(
        "far from zero",
        "gelu erf sigmoid silu tanh",
        lambda mb, x: mb.concat(
            values=[
                f(x=mb.mul(x=x, y=k)) for k in (1e-4, 1.0, 9.0) for f in (mb.gelu, mb.erf, mb.sigmoid, mb.silu, mb.tanh)
            ],
            axis=-1,
        ),
        lambda x: torch.cat(
            [f(x * k) for k in (1e-4, 1.0, 9.0) for f in (F.gelu, torch.erf, torch.sigmoid, F.silu, torch.tanh)], -1
        ),
        (1, 257),
    ),
    built(
        "gelu by a sigmoid",
        "gelu",
        lambda mb, x: mb.gelu(x=x, mode="SIGMOID_APPROXIMATION"),
        lambda x: x * torch.sigmoid(1.702 * x),
        IMAGE,
    ),
    built(
        "gelu by a tanh",
        "gelu",
        lambda mb, x: mb.gelu(x=mb.mul(x=x, y=4.0), mode="TANH_APPROXIMATION"),
        lambda x: F.gelu(4 * x, approximate="tanh"),
        ODD,
    ),
    built(
        "epsilons",
        "rsqrt log",
        lambda mb, x: mb.add(x=mb.rsqrt(x=mb.abs(x=x), epsilon=0.5), y=mb.log(x=mb.abs(x=x), epsilon=0.25)),
        lambda x: (x.abs() + 0.5).rsqrt() + (x.abs() + 0.25).log(),
        ODD,
    ),
    built("remainders", "mod", lambda mb, x: mb.mod(x=mb.mul(x=x, y=4.0), y=1.5), lambda x: (4 * x) % 1.5, ODD),
    built("squares of negative", "pow", lambda mb, x: mb.pow(x=x, y=2.0), lambda x: x**2, ODD),
    built("softmax of one", "softmax", lambda mb, x: mb.softmax(x=x, axis=-3), lambda x: x.softmax(1), ODD),
    built("softmax, first axis", "softmax", lambda mb, x: mb.softmax(x=x, axis=0), lambda x: x.softmax(0), ODD),
    built(
        "softmax of large",
        "softmax",
        lambda mb, x: mb.softmax(x=mb.mul(x=x, y=1e4), axis=-2),
        lambda x: (x * 1e4).softmax(-2),
        ODD,
    ),
    built(
        "layer norm, apart",
        "layer_norm",
        lambda mb, x: mb.layer_norm(x=x, axes=[-4, -1], epsilon=1e-3),
        lambda x: F.layer_norm(x.permute(1, 2, 0, 3), (3, 7), eps=1e-3).permute(2, 0, 1, 3),
        ODD,
    ),
    built(
        "layer norm, middle, weights",
        "layer_norm",
        lambda mb, x: mb.layer_norm(x=x, axes=[2], gamma=SCALES.numpy(), beta=-SCALES.numpy()),
        lambda x: F.layer_norm(x.transpose(2, 3), (5,), SCALES, -SCALES).transpose(2, 3),
        ODD,
    ),
    built(
        "matmul, both turned, between ranks",
        "matmul",
        lambda mb, x, y: mb.matmul(x=x, y=y, transpose_x=True, transpose_y=True),
        lambda x, y: x.transpose(-1, -2) @ y.T,
        (2, 3, 5, 4),
        (7, 5),
    ),
    built(
        "linear of a row",
        "linear",
        lambda mb, x: mb.linear(x=x, weight=SCALES[None].numpy()),
        lambda x: x @ SCALES[:, None],
        (3, 5),
    ),
    built(
        "conv same",
        "conv",
        lambda mb, x: mb.conv(x=x, weight=WEIGHT.numpy(), pad_type="same", strides=[1, 1]),
        lambda x: F.conv2d(F.pad(x, (0, 1, 0, 1)), WEIGHT),
        IMAGE,
    ),
    built(
        "conv same_lower",
        "conv",
        lambda mb, x: mb.conv(x=x, weight=WEIGHT.numpy(), pad_type="same_lower", strides=[1, 1]),
        lambda x: F.conv2d(F.pad(x, (1, 0, 1, 0)), WEIGHT),
        IMAGE,
    ),
    built(
        "max pool same",
        "max_pool",
        lambda mb, x: mb.max_pool(x=x, kernel_sizes=[2, 3], strides=[2, 1], pad_type="same"),
        lambda x: F.max_pool2d(F.pad(x, (1, 1, 0, 0), value=-torch.inf), (2, 3), (2, 1)),
        IMAGE,
    ),
    built(
        "concat and stack, last axis",
        "concat stack",
        lambda mb, x, y: mb.stack(
            values=[mb.concat(values=[x, y], axis=-1), mb.concat(values=[y, x], axis=-1)], axis=-1
        ),
        lambda x, y: torch.stack([torch.cat([x, y], -1), torch.cat([y, x], -1)], -1),
        WIDE,
        (2, 3, 4),
    ),
    built(
        "split by number",
        "split",
        lambda mb, x: mb.concat(values=mb.split(x=x, num_splits=2, axis=-3)[::-1], axis=1),
        lambda x: torch.cat(x.chunk(2, 1)[::-1], 1),
        IMAGE,
    ),
    built("squeeze", "squeeze", lambda mb, x: mb.squeeze(x=x), lambda x: x.squeeze(), IMAGE),
    built("squeeze one", "squeeze", lambda mb, x: mb.squeeze(x=x, axes=[-3]), lambda x: x.squeeze(1), ODD),
    built(
        "expand at both ends",
        "expand_dims",
        lambda mb, x: mb.expand_dims(x=x, axes=[-1, 0]),
        lambda x: x.unsqueeze(0).unsqueeze(-1),
        WIDE,
    ),
    built(
        "transpose, negative",
        "transpose",
        lambda mb, x: mb.transpose(x=x, perm=[-1, 0, -2, 1]),
        lambda x: x.permute(3, 0, 2, 1),
        ODD,
    ),
    built(
        "reshape, kept",
        "reshape",
        lambda mb, x: mb.reshape(x=x, shape=[0, -1, 0, 1]),
        lambda x: x.reshape(3, 7, 5, 1),
        ODD,
    ),
    built(
        "reshape, kept from the end",
        "reshape",
        lambda mb, x: mb.reshape(x=x, shape=[-1, 0]),
        lambda x: x.reshape(6, 11),
        WIDE,
        target=17,
    ),
    built(
        "slice backwards",
        "slice_by_index",
        lambda mb, x: mb.slice_by_index(x=x, begin=[0, 3, 7, 0], end=[1, 0, 1, 8], stride=[1, -1, -2, 3]),
        lambda x: x.flip(1)[:, 0:3].flip(2)[:, :, 0:6:2, ::3],
        IMAGE,
    ),
    built(
        "slice by masks",
        "slice_by_index",
        lambda mb, x: mb.slice_by_index(
            x=x,
            begin=[1, 0, -4, -2],
            end=[0, 0, 0, 0],
            begin_mask=[False, True, False, False],
            end_mask=[False, True, True, False],
            squeeze_mask=[True, False, False, True],
        ),
        lambda x: x[1, :, -4:, -2],
        ODD,
    ),
    built(
        "gather, negative places",
        "gather",
        lambda mb, x: mb.gather(x=x, indices=PLACES - 3, axis=-2),
        lambda x: x[:, torch.from_numpy(PLACES)],
        WIDE,
    ),
    *(
        built(
            f"gather by {kind.__name__}",
            "gather",
            lambda mb, x, kind=kind: mb.gather(x=x, indices=PLACES.astype(kind), axis=1, validate_indices=True),
            lambda x: x[:, torch.from_numpy(PLACES)],
            WIDE,
            target=target,
        )
        for kind, target in ((np.int16, 17), (np.uint16, 17), (np.int8, 17), (np.uint8, 18), (np.int32, 18))
    ),
    built(
        "gather along the last axis",
        "gather_along_axis",
        lambda mb, x: mb.gather_along_axis(
            x=x, indices=PLACES[:, :, None].astype(np.uint16), axis=-1, validate_indices=False
        ),
        lambda x: x.gather(2, torch.from_numpy(PLACES)[:, :, None]),
        WIDE,
        target=17,
    ),
    *(
        built(
            f"argsort of ties, {'up' if ascending else 'down'}",
            "argsort",
            lambda mb, x, up=ascending: mb.cast(x=mb.argsort(x=mb.floor(x=x), axis=-2, ascending=up), dtype="fp32"),
            lambda x, up=ascending: x.floor().argsort(dim=1, descending=not up, stable=True).float(),
            WIDE,
        )
        for ascending in (True, False)
    ),
    built(
        "topk, first axis, values alone",
        "topk",
        lambda mb, x: mb.topk(x=x, k=1, axis=0, ascending=True, return_indices=False, sort=True),
        lambda x: x.sort(0).values[:1],
        WIDE,
        target=17,
    ),
    built(
        "topk, places of 16 bits",
        "topk",
        lambda mb, x: mb.cast(
            x=mb.cast(x=mb.topk(x=x, k=4, axis=-1, output_indices_dtype="uint16")[1], dtype="int32"), dtype="fp32"
        ),
        lambda x: x.topk(4, -1).indices.float(),
        WIDE,
        target=17,
    ),
    built(
        "one hot, an axis in front, other values",
        "one_hot",
        lambda mb, x: mb.one_hot(
            indices=mb.cast(x=mb.abs(x=mb.mul(x=x, y=2.0)), dtype="int32"),
            one_hot_vector_size=4,
            axis=-3,
            on_value=2.5,
            off_value=-1.0,
        ),
        lambda x: torch.where((2 * x.abs()).int().unsqueeze(1) == torch.arange(4).view(4, 1, 1), 2.5, -1.0),
        WIDE,
    ),
    *(
        built(
            f"{name}, kept, iOS {target}",
            name,
            lambda mb, x, name=name, more=more: mb.cast(
                x=getattr(mb, name)(x=x, axis=-2, keep_dims=True, **more), dtype="fp32"
            ),
            lambda x, name=name: getattr(torch, name.removeprefix("reduce_"))(x, 1, keepdim=True).float(),
            WIDE,
            target=target,
        )
        for name in ("reduce_argmax", "reduce_argmin")
        for target, more in ((16, {}), (17, {"output_dtype": "uint16"}))
    ),
    *(
        built(
            f"gather at places from the image, {kind}",
            "gather",
            lambda mb, x, y, axis=axis: mb.gather(x=x, indices=mb.cast(x=mb.abs(x=y), dtype="int32"), axis=axis),
            lambda x, y, axis=axis: x.index_select(axis, y.abs().int()),
            (6, 5, 7),
            (4,),
        )
        for kind, axis in (("first axis", 0), ("last axis", 2))
    ),
    built(
        "gather from a table at places from the image",
        "gather",
        lambda mb, x: mb.gather(x=CUBE.numpy(), indices=mb.cast(x=mb.abs(x=x), dtype="int32"), axis=1),
        lambda x: CUBE[:, x.abs().int()],
        (4, 2),
    ),
    built("tile odd", "tile", lambda mb, x: mb.tile(x=x, reps=[2, 1, 3]), lambda x: x.repeat(2, 1, 3), WIDE),
    built(
        "pad in front",
        "pad",
        lambda mb, x: mb.pad(x=x, pad=[0, 2, 1, 0], mode="constant", constant_val=-1.5),
        lambda x: F.pad(x, (1, 0, 0, 2), value=-1.5),
        WIDE,
    ),
    built(
        "select by rank",
        "select",
        lambda mb, x, y: mb.select(cond=BOOLEAN[:, :1].numpy(), a=x, b=y),
        lambda x, y: torch.where(BOOLEAN[:, :1], x, y),
        ODD,
        ODD,
    ),
    built("clip one side", "clip", lambda mb, x: mb.clip(x=x, alpha=0.25, beta=3e38), lambda x: x.clamp(min=0.25), ODD),
    built(
        "batch norm, plain",
        "batch_norm",
        lambda mb, x: mb.batch_norm(x=x, mean=SCALES[:1].numpy(), variance=SCALES[1:2].numpy(), epsilon=0.5),
        lambda x: F.batch_norm(x, SCALES[:1], SCALES[1:2], eps=0.5),
        ODD,
    ),
    built(
        "unshuffle and shuffle, odd",
        "pixel_unshuffle pixel_shuffle",
        lambda mb, x: mb.pixel_shuffle(x=mb.pixel_unshuffle(x=x, downscale_factor=np.uint32(3)), upscale_factor=3),
        lambda x: x,
        (1, 2, 9, 3),
    ),
]


def by_builder(
    body: Callable[..., object], shapes: tuple[tuple[int, ...], ...], target: int, folder: Path
) -> Evaluator:
    ct = import_coremltools()
    mb = import_coremltools("coremltools.converters.mil").Builder
    version = getattr(ct.target, f"iOS{target}")
    specs = [mb.TensorSpec(shape=shape) for shape in shapes]
    # A program takes its inputs' names from the function that builds it.
    functions = {
        1: lambda in0: body(mb, in0),
        2: lambda in0, in1: body(mb, in0, in1),
        3: lambda in0, in1, in2: body(mb, in0, in1, in2),
    }
    with quiet():
        program = mb.program(input_specs=specs, opset_version=version)(functions[len(shapes)])
        model = ct.convert(
            program,
            compute_precision=ct.precision.FLOAT32,
            minimum_deployment_target=version,
            skip_model_load=True,
            # As it was written, not what coremltools would make of it.
            pass_pipeline=ct.PassPipeline.EMPTY,
        )
        model.save(str(folder / "model.mlpackage"))
    return Evaluator(read_program(folder / "model.mlpackage"))


@pytest.mark.parametrize("row", BUILT, ids=lambda row: row.name)
def test_built_programs_agree_with_torch(row: Built, tmp_path: Path) -> None:
    evaluator = by_builder(row.body, row.shapes, row.target, tmp_path)
    assert evaluator.program.target == row.target
    present = {operation.type for operation in evaluator.program.operations}
    assert set(row.operators.split()) <= present, f"coremltools wrote {present}"
    values = examples(row.shapes)
    (name,) = evaluator.program.outputs
    expected = by_torch(Calls(row.expected), values)
    found = evaluator.run(values)[name]
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6)


def test_every_operator_is_tested() -> None:
    rows: list[Case | Built] = [*CASES, *BUILT]
    tested = {name for row in rows for name in row.operators.split()}
    # tests/test_mil_compressed.py has such a test for those; only a classifier has the last (test_to_coreml.py).
    compressed = {name for name in OPERATORS if name.startswith("constexpr_")}
    assert tested | {"classify"} == set(OPERATORS) - compressed


def test_float16_overflow_becomes_infinite(tmp_path: Path) -> None:
    evaluator = convert(Calls(lambda x: (x * 300) * 300), ((1, 4),), "fp16", tmp_path)
    assert np.isinf(evaluator.run({"in0": np.ones((1, 1, 4), np.float32)})["out"]).all()


def test_the_first_overflow_is_named(tmp_path: Path) -> None:
    evaluator = convert(Calls(lambda x: (x * x * 300).relu().sum(-1)), ((1, 4),), "fp16", tmp_path)
    values = np.ones((600, 1, 4), np.float32)
    assert evaluator.first_overflow({"in0": values}) is None
    # 20·20·300 is more than float16 holds; in another batch than the first.
    values[-1, 0, 2] = 20
    found = evaluator.first_overflow({"in0": values})
    assert found is not None
    assert "(float16), which the operator 'mul' makes of finite values: it gives values up to 120000" in found


def test_a_mask_of_infinite_values_is_no_overflow(tmp_path: Path) -> None:
    mask = torch.tensor([0.0, 0.0, -torch.inf, 0.0])
    evaluator = convert(Calls(lambda x: (x + mask).softmax(-1) * 60000 * (x + 1)), ((1, 4),), "fp16", tmp_path)
    assert np.isinf(evaluator.run({"in0": np.full((1, 1, 4), 100, np.float32)})["out"]).any()
    found = evaluator.first_overflow({"in0": np.full((1, 1, 4), 100, np.float32)})
    assert found is not None
    assert "'mul' makes of finite values" in found


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
    with pytest.raises(InputError, match=r"operator 'pad' .* pads by 'reflect', unknown here"):
        convert(Calls(lambda x: F.pad(x, (1, 1), mode="reflect")), (ROW,), "fp32", tmp_path)


def test_an_unknown_parameter_is_named(tmp_path: Path) -> None:
    program = convert(Calls(lambda x: x.softmax(-1)), (ROW,), "fp32", tmp_path).program
    (operation,) = [operation for operation in program.operations if operation.type == "softmax"]
    hotter = dataclasses.replace(operation, inputs={**operation.inputs, "temperature": operation.inputs["axis"]})
    with pytest.raises(InputError, match=r"operator 'softmax' .* has the parameter 'temperature', not known"):
        Evaluator(dataclasses.replace(program, operations=(hotter,)))


def test_an_operator_of_a_later_version_is_named(tmp_path: Path) -> None:
    row = attention(None)
    program = by_builder(row.body, row.shapes, 18, tmp_path).program
    with pytest.raises(
        InputError, match=r"'scaled_dot_product_attention' .* is not known to the evaluator before iOS 18"
    ):
        Evaluator(dataclasses.replace(program, target=17))


@pytest.mark.parametrize("place", [-1, 3])
def test_places_that_core_ml_leaves_undefined_are_refused(place: int, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"takes place {place} of 3, which is undefined in iOS 17"):
        by_builder(lambda mb, x: mb.gather(x=x, indices=[0, place], axis=1), (WIDE,), 17, tmp_path)


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
