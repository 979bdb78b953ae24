"""N-pixel attacks from scores alone: sparse random search and differential evolution.

A pixel is one position with all its channels; ε is how many of them may take any 8-bit value. Both attacks ask for
a whole batch at a time, and an image whose label has changed is not asked about again, unless the search is told to go
on. The sparse search can be kept inside one region of the image (``regions.py``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from device_tests.attacks.answers import Queries, margins
from device_tests.attacks.attack import Progress
from device_tests.attacks.gradients import at_rest, batches
from device_tests.attacks.regions import Region
from device_tests.images import LEVELS
from device_tests.perturbation import Norm
from keys.errors import InputError


@dataclass(frozen=True)
class SparseSearch:
    """Sparse-RS for N pixels (Croce et al., AAAI 2022): swap some of the pixels, keep what lowers the margin.

    Colours are corners of the colour cube, 0 or 1 in every channel. At most ``queries`` forward passes per image.
    ``region``: all pixels lie in it, or in the centre if they do not fit. ``places``: ``"drawn"`` pixels stay where
    they were drawn at random and only their colours are searched, as in the volumization paper ("selected at random");
    ``"searched"`` is the whole attack. ``stops``: an image is left alone once it is wrong; else its margin is lowered
    until the queries are spent, which matters where several attacked images are averaged.
    """

    queries: int = 500
    region: Region | None = None
    places: Literal["searched", "drawn"] = "searched"
    stops: bool = True

    @property
    def norm(self) -> Norm:
        """Single pixels."""
        return Norm.L0

    # Share of the pixels that is swapped, by the share of the budget that is spent (the paper's schedule for L0).
    _SCHEDULE: ClassVar[tuple[tuple[float, float], ...]] = (
        (0.005, 0.15), (0.02, 0.075), (0.05, 0.06), (0.1, 0.05), (0.2, 0.0375), (0.4, 0.03), (0.6, 0.025), (0.8, 0.02),
        (1.0, 0.015),
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.queries < 1:
            raise InputError(f"Sparse search needs at least one query, not {self.queries}; 500 is usual.")

    @property
    def name(self) -> str:
        """``"sparse-rs"``, and where it is kept to: ``"sparse-rs-drawn-top-left"``."""
        where = "" if self.region is None else f"-{self.region.value}"
        return "sparse-rs" + ("" if self.places == "searched" else "-drawn") + where

    @property
    def description(self) -> str:
        """Norm and budget in words."""
        words = f"Sparse-RS, L0, at most {self.queries} score queries of 8-bit images, corner colours, margin loss"
        if self.places == "drawn":
            words += ", places drawn at random and kept"
        if self.region is not None:
            words += f", inside the {self.region.value} region"
        return words if self.stops else words + ", all queries spent"

    @property
    def gradients_per_image(self) -> int:
        """No gradients: forward passes, at most."""
        return self.queries

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
        """Candidates; see :class:`~device_tests.attacks.attack.Attack`. Without a success, the lowest margin found."""
        generator = torch.Generator().manual_seed(seed if self.region is None else self.region.seed(seed))
        candidates = torch.empty_like(images)
        queries = Queries(model, progress)
        with at_rest(model):
            for part in batches(images):
                candidates[part] = self._search(queries, images[part], labels[part], int(epsilon), generator)
        return candidates

    def _search(
        self, queries: Queries, clean: torch.Tensor, labels: torch.Tensor, pixels: int, generator: torch.Generator
    ) -> torch.Tensor:
        """Algorithm 1 with the sampling of algorithm 2; every image draws whether it is still asked about or not."""
        n, channels, height, width = clean.shape
        inside = self._inside(height, width, pixels).to(clean.device)
        room = int(inside.sum())
        pixels = min(pixels, room)

        def ask(rows: torch.Tensor, places: torch.Tensor, colours: torch.Tensor) -> torch.Tensor:
            return margins(queries.logits_of_8bit(_painted(clean[rows], places, colours)), labels[rows])

        def draw(shape: tuple[int, ...]) -> torch.Tensor:
            return torch.rand(shape, generator=generator).to(clean)  # on the CPU: the same on every device

        places = draw((n, height * width)).masked_fill(~inside, -1.0).topk(pixels).indices
        colours = draw((n, pixels, channels)).round()
        margin = ask(torch.arange(n, device=clean.device), places, colours)
        for query in range(1, self.queries):
            swapped = max(1, int(pixels * self._share(query / self.queries)))
            new_places, new_colours = places.clone(), colours.clone()
            slots = draw((n, pixels)).topk(swapped).indices
            free = draw((n, height * width)).masked_fill(~inside, -1.0).scatter(1, places, -1.0)
            if pixels < room and self.places == "searched":
                found = free.topk(swapped)
                # Where fewer are free than are swapped, the others stay.
                kept = torch.where(found.values >= 0, found.indices, places.gather(1, slots))
                new_places.scatter_(1, slots, kept)
            fresh = draw((n, swapped, channels)).round()
            new_colours.scatter_(1, slots[:, :, None].expand(-1, -1, channels), fresh)
            rows = torch.nonzero((margin >= 0) | (not self.stops))[:, 0]
            if len(rows) == 0:
                break
            asked = ask(rows, new_places[rows], new_colours[rows])
            better = rows[asked < margin[rows]]
            margin[rows] = torch.minimum(asked, margin[rows])
            places[better], colours[better] = new_places[better], new_colours[better]
        return _painted(clean, places, colours)

    def _inside(self, height: int, width: int, pixels: int) -> torch.Tensor:
        """Which of the flat pixels may be changed: bool height·width."""
        if self.region is None:
            return torch.ones(height * width, dtype=torch.bool)
        return self.region.holding(height, width, pixels).mask(height, width).flatten()

    def _share(self, spent: float) -> float:
        return next(share for end, share in self._SCHEDULE if spent <= end)


@dataclass(frozen=True)
class PixelEvolution:
    """Differential evolution over N pixels (Su, Vargas and Sakurai, IEEE TEVC 2019), made for a batch of images.

    Each of ``population`` candidates holds the places and colours of all pixels; a child is x₁ + ``weight``·(x₂ − x₃)
    of three others (their eq. 3, no crossover) and takes its parent's place if its margin is not larger. At most
    ``queries`` forward passes per image, in whole generations.
    """

    queries: int = 1000
    population: int = 50
    weight: float = 0.5

    @property
    def norm(self) -> Norm:
        """Single pixels."""
        return Norm.L0

    def __post_init__(self) -> None:
        if self.population < 4 or self.queries < self.population:
            raise InputError(
                f"Differential evolution needs a population of at least 4 and a query for each, not {self.population} "
                f"with {self.queries} queries; 50 and 1000 are usual."
            )

    @property
    def name(self) -> str:
        """``"pixel-evolution"``."""
        return "pixel-evolution"

    @property
    def description(self) -> str:
        """Norm and budget in words."""
        return (
            f"differential evolution, L0, at most {self.queries} score queries of 8-bit images, "
            f"population {self.population}, weight {self.weight:g}, margin loss"
        )

    @property
    def gradients_per_image(self) -> int:
        """No gradients: forward passes, at most."""
        return self.queries // self.population * self.population

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
        """Candidates; see :class:`~device_tests.attacks.attack.Attack`. Without a success, the lowest margin found."""
        generator = torch.Generator().manual_seed(seed)
        candidates = torch.empty_like(images)
        queries = Queries(model, progress)
        with at_rest(model):
            for part in batches(images):
                candidates[part] = self._evolve(queries, images[part], labels[part], int(epsilon), generator)
        return candidates

    def _evolve(
        self, queries: Queries, clean: torch.Tensor, labels: torch.Tensor, pixels: int, generator: torch.Generator
    ) -> torch.Tensor:
        n, channels, height, width = clean.shape
        size = self.population
        sides = torch.tensor([height, width]).to(clean)

        def decoded(genes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            """Genes …×N×(2 + C) in [0, 1] → places …×N and colours …×N×C."""
            cells = torch.minimum((genes[..., :2] * sides).floor(), sides - 1).long()
            return cells[..., 0] * width + cells[..., 1], genes[..., 2:]

        def ask(rows: torch.Tensor, genes: torch.Tensor) -> torch.Tensor:
            places, colours = decoded(genes.flatten(0, 1))
            each = rows.repeat_interleave(size)
            painted = _painted(clean[each], places, colours)
            return margins(queries.logits_of_8bit(painted), labels[each]).view(-1, size)

        def draw(shape: tuple[int, ...]) -> torch.Tensor:
            return torch.rand(shape, generator=generator).to(clean)

        genes = draw((n, size, pixels, 2 + channels))
        # Colours start from the paper's normal distribution around mid-grey, as wide as half the range.
        normal = torch.randn((n, size, pixels, channels), generator=generator).to(clean)
        genes[..., 2:] = (0.5 + 0.5 * normal).clamp(0, 1)
        margin = ask(torch.arange(n, device=clean.device), genes)
        for _ in range(self.queries // size - 1):
            # Three different members for every child, whether its image is still asked about or not.
            chosen = draw((n, size, size)).topk(3).indices
            redrawn = draw(tuple(genes.shape))
            rows = torch.nonzero(margin.min(dim=1).values >= 0)[:, 0]
            if len(rows) == 0:
                break
            first, second, third = (genes[rows[:, None], chosen[rows, :, index]] for index in range(3))
            children = first + self.weight * (second - third)
            children = torch.where((children < 0) | (children > 1), redrawn[rows], children)
            asked = ask(rows, children)
            better = asked <= margin[rows]
            genes[rows] = torch.where(better[..., None, None], children, genes[rows])
            margin[rows] = torch.where(better, asked, margin[rows])
        best = margin.argmin(dim=1)
        return _painted(clean, *decoded(genes[torch.arange(n, device=clean.device), best]))


def _painted(clean: torch.Tensor, places: torch.Tensor, colours: torch.Tensor) -> torch.Tensor:
    """Images n×C×H×W with the pixels at flat ``places`` n×N set to ``colours`` n×N×C, in 8-bit levels."""
    rounded = (torch.round(colours * LEVELS) / LEVELS).transpose(1, 2)
    index = places[:, None].expand(-1, clean.shape[1], -1)
    return clean.flatten(2).scatter(2, index, rounded).view_as(clean)
