"""How much of a keyed transform the first layer can undo with an update of rank r, on real patches.

A device that undoes its key in the patch embedding ends as the base's function behind it, and what fools the base then
fools the device, too. To undo a transform t exactly, an embedding W needs an update Δ with (W + Δ)·t(x) = W·x for every
patch x; LoRA gives it rank r. This finds the best Δ of that rank in closed form (reduced-rank regression) on one half
of the images and prints, on the other half, what is left: E|(W + Δ)·t(x) − W·x|² over the variance of W·x. 0: the key
is undone where natural images live; 1: no better than the mean. It is a bound for the first layer alone: the layers
behind it learn as well. For a shuffle and for flips beside it the rank that undoes *every* patch is printed. Run::

    python -m benchmarks.undoing_keys --json FILE
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.rounds import base_and_sample, table, write_record
from factory.base import Base
from factory.block_shuffle import BlockShuffle
from factory.keyed_transforms.bit_flip import BitFlip
from factory.recipes.bit_flip import BitFlipPart
from factory.recipes.block_shuffle import BlockShufflePart
from factory.recipes.format_preserving import FormatPreservingPart
from factory.recipes.part import TransformPart
from keys.derive import fixed_guess

PARTS: dict[str, TransformPart] = {
    "shuffle": BlockShufflePart(), "bit flip": BitFlipPart(), "bit flip, shuffle": BitFlipPart(shuffle=True),
    "format-preserving": FormatPreservingPart(), "format-preserving, shuffle": FormatPreservingPart(shuffle=True),
}  # fmt: skip


def patches_of(images: Tensor, base: Base) -> Tensor:
    """Normalised patches float64 (c·P·P)×n of images N×C×H×W in [0, 1]."""
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (base.architecture.mean, base.architecture.std))
    columns = functional.unfold((images - mean) / std, base.patch_size, stride=base.patch_size)
    return columns.transpose(0, 1).flatten(1).double()


def rank_to_undo(transform: nn.Module) -> int | None:
    """The rank that undoes an affine transform of whole patches for every patch; None if no linear update does.

    Of M for t(x) = M·x + o it is the rank of M⁻¹ − 1: n less the cycles of a permutation, the flipped places of a flip.
    """
    if isinstance(transform, BitFlip):
        shuffle, sign = transform.shuffle, transform.sign.double().view(-1, 1)
    elif isinstance(transform, BlockShuffle):
        shuffle, sign = transform, torch.ones(len(transform.permutation), 1, dtype=torch.float64)
    else:
        return None
    matrix = torch.eye(len(sign), dtype=torch.float64)
    if shuffle is not None:
        matrix = matrix[shuffle.permutation]
    matrix = sign * matrix
    return int(torch.linalg.matrix_rank(matrix - torch.eye(len(matrix), dtype=torch.float64)))


def left_over(weight: Tensor, seen: Tensor, plain: Tensor, ranks: Sequence[int]) -> dict[int, float]:
    """What the best update of each rank leaves; ``weight`` D×n, ``seen`` and ``plain`` patches n×m."""
    half = seen.shape[1] // 2
    fitted, judged = slice(None, half), slice(half, None)
    missing = weight @ (plain - seen)
    gram = seen[:, fitted] @ seen[:, fitted].T
    # Grey borders make patches that are never seen; a ridge leaves those directions alone.
    ridge = 1e-8 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    best = torch.linalg.solve(gram + ridge, (missing[:, fitted] @ seen[:, fitted].T).T).T
    directions = torch.linalg.svd(best @ torch.linalg.cholesky(gram + ridge), full_matrices=False).U
    target = weight @ plain[:, judged]
    spread = (target - target.mean(1, keepdim=True)).square().sum()
    found = {}
    for rank in ranks:
        update = directions[:, :rank] @ (directions[:, :rank].T @ best)
        found[rank] = float((missing[:, judged] - update @ seen[:, judged]).square().sum() / spread)
    return found


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and record."""
    made = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    made.add_argument("--base", default="shipped", help="or the path of another checkpoint of the same ten classes")
    made.add_argument("--images", type=int, default=1000, help="training images; half of them fit, half are judged")
    made.add_argument("--keys", type=int, default=5)
    made.add_argument("--ranks", type=int, nargs="+", default=[0, 4, 16, 48])
    made.add_argument("--json", type=Path, help="write everything measured to this file")
    asked = made.parse_args(arguments)
    asked.threads = torch.get_num_threads()
    base, _, splits = base_and_sample(asked.base)
    projection = base.network.patch_embed.proj
    assert isinstance(projection, nn.Conv2d)
    images = splits.train.images[: asked.images].float() / 255
    weight, plain = projection.weight.detach().flatten(1).double(), patches_of(images, base)
    results: dict[str, dict[str, object]] = {}
    for name, part in PARTS.items():
        lines: list[dict[int, float]] = []
        exact: list[int | None] = []
        for number in range(1, asked.keys + 1):
            shape = base.architecture.contract.shape
            transform = part.build(fixed_guess(f"undoing-{number}"), shape, base.patch_size)
            assert transform is not None
            lines.append(left_over(weight, patches_of(transform(images), base), plain, asked.ranks))
            exact.append(rank_to_undo(transform))
        results[name] = {"left_over": lines, "rank_to_undo": exact}
    rows = []
    for name, found in results.items():
        lines, exact = found["left_over"], found["rank_to_undo"]  # type: ignore[assignment]
        shown = [f"{statistics.mean(line[rank] for line in lines):.3f}" for rank in asked.ranks]
        every = "none" if exact[0] is None else f"{min(filter(None, exact))}–{max(filter(None, exact))}"
        rows.append([name, *shown, every])
    print(f"{len(plain)} values a patch, {asked.keys} keys; mean share left over\n")
    print(table(["transform", *(f"rank {rank}" for rank in asked.ranks), "rank for every patch"], rows))
    write_record(asked.json, "undoing_keys", asked, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
