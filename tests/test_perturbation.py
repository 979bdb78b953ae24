"""Perturbation sets: what an attack may change, and the 8-bit images that lie inside."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from device_tests.images import from_8bit
from device_tests.perturbation import Norm, Perturbation
from keys.errors import InputError

LEVELS = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
EIGHT = Perturbation(Norm.LINF, 8 / 255)


def test_every_level_survives_and_torch_computes_the_same_floats() -> None:
    floats = from_8bit(LEVELS)
    assert np.array_equal(EIGHT.to_8bit(floats, LEVELS), LEVELS)
    assert np.array_equal(floats, (torch.from_numpy(LEVELS).to(torch.float32) / 255).numpy())


@pytest.mark.parametrize("levels", range(1, 256))
def test_a_whole_radius_is_reached_in_full(levels: int) -> None:
    ball = Perturbation(Norm.LINF, levels / 255)
    assert ball.radius == levels / 255
    assert Perturbation(Norm.LINF, float(np.float32(levels / 255))).radius == levels / 255
    # Rounding alone, before anything is clipped to the ball, stays inside it.
    edge = np.clip(from_8bit(LEVELS) + np.float32(levels / 255), 0, 1)
    free = Perturbation(Norm.LINF, 1.0).to_8bit(edge, LEVELS)
    assert (free.astype(int) - LEVELS).max() == levels
    assert np.array_equal(free, ball.to_8bit(edge, LEVELS))


ANY_SIZE = st.one_of(
    st.floats(1 / 255, 1.0).map(lambda size: Perturbation(Norm.LINF, size)),
    st.floats(1 / 255, 6.0).map(lambda size: Perturbation(Norm.L2, size)),
    st.integers(1, 30).map(lambda pixels: Perturbation(Norm.L0, float(pixels))),
)


@given(ANY_SIZE, st.integers(0, 2**32 - 1))
@settings(max_examples=80, deadline=None)
def test_any_candidate_is_brought_inside_any_set(perturbation: Perturbation, seed: int) -> None:
    generator = np.random.default_rng(seed)
    clean = generator.integers(0, 256, (3, 3, 5, 5), dtype=np.uint8)
    candidate = generator.uniform(-0.5, 1.5, clean.shape).astype(np.float32)
    made = perturbation.to_8bit(candidate, clean)
    assert made.dtype == np.uint8
    assert perturbation.contains(made, clean).all()
    difference = (made.astype(float) - clean) / 255
    sizes = {
        Norm.LINF: np.abs(difference).max(axis=(1, 2, 3)),
        Norm.L2: np.sqrt((difference**2).sum(axis=(1, 2, 3))),
        Norm.L0: (difference != 0).any(axis=1).sum(axis=(1, 2)),
    }
    assert (sizes[perturbation.norm] <= perturbation.size + 1e-8).all()


def test_an_l2_candidate_on_the_edge_keeps_almost_all_of_its_size() -> None:
    generator = np.random.default_rng(0)
    clean = generator.integers(60, 200, (20, 1, 28, 28), dtype=np.uint8)
    step = generator.normal(size=clean.shape)
    step *= 1.5 / np.sqrt((step**2).sum(axis=(1, 2, 3), keepdims=True))
    made = Perturbation(Norm.L2, 1.5).to_8bit(from_8bit(clean) + step.astype(np.float32), clean)
    size = np.sqrt((((made.astype(float) - clean) / 255) ** 2).sum(axis=(1, 2, 3)))
    assert (size <= 1.5).all()
    assert (size > 1.45).all()


def test_the_pixels_that_changed_most_are_kept() -> None:
    clean = np.full((1, 1, 3, 3), 100, dtype=np.uint8)
    moved = from_8bit(clean).copy()
    moved[0, 0, 0, 0], moved[0, 0, 1, 1], moved[0, 0, 2, 2] = 0.45, 0.9, 0.1
    made = Perturbation(Norm.L0, 2).to_8bit(moved, clean)
    assert np.argwhere(made[0, 0] != 100).tolist() == [[1, 1], [2, 2]]


def test_a_patch_is_one_square_anywhere() -> None:
    quarter = Perturbation(Norm.PATCH, 0.25)
    clean = np.zeros((1, 3, 8, 8), dtype=np.uint8)
    assert quarter.side(8, 8) == 4
    assert Perturbation(Norm.PATCH, 0.1).side(8, 8) == 2
    inside, outside = clean.copy(), clean.copy()
    inside[:, :, 3:7, 4:8] = 255
    outside[:, :, 3:8, 4:8] = 255
    assert quarter.contains(inside, clean).all()
    assert not quarter.contains(outside, clean).any()
    assert np.array_equal(quarter.to_8bit(from_8bit(inside), clean), inside)
    with pytest.raises(ValueError, match="more than one patch"):
        quarter.to_8bit(from_8bit(outside), clean)
    with pytest.raises(InputError, match="smaller than one pixel"):
        Perturbation(Norm.PATCH, 0.001).side(8, 8)


def test_values_that_are_not_finite_or_not_8bit_are_refused() -> None:
    broken = from_8bit(LEVELS)
    broken[0, 0, 3, 3] = np.nan
    with pytest.raises(InputError, match="not finite"):
        EIGHT.to_8bit(broken, LEVELS)
    with pytest.raises(InputError, match="8-bit"):
        from_8bit(LEVELS.astype(np.float32))


@pytest.mark.parametrize(
    "text",
    ["linf:0", "linf:0.5/255", "linf:-0.1", "linf:1.5", "linf:nan", "l2:0.001", "l0:1.5", "l0:0", "patch:1.1",
     "linf", "8/255", "l3:1", "linf:1/0", "patch:x"],
)  # fmt: skip
def test_a_size_that_reaches_nothing_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="perturbation"):
        Perturbation.parse(text)


@pytest.mark.parametrize("text", ["linf:8/255", "linf:0.06", "l2:0.5", "l0:16", "patch:0.25"])
def test_a_code_reads_back_as_the_same_value(text: str) -> None:
    perturbation = Perturbation.parse(text)
    assert Perturbation.parse(perturbation.code) == perturbation
