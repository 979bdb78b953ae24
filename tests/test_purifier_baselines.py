"""JPEG, total variation, PSNR and SSIM: against literal versions, and by properties that they must have."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from device_tests.defences.jpeg import JpegCompression
from device_tests.defences.total_variation import TotalVariation
from factory.purifier.likeness import psnr, ssim
from keys.errors import InputError


@pytest.fixture(scope="module")
def photos(sample_images: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    return sample_images[0][:6, None]


@pytest.fixture(scope="module")
def floats(photos: np.ndarray) -> Tensor:
    return torch.from_numpy(photos).float() / 255


def noisy(images: Tensor, size: float) -> Tensor:
    return (images + size * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)


def total_variation(images: Tensor, weight: float, iterations: int = 100) -> Tensor:
    return TotalVariation(weight, iterations)(images)


def variation(image: np.ndarray) -> float:
    total = 0.0
    height, width = image.shape
    for row in range(height):
        for column in range(width):
            down = image[row + 1, column] - image[row, column] if row + 1 < height else 0.0
            right = image[row, column + 1] - image[row, column] if column + 1 < width else 0.0
            total += math.hypot(down, right)
    return total


def energy(image: np.ndarray, given: np.ndarray, weight: float) -> float:
    return float(((image - given) ** 2).sum()) / 2 + weight * variation(image)


def literal_chambolle(given: np.ndarray, weight: float, iterations: int) -> np.ndarray:
    """The paper's fixed point, pixel by pixel."""
    height, width = given.shape
    p = np.zeros((2, height, width))

    def divergence(row: int, column: int) -> float:
        down = p[0, row, column] if row + 1 < height else 0.0
        up = p[0, row - 1, column] if row > 0 else 0.0
        right = p[1, row, column] if column + 1 < width else 0.0
        left = p[1, row, column - 1] if column > 0 else 0.0
        return down - up + right - left

    for _ in range(iterations):
        inner = np.array([[divergence(r, c) - given[r, c] / weight for c in range(width)] for r in range(height)])
        for r in range(height):
            for c in range(width):
                down = inner[r + 1, c] - inner[r, c] if r + 1 < height else 0.0
                right = inner[r, c + 1] - inner[r, c] if c + 1 < width else 0.0
                size = 1 + 0.125 * math.hypot(down, right)
                p[0, r, c] = (p[0, r, c] + 0.125 * down) / size
                p[1, r, c] = (p[1, r, c] + 0.125 * right) / size
    return np.array([[given[r, c] - weight * divergence(r, c) for c in range(width)] for r in range(height)])


def test_total_variation_is_chambolles_projection(floats: Tensor) -> None:
    given = noisy(floats[:1, :, 8:17, 8:15], 0.2).double()
    found = total_variation(given, 0.15, iterations=20)[0, 0].numpy()
    np.testing.assert_allclose(found, literal_chambolle(given[0, 0].numpy(), 0.15, 20), atol=1e-12)


def test_total_variation_minimises_its_energy(floats: Tensor) -> None:
    given = noisy(floats[:1], 0.1).double()
    found = total_variation(given, 0.1, iterations=400)
    best = energy(found[0, 0].numpy(), given[0, 0].numpy(), 0.1)
    generator = torch.Generator().manual_seed(1)
    for size in (0.003, 0.01, 0.03):
        for _ in range(5):
            other = found + size * torch.randn(found.shape, generator=generator, dtype=torch.float64)
            assert energy(other[0, 0].numpy(), given[0, 0].numpy(), 0.1) > best
    assert best < energy(given[0, 0].numpy(), given[0, 0].numpy(), 0.1)


def test_total_variation_keeps_means_and_flat_images_and_removes_noise(floats: Tensor) -> None:
    flat = torch.full((1, 3, 12, 12), 0.4)
    torch.testing.assert_close(total_variation(flat, 0.3), flat)
    given = noisy(floats, 0.1)
    found = total_variation(given, 0.03)
    torch.testing.assert_close(found.mean(dim=(1, 2, 3)), given.mean(dim=(1, 2, 3)))
    assert (psnr(found, floats) > psnr(given, floats)).all()
    torch.testing.assert_close(total_variation(given, 1e-6), given, atol=1e-5, rtol=0)


def test_psnr_is_its_formula(floats: Tensor) -> None:
    shifted = floats.clone()
    shifted[0] = (floats[0] * 0) + 0.5
    reference = floats.clone()
    reference[0] = 0.4
    assert psnr(shifted, reference)[0] == pytest.approx(20.0, abs=1e-4)  # a tenth everywhere
    assert torch.isinf(psnr(floats, floats)).all()
    assert (psnr(noisy(floats, 0.05), floats) > psnr(noisy(floats, 0.1), floats)).all()


def literal_ssim(x: np.ndarray, y: np.ndarray) -> float:
    window = np.array([[math.exp(-((r - 5) ** 2 + (c - 5) ** 2) / (2 * 1.5**2)) for c in range(11)] for r in range(11)])
    window /= window.sum()
    values: list[float] = []
    for row in range(x.shape[0] - 10):
        for column in range(x.shape[1] - 10):
            a, b = x[row : row + 11, column : column + 11], y[row : row + 11, column : column + 11]
            mean_a, mean_b = (window * a).sum(), (window * b).sum()
            var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
            cov = (window * (a - mean_a) * (b - mean_b)).sum()
            values.append(
                (2 * mean_a * mean_b + 1e-4) * (2 * cov + 9e-4)
                / ((mean_a**2 + mean_b**2 + 1e-4) * (var_a + var_b + 9e-4))
            )  # fmt: skip
    return float(np.mean(values))


def test_ssim_is_its_formula(floats: Tensor) -> None:
    other = noisy(floats, 0.1)
    found = ssim(floats, other)
    for index in range(2):
        expected = literal_ssim(floats[index, 0].double().numpy(), other[index, 0].double().numpy())
        assert found[index] == pytest.approx(expected, abs=1e-6)


def test_ssim_is_one_for_equal_images_symmetric_and_falls_with_noise(floats: Tensor) -> None:
    torch.testing.assert_close(ssim(floats, floats), torch.ones(len(floats)))
    low, high = noisy(floats, 0.05), noisy(floats, 0.2)
    torch.testing.assert_close(ssim(floats, low), ssim(low, floats))
    assert (ssim(floats, low) > ssim(floats, high)).all()
    dark, light = torch.full((1, 1, 12, 12), 0.2), torch.full((1, 1, 12, 12), 0.6)
    # Without variance only the first factor of eq. 13 is left.
    assert ssim(dark, light)[0] == pytest.approx((2 * 0.12 + 1e-4) / (0.04 + 0.36 + 1e-4), abs=1e-6)
    with pytest.raises(InputError, match="at least 11×11"):
        ssim(dark[..., :10], light[..., :10])


def test_jpeg_is_closer_at_higher_quality_and_keeps_the_shape(floats: Tensor) -> None:
    rgb = torch.cat([floats, floats.flip(2), floats.flip(3)], dim=1)
    for images in (floats, rgb):
        found = [JpegCompression(quality)(images) for quality in (10, 50, 95)]
        errors = [float((one - images).square().mean()) for one in found]
        assert all(one.shape == images.shape for one in found)
        assert errors[0] > errors[1] > errors[2] > 0
