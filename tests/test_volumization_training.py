"""The patch aggregate loss and the syllabus; and that the two train a small network on real images."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from torch.nn import functional

from factory.data import SAMPLE
from factory.idx import find_idx, read_idx
from factory.volumization.metrics import METRICS, measure
from factory.volumization.networks import build_network
from factory.volumization.patch_loss import patch_aggregate_loss
from factory.volumization.syllabus import Syllabus
from factory.volumization.volumize import Volumize
from keys.errors import InputError


@functools.cache
def real(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = (find_idx(SAMPLE, f"train-{stem}") for stem in ("images-idx3-ubyte", "labels-idx1-ubyte"))
    assert images is not None
    assert labels is not None
    return torch.from_numpy(read_idx(images)[:count, np.newaxis].copy()), torch.from_numpy(
        read_idx(labels)[:count].astype(np.int64)
    )


def test_the_loss_is_the_sum_over_patches() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 5, generator=generator)
    labels = torch.tensor([0, 4, 2])
    each = [[functional.cross_entropy(logits[b, n], labels[b]) for n in range(4)] for b in range(3)]
    expected = torch.tensor(each).sum(1).mean()
    torch.testing.assert_close(patch_aggregate_loss(logits, labels), expected)
    # With one patch it is the cross-entropy that a plain network is trained with.
    torch.testing.assert_close(
        patch_aggregate_loss(logits[:, :1], labels), functional.cross_entropy(logits[:, 0], labels)
    )


def test_the_loss_refuses_other_shapes() -> None:
    with pytest.raises(InputError, match="patch aggregate loss"):
        patch_aggregate_loss(torch.zeros(3, 5), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(InputError, match="patch aggregate loss"):
        patch_aggregate_loss(torch.zeros(3, 4, 5), torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize("metric", METRICS)
def test_a_batch_goes_from_low_scores_to_high(metric: str) -> None:
    images, _ = real(40)
    order = Syllabus(metric, 4).order(images)
    assert sorted(order.tolist()) == list(range(40))
    samples = images.unsqueeze(0) / 255
    lowest = measure("entropy", samples, samples[:, 0])[0].argmin()
    scores = measure(metric, samples, samples[:, lowest])[0]
    assert (scores[order].diff() >= 0).all()
    assert not torch.equal(order, torch.arange(40))


@pytest.mark.parametrize(("count", "sizes"), [(40, [10] * 4), (10, [3, 3, 2, 2]), (2, [1, 1])])
def test_a_batch_is_cut_into_parts_that_hold_every_sample_once(count: int, sizes: list[int]) -> None:
    images, _ = real(count)
    syllabus = Syllabus("entropy", 4)
    parts = syllabus.parts(images)
    assert [len(part) for part in parts] == sizes
    assert torch.equal(torch.cat(parts), syllabus.order(images))


def test_the_control_takes_samples_as_they_come() -> None:
    images, _ = real(10)
    assert torch.cat(Syllabus("raster", 3).parts(images)).tolist() == list(range(10))


def test_one_part_gives_the_gradient_of_the_unordered_batch() -> None:
    images, labels = real(20)
    network = build_network("vgg3d", channels=1, patches=4, side=14, classes=10, width=4)
    volumes = Volumize(14)(images / 255)
    gradients = []
    for metric in ("entropy", "raster"):
        (part,) = Syllabus(metric, 1).parts(images)
        network.zero_grad()
        patch_aggregate_loss(network.patch_logits(volumes[part]), labels[part]).backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-5)


def test_refuses_a_syllabus_that_is_none() -> None:
    with pytest.raises(InputError, match="not by a key"):
        Syllabus("key", 2)
    with pytest.raises(InputError, match="no order 'hardness'"):
        Syllabus("hardness", 2)
    with pytest.raises(InputError, match="one part"):
        Syllabus("entropy", 0)
    with pytest.raises(InputError, match="bins"):
        Syllabus("entropy", 2, bins=7)
    with pytest.raises(InputError, match="uint8"):
        Syllabus("entropy", 2).order(torch.zeros(4, 1, 8, 8))


def test_the_parts_together_learn_real_images() -> None:
    images, labels = real(300)
    torch.manual_seed(0)
    network = build_network("resnet3d", channels=1, patches=4, side=14, classes=10, width=4)
    volumize, syllabus = Volumize(14, "mutual-information"), Syllabus("entropy", 2)
    optimiser = torch.optim.AdamW(network.parameters(), lr=5e-3)
    for _ in range(6):
        for batch in torch.randperm(300).split(50):
            for part in syllabus.parts(images[batch]):
                chosen = batch[part]
                logits = network.patch_logits(volumize(images[chosen] / 255))
                loss = patch_aggregate_loss(logits, labels[chosen])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
    network.eval()
    with torch.no_grad():
        right = network(volumize(images / 255)).argmax(1) == labels
    # A guess is right for one in ten.
    assert right.float().mean() > 0.5
