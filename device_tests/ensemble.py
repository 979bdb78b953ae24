"""Several classifiers attacked as one: their logits are averaged (Dong et al., CVPR 2018, section 3.4).

Averaging logits or log-probabilities is the same attack: they differ by one number per image and member, and the
cross-entropy of the fused logits does not see it. So does the gradient of one forward and backward pass through all
members, in which every member's part counts in proportion to how much its logits move the fused prediction.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from keys.errors import InputError


class Ensemble(nn.Module):
    """The mean logits of ``members``: float32 N×C×H×W in [0, 1] → logits N×K.

    A member may itself be an ensemble; it then counts as one. Raises :class:`InputError` if there are no members, or
    on use if their classes differ in number.
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        if not members:
            raise InputError("An ensemble needs at least one model.")
        self.members = nn.ModuleList(members)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits N×K of ``images``."""
        logits = [member(images) for member in self.members]
        if len({part.shape[1] for part in logits}) > 1:
            raise InputError(
                f"The models of an ensemble tell {sorted({part.shape[1] for part in logits})} classes apart; attack "
                "together only models of the same classes."
            )
        return torch.stack(logits).mean(0)


def members_of(model: nn.Module) -> Iterator[nn.Module]:
    """The single classifiers that ``model`` consists of: itself, or those of an ensemble, of whatever depth."""
    if isinstance(model, Ensemble):
        for member in model.members:
            yield from members_of(member)
    else:
        yield model
