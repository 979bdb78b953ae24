"""The evaluator's own float32 functions: float16 rounding exactly, the others against float64."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from exporters.mil.fast import erf, gelu, normalised, round_to_half, sigmoid, silu, softmax

HALVES = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
FINITE = np.sort(HALVES[np.isfinite(HALVES)].astype(np.float32))


def between() -> np.ndarray:
    """Every float16, the middle of every two neighbours, and the float32 next to each on both sides."""
    values = np.concatenate([FINITE, (FINITE[1:] + FINITE[:-1]) / 2])
    return np.concatenate([values, np.nextafter(values, np.float32(np.inf)), np.nextafter(values, np.float32(-np.inf))])


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("more", [[], [65520.0], [65519.99, -65519.99], [1e9, -np.inf], [np.nan]], ids=str)
def test_rounds_as_numpy_converts(more: list[float], in_place: bool) -> None:
    with np.errstate(over="ignore"):
        # Also what overflows only in the same piece as values that do not.
        values = np.concatenate([between(), np.array(more, np.float32)])
        expected = values.astype(np.float16).astype(np.float32)
        given = values.copy()
        found = round_to_half(given, in_place=in_place)
    np.testing.assert_array_equal(found, expected)
    assert (found is given) == in_place
    if not in_place:
        np.testing.assert_array_equal(given, values)


def test_rounds_what_is_not_contiguous() -> None:
    values = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    given = values.T
    found = round_to_half(given, in_place=False)
    np.testing.assert_array_equal(found, values.T.astype(np.float16).astype(np.float32))
    assert np.array_equal(given, values.T)


FUNCTIONS = [
    (erf, torch.erf, 1.5e-7),
    (gelu, torch.nn.functional.gelu, 1.5e-7),
    (sigmoid, torch.sigmoid, 1.5e-7),
    (silu, torch.nn.functional.silu, 1.5e-7),
]


@pytest.mark.parametrize(("function", "exact", "limit"), FUNCTIONS, ids=lambda value: getattr(value, "__name__", ""))
def test_agrees_with_float64(
    function: Callable[..., np.ndarray], exact: Callable[..., torch.Tensor], limit: float
) -> None:
    # More than one piece, an odd number of values.
    values = np.linspace(-12, 12, 200_001).astype(np.float32).reshape(3, -1)
    expected = exact(torch.from_numpy(values.astype(np.float64))).numpy()
    assert (np.abs(function(values) - expected) / np.maximum(1, np.abs(values))).max() < limit


@pytest.mark.parametrize("function", [row[0] for row in FUNCTIONS], ids=lambda value: value.__name__)
def test_the_ends_and_what_is_no_number(function: Callable[..., np.ndarray]) -> None:
    with np.errstate(all="ignore"):
        found = function(np.array([np.inf, np.nan, 1e30, 0], np.float32))
    limits = {"erf": (1, 1), "sigmoid": (1, 1)}.get(function.__name__, (np.inf, np.float32(1e30)))
    assert found[0] == limits[0]
    assert np.isnan(found[1])
    assert found[2] == limits[1]


def test_rows_of_any_length() -> None:
    generator = np.random.default_rng(0)
    for shape in ((1, 1), (3, 5, 1), (2, 40_001), (700, 197)):
        values = (30 * generator.normal(size=shape)).astype(np.float32)
        double = torch.from_numpy(values.astype(np.float64))
        np.testing.assert_allclose(softmax(values), double.softmax(-1).numpy(), rtol=1e-5, atol=1e-7)
        expected = torch.nn.functional.layer_norm(double, shape[-1:], eps=1e-6).numpy()
        np.testing.assert_allclose(normalised(values, np.float32(1e-6)), expected, rtol=1e-4, atol=1e-5)
