"""Kinds of Vision Transformer for every target, with and without fused attention: the evaluator against torch."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.layers import SwiGLUPacked, set_fused_attn
from torch import nn

import exporters.mil
from exporters.mil.evaluator import Evaluator
from exporters.mil.ops import OPERATORS
from exporters.mil.program import read_program
from exporters.parity import COREML_FP16, compare
from exporters.quiet import import_coremltools, quiet

# Closer than the limit for Core ML packages, which leaves room for what coremltools does to an RMS norm.
LARGEST_FP32 = 5e-5
SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 7}


@dataclass(frozen=True)
class Kind:
    name: str
    model: str
    options: dict[str, Any] = field(default_factory=dict)


KINDS = [
    Kind("vit", "vit_tiny_patch16_224"),
    Kind("average pooling", "vit_tiny_patch16_224", {"global_pool": "avg", "class_token": False}),
    Kind("attention pooling", "vit_tiny_patch16_224", {"global_pool": "map", "class_token": False}),
    Kind("q/k norm", "vit_tiny_patch16_224", {"qk_norm": True}),
    Kind("rms norm", "vit_tiny_patch16_224", {"norm_layer": "rmsnorm"}),
    Kind("swiglu", "vit_tiny_patch16_224", {"mlp_layer": SwiGLUPacked}),
    Kind("deit", "deit_tiny_patch16_224"),
    Kind("deit, distilled", "deit_tiny_distilled_patch16_224"),
    Kind("deit3", "deit3_small_patch16_224"),
    Kind("eva02", "eva02_tiny_patch14_224"),
    Kind("beit", "beit_base_patch16_224"),
    Kind("beitv2", "beitv2_base_patch16_224"),
    Kind("dinov2, registers", "vit_small_patch14_reg4_dinov2"),
    Kind("dinov3", "vit_small_patch16_dinov3"),
]
# Every kind for the oldest and the newest target, and between them each difference once.
RUNS = [
    *((kind, 16, False, "fp32") for kind in KINDS),
    *((kind, 18, True, "fp16") for kind in KINDS),
    *((kind, 17, False, "fp16") for kind in KINDS if kind.name in ("vit", "eva02", "rms norm")),
    *((kind, 18, False, "fp32") for kind in KINDS if kind.name in ("beit", "swiglu")),
    *((kind, 18, True, "fp32") for kind in KINDS if kind.name in ("vit", "dinov2, registers", "q/k norm")),
]


@pytest.fixture(autouse=True)
def plain_attention_after_each_test() -> Iterator[None]:
    yield
    set_fused_attn(False)


def module_of(kind: Kind, fused: bool) -> nn.Module:
    set_fused_attn(fused)
    torch.manual_seed(0)
    module = timm.create_model(kind.model, pretrained=False, **SIZES, **kind.options).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            # Heads and layer scales start at almost nothing, which would hide all that comes before them.
            parameter += 0.1 * torch.randn(parameter.shape)
    return module


@pytest.mark.parametrize(
    ("kind", "target", "fused", "precision"),
    [pytest.param(*run, id=f"{run[0].name}, iOS {run[1]}, {'fused, ' * run[2]}{run[3]}") for run in RUNS],
)
def test_agrees_with_torch(kind: Kind, target: int, fused: bool, precision: str, tmp_path: Path) -> None:
    module = module_of(kind, fused)
    ct = import_coremltools()
    with quiet(), torch.no_grad():
        model = ct.convert(
            torch.jit.trace(module, torch.zeros(1, 3, 32, 32), check_trace=False),
            inputs=[ct.TensorType(name="image", shape=(1, 3, 32, 32))],
            outputs=[ct.TensorType(name="logits", dtype=np.float32)],
            minimum_deployment_target=getattr(ct.target, f"iOS{target}"),
            compute_precision=ct.precision.FLOAT16 if precision == "fp16" else ct.precision.FLOAT32,
            skip_model_load=True,
        )
        model.save(str(tmp_path / "m.mlpackage"))
    program = read_program(tmp_path / "m.mlpackage")
    assert (program.target, program.precision) == (target, precision)
    if fused and kind.name == "vit":
        assert "scaled_dot_product_attention" in {operation.type for operation in program.operations}
    images = np.random.default_rng(1).random((6, 3, 32, 32)).astype(np.float32)
    with torch.no_grad():
        reference = module(torch.from_numpy(images)).numpy()
    evaluator = Evaluator(program)
    found = evaluator.run({"image": images[:, np.newaxis]})["logits"][:, 0]
    limit = COREML_FP16.difference if precision == "fp16" else LARGEST_FP32
    # Six images of noise: the class may change with the last bit, which is measured elsewhere.
    parity = compare(reference, found, limit, 0.0, runtime="evaluator", precision=precision)
    assert parity.passed, parity
    assert evaluator.first_overflow({"image": images[:1, np.newaxis]}) is None


# ---- the evaluator as a part of its own ---------------------------------------------------------------------

FOLDER = Path(exporters.mil.__file__).parent
ALLOWED = ("numpy", "scipy", "exporters.mil", "exporters.quiet", "keys.errors", *sorted(sys.stdlib_module_names))
MESSAGES = ("coremltools.proto.Model_pb2", "coremltools.proto.MIL_pb2", "google.protobuf.message")


def imported(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            found.add(str(node.module))
    return found


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_imports_nothing_but_numpy_and_coremltools_messages(path: Path) -> None:
    others = {name for name in imported(path) if not any(name == a or name.startswith(f"{a}.") for a in ALLOWED)}
    assert others == set()
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    asked = [call.args for call in calls if getattr(call.func, "id", "") == "import_coremltools"]
    assert all(len(args) == 1 and ast.literal_eval(args[0]) in MESSAGES for args in asked)


# ---- the guide ----------------------------------------------------------------------------------------------

GUIDE = FOLDER.parents[1] / "docs" / "core-ml-evaluator.md"


def test_the_guide_lists_the_operators_and_their_parameters() -> None:
    rows = [line.split("|")[1:-1] for line in GUIDE.read_text().splitlines() if line.startswith("| `")]
    listed = {
        name.strip(" `"): (int(since), set(parameters.replace("`", "").split(", ")))
        for cell, since, parameters, _ in rows
        for name in cell.split(",")
        for parameters in [parameters.strip()]
    }
    assert listed == {name: (operator.since, set(operator.parameters)) for name, operator in OPERATORS.items()}


def test_the_lines_of_the_guide_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = GUIDE.read_text()
    blocks = [part.split("```")[0] for part in text.split("```python\n")[1:]]
    assert len(blocks) >= 2
    ct = import_coremltools()
    with quiet(), torch.no_grad():
        model = ct.convert(
            torch.jit.trace(module_of(KINDS[0], False), torch.zeros(1, 3, 32, 32), check_trace=False),
            inputs=[ct.TensorType(name="image", shape=(1, 3, 32, 32))],
            outputs=[ct.TensorType(name="logits", dtype=np.float32)],
            minimum_deployment_target=ct.target.iOS17,
            skip_model_load=True,
        )
        model.save(str(tmp_path / "model.mlpackage"))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, str(GUIDE), "exec"), names)
    assert capsys.readouterr().out.splitlines() == ["17 fp16", "(32, 1, 7)", "None"]
