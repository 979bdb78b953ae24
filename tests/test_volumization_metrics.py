"""Metrics and orders of patches against plain NumPy, one patch at a time; never a value that is no number."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from factory.volumization.histograms import counts, joint_counts, levels
from factory.volumization.metrics import METRICS, measure
from factory.volumization.order import (
    ORDERS,
    ascending,
    check_order,
    metric_order,
    reference_index,
)
from keys.errors import InputError

DISTANCES = [name for name, metric in METRICS.items() if metric.distance]


def literal(name: str, patch: np.ndarray, reference: np.ndarray, bins: int) -> float:
    """A metric of two patches of 8-bit levels, written as its definition reads."""
    edges = np.linspace(0, 256, bins + 1)
    x, r = patch.reshape(-1), reference.reshape(-1)

    def entropy(found: np.ndarray) -> float:
        shares = found[found > 0] / found.sum()
        return float(-(shares * np.log(shares)).sum())

    alone = entropy(np.histogram(x, edges)[0])
    other = entropy(np.histogram(r, edges)[0])
    joint = entropy(np.histogram2d(x, r, (edges, edges))[0].reshape(-1))
    mse = float(np.square((x.astype(float) - r) / 255).mean())
    p, q = ((np.histogram(v, edges)[0] + 1) / (len(v) + bins) for v in (x, r))
    return {
        "entropy": alone,
        "joint-entropy": joint,
        "mutual-information": alone + other - joint,
        "kl": float((p * np.log(p / q)).sum()),
        "mse": mse,
        "psnr": 10 * math.log10(1 / max(mse, 0.5 / 255**2 / len(x))),
        "max-norm": float(np.abs(x.astype(float) - r).max()) / 255,
    }[name]


def eight_bit(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    # From a few values to many, so that entropies differ.
    spread = generator.integers(1, 256, (*shape[:2], 1, 1, 1))
    return (generator.integers(0, 2**16, shape) % spread).astype(np.uint8)


def as_floats(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).float() / 255


@pytest.mark.parametrize("bins", [2, 16, 256])
@pytest.mark.parametrize("name", METRICS)
def test_is_the_definition_patch_by_patch(name: str, bins: int) -> None:
    patches = eight_bit((3, 5, 2, 6, 4))
    reference = eight_bit((3, 1, 2, 6, 4), seed=1)[:, 0]
    found = measure(name, as_floats(patches), as_floats(reference), bins)
    expected = [[literal(name, patch, reference[b], bins) for patch in patches[b]] for b in range(3)]
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=2e-6)


def test_known_values() -> None:
    # Half of the values 0, half 255; a reference of zeros.
    patch = torch.tensor([0.0, 1.0, 0.0, 1.0]).reshape(1, 1, 1, 2, 2)
    zeros = torch.zeros(1, 1, 2, 2)
    expected = {
        "entropy": math.log(2),
        "joint-entropy": math.log(2),
        "mutual-information": 0,
        "mse": 0.5,
        "psnr": 10 * math.log10(2),
        "max-norm": 1,
        # (3/6) ln((3/6)/(5/6)) + (3/6) ln((3/6)/(1/6))
        "kl": 0.5 * math.log(3 / 5) + 0.5 * math.log(3),
    }
    assert set(expected) == set(METRICS)
    for name, value in expected.items():
        assert measure(name, patch, zeros, 2).item() == pytest.approx(value, abs=1e-6), name


def test_a_patch_shares_all_information_with_itself() -> None:
    patches = as_floats(eight_bit((2, 4, 1, 8, 8)))
    for place in range(4):
        reference = patches[:, place]
        entropy = measure("entropy", patches, reference)[:, place]
        torch.testing.assert_close(measure("mutual-information", patches, reference)[:, place], entropy)
        torch.testing.assert_close(measure("joint-entropy", patches, reference)[:, place], entropy)
        for name in ("kl", "mse", "max-norm"):
            assert measure(name, patches, reference)[:, place].eq(0).all(), name
        assert measure("psnr", patches, reference)[:, place].gt(60).all()


SHAPES = st.tuples(*(st.integers(1, high) for high in (2, 5, 3, 6, 6)))


@settings(max_examples=60, deadline=None)
@given(
    values=SHAPES.flatmap(
        lambda shape: hnp.arrays(
            np.float32, shape, elements=st.sampled_from([0.0, 0.1, 0.5, 1.0]) | st.floats(0, 1, width=32)
        )
    ),
    constant=st.booleans(),
    bins=st.sampled_from([2, 4, 16, 64, 256]),
)
def test_every_metric_is_finite_and_every_order_a_permutation(values: np.ndarray, constant: bool, bins: int) -> None:
    patches = torch.from_numpy(values)
    if constant:
        patches = patches[..., :1, :1].expand(patches.shape)
    size, number = values[0, 0].size, values.shape[1]
    for name in METRICS:
        found = measure(name, patches, patches[:, 0], bins)
        assert found.shape == values.shape[:2]
        assert torch.isfinite(found).all(), name
        order = metric_order(name, patches, bins)
        assert torch.equal(order.sort(1).values, torch.arange(number).expand(len(values), -1)), name
        assert order.dtype == torch.int64
    for name in ("entropy", "joint-entropy"):
        found = measure(name, patches, patches[:, 0], bins)
        assert found.min() > -1e-6
        assert found.max() < math.log(size) + 1e-6
    assert measure("mutual-information", patches, patches[:, 0], bins).min() > -1e-6
    assert measure("kl", patches, patches[:, 0], bins).min() > -1e-6


def test_all_256_levels_survive_float16() -> None:
    images = torch.arange(256).float().reshape(1, 1, 1, 16, 16) / 255
    half = (images.half() * torch.tensor(255).half() + 0.5).floor()
    assert torch.equal(half.int().flatten(), torch.arange(256, dtype=torch.int32))
    assert torch.equal(levels(images).flatten(), torch.arange(256.0))
    assert levels(torch.tensor([-1.0, 2.0]).reshape(1, 1, 1, 1, 2)).flatten().tolist() == [0, 255]


class Counted(torch.nn.Module):
    def forward(self, of: torch.Tensor, reference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return counts(of, 8), joint_counts(of, reference, 8)


def test_counting_by_comparisons_is_counting_by_addresses() -> None:
    generator = torch.Generator().manual_seed(0)
    of = torch.randint(0, 8, (3, 4, 30), generator=generator, dtype=torch.int32)
    reference = torch.randint(0, 8, (3, 1, 30), generator=generator, dtype=torch.int32)
    recorded = torch.export.export(Counted(), (of, reference)).module()
    assert "bincount" not in str(recorded.graph)
    expected = Counted()(of, reference)
    assert expected[0].sum().item() == expected[1].sum().item() == 3 * 4 * 30
    for found, wanted in zip(recorded(of, reference), expected, strict=True):
        assert torch.equal(found, wanted)


@settings(max_examples=50, deadline=None)
@given(hnp.arrays(np.int32, st.tuples(st.integers(1, 3), st.integers(1, 40)), elements=st.integers(-3, 3)))
def test_sorts_as_a_stable_sort(scores: np.ndarray) -> None:
    assert np.array_equal(ascending(torch.from_numpy(scores)).numpy(), scores.argsort(axis=1, kind="stable"))


def test_sorts_scores_as_far_apart_as_int32() -> None:
    scores = torch.tensor([[2**31 - 1, -(2**31), 0, 2**31 - 1]], dtype=torch.int32)
    assert ascending(scores).tolist() == [[1, 2, 0, 3]]


@pytest.mark.parametrize("name", METRICS)
def test_orders_by_the_metric_against_the_patch_of_the_lowest_entropy(name: str) -> None:
    patches = as_floats(eight_bit((4, 9, 1, 7, 7), seed=3))
    entropies = measure("entropy", patches, patches[:, 0])
    lowest = entropies.argmin(1)
    assert torch.equal(reference_index(patches)[:, 0], lowest)
    found = measure(name, patches, patches[torch.arange(4), lowest])
    ranked = found.gather(1, metric_order(name, patches))
    assert (ranked.diff(dim=1) >= 0).all()
    if METRICS[name].distance:
        other = metric_order(name, patches, reference=patches[:, 5])
        ranked = measure(name, patches, patches[:, 5]).gather(1, other)
        assert (ranked.diff(dim=1) >= 0).all()


def test_constant_patches_keep_their_order() -> None:
    patches = torch.full((2, 6, 1, 4, 4), 0.25)
    for name in METRICS:
        assert metric_order(name, patches).tolist() == [list(range(6))] * 2


def test_a_permuted_histogram_is_a_tie() -> None:
    # The same counts in other cells: floats added in another order would decide, whole numbers do not.
    amounts = np.array([1, 2, 4, 5, 7, 11, 13, 21])
    generator = np.random.default_rng(0)
    rows = [np.repeat(generator.permutation(16)[:8] * 16, amounts) for _ in range(50)]
    patches = as_floats(np.array(rows, np.uint8).reshape(1, 50, 1, 8, 8))
    assert metric_order("entropy", patches).tolist() == [list(range(50))]


def test_the_orders_are_the_metrics_the_key_and_none() -> None:
    assert set(ORDERS) == {*METRICS, "key", "raster"}


@pytest.mark.parametrize("bins", [0, 1, 3, 10, 512])
def test_refuses_bins_that_cut_levels(bins: int) -> None:
    patches = torch.zeros(1, 2, 1, 2, 2)
    for name in METRICS:
        with pytest.raises(InputError, match="bins"):
            measure(name, patches, patches[:, 0], bins)


def test_refuses_what_it_cannot_measure() -> None:
    patches = torch.zeros(1, 2, 1, 2, 2)
    with pytest.raises(InputError, match="no metric 'ssim'"):
        measure("ssim", patches, patches[:, 0])
    with pytest.raises(InputError, match="no metric 'raster'"):
        metric_order("raster", patches)
    with pytest.raises(InputError, match="reference"):
        measure("mse", patches, patches)
    with pytest.raises(InputError, match="too large"):
        measure("mse", torch.zeros(1, 1, 3, 128, 128), torch.zeros(1, 3, 128, 128))
    with pytest.raises(InputError, match="no order 'ssim'"):
        check_order("ssim")


def test_the_largest_patch_does_not_overflow() -> None:
    patches = torch.stack([torch.zeros(2, 128, 128), torch.ones(2, 128, 128)])[None]
    found = {name: measure(name, patches, patches[:, 0]) for name in DISTANCES}
    assert found["mse"].tolist() == [[0, 1]]
    assert found["max-norm"].tolist() == [[0, 1]]
    assert found["psnr"][0, 1] == 0
    # The larger the patch, the fewer digits int32 leaves for its logarithms.
    assert found["kl"][0, 1] == pytest.approx(literal("kl", np.full(2**15, 255), np.zeros(2**15), 16), abs=1e-3)
