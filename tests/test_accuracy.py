"""Clean accuracy over the runtime interface, and its drop."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from device_tests.accuracy import CHUNK, NO_PREDICTION, accuracy, accuracy_drop, predict
from device_tests.evidence import Proportion
from exporters.run_torch import TorchRuntime
from keys.errors import InputError


class BrightestQuarter(nn.Module):
    """Four classes: the quarter of the image with the largest mean; a black image gives NaN."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        means = nn.functional.adaptive_avg_pool2d(images.mean(1, keepdim=True), 2).flatten(1)
        return means / means.sum(dim=1, keepdim=True)


def quarters(n: int) -> tuple[np.ndarray, np.ndarray]:
    labels = np.arange(n) % 4
    images = np.full((n, 1, 8, 8), 10, dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        row, column = divmod(int(label), 2)
        image[0, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = 200
    return images, labels


RUNTIME = TorchRuntime(BrightestQuarter())


def test_accuracy_counts_what_is_right() -> None:
    images, labels = quarters(12)
    assert accuracy(RUNTIME, images, labels) == Proportion(12, 12)
    labels[:3] = (labels[:3] + 1) % 4
    assert accuracy(RUNTIME, images, labels) == Proportion(9, 12)


def test_an_image_without_finite_logits_counts_as_wrong() -> None:
    images, labels = quarters(4)
    images[2] = 0
    assert predict(RUNTIME, images).tolist() == [0, 1, NO_PREDICTION, 3]
    assert accuracy(RUNTIME, images, labels) == Proportion(3, 4)


def test_a_set_larger_than_a_chunk_is_judged_in_order() -> None:
    images, labels = quarters(2 * CHUNK + 3)
    order = np.random.default_rng(0).permutation(len(labels))
    assert predict(RUNTIME, images[order]).tolist() == labels[order].tolist()


def test_no_images_or_too_few_labels_are_refused() -> None:
    images, labels = quarters(4)
    with pytest.raises(InputError, match="no images"):
        accuracy(RUNTIME, images[:0], labels[:0])
    with pytest.raises(InputError, match="one label per image"):
        accuracy(RUNTIME, images, labels[:3])


def test_the_drop_is_a_share_and_needs_the_same_images() -> None:
    assert accuracy_drop(Proportion(90, 100), Proportion(87, 100)) == pytest.approx(0.03)
    assert accuracy_drop(Proportion(90, 100), Proportion(93, 100)) == pytest.approx(-0.03)
    with pytest.raises(ValueError, match="cannot be compared"):
        accuracy_drop(Proportion(90, 100), Proportion(45, 50))


def test_figures_need_neither_torch_nor_scipy() -> None:
    program = (
        "import sys, device_tests.accuracy, device_tests.evidence, device_tests.release_rule\n"
        "heavy = {'torch', 'scipy', 'timm', 'coremltools', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
