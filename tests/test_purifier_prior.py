"""The prior and its trajectories: networks that do not touch each other, resumption, divergence, and what it is for."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from factory.purifier.likeness import psnr
from factory.purifier.prior_network import PriorShape, first_code, first_weights, render
from factory.purifier.settings import PurifierSettings
from factory.purifier.trajectory import CHECKPOINT_EVERY, judged, reconstruct
from keys.errors import InputError

SHAPE = PriorShape(1, 28, 28, features=8, scales=2)
QUICK = PurifierSettings(steps=30, width=8)


@pytest.fixture(scope="module")
def photos(sample_images: tuple[np.ndarray, np.ndarray]) -> Tensor:
    """Four real images float32 4×1×28×28 in [0, 1]."""
    return torch.from_numpy(sample_images[0][:4, None]).float() / 255


def batch_of(shape: PriorShape, seeds: list[int]) -> tuple[Tensor, Tensor]:
    return (
        torch.stack([first_weights(shape, seed) for seed in seeds]),
        torch.stack([first_code(shape, seed) for seed in seeds]),
    )


@pytest.mark.parametrize("shape", [SHAPE, PriorShape(3, 33, 20, features=6, scales=3)])
def test_networks_in_a_batch_draw_what_each_draws_alone(shape: PriorShape) -> None:
    weights, codes = batch_of(shape, [0, 1, 2])
    together = render(shape, weights, codes)
    assert together.shape == (3, shape.channels, shape.height, shape.width)
    assert shape.weights == weights.shape[1]
    for index in range(3):
        alone = render(shape, weights[index : index + 1], codes[index : index + 1])
        torch.testing.assert_close(together[index], alone[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-3)


def test_no_gradient_passes_from_one_image_to_another() -> None:
    weights, codes = batch_of(SHAPE, [0, 1, 2])
    leaf = weights.requires_grad_(True)
    (gradient,) = torch.autograd.grad(render(SHAPE, leaf, codes)[1].sum(), leaf)
    assert gradient[1].any()
    assert not gradient[[0, 2]].any()


def test_a_network_is_drawn_from_its_seed() -> None:
    assert torch.equal(first_weights(SHAPE, 5), first_weights(SHAPE, 5))
    assert not torch.equal(first_weights(SHAPE, 5), first_weights(SHAPE, 6))
    code = first_code(SHAPE, 5)
    assert code.shape == SHAPE.code
    assert 0 <= code.min() < 0.01
    assert 0.09 < code.max() <= 0.1


@pytest.mark.parametrize(("size", "scales"), [((4, 28), 2), ((28, 512), 2), ((8, 8), 4)])
def test_sizes_that_cannot_be_drawn_are_refused(size: tuple[int, int], scales: int) -> None:
    with pytest.raises(InputError, match=r"pixels a side|cannot be halved"):
        PriorShape(1, *size, features=8, scales=scales)


def test_the_prior_learns_the_picture_before_the_noise(photos: Tensor) -> None:
    """The property that everything rests on, with far more noise than an attack makes."""
    noisy = (photos + 0.15 * torch.randn(photos.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    found = reconstruct(noisy, PurifierSettings(steps=60))
    best = torch.stack([psnr(drawn, photos) for drawn in found.images]).amax(dim=0)
    assert (best > psnr(noisy, photos) + 1.5).all()
    assert (found.fidelity[-1] > found.fidelity[0]).all()


def test_seeds_differ_and_repeat(photos: Tensor) -> None:
    pair = photos[:1].repeat(2, 1, 1, 1)
    same, other = reconstruct(pair, QUICK, seeds=[3, 3]), reconstruct(pair, QUICK, seeds=[3, 4])
    # Two images of a batch may be summed in other orders, but not in another way from run to run.
    torch.testing.assert_close(same.images[0, 0], same.images[0, 1], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(other.images[0, 0], other.images[0, 1], atol=1e-2)
    assert torch.equal(other.images, reconstruct(pair, QUICK, seeds=[3, 4]).images)


class _KilledError(Exception):
    pass


def test_a_killed_run_ends_in_the_same_bits(photos: Tensor, tmp_path: Path) -> None:
    settings = dataclasses.replace(QUICK, steps=CHECKPOINT_EVERY + 30)
    whole = reconstruct(photos[:2], settings)
    path = tmp_path / "run.safetensors"
    done: list[int] = []

    def until_115(count: int) -> None:
        done.append(count)
        if len(done) == 115:
            raise _KilledError

    with pytest.raises(_KilledError):
        reconstruct(photos[:2], settings, checkpoint=path, advance=until_115)
    heard: list[int] = []
    resumed = reconstruct(photos[:2], settings, checkpoint=path, advance=heard.append)
    assert torch.equal(resumed.images, whole.images)
    assert torch.equal(resumed.errors, whole.errors)
    assert heard == [2 * CHECKPOINT_EVERY, *[2] * 30]
    # Finished, it is read and nothing is done again.
    heard.clear()
    assert torch.equal(reconstruct(photos[:2], settings, checkpoint=path, advance=heard.append).images, whole.images)
    assert heard == [2 * settings.steps]


@pytest.mark.parametrize("fault", ["other settings", "other images", "damaged"])
def test_a_checkpoint_of_something_else_is_not_used(photos: Tensor, tmp_path: Path, fault: str) -> None:
    path = tmp_path / "run.safetensors"
    reconstruct(photos[:1], QUICK, checkpoint=path)
    images, settings = photos[:1], QUICK
    if fault == "other settings":
        settings = dataclasses.replace(QUICK, learning_rate=0.02)
    elif fault == "other images":
        images = photos[1:2]
    else:
        path.write_bytes(path.read_bytes()[:200])
    assert torch.equal(reconstruct(images, settings, checkpoint=path).images, reconstruct(images, settings).images)


def test_a_diverging_image_is_named_and_the_others_go_on(photos: Tensor) -> None:
    broken = photos.clone()
    broken[1, 0, 3, 3] = torch.nan
    found, healthy = reconstruct(broken, QUICK), reconstruct(photos, QUICK)
    assert found.diverged == {1: "its error is no finite number at step 10"}
    assert not healthy.diverged
    others = [0, 2, 3]
    assert torch.equal(found.images[:, others], healthy.images[:, others])

    def brightness(images: Tensor) -> Tensor:
        return torch.stack([images.mean(dim=(1, 2, 3)), torch.full((len(images),), 0.3)], dim=1)

    trajectory = judged(found, brightness)
    assert trajectory.logits[:, 1].isnan().all()
    assert torch.equal(trajectory.logits[:, others], judged(healthy, brightness).logits[:, others])


def test_an_error_that_does_not_fall_is_divergence(photos: Tensor) -> None:
    found = reconstruct(photos[:2], dataclasses.replace(QUICK, learning_rate=500.0))
    assert set(found.diverged) == {0, 1}
    assert all("a flat picture has" in said or "no finite number" in said for said in found.diverged.values())


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"steps": 0}, "steps must be a whole number"),
        ({"every": 200}, "keeps nothing of 150 steps every 200"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be a finite number"),
        ({"patch": 1}, "patch must be a whole number of at least 2"),
    ],
)
def test_settings_that_cannot_work_are_refused(values: dict[str, float], said: str) -> None:
    with pytest.raises(InputError, match=said):
        PurifierSettings(**values)  # type: ignore[arg-type]
