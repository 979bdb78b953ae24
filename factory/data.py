"""Images and labels as uint8 tensors at the model's size, in three splits that never overlap.

``sample`` is the Fashion-MNIST sample shipped with the project; ``idx`` is a folder of IDX files; any other
name goes to :func:`timm.data.create_dataset` (image folder, tar, torchvision, Hugging Face). Those are decoded
once into a memory-mapped file, so that every epoch of every device reads plain bytes.

Images that cannot be used (corrupt, truncated, empty, 16 bits a channel) are skipped and counted; more than
one in a hundred of them is an error. Grey images are repeated to RGB where the model takes RGB, colour images
are converted to grey where it takes grey.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import tarfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import CenterCrop, Compose, Resize

from exporters.contract import InputContract
from factory.idx import find_idx, read_idx
from factory.progress import Progress
from factory.seeds import derive_seed
from factory.settings import DataSettings
from keys.errors import InputError
from keys.files import storage_errors, write_atomic

SAMPLE = Path(__file__).parent / "assets" / "fashion-mnist-sample"
FASHION_MNIST_LABELS = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
_SPLIT_SEED = 0  # one constant: the base and all devices must hold out the same validation images
_MOST_BAD_IMAGES = 0.01

logger = logging.getLogger("keyfoundry")


@dataclass(frozen=True)
class Split:
    """Images uint8 N×C×H×W and labels int64 N of one split."""

    images: Tensor
    labels: Tensor
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, count: int | None) -> Split:
        """The first ``count`` images (all for None). Splits are stored in a shuffled order."""
        return self if count is None else Split(self.images[:count], self.labels[:count], self.skipped)


@dataclass(frozen=True)
class Splits:
    """Train, validation and test images of one data set; no image is in two of them."""

    name: str
    train: Split
    validation: Split
    test: Split
    labels: tuple[str, ...]

    @cached_property
    def digest(self) -> str:
        """SHA-256 over all images and labels: names the data in evidence and cached results."""
        digest = hashlib.sha256()
        for split in (self.train, self.validation, self.test):
            for index in range(0, len(split), 4096):
                digest.update(split.images[index : index + 4096].contiguous().numpy().tobytes())
            digest.update(split.labels.numpy().tobytes())
        return digest.hexdigest()


def load_splits(settings: DataSettings, contract: InputContract, cache: Path, progress: Progress) -> Splits:
    """Load all three splits at the size and colour of ``contract``.

    Raises InputError for a missing folder, fewer than two classes, or too many unusable images.
    """
    if settings.name == "sample":
        splits = _load_idx("sample", SAMPLE, settings, contract)
    elif settings.name == "idx":
        if settings.root is None:
            raise InputError("Data 'idx' needs --data-root, a folder with the IDX files.")
        splits = _load_idx("idx", settings.root, settings, contract)
    else:
        splits = _load_timm(settings, contract, cache, progress)
    for name, split in (("train", splits.train), ("validation", splits.validation), ("test", splits.test)):
        if len(split) == 0:
            raise InputError(f"Data set {settings.name!r} has no {name} images.")
    if len(splits.labels) < 2:
        raise InputError(f"Data set {settings.name!r} has one class only; a classifier needs two or more.")
    return splits


def _load_idx(name: str, root: Path, settings: DataSettings, contract: InputContract) -> Splits:
    def pair(stem: str) -> tuple[Tensor, Tensor] | None:
        images, labels = find_idx(root, f"{stem}-images-idx3-ubyte"), find_idx(root, f"{stem}-labels-idx1-ubyte")
        if images is None or labels is None:
            return None
        pixels, classes = read_idx(images), read_idx(labels)
        if pixels.ndim != 3 or classes.ndim != 1 or len(pixels) != len(classes):
            raise InputError(f"{images} and {labels} do not hold as many images as labels.")
        if len(classes) == 0:
            raise InputError(f"{images} holds no images.")
        return _fit(torch.from_numpy(pixels), contract), torch.from_numpy(classes).long()

    train, test = pair("train"), pair("t10k")
    if train is None or test is None:
        raise InputError(f"{root} lacks train-images-idx3-ubyte or t10k-images-idx3-ubyte (plain, .gz or .xz).")
    order = _shuffled(len(test[1]), "test")
    shuffled_test = Split(test[0][order], test[1][order])
    classes = int(max(train[1].max(), test[1].max())) + 1
    labels = FASHION_MNIST_LABELS if name == "sample" else (settings.labels or tuple(map(str, range(classes))))
    if len(labels) != classes:
        raise InputError(f"data.labels names {len(labels)} classes, but {root} has {classes}.")
    held_out = pair("validation")
    if held_out is not None:
        return Splits(name, Split(*train), Split(*held_out), shuffled_test, labels)
    train_split, validation = _hold_out(Split(*train), settings.validation)
    return Splits(name, train_split, validation, shuffled_test, labels)


def _fit(images: Tensor, contract: InputContract) -> Tensor:
    """Grey uint8 N×H×W to uint8 N×C×H×W of the contract's size, by the contract's resize."""
    images = images[:, None]
    if images.shape[-2:] != (contract.height, contract.width):
        transform = _evaluation_transform(contract)
        images = torch.cat([transform(chunk) for chunk in images.split(4096)])
    return images.expand(-1, contract.channels, -1, -1).contiguous()


def _shuffled(count: int, label: str) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(derive_seed(_SPLIT_SEED, label)))


def _hold_out(split: Split, count: int) -> tuple[Split, Split]:
    """Part ``count`` images from the training images for validation, at random with a constant seed."""
    if count >= len(split):
        raise InputError(f"{count} validation images were asked for, but there are {len(split)} training images.")
    order = _shuffled(len(split), "validation")
    held, rest = order[:count], order[count:]
    return (
        Split(split.images[rest], split.labels[rest], split.skipped),
        Split(split.images[held], split.labels[held]),
    )


def _load_timm(settings: DataSettings, contract: InputContract, cache: Path, progress: Progress) -> Splits:
    train, train_names = _decode(settings, settings.train_split, contract, cache, progress)
    test, test_names = _decode(settings, settings.test_split, contract, cache, progress)
    if train_names != test_names:
        raise InputError(
            f"The splits {settings.train_split!r} and {settings.test_split!r} of {settings.name or settings.root} "
            "have different classes."
        )
    train, validation = _hold_out(train, settings.validation)
    order = _shuffled(len(test), "test")
    name = settings.name or (settings.root.name if settings.root else "folder")
    return Splits(name, train, validation, Split(test.images[order], test.labels[order], test.skipped), train_names)


def _open_dataset(settings: DataSettings, split: str) -> Any:
    """timm's data set of one split; tar files may be named ``<root>/<split>.tar``."""
    from timm.data.dataset_factory import create_dataset

    root = settings.root
    options: dict[str, Any] = {}
    if "/" not in settings.name:
        if root is None or not root.exists():
            raise InputError(f"Data folder {root} does not exist; give one with --data-root.")
        if (root / f"{split}.tar").is_file():
            root = root / f"{split}.tar"
            options["cache_tarinfo"] = False  # timm's cache is a pickle file
        elif root.is_dir() and not (root / split).is_dir():
            raise InputError(f"{root} holds neither a folder {split}/ nor a file {split}.tar.")
    try:
        return create_dataset(
            settings.name, root=None if root is None else str(root), split=split, download=settings.download, **options
        )
    except (AssertionError, ImportError, RuntimeError, ValueError, TypeError, OSError, tarfile.TarError) as error:
        raise InputError(f"Data set {settings.name!r} at {root} cannot be opened: {error}") from error


def _class_names(dataset: Any) -> tuple[str, ...]:
    reader = getattr(dataset, "reader", None)
    mapping = (
        getattr(reader, "class_to_idx", None)
        or getattr(reader, "class_name_to_idx", None)  # what timm's reader of tar files calls it
        or getattr(dataset, "class_to_idx", None)
    )
    if not mapping:
        raise InputError("The data set does not name its classes; use one that has class folders or class names.")
    return tuple(str(name) for name, _ in sorted(mapping.items(), key=lambda item: item[1]))


def _decode(
    settings: DataSettings, split: str, contract: InputContract, cache: Path, progress: Progress
) -> tuple[Split, tuple[str, ...]]:
    """Decode one split into memory-mapped files under ``cache``, or open them if they are there."""
    dataset = _open_dataset(settings, split)
    names = _class_names(dataset)
    state = _state(settings.root, split) if settings.root else ""
    description = json.dumps([settings.name, str(settings.root), state, split, contract.to_json(), len(dataset)])
    stem = cache / f"{split}-{hashlib.sha256(description.encode()).hexdigest()[:16]}"
    images_path, done_path = stem.with_suffix(".npy"), stem.with_suffix(".json")
    shape = (len(dataset), contract.channels, contract.height, contract.width)
    if not done_path.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        images = np.lib.format.open_memmap(images_path, mode="w+", dtype=np.uint8, shape=shape)
        with storage_errors(images_path), images_path.open("r+b") as file:
            # Reserved now: a disk that fills up under a memory map kills the process without a word.
            os.posix_fallocate(file.fileno(), 0, images_path.stat().st_size)
        labels: list[int] = []
        transform = _evaluation_transform(contract)
        with progress.stage(f"decode {split} images", total=len(dataset), unit="images") as stage:
            for index in range(len(dataset)):
                stage.advance()
                loaded = _load_image(dataset, index, contract, transform)
                if loaded is not None:
                    images[len(labels)] = loaded[0]
                    labels.append(loaded[1])
        images.flush()
        bad = len(dataset) - len(labels)
        if bad:
            logger.warning("%d of %d %s images could not be used and were skipped", bad, len(dataset), split)
        if bad > _MOST_BAD_IMAGES * len(dataset):
            raise InputError(
                f"{bad} of {len(dataset)} {split} images are corrupt, truncated, empty or of 16 bits a channel; "
                "more than 1 % is taken as a fault of the data set."
            )
        write_atomic(done_path, json.dumps({"labels": labels}).encode())
    kept = torch.tensor(json.loads(done_path.read_text())["labels"], dtype=torch.int64)
    mapped = np.load(images_path, mmap_mode="c")[: len(kept)]
    return Split(torch.from_numpy(mapped), kept, len(dataset) - len(kept)), names


def _state(root: Path, split: str) -> str:
    """Digest of the names, sizes and times of a split's files: decoded images are read back while these stay."""
    places = [place for place in (root / f"{split}.tar", root / split, root) if place.exists()]
    files = [places[0]] if places[0].is_file() else []
    for folder, _, names in os.walk(places[0], followlinks=True):
        files += [Path(folder, name) for name in names]
    lines = [f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}\n" for file in sorted(files)]
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def _load_image(dataset: Any, index: int, contract: InputContract, transform: Compose) -> tuple[np.ndarray, int] | None:
    """One decoded image uint8 C×H×W and its label, or None if it cannot be used."""
    with contextlib.suppress(OSError, SyntaxError, ValueError, Image.DecompressionBombError, tarfile.TarError):
        if hasattr(dataset, "reader"):  # ask timm's reader itself: its data set replaces bad images by others
            file, label, *_ = dataset.reader[index]
            image = file if isinstance(file, Image.Image) else Image.open(file)
        else:
            image, label = dataset[index]
        # 16 or 32 bits a channel: PIL would clip grey ones to white, and reads RGB ones as if they had 8.
        if image.mode.startswith(("I", "F")) or any("16" in str(tile[-1]) for tile in getattr(image, "tile", ())):
            return None
        pixels = np.asarray(transform(image.convert("RGB" if contract.channels == 3 else "L")))
        return (pixels.transpose(2, 0, 1) if pixels.ndim == 3 else pixels[None]), int(cast(int, label))
    return None


def _evaluation_transform(contract: InputContract) -> Compose:
    return Compose(
        [
            Resize(min(contract.height, contract.width), InterpolationMode.BICUBIC),
            CenterCrop((contract.height, contract.width)),
        ]
    )
