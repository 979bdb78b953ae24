"""The volume: every pixel is there, patches stand in order, and gradients pass as if the order were fixed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from factory.data import SAMPLE
from factory.idx import find_idx, read_idx
from factory.volumization.order import ORDERS, metric_order
from factory.volumization.volumize import Volumize, patches_of
from keys.errors import InputError
from keys.permutation import permutation

METRIC_ORDERS = [name for name in ORDERS if name not in ("key", "raster")]


def real_images(count: int) -> torch.Tensor:
    path = find_idx(SAMPLE, "t10k-images-idx3-ubyte")
    assert path is not None
    return torch.from_numpy(read_idx(path)[:count, np.newaxis].astype(np.float32) / 255)


def transform(order: str, patch_size: int, patches: int) -> Volumize:
    key = permutation(bytes(32), patches) if order == "key" else None
    return Volumize(patch_size, order, permutation=key)


def restored(volumes: torch.Tensor, orders: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The image that a volume was made of, by plain indexing: Eq. 4 read backwards."""
    batch, channels, _, side, _ = volumes.shape
    images = torch.full((batch, channels, height, width), torch.nan)
    for b in range(batch):
        for place, patch in enumerate(orders[b].tolist()):
            top, left = divmod(patch, width // side)
            rows, columns = slice(top * side, (top + 1) * side), slice(left * side, (left + 1) * side)
            images[b, :, rows, columns] = volumes[b, :, place]
    return images


@settings(max_examples=40, deadline=None)
@given(
    order=st.sampled_from(ORDERS),
    side=st.integers(1, 4),
    rows=st.integers(1, 3),
    columns=st.integers(1, 4),
    channels=st.sampled_from([1, 3]),
    seed=st.integers(0, 2**16),
)
def test_preserves_every_pixel(order: str, side: int, rows: int, columns: int, channels: int, seed: int) -> None:
    images = torch.rand(2, channels, rows * side, columns * side, generator=torch.Generator().manual_seed(seed))
    volumize = transform(order, side, rows * columns)
    volumes = volumize(images)
    assert volumes.shape == (2, channels, rows * columns, side, side)
    assert torch.equal(restored(volumes, volumize.orders(images), rows * side, columns * side), images)


@pytest.mark.parametrize("order", METRIC_ORDERS)
def test_stacks_real_images_in_the_order_of_the_metric(order: str) -> None:
    images = real_images(16)
    volumize = Volumize(7, order)
    expected = metric_order(order, patches_of(images, 7))
    assert torch.equal(volumize.orders(images), expected)
    # The patches of an image are not in the metric's order by themselves, or this test could not fail.
    assert not torch.equal(expected, torch.arange(16).expand(16, -1))


def test_patches_stand_row_by_row() -> None:
    images = torch.arange(2 * 4 * 6).reshape(1, 2, 4, 6).float()
    patches = patches_of(images, 2)
    assert patches.shape == (1, 6, 2, 2, 2)
    assert torch.equal(patches[0, 4], images[0, :, 2:4, 2:4])
    assert torch.equal(Volumize(2, "raster")(images)[0, :, 4], images[0, :, 2:4, 2:4])


def test_the_key_alone_decides_the_order_by_key() -> None:
    key = permutation(bytes(range(32)), 16)
    volumize = Volumize(7, "key", permutation=key)
    images = real_images(4)
    assert volumize.orders(images).tolist() == [key.tolist()] * 4
    assert torch.equal(volumize(images)[:, :, 0], patches_of(images, 7)[:, key[0]])
    assert "permutation" in volumize.state_dict()


@pytest.mark.parametrize("order", ["entropy", "mse", "raster"])
def test_the_gradient_is_that_of_the_fixed_order(order: str) -> None:
    images = real_images(4)
    volumize = Volumize(7, order)
    weights = torch.rand(4, 1, 16, 7, 7, generator=torch.Generator().manual_seed(0))
    gradients = []
    for through in (volumize, volumize.fixed(volumize.orders(images))):
        leaf = images.clone().requires_grad_(True)
        (through(leaf) * weights).sum().backward()
        assert leaf.grad is not None
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)
    # Each pixel's gradient is the weight of the place where it stands.
    assert torch.equal(gradients[0], restored(weights, volumize.orders(images), 28, 28))


def test_a_held_order_does_not_follow_the_image() -> None:
    images = real_images(4)
    volumize = Volumize(7, "entropy")
    held = volumize.fixed(volumize.orders(images))
    turned = images.flip(0)
    assert not torch.equal(volumize.orders(turned), held.orders)
    assert torch.equal(held(turned), volumize.held(turned, held.orders))
    assert torch.equal(restored(held(turned), held.orders, 28, 28), turned)


def test_refuses_images_that_patches_do_not_tile() -> None:
    with pytest.raises(InputError, match="do not tile the image of 28×28; choose one of 2, 4, 7, 14, 28"):
        Volumize(5)(torch.zeros(1, 1, 28, 28))
    with pytest.raises(InputError, match="smaller than a patch of 32×32"):
        Volumize(32)(torch.zeros(1, 1, 28, 28))


def test_refuses_orders_that_are_none() -> None:
    with pytest.raises(InputError, match="no order 'random'"):
        Volumize(7, "random")
    with pytest.raises(InputError, match="bins"):
        Volumize(7, "entropy", bins=10)
    with pytest.raises(InputError, match="one pixel"):
        Volumize(0)
    with pytest.raises(InputError, match="takes a permutation"):
        Volumize(7, "key")
    with pytest.raises(InputError, match="takes no permutation"):
        Volumize(7, "mse", permutation=np.arange(16))
    with pytest.raises(InputError, match="each index"):
        Volumize(7, "key", permutation=np.zeros(16, np.int64))
    with pytest.raises(InputError, match="order is of 4 patches and the image has 16"):
        Volumize(7, "key", permutation=np.arange(4))(torch.zeros(1, 1, 28, 28))
    with pytest.raises(InputError, match="2 images of 16 patches"):
        Volumize(7).held(torch.zeros(2, 1, 28, 28), torch.zeros(1, 16, dtype=torch.int64))
