"""Order search: small changes that put the patches of a volumized network into another order, by queries alone.

A volumized network stacks an image's patches in the order of a metric (entropy, mutual information, …) that is computed
from the pixels, so whoever changes pixels a little can move whole patches along the depth. This attack looks for such
changes with the order alone, by random search without a gradient; what the model itself says only breaks ties. Against
a fixed order (raster, keyed) it can move nothing, which is its control.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from device_tests.attacks.answers import Queries, margins
from device_tests.attacks.attack import Progress
from device_tests.attacks.gradients import at_rest, batches
from device_tests.images import LEVELS
from device_tests.perturbation import Norm
from keys.errors import InputError

Order = Callable[[torch.Tensor], torch.Tensor]
"""Images N×C×H×W in [0, 1] → int64 N×P: which patch, counted in raster order, lies at each depth of the volume."""


@dataclass(frozen=True)
class OrderSearch:
    """Random search in an L∞ ball for the image with the most patches out of their place; 8-bit images throughout.

    ``order``: the target's, with patches of ``patch`` = (height, width) pixels that tile the image; ``label``: what it
    is, for the description. In each of ``queries`` rounds one patch of each image is set anew: brighter or darker by ε,
    drawn towards its mean by ε (less entropy), or ±ε at random (more). Kept is what moves more patches than before, or
    as many with a lower margin. An image that is wrong is left alone. Raises :class:`InputError` without a query.
    """

    order: Order
    patch: tuple[int, int]
    label: str = "order"
    queries: int = 200

    def __post_init__(self) -> None:
        if self.queries < 1 or min(self.patch) < 1:
            raise InputError(
                f"An order search takes at least one query and patches of a pixel or more, not {self.queries} queries "
                f"and patches of {self.patch}."
            )

    @property
    def norm(self) -> Norm:
        """An L∞ ball."""
        return Norm.LINF

    @property
    def name(self) -> str:
        """``"order-search"``."""
        return "order-search"

    @property
    def description(self) -> str:
        """Norm and budget in words."""
        height, width = self.patch
        return (
            f"order search, L∞, at most {self.queries} queries of 8-bit images, {self.label} of patches of "
            f"{height}×{width}, most patches out of place, then least margin"
        )

    @property
    def gradients_per_image(self) -> int:
        """No gradients: forward passes, at most."""
        return self.queries + 1

    @torch.no_grad()
    def generate(
        self,
        model: nn.Module,
        images: torch.Tensor,
        labels: torch.Tensor,
        *,
        epsilon: float,
        seed: int,
        progress: Progress | None = None,
    ) -> torch.Tensor:
        """Candidates; see :class:`~device_tests.attacks.attack.Attack`.

        Raises :class:`InputError` if the patches do not tile the images.
        """
        if any(side % patch for side, patch in zip(images.shape[-2:], self.patch, strict=True)):
            raise InputError(f"Patches of {self.patch} pixels do not tile images {tuple(images.shape[-2:])}.")
        generator = torch.Generator().manual_seed(seed)
        candidates = torch.empty_like(images)
        queries = Queries(model, progress)
        with at_rest(model):
            for part in batches(images):
                candidates[part] = self._search(queries, images[part], labels[part], epsilon, generator)
        return candidates

    def _search(
        self, queries: Queries, clean: torch.Tensor, labels: torch.Tensor, epsilon: float, generator: torch.Generator
    ) -> torch.Tensor:
        levels = torch.floor(torch.tensor(epsilon * LEVELS + 1e-6)) / LEVELS
        home = self.order(clean)
        best = clean.clone()
        moved = torch.zeros(len(clean), dtype=torch.int64, device=clean.device)
        margin = margins(queries.logits_of_8bit(best), labels)
        for _ in range(self.queries):
            # Drawn for every image, whether it is still asked about or not.
            proposed = self._changed(best, clean, float(levels), generator)
            rows = torch.nonzero(margin >= 0)[:, 0]
            if len(rows) == 0:
                break
            found = (self.order(proposed[rows]) != home[rows]).sum(dim=1)
            asked = margins(queries.logits_of_8bit(proposed[rows]), labels[rows])
            better = (found > moved[rows]) | ((found == moved[rows]) & (asked < margin[rows])) | (asked < 0)
            taken = rows[better]
            best[taken], moved[taken], margin[taken] = proposed[taken], found[better], asked[better]
        return best

    def _changed(
        self, current: torch.Tensor, clean: torch.Tensor, epsilon: float, generator: torch.Generator
    ) -> torch.Tensor:
        """Each image with one patch set anew, within ε of the clean one: 8-bit levels in [0, 1]."""
        n, _, height, width = clean.shape
        tall, wide = self.patch
        rows = torch.randint(height // tall, (n, 1), generator=generator)
        columns = torch.randint(width // wide, (n, 1), generator=generator)
        in_rows = torch.arange(height) // tall == rows
        in_columns = torch.arange(width) // wide == columns
        inside = (in_rows[:, :, None] & in_columns[:, None, :])[:, None].to(clean.device)
        share = inside.to(clean)
        mean = (clean * share).sum(dim=(2, 3), keepdim=True) / (tall * wide)
        noise = torch.randint(2, clean.shape, generator=generator).to(clean) * 2 - 1
        signs = (torch.randint(2, (n, 1, 1, 1), generator=generator) * 2 - 1).to(clean)
        kinds = torch.randint(3, (n, 1, 1, 1), generator=generator).to(clean.device)
        change = torch.where(kinds == 0, signs * epsilon, torch.where(kinds == 1, noise * epsilon, mean - clean))
        changed = (clean + change.clamp(-epsilon, epsilon)).clamp(0, 1)
        return torch.where(inside, torch.round(changed * LEVELS) / LEVELS, current)


def displaced(order: Order, clean: torch.Tensor, attacked: torch.Tensor) -> torch.Tensor:
    """Share of an image's patches that the attack put into another place of the volume: float N in [0, 1]."""
    with torch.no_grad():
        parts = [(order(clean[part]) != order(attacked[part])).float().mean(dim=1) for part in batches(clean)]
    return torch.cat(parts)
