"""Make the shipped Fashion-MNIST sample from the four original IDX files.

    uv run python scripts/make_sample.py ../shared/data/fashion-mnist

The sample's validation images come from the images that ``keyfoundry pretrain`` holds out, its test images from
the original test set, so that no image which a device is judged on was ever trained on.
"""

from __future__ import annotations

import sys
from pathlib import Path

from factory.base import contract_for
from factory.data import SAMPLE, load_splits
from factory.idx import write_idx_xz
from factory.progress import Progress
from factory.settings import DataSettings

COUNTS = {"train": 16_000, "validation": 1_500, "test": 2_500}


def main(root: Path) -> None:
    """Write the six files of the sample beside its licence."""
    splits = load_splits(DataSettings(name="idx", root=root), contract_for(1, 28), Path(), Progress())
    for name, stem in (("train", "train"), ("validation", "validation"), ("test", "t10k")):
        split = getattr(splits, name).take(COUNTS[name])
        write_idx_xz(SAMPLE / f"{stem}-images-idx3-ubyte.xz", split.images[:, 0].numpy())
        write_idx_xz(SAMPLE / f"{stem}-labels-idx1-ubyte.xz", split.labels.numpy())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
