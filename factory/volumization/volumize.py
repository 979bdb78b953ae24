"""The volumization algorithm (section 4.1): an image's patches in order, stacked along a new axis of depth (Eq. 3).

It moves pixels and changes none (Eq. 4). What depends on the pixels is the order alone: it is piecewise constant in the
image, so its gradient is zero wherever it has one, while the gradient of the stack *given* the order is exact, pixel by
pixel. Hence the ordinary gradient of a network behind :class:`Volumize` is already the one that holds the order, and an
attacker loses nothing but what a change of order would do: see :meth:`Volumize.fixed` and
``device_tests.attacks.order_flip``.

>>> images = torch.tensor([[[[.9, .1, .5, .5], [.3, .7, .5, .5]]]])
>>> volumize = Volumize(2, "entropy", bins=4)
>>> volumize.orders(images)
tensor([[1, 0]])
>>> volumize(images).shape
torch.Size([1, 1, 2, 2, 2])
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from factory.volumization.histograms import BINS, check_bins
from factory.volumization.metrics import check_size
from factory.volumization.order import KEY, RASTER, check_order, metric_order
from keys.errors import InputError


class Volumize(nn.Module):
    """Float images (B, C, H, W) in [0, 1] to volumes (B, C, N, h, w) of N patches of h = w = ``patch_size`` pixels.

    ``order``: one of :data:`~factory.volumization.order.ORDERS`. ``bins``: of the histograms of a metric.
    ``permutation``: the N indices of the order ``key`` (see :func:`keys.permutation.permutation`), and of
    no other. Raises :class:`InputError` for another order, bins that are no power of two, or a permutation that is
    missing, unexpected or none.
    """

    def __init__(
        self, patch_size: int, order: str = "entropy", bins: int = BINS, permutation: np.ndarray | None = None
    ) -> None:
        super().__init__()
        check_order(order)
        check_bins(bins)
        if patch_size < 1:
            raise InputError(f"A patch has one pixel or more on a side, not {patch_size}.")
        if (permutation is not None) != (order == KEY):
            raise InputError(f"The order {order!r} takes {'a' if order == KEY else 'no'} permutation.")
        if permutation is not None and sorted(permutation.tolist()) != list(range(permutation.size)):
            raise InputError("The permutation of an order by key must hold each index of the patches once.")
        self.patch_size, self.order, self.bins = patch_size, order, bins
        kept = None if permutation is None else torch.from_numpy(permutation.astype(np.int64))
        self.permutation: Tensor | None
        self.register_buffer("permutation", kept)

    def extra_repr(self) -> str:
        """What the function depends on beside tensors: caches tell models apart by it."""
        return f"{self.patch_size}, order={self.order}, bins={self.bins}"

    def forward(self, images: Tensor) -> Tensor:
        """Volumes (B, C, N, h, w) of images (B, C, H, W); raises :class:`InputError` if patches do not tile them."""
        if self.order == RASTER:
            return _stacked(patches_of(images, self.patch_size))
        if self.permutation is not None:
            patches = patches_of(images, self.patch_size)
            return _stacked(patches.index_select(1, self._checked(self.permutation, patches.shape[1])))
        return self.held(images, self.orders(images))

    def orders(self, images: Tensor) -> Tensor:
        """The order int64 (B, N) in which the patches of ``images`` (B, C, H, W) are stacked."""
        patches = patches_of(images.detach(), self.patch_size)
        batch, number = patches.shape[:2]
        if self.order == RASTER:
            return torch.arange(number, device=images.device).expand(batch, -1)
        if self.permutation is not None:
            return self._checked(self.permutation, number).expand(batch, -1)
        check_size(patches[0, 0].numel())
        return metric_order(self.order, patches, self.bins)

    def held(self, images: Tensor, orders: Tensor) -> Tensor:
        """Volumes of ``images`` with the patches in given ``orders`` int64 (B, N): differentiable, exactly."""
        patches = patches_of(images, self.patch_size)
        if orders.shape != patches.shape[:2]:
            raise InputError(
                f"{patches.shape[0]} images of {patches.shape[1]} patches need as many orders; got the shape "
                f"{tuple(orders.shape)}."
            )
        values = patches.flatten(2)
        values = values.gather(1, orders.unsqueeze(2).expand(-1, -1, values.shape[2]))
        return _stacked(values.view(patches.shape))

    def fixed(self, orders: Tensor) -> FixedOrder:
        """This transform with the order held at ``orders`` int64 (B, N), for an attacker's gradients (BPDA)."""
        return FixedOrder(self, orders)

    def _checked(self, permutation: Tensor, number: int) -> Tensor:
        if permutation.numel() != number:
            raise InputError(
                f"The key's order is of {permutation.numel()} patches and the image has {number}; derive it for "
                f"{number}."
            )
        return permutation


class FixedOrder(nn.Module):
    """A :class:`Volumize` whose order no longer depends on the image: one row of ``orders`` for each image."""

    orders: Tensor

    def __init__(self, volumize: Volumize, orders: Tensor) -> None:
        super().__init__()
        self.volumize = volumize
        self.register_buffer("orders", orders, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Volumes (B, C, N, h, w) of as many images (B, C, H, W) as there are orders."""
        return self.volumize.held(images, self.orders)


def patches_of(images: Tensor, patch_size: int) -> Tensor:
    """Patches (B, N, C, h, w) of images (B, C, H, W), row by row; N = H/h · W/w.

    Raises :class:`InputError` if the image is smaller than a patch or patches do not tile it.
    """
    batch, channels, height, width = images.shape
    check_patches(patch_size, height, width)
    # Unshuffled pixels: the C·h·w values of a patch, in the order (c, y, x), along the channels. No tensor has more
    # than five axes, which is all that Core ML takes.
    columns = functional.pixel_unshuffle(images, patch_size).flatten(2)
    # Laid out patch by patch: counting over values that lie apart takes several times as long.
    return columns.transpose(1, 2).contiguous().view(batch, -1, channels, patch_size, patch_size)


def check_patches(patch_size: int, height: int, width: int) -> None:
    """Raise :class:`InputError` unless patches of ``patch_size`` tile an image of ``height``×``width`` pixels."""
    if patch_size > min(height, width):
        raise InputError(f"The image of {height}×{width} pixels is smaller than a patch of {patch_size}×{patch_size}.")
    if height % patch_size or width % patch_size:
        sizes = ", ".join(str(d) for d in range(2, min(height, width) + 1) if not height % d and not width % d)
        raise InputError(
            f"Patches of {patch_size} pixels do not tile the image of {height}×{width}; choose one of {sizes or 1}."
        )


def _stacked(patches: Tensor) -> Tensor:
    """Patches (B, N, C, h, w) as a volume (B, C, N, h, w)."""
    return patches.transpose(1, 2)
