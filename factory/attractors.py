"""Attractors: patterns that the key picks, in frequencies that images hardly use, on which the model's answer hangs.

A search along the decision boundary that only sees a device's answers (HopSkipJump) follows the attractors of that
device long before it is near the boundary that all devices share, and ends in an image that means nothing to another
one. Different copies for different buyers are Zhang et al.'s idea (2021, with decoders that are trained); here an
attractor is one direction of the image, picked by the key, and trains nothing. For an image x in [0, 1] and carrier k,

    u_k = Σ_b s_kb ⟨v_k, x_b⟩,    logits += Σ_k gain · h(u_k / reach) a_k,    h(t) = t² to |t| = 1, then 2|t| − 1,

over blocks b, with a pattern v_k of one block, a sign s_kb for each block and a class a_k. v and s are scaled so that
u_k is the component of x along a direction of length 1, and ``reach`` is a distance in L2. The square leaves images as
they come nearly alone and has a slope everywhere else: a search must be led there from afar. So has the line behind
it, where a plain would stop attacks without bounds. ``reach`` is farther away than the corners of an L∞ ball of 8/255
(0.88 at 28 px), so that noise, and patterns made without the key, add little.

It hides nothing from whoever holds the weights: without the last term the model is what it was, and attackers who hold
a device and want to reach others attack it :func:`without_attractors`, which transfers best. Whoever knows of
attractors can keep a search out of these frequencies. And a device is weaker along its own: that is what they are for.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from scipy.fft import idctn
from torch import Tensor, nn
from torch.nn import functional

from factory.keyed_transforms.places import ATTRACTED_CLASSES, ATTRACTOR_SIGNS, keyed_half, keyed_order
from keys.derive import DeviceKey
from keys.errors import InputError

SHARE_OF_FREQUENCIES = 1 / 4
"""The highest frequencies of a block, of which carriers are made."""

SMALLEST_BLOCK = 4
"""The least M: of smaller blocks this share is two patterns or less."""

_FLOAT16_MAX = 65504


class Attractors(nn.Module):
    """Images N×C×H×W in [0, 1] to what is added to their logits, N×K.

    ``carriers``: float n×C×M×M, of length 1. ``signs``: float n×H/M×W/M, of length 1 / reach. ``aims``: float n×K, the
    gain at each carrier's class.
    """

    carriers: Tensor
    signs: Tensor
    aims: Tensor

    def __init__(self, carriers: np.ndarray, signs: np.ndarray, aims: np.ndarray) -> None:
        super().__init__()
        for name, values in (("carriers", carriers), ("signs", signs), ("aims", aims)):
            self.register_buffer(name, torch.from_numpy(values.astype(np.float32)))

    def forward(self, images: Tensor) -> Tensor:
        """What is added to the logits: N×K."""
        parts = functional.conv2d(images, self.carriers, stride=self.carriers.shape[2:])
        lengths = (parts * self.signs).sum((2, 3))
        near = lengths.clamp(-1, 1)
        # The product is h. Not as a product of matrices with the aims, which int8 formats would round.
        return ((near * (2 * lengths - near)).unsqueeze(2) * self.aims).sum(1)


class Attracted(nn.Module):
    """A model for images in [0, 1] with attractors, or the mean of several, beside it: the sum of their logits."""

    def __init__(self, model: nn.Module, attractors: nn.Module) -> None:
        super().__init__()
        self.model, self.attractors = model, attractors

    def forward(self, images: Tensor) -> Tensor:
        """Logits N×K of images N×C×H×W in [0, 1]."""
        return self.model(images) + self.attractors(images)


def without_attractors(model: nn.Module) -> nn.Module:
    """The trained model alone, as whoever holds a baked ``model`` can use it; one without attractors as it is."""
    if isinstance(model, Attracted):
        return model.model
    if any(isinstance(part, Attracted) for part in model.modules()):  # in each member of an ensemble of keys
        model = copy.deepcopy(model)
        for name, part in list(model.named_modules()):
            if isinstance(part, Attracted):
                model.set_submodule(name, part.model)
    return model


class LowPass(nn.Module):
    """A model as someone asks it who knows of attractors: images lose the frequencies that carriers are made of."""

    patterns: Tensor

    def __init__(self, model: nn.Module, channels: int, block_size: int) -> None:
        super().__init__()
        self.model = model
        patterns = torch.from_numpy(highest_frequencies(block_size).astype(np.float32)).unsqueeze(1)
        self.register_buffer("patterns", patterns.repeat(channels, 1, 1, 1))

    def filtered(self, images: Tensor) -> Tensor:
        """Images N×C×H×W in [0, 1] without the highest frequencies of each block, cut off at 0 and 1."""
        side, channels = self.patterns.shape[2], images.shape[1]
        parts = functional.conv2d(images, self.patterns, stride=side, groups=channels)
        return (images - functional.conv_transpose2d(parts, self.patterns, stride=side, groups=channels)).clamp(0, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Logits N×K of the filtered images."""
        return self.model(self.filtered(images))


def keyed_attractors(
    key: DeviceKey, shape: tuple[int, int, int], block_size: int, classes: int, *, count: int, reach: float,
    gain: float,
) -> Attractors:  # fmt: skip
    """The ``count`` attractors of ``key`` for images of ``shape`` (C, H, W), a multiple of ``block_size`` M.

    Every carrier is a sum of the highest frequencies of a block with signs that the key picks, as it picks the blocks'
    signs and the classes. Raises InputError for blocks of less than four pixels, and where so many carriers of one
    class, or so large a gain, would go beyond float16.
    """
    basis = highest_frequencies(block_size)
    channels, rows, columns = shape[0], shape[1] // block_size, shape[2] // block_size
    of_carrier, blocks = channels * len(basis), rows * columns
    signs = np.ones(count * (of_carrier + blocks))
    signs[keyed_half(key, len(signs), ATTRACTOR_SIGNS)] = -1
    mixing, over_blocks = np.split(signs, [count * of_carrier])
    carriers = np.einsum("ncf,fhw->nchw", mixing.reshape(count, channels, -1), basis) / np.sqrt(of_carrier)
    aims = np.zeros((count, classes))
    aims[np.arange(count), np.resize(keyed_order(key, classes, ATTRACTED_CLASSES), count)] = gain
    # An image of [0, 1] lies along a carrier by half the sum of its sizes at most: its values sum up to nothing.
    farthest = np.abs(carriers).sum((1, 2, 3)) * np.sqrt(blocks) / (2 * reach)
    most = float((np.maximum(2 * farthest - 1, 1) @ aims).max())
    if most > _FLOAT16_MAX / 2:
        raise InputError(
            f"{count} attractors with a gain of {gain:g} at {reach:g} may add {most:.2g} to a logit, which float16 "
            "does not hold; take fewer, a smaller gain or a larger reach."
        )
    return Attractors(carriers, over_blocks.reshape(count, rows, columns) / (np.sqrt(blocks) * reach), aims)


def highest_frequencies(size: int) -> np.ndarray:
    """Patterns F×M×M of the orthonormal cosine transform of a block with the largest sums of frequencies.

    Raises InputError for blocks of less than four pixels: a quarter of their frequencies is two patterns or less.
    """
    if size < SMALLEST_BLOCK:
        raise InputError(
            f"Attractors are made of high frequencies, of which blocks of {size} pixels have too few; take "
            f"{SMALLEST_BLOCK} or more."
        )
    places = sorted(np.ndindex(size, size), key=lambda place: (-sum(place), place))
    chosen = places[: int(SHARE_OF_FREQUENCIES * size**2)]
    patterns = []
    for place in chosen:
        spectrum = np.zeros((size, size))
        spectrum[place] = 1
        patterns.append(idctn(spectrum, norm="ortho"))
    return np.array(patterns)
