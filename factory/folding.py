"""Bake the transform into the graph: folded into the patch embedding where that is exact, else kept as it is.

Batch norms are folded into the convolutions before them, whatever becomes of the shuffle.

With the block size a divisor of the patch size, every patch is made of whole blocks. Shuffle, normalisation
and patch embedding are then one linear map of the patch, so permuting (and scaling) the columns of the
convolution's weight gives the same function at no run-time cost. Folding hides nothing: whoever holds the
weights can find the permutation by comparing them with the base.
"""

from __future__ import annotations

import copy
from collections import Counter

import torch
from torch import Tensor, fx, nn

from factory.adaptation import merge
from factory.attractors import Attracted
from factory.block_shuffle import BlockShuffle
from factory.classifier import ImageClassifier
from factory.keyed_transforms.bit_flip import BitFlip
from factory.keyed_transforms.key_ensemble import DeviceClassifier, KeyEnsemble
from factory.networks import embedding_convolution, patch_embedding


def bake(model: DeviceClassifier) -> nn.Module:
    """A plain module for export, float N×C×H×W in [0, 1] to logits: merged, and folded where that is possible."""
    if isinstance(model, KeyEnsemble):
        return model.each(_bake)
    return _bake(model)


def _bake(model: nn.Module) -> nn.Module:
    assert isinstance(model, ImageClassifier)
    network = fold_batch_norms(merge(model.network))
    merged = ImageClassifier(network, model.mean.flatten().tolist(), model.std.flatten().tolist(), model.transform)
    module = fold(merged) if can_fold(merged) else merged
    return (module if model.attractors is None else Attracted(module, model.attractors)).eval()


def can_fold(model: ImageClassifier) -> bool:
    """Whether every patch consists of whole blocks, and patches neither overlap nor are padded."""
    if patch_embedding(model.network) is None:
        return False
    convolution = embedding_convolution(model.network)
    tiles = convolution.stride == convolution.kernel_size and convolution.padding == (0, 0)
    transform, side = model.transform, convolution.kernel_size[0]
    affine = isinstance(transform, BlockShuffle | BitFlip) and side % transform.block_size == 0
    return tiles and (transform is None or affine)


def fold(model: ImageClassifier) -> nn.Module:
    """Fold shuffle or bit flips and normalisation into the patch embedding of a merged model; computed in float64."""
    assert can_fold(model)
    network = copy.deepcopy(model.network)
    convolution = embedding_convolution(network)
    weight = convolution.weight.detach().double()
    scaled = weight / model.std.double()
    folded_bias = _bias(convolution) - (scaled * model.mean.double()).sum((1, 2, 3))
    shuffle = model.transform
    if isinstance(shuffle, BitFlip):
        scaled, folded_bias = shuffle.folded(scaled, folded_bias)
        shuffle = shuffle.shuffle
    folded = _unshuffle(scaled, shuffle) if isinstance(shuffle, BlockShuffle) else scaled
    replacement = nn.Conv2d(
        convolution.in_channels, convolution.out_channels, convolution.kernel_size, convolution.stride  # type: ignore[arg-type]
    ).to(convolution.weight.dtype)  # fmt: skip
    with torch.no_grad():
        replacement.weight.copy_(folded)
        assert replacement.bias is not None
        replacement.bias.copy_(folded_bias)
    replacement.requires_grad_(False)
    name = patch_embedding(network)
    assert name is not None
    network.set_submodule(name, replacement)
    return network


def fold_batch_norms(network: nn.Module) -> nn.Module:
    """A copy in which every batch norm that directly follows a convolution is folded into it; computed in float64.

    Converters fold them, too, each in its own way, into tensors that are made of several others; after this there is
    nothing left for them to fold, and a fleet's template finds every tensor in their files. Norms behind anything else
    (ConvMixer has them behind activations) stay. ``network`` is in evaluation mode, and what comes out computes the
    same but for rounding; a network without such norms, or whose order of layers cannot be traced, comes back as it is.
    """
    pairs = _norms_behind_convolutions(network)
    if not pairs:
        return network
    folded = copy.deepcopy(network)
    for convolution_name, norm_name in pairs:
        convolution, norm = folded.get_submodule(convolution_name), folded.get_submodule(norm_name)
        assert isinstance(convolution, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        # Ioffe & Szegedy, arXiv 1502.03167, Algorithm 2, line 11.
        scale = (norm.running_var.double() + norm.eps).rsqrt()
        shift = -norm.running_mean.double() * scale
        if norm.affine:
            scale, shift = scale * norm.weight.detach().double(), shift * norm.weight.detach().double()
            shift = shift + norm.bias.detach().double()
        weight = convolution.weight.detach().double() * scale.view(-1, 1, 1, 1)
        bias = _bias(convolution) * scale + shift
        convolution.weight = nn.Parameter(weight.to(convolution.weight.dtype), requires_grad=False)
        convolution.bias = nn.Parameter(bias.to(convolution.weight.dtype), requires_grad=False)
        folded.set_submodule(norm_name, nn.Identity())
    return folded


class _Tracer(fx.Tracer):
    """Looks into modules that hold batch norms, and takes all others as they are."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether ``m`` is one step of the graph."""
        return isinstance(m, nn.BatchNorm2d) or not any(isinstance(part, nn.BatchNorm2d) for part in m.modules())


def _norms_behind_convolutions(network: nn.Module) -> list[tuple[str, str]]:
    """Names of convolutions and of the batch norms that take their output, and nobody else does."""
    if not any(type(module) is nn.BatchNorm2d for module in network.modules()):
        return []
    try:
        nodes = list(_Tracer().trace(network).nodes)
    except Exception:  # noqa: BLE001 – control flow that depends on values fails in as many ways as there are networks
        return []
    called = Counter(node.target for node in nodes if node.op == "call_module")
    pairs: list[tuple[str, str]] = []
    for node in nodes:
        if node.op != "call_module" or called[node.target] > 1:
            continue
        norm, before = network.get_submodule(str(node.target)), node.args[0] if node.args else None
        if type(norm) is not nn.BatchNorm2d or not norm.track_running_stats or not isinstance(before, fx.Node):
            continue
        if before.op != "call_module" or called[before.target] > 1 or len(before.users) > 1:
            continue
        if type(network.get_submodule(str(before.target))) is nn.Conv2d:
            pairs.append((str(before.target), str(node.target)))
    return pairs


def _bias(convolution: nn.Conv2d) -> Tensor:
    """The convolution's bias in float64, zeros where it has none."""
    if convolution.bias is None:
        return torch.zeros(convolution.out_channels, dtype=torch.float64)
    return convolution.bias.detach().double()


def _unshuffle(weight: Tensor, shuffle: BlockShuffle) -> Tensor:
    """Columns of ``weight`` D×C×P×P reordered so that it takes unshuffled patches.

    The shuffle gives out[j] = in[p[j]], so Σ_j w[j]·out[j] = Σ_i w[p⁻¹[i]]·in[i]: the inverse permutation.
    """
    inverse = torch.empty_like(shuffle.permutation)
    inverse[shuffle.permutation] = torch.arange(len(inverse))
    return BlockShuffle(inverse.numpy(), channels=shuffle.channels, block_size=shuffle.block_size)(weight)
