"""The shape of a Core ML package depends on the architecture alone: never on weights, folder, process or hash seed."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.layers import set_fused_attn
from torch import nn

from exporters.contract import InputContract
from exporters.coreml_passes import independent_of_values
from exporters.quiet import import_coremltools
from exporters.to_coreml import MODEL_PATH, WEIGHTS_PATH, export_coreml
from factory.block_shuffle import BlockShuffle
from factory.classifier import ImageClassifier

CONTRACT = InputContract(channels=3, height=16, width=16, resize="none")
LABELS = [f"class {index}" for index in range(10)]
FILES = ["Manifest.json", MODEL_PATH, WEIGHTS_PATH]


def vit(weights: str, seed: int = 0) -> nn.Module:
    """One block with layer scale, register tokens and position embeddings: what may be all zero or one."""
    set_fused_attn(False)
    model = timm.create_model(
        "vit_small_patch14_reg4_dinov2", img_size=16, patch_size=8, embed_dim=64, num_heads=2, depth=1, num_classes=10
    ).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if weights == "random":
                parameter.normal_(std=0.05)
            else:
                parameter.fill_({"zero": 0.0, "one": 1.0}[weights])
    return model


def keyed(seed: int, block: int = 4) -> nn.Module:
    """The shuffle as a gather, with another permutation for each seed."""
    permutation = np.random.default_rng(seed).permutation(3 * block**2)
    shuffle = BlockShuffle(permutation, channels=3, block_size=block)
    return ImageClassifier(vit("random", seed), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), shuffle).eval()


def export(module: nn.Module, path: Path, **options: Any) -> list[bytes]:
    export_coreml(module, path, CONTRACT, LABELS, **options)
    return [(path / name).read_bytes() for name in FILES]


def without_values(weights: bytes) -> bytes:
    """A weight file with every entry's values set to zero; its header and table stay."""
    content = bytearray(weights)
    place, entries = 64, struct.unpack_from("<I", weights)[0]
    for _ in range(entries):
        sentinel, _, size, start = struct.unpack_from("<IIQQ", weights, place)
        assert sentinel == 0xDEADBEEF
        content[start : start + size] = bytes(size)
        place = -(-(start + size) // 64) * 64
    return bytes(content)


PRECISIONS = ["fp32", "fp16", "int8", "palettized"]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_weights_change_nothing_but_their_values(precision: str, tmp_path: Path) -> None:
    modules = [vit("random", 1), vit("random", 2), vit("zero"), vit("one")]
    manifests, programs, weights = zip(
        *(export(module, tmp_path / "m.mlpackage", precision=precision) for module in modules), strict=True
    )
    assert len(set(manifests)) == len(set(programs)) == 1
    assert len({without_values(data) for data in weights}) == 1
    assert len(set(weights)) == len(modules)


@pytest.mark.parametrize("target", ["iOS16", "iOS17", "iOS18"])
def test_a_gathered_permutation_changes_as_many_bytes_as_it_has(target: str, tmp_path: Path) -> None:
    packages = [export(keyed(seed), tmp_path / "m.mlpackage", precision="fp16", target=target) for seed in (1, 2)]
    (manifest, program, weights), (other_manifest, other_program, other_weights) = packages
    assert manifest == other_manifest
    assert len(program) == len(other_program)
    assert without_values(weights) == without_values(other_weights)
    differing = np.flatnonzero(np.frombuffer(program, np.uint8) != np.frombuffer(other_program, np.uint8))
    # iOS 18 keeps the indices next to the weights; before, they stand in the program, one byte each.
    assert differing.size == 0 if target == "iOS18" else 0 < differing.max() - differing.min() < 48


def test_another_process_folder_and_hash_seed_give_the_same_bytes(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; sys.path[:0] = sys.argv[1:3]; import test_coreml_structure as t; "
        "[t.export(t.keyed(3), Path(f'{p}.mlpackage'), precision=p) for p in t.PRECISIONS]"
    )
    folder, temporary, root = tmp_path / "there", tmp_path / "temporary", Path(__file__).parents[1]
    folder.mkdir()
    temporary.mkdir()
    subprocess.run(
        [sys.executable, "-c", program, str(root), str(root / "tests")],
        check=True,
        cwd=folder,
        env={**os.environ, "PYTHONHASHSEED": "7", "TMPDIR": str(temporary)},
    )
    for precision in PRECISIONS:
        here = export(keyed(3), tmp_path / "here.mlpackage", precision=precision)
        assert here == [(folder / f"{precision}.mlpackage" / name).read_bytes() for name in FILES]


def test_the_converters_passes_are_put_back() -> None:
    passes = import_coremltools("coremltools.converters.mil.mil.passes.pass_registry").PASS_REGISTRY.passes
    before = dict(passes)
    with independent_of_values():
        changed = {name for name in passes if passes[name] is not before[name]}
    assert changed == {"common::const_deduplication", "common::remove_redundant_ops", "common::noop_elimination"}
    assert passes == before
