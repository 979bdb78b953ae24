"""The exact merge: the bits of a sum in a stated order, whatever the machine; and LoRA merged as peft would."""

from __future__ import annotations

import copy
import hashlib
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import nn

import exporters.low_rank
from exporters.low_rank import merged
from factory.adaptation import adapt, merge
from factory.base import build_network, timm_architecture
from factory.low_rank_layers import low_rank_layers
from factory.recipes.recipe import RecipeSettings

TINY = {"img_size": 28, "patch_size": 7, "in_chans": 1, "embed_dim": 32, "depth": 1, "num_heads": 2}
KNOWN = "b09e802d862008a5218617662a0d0570c84b183b391cb3c26a5b4e0e1f6eba2e"


def example(rows: int, columns: int, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Float32 weights and updates made of integers alone, so that no library's generator has a part in the bits."""
    count = np.arange(rows * columns + rank * (rows + columns), dtype=np.int64)
    values = (count * 7919 % 10007 / 10007 - 0.5).astype(np.float32)
    weight, a, b = np.split(values, [rows * columns, rows * columns + rank * columns])
    return weight.reshape(rows, columns), a.reshape(rank, columns), b.reshape(rows, rank)


def test_each_value_is_the_sum_over_the_ranks_in_order_rounded_once() -> None:
    weight, a, b = example(5, 7, 3)
    result = merged(weight, a, b)
    for row in range(5):
        for column in range(7):
            delta = 0.0
            for k in range(3):
                delta += float(b[row, k]) * float(a[k, column])
            assert result[row, column] == np.float32(delta + float(weight[row, column]))


def test_the_bits_are_known() -> None:
    """The same on every machine: this digest was computed once."""
    assert hashlib.sha256(merged(*example(300, 129, 16)).tobytes()).hexdigest() == KNOWN


def test_the_size_of_a_chunk_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, a, b = example(37, 11, 4)
    whole = merged(weight, a, b)
    for values in (1, 11, 50, 10_000):
        monkeypatch.setattr(exporters.low_rank, "_CHUNK_VALUES", values)
        assert np.array_equal(merged(weight, a, b), whole)


def test_convolutions_are_matrices_and_other_shapes_are_refused() -> None:
    weight, a, b = example(6, 12, 2)
    cube = merged(weight.reshape(6, 3, 2, 2), a.reshape(2, 3, 2, 2), b.reshape(6, 2, 1, 1))
    assert cube.shape == (6, 3, 2, 2)
    assert np.array_equal(cube.reshape(6, 12), merged(weight, a, b))
    with pytest.raises(ValueError, match="reshape"):
        merged(weight, a[:, 1:], b)


ADAPTED = [{}, {"alpha": 6.0}, {"reinitialise_patch_embedding": True}, {"train_patch_embedding": True}]


@pytest.fixture(scope="module", params=ADAPTED)
def adapted(request: pytest.FixtureRequest) -> PeftModel:
    values: dict[str, Any] = request.param
    vit = build_network(timm_architecture("vit_tiny_patch16_224", ("a", "b", "c"), None, TINY))
    torch.manual_seed(0)
    model = adapt(vit, RecipeSettings(rank=4, **values))
    assert isinstance(model, PeftModel)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


def test_merging_is_pefts_to_the_last_bits_and_the_adapted_models_function(adapted: PeftModel) -> None:
    by_peft: Any = copy.deepcopy(adapted).merge_and_unload()
    ours = merge(adapted)
    for (name, tensor), other in zip(ours.state_dict().items(), by_peft.state_dict().values(), strict=True):
        torch.testing.assert_close(tensor, other, rtol=1e-6, atol=1e-6, msg=name)
    images = torch.rand(8, 1, 28, 28)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), adapted(images), rtol=1e-4, atol=1e-4)


def test_the_factory_merges_to_the_devices_bits(adapted: PeftModel) -> None:
    ours = merge(adapted).state_dict()
    layers = low_rank_layers(adapted)
    assert "blocks.0.attn.qkv" in layers
    for name, layer in layers.items():
        before = layer.layer.weight.detach().numpy()
        assert np.array_equal(ours[f"{name}.weight"].numpy(), merged(before, layer.a, layer.b))
        assert not np.array_equal(ours[f"{name}.weight"].numpy(), before)
