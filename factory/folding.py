"""Bake the transform into the graph: folded into the patch embedding where that is exact, else kept as it is.

With the block size a divisor of the patch size, every patch is made of whole blocks. Shuffle, normalisation
and patch embedding are then one linear map of the patch, so permuting (and scaling) the columns of the
convolution's weight gives the same function at no run-time cost. Folding hides nothing: whoever holds the
weights can find the permutation by comparing them with the base.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from factory.adaptation import merge
from factory.block_shuffle import BlockShuffle
from factory.classifier import ImageClassifier
from factory.keyed_transforms.bit_flip import BitFlip
from factory.keyed_transforms.key_ensemble import DeviceClassifier, KeyEnsemble
from factory.vits import KeyedVit


def bake(model: DeviceClassifier) -> nn.Module:
    """A plain module for export, float N×C×H×W in [0, 1] to logits: merged, and folded where that is possible."""
    if isinstance(model, KeyEnsemble):
        return model.each(_bake)
    return _bake(model)


def _bake(model: nn.Module) -> nn.Module:
    assert isinstance(model, ImageClassifier)
    merged = ImageClassifier(
        merge(model.network), model.mean.flatten().tolist(), model.std.flatten().tolist(), model.transform
    )
    return (fold(merged) if can_fold(merged) else merged).eval()


def can_fold(model: ImageClassifier) -> bool:
    """Whether every patch consists of whole blocks, and patches neither overlap nor are padded."""
    assert isinstance(model.network, KeyedVit)
    projection = _projection(model.network)
    tiles = projection.stride == projection.kernel_size and projection.padding == (0, 0)
    transform, side = model.transform, projection.kernel_size[0]
    affine = isinstance(transform, BlockShuffle | BitFlip) and side % transform.block_size == 0
    return tiles and (transform is None or affine)


def fold(model: ImageClassifier) -> KeyedVit:
    """Fold shuffle or bit flips and normalisation into the patch embedding of a merged model; computed in float64."""
    assert isinstance(model.network, KeyedVit)
    assert can_fold(model)
    vit = copy.deepcopy(model.network)
    projection = _projection(vit)
    weight = projection.weight.detach().double()
    bias = torch.zeros(weight.shape[0], dtype=torch.float64) if projection.bias is None else projection.bias.double()
    scaled = weight / model.std.double()
    folded_bias = bias - (scaled * model.mean.double()).sum((1, 2, 3))
    shuffle = model.transform
    if isinstance(shuffle, BitFlip):
        scaled, folded_bias = shuffle.folded(scaled, folded_bias)
        shuffle = shuffle.shuffle
    folded = _unshuffle(scaled, shuffle) if isinstance(shuffle, BlockShuffle) else scaled
    replacement = nn.Conv2d(
        projection.in_channels, projection.out_channels, projection.kernel_size, projection.stride  # type: ignore[arg-type]
    ).to(projection.weight.dtype)  # fmt: skip
    with torch.no_grad():
        replacement.weight.copy_(folded)
        assert replacement.bias is not None
        replacement.bias.copy_(folded_bias)
    replacement.requires_grad_(False)
    vit.patch_embed.proj = replacement
    return vit


def _projection(vit: KeyedVit) -> nn.Conv2d:
    assert isinstance(vit.patch_embed.proj, nn.Conv2d)
    return vit.patch_embed.proj


def _unshuffle(weight: Tensor, shuffle: BlockShuffle) -> Tensor:
    """Columns of ``weight`` D×C×P×P reordered so that it takes unshuffled patches.

    The shuffle gives out[j] = in[p[j]], so Σ_j w[j]·out[j] = Σ_i w[p⁻¹[i]]·in[i]: the inverse permutation.
    """
    inverse = torch.empty_like(shuffle.permutation)
    inverse[shuffle.permutation] = torch.arange(len(inverse))
    return BlockShuffle(inverse.numpy(), channels=shuffle.channels, block_size=shuffle.block_size)(weight)
