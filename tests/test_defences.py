"""Input defences: their parameters, their gradients, and what they do to clean images and to patches."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from device_tests.attacks.patch import pasted, places
from device_tests.defences.differences import forward_differences, lengths
from device_tests.defences.jpeg import JpegCompression
from device_tests.defences.local_gradient_smoothing import LocalGradientSmoothing
from device_tests.defences.total_variation import TotalVariation
from device_tests.images import from_8bit
from keys.errors import InputError

DEFENCES: list[Callable[[], nn.Module]] = [LocalGradientSmoothing, JpegCompression, TotalVariation]
every_defence = pytest.mark.parametrize("build", DEFENCES, ids=lambda build: build.__name__)


@pytest.fixture(scope="module")
def images(sample_images: tuple[np.ndarray, np.ndarray]) -> torch.Tensor:
    """Sixty-four real images, float N×1×28×28."""
    return torch.from_numpy(from_8bit(sample_images[0][:64, None]))


def variation(images: torch.Tensor) -> torch.Tensor:
    return lengths(*forward_differences(images)).sum(dim=(1, 2, 3))


@every_defence
@pytest.mark.parametrize("shape", [(2, 1, 28, 28), (2, 3, 32, 32), (1, 3, 9, 14), (1, 1, 3, 4)])
def test_images_keep_their_shape_and_range(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    out = build()(x)
    assert out.shape == x.shape
    assert out.dtype == torch.float32
    assert out.min() >= -1e-6
    assert out.max() <= 1 + 1e-6
    assert not torch.equal(out, x)


@every_defence
def test_a_gradient_comes_back_finite_even_where_an_image_is_flat(
    build: Callable[[], nn.Module], images: torch.Tensor
) -> None:
    flat = torch.full((1, 1, 28, 28), 0.5)
    x = torch.cat([images[:3], flat]).requires_grad_(True)
    build()(x).square().sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
    assert (x.grad[:3].flatten(1).abs().sum(dim=1) > 0).all()


@every_defence
def test_an_image_does_not_depend_on_its_batch(build: Callable[[], nn.Module], images: torch.Tensor) -> None:
    defence = build()
    together = defence(images[:5])
    assert torch.allclose(together, torch.cat([defence(image[None]) for image in images[:5]]), atol=1e-6)


def test_lgs_leaves_flat_images_alone_and_darkens_a_noisy_patch() -> None:
    flat = torch.full((1, 1, 32, 32), 0.6)
    defence = LocalGradientSmoothing()
    assert torch.equal(defence(flat), flat)
    noise = torch.randint(2, (1, 10, 10), generator=torch.Generator().manual_seed(0)).float()
    attacked = pasted(flat, noise, torch.tensor([[12, 9]]))
    out = defence(attacked)
    inside = torch.zeros(1, 1, 32, 32, dtype=torch.bool)
    inside[:, :, 7:27, 4:24] = True
    # Far from the patch nothing changes; inside it most of its light is gone.
    assert torch.equal(out[~inside], attacked[~inside])
    assert out[:, :, 12:21, 9:18].sum() < 0.35 * attacked[:, :, 12:21, 9:18].sum()


def test_lgs_by_hand() -> None:
    # One bright pixel: differences of 1 at it and before it, √2 where both are; windows of 2 without overlap.
    x = torch.zeros(1, 1, 4, 4)
    x[0, 0, 1, 1] = 1.0
    gradient = torch.zeros(4, 4)
    gradient[0, 1] = gradient[1, 0] = 1 / 2**0.5
    gradient[1, 1] = 1.0
    found = LocalGradientSmoothing(factor=0.4, threshold=0.6, window=2, overlap=0).suppressed(x)
    assert torch.allclose(found[0, 0], gradient)
    # The mean of that window is (2/√2 + 1) / 4 = 0.604: just above, and above a threshold of 0.61 no more.
    assert LocalGradientSmoothing(threshold=0.61, window=2, overlap=0).suppressed(x).abs().sum() == 0
    out = LocalGradientSmoothing(factor=0.4, threshold=0.6, window=2, overlap=0)(x)
    assert out[0, 0, 1, 1] == pytest.approx(0.6)


def test_a_window_over_the_edge_is_judged_by_the_pixels_it_has() -> None:
    # Five columns in windows of four: the second window has one column of its own, all of it gradient.
    x = torch.zeros(1, 1, 4, 5)
    x[:, :, ::2, 4] = 1.0
    active = LocalGradientSmoothing(factor=1, threshold=0.5, window=4, overlap=0)
    assert active.suppressed(x)[0, 0, :3, 4].min() == 1.0
    assert active.suppressed(x)[0, 0, :, :3].abs().sum() == 0


def test_lgs_without_a_factor_is_no_defence(images: torch.Tensor) -> None:
    assert torch.equal(LocalGradientSmoothing(factor=0)(images), images)
    strong, weak = (LocalGradientSmoothing(factor=factor)(images) for factor in (2.3, 0.5))
    assert (strong <= weak).all()
    assert strong.sum() < weak.sum() < images.sum()


def test_jpeg_is_pillows_own_and_its_gradient_the_identity(images: torch.Tensor) -> None:
    level = (images[0, 0] * 255).round().to(torch.uint8).numpy()
    file = io.BytesIO()
    Image.fromarray(level).save(file, "JPEG", quality=30)
    expected = np.asarray(Image.open(file)).astype(np.float32) / 255
    assert np.array_equal(JpegCompression(30)(images[:1])[0, 0].numpy(), expected)
    x = images[:2].clone().requires_grad_(True)
    weights = torch.rand(2, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    (JpegCompression(30)(x) * weights).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, weights)
    low, high = ((JpegCompression(quality)(images) - images).abs().mean() for quality in (20, 90))
    assert low > 2 * high


def test_total_variation_lowers_what_it_is_named_after(images: torch.Tensor) -> None:
    defence = TotalVariation(0.1, 100)
    out = defence(images)
    assert (variation(out) < variation(images)).all()

    def objective(u: torch.Tensor) -> torch.Tensor:
        return 0.5 * ((u - images) ** 2).sum(dim=(1, 2, 3)) + 0.1 * variation(u)

    # Nearer to the minimum than the image itself, a blurred one, and fewer steps.
    blurred = nn.functional.avg_pool2d(images, 3, 1, 1)
    for other in (images, blurred, TotalVariation(0.1, 5)(images)):
        assert (objective(out) < objective(other) + 1e-4).all()
    assert torch.equal(TotalVariation(0)(images), images)
    # A step edge keeps its place and loses height: the known solution lowers a plateau of width w by 2·weight/w.
    step = torch.zeros(1, 1, 3, 40)
    step[..., 10:30] = 1.0
    solved = TotalVariation(0.1, 3000)(step)
    assert solved[0, 0, 1, 20] == pytest.approx(1 - 2 * 0.1 / 20, abs=2e-3)
    assert solved[0, 0, 1, 3] == pytest.approx(0.1 / 10, abs=2e-3)


def test_a_noisy_patch_changes_less_behind_lgs_than_before_it(images: torch.Tensor) -> None:
    noise = torch.randint(2, (1, 7, 7), generator=torch.Generator().manual_seed(2)).float()
    attacked = pasted(images, noise, places(len(images), 28, 28, 7, seed=0))
    defence = LocalGradientSmoothing()
    before = (attacked - images).square().sum(dim=(1, 2, 3))
    after = (defence(attacked) - defence(images)).square().sum(dim=(1, 2, 3))
    # 0.68 of it: real images have high gradients, too, and lose them less where a patch sets the scale.
    assert after.mean() < 0.8 * before.mean()


@pytest.mark.parametrize(
    "build",
    [
        lambda: LocalGradientSmoothing(factor=-1), lambda: LocalGradientSmoothing(threshold=1.1),
        lambda: LocalGradientSmoothing(window=3, overlap=3), lambda: JpegCompression(0), lambda: JpegCompression(96),
        lambda: TotalVariation(-0.1), lambda: TotalVariation(steps=0),
        lambda: JpegCompression()(torch.rand(1, 2, 8, 8)),
    ],
)  # fmt: skip
def test_impossible_parameters_are_refused(build: Callable[[], object]) -> None:
    with pytest.raises(InputError):
        build()


@every_defence
def test_a_defence_prints_what_it_depends_on(build: Callable[[], nn.Module]) -> None:
    # Attacks are kept under the printed model: two settings must not look alike.
    other = {
        "LocalGradientSmoothing": lambda: LocalGradientSmoothing(factor=1.0),
        "JpegCompression": lambda: JpegCompression(40),
        "TotalVariation": lambda: TotalVariation(0.2),
    }[build.__name__]
    assert str(build()) == str(build())
    assert str(build()) != str(other())
