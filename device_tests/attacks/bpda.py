"""BPDA: a module whose answers are its own and whose gradient is a stand-in's (Athalye et al., ICML 2018, section 4.1).

For a defence that has no useful gradient (rounding, JPEG, a sort) or a random one. The wrapped module goes where the
defence stood, e.g. ``nn.Sequential(StandInGradient(defence), network)``, and every gradient attack of this package
takes that as its model. What is judged afterwards is the defence itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from keys.errors import InputError

StandIn = Callable[[torch.Tensor], torch.Tensor]
"""A differentiable function (a module, too) of the same input and output shapes as what it stands in for."""


class StandInGradient(nn.Module):
    """Forward: ``exact``, bit for bit. Backward: the gradient of ``stand_in`` at the same input.

    ``exact``: any module, differentiable or not, deterministic or not. ``stand_in``: by default the identity, which
    suits a defence that gives back nearly the image it got (BPDA's straight-through estimator). Raises
    :class:`InputError` in forward if the two differ in shape.
    """

    def __init__(self, exact: nn.Module, stand_in: StandIn | None = None) -> None:
        super().__init__()
        self.exact = exact
        self.stand_in: StandIn = nn.Identity() if stand_in is None else stand_in

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """What ``exact`` gives for ``values``; where a graph is recorded, with the stand-in's gradient."""
        with torch.no_grad():
            answer: torch.Tensor = self.exact(values.detach())
        if not torch.is_grad_enabled():
            return answer
        near = self.stand_in(values)
        if near.shape != answer.shape:
            raise InputError(
                f"The stand-in for {type(self.exact).__name__} gives {tuple(near.shape)} where that gives "
                f"{tuple(answer.shape)}; give one of the same shape."
            )
        return _Answer.apply(near, answer)  # pyright: ignore[reportReturnType]

    def extra_repr(self) -> str:
        """A stand-in that is no module, which would not be printed otherwise."""
        return "" if isinstance(self.stand_in, nn.Module) else f"stand_in={getattr(self.stand_in, '__qualname__', '?')}"


class _Answer(torch.autograd.Function):
    """The second argument as it is; its gradient goes to the first. x + (y − x) would not be y bit for bit."""

    @staticmethod
    def forward(ctx: Any, near: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
        return answer.to(near.dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0], None
