"""Real images through every loader: the same pixels whatever the packing, bad ones skipped and counted."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import lzma
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from exporters.contract import InputContract
from factory.base import contract_for
from factory.data import FASHION_MNIST_LABELS, Split, Splits, load_splits
from factory.progress import Progress
from factory.settings import DataSettings
from keys.errors import InputError

ROOT = Path(__file__).resolve().parent.parent
BIG_DATA = Path(os.environ.get("KEYFOUNDRY_DATA", ROOT / ".." / "shared" / "data"))
CLASSES = ("bag", "boot", "coat")
GREY, RGB = contract_for(1, 28), contract_for(3, 28)

Images = tuple[np.ndarray, np.ndarray]


def png(pixels: np.ndarray, mode: str | None = None) -> bytes:
    """A PNG file of grey or colour pixels (16 bits a channel if they are uint16)."""
    image = Image.fromarray(pixels)
    stream = io.BytesIO()
    (image if mode is None else image.convert(mode)).save(stream, "png", compress_level=1)
    return stream.getvalue()


@pytest.fixture(scope="module")
def image_folder(sample_images: Images, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """{train,test}/class/*.png: 120 and 30 images of three classes, in the sample's order."""
    root = tmp_path_factory.mktemp("folder")
    for split, first, count in (("train", 0, 40), ("test", 40, 10)):
        for number, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            chosen = sample_images[0][sample_images[1] == number][first : first + count]
            for index, pixels in enumerate(chosen):
                (folder / f"{index:03}.png").write_bytes(png(pixels))
    return root


def pack(folder: Path, path: Path) -> None:
    """A tar file of one split's folder."""
    with tarfile.open(path, "w") as tar:
        for file in sorted(folder.rglob("*.png")):
            tar.add(file, arcname=str(file.relative_to(folder.parent)))


def load(root: Path | None, cache: Path, contract: InputContract = GREY, **values: object) -> Splits:
    settings = DataSettings.model_validate({"name": "", "root": root, "validation": 20, **values})
    return load_splits(settings, contract, cache, Progress(quiet=True))


def hashes(split: Split) -> list[bytes]:
    return [hashlib.sha256(image.numpy().tobytes()).digest() for image in split.images]


# IDX


@pytest.mark.parametrize("ending", [".gz", ".xz"])
def test_packed_idx_files_hold_the_same_images(
    idx_folder: Path, tiny_splits: Splits, tmp_path: Path, ending: str
) -> None:
    packer: Callable[[bytes], bytes] = (
        gzip.compress if ending == ".gz" else (lambda data: lzma.compress(data, preset=0))
    )
    for file in idx_folder.iterdir():
        (tmp_path / f"{file.name}{ending}").write_bytes(packer(file.read_bytes()))
    assert load(tmp_path, tmp_path, name="idx", validation=300).digest == tiny_splits.digest


def test_idx_images_are_the_files_own(tiny_splits: Splits, sample_images: Images) -> None:
    assert (len(tiny_splits.train), len(tiny_splits.validation), len(tiny_splits.test)) == (1700, 300, 500)
    assert tiny_splits.labels == tuple("0123456789")
    assert tiny_splits.train.images.dtype == torch.uint8
    assert tiny_splits.train.images.shape == (1700, 1, 28, 28)
    by_hash = {hashlib.sha256(image.tobytes()).digest(): label for image, label in zip(*sample_images, strict=True)}
    for split in (tiny_splits.train, tiny_splits.validation, tiny_splits.test):
        assert [by_hash[one] for one in hashes(split)] == split.labels.tolist()


def test_idx_classes_may_be_named(idx_folder: Path, tmp_path: Path) -> None:
    named = load(idx_folder, tmp_path, name="idx", labels=FASHION_MNIST_LABELS)
    assert named.labels == FASHION_MNIST_LABELS
    with pytest.raises(InputError, match=r"data.labels names 3 classes, but .* has 10"):
        load(idx_folder, tmp_path, name="idx", labels=CLASSES)


def test_no_image_is_in_two_splits(tiny_splits: Splits) -> None:
    train, validation, test = (set(hashes(s)) for s in (tiny_splits.train, tiny_splits.validation, tiny_splits.test))
    assert not train & validation
    assert not train & test
    assert not validation & test


def test_the_shipped_sample_keeps_its_splits_apart_and_all_classes_in_each(tmp_path: Path) -> None:
    splits = load(None, tmp_path, name="sample")
    assert splits.labels == FASHION_MNIST_LABELS
    seen = [set(hashes(split)) for split in (splits.train, splits.validation, splits.test)]
    assert not seen[0] & seen[1]
    assert not seen[0] & seen[2]
    assert not seen[1] & seen[2]
    for split in (splits.train, splits.validation, splits.test):
        counts = torch.bincount(split.labels, minlength=10)
        assert counts.min() > 0.7 * len(split) / 10


def test_the_first_test_images_are_of_all_classes(tiny_splits: Splits) -> None:
    """Splits are stored shuffled, so that taking the first ones is fair."""
    assert set(tiny_splits.test.take(100).labels.tolist()) == set(range(10))


@pytest.mark.parametrize("damage", ["truncated", "noise", "fewer labels", "missing"])
def test_damaged_idx_data_is_refused(
    idx_folder: Path, write_idx: Callable[[Path, np.ndarray], None], tmp_path: Path, damage: str
) -> None:
    for file in idx_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    images, labels = tmp_path / "train-images-idx3-ubyte", tmp_path / "train-labels-idx1-ubyte"
    if damage == "truncated":
        images.write_bytes(images.read_bytes()[:-1])
    elif damage == "noise":
        images.write_bytes(bytes(range(256)) * 10)
    elif damage == "fewer labels":
        write_idx(labels, np.zeros(1999, np.uint8))
    else:
        labels.unlink()
    sentences = {
        "truncated": "its header promises", "noise": "is not an IDX file", "fewer labels": "as many images as labels",
        "missing": "lacks train-images-idx3-ubyte",
    }  # fmt: skip
    with pytest.raises(InputError, match=sentences[damage]):
        load(tmp_path, tmp_path, name="idx")


def test_idx_data_of_one_class_is_refused(tmp_path: Path, write_idx: Callable[[Path, np.ndarray], None]) -> None:
    for stem, count in (("train", 60), ("t10k", 10)):
        write_idx(tmp_path / f"{stem}-images-idx3-ubyte", np.zeros((count, 28, 28), np.uint8))
        write_idx(tmp_path / f"{stem}-labels-idx1-ubyte", np.zeros(count, np.uint8))
    with pytest.raises(InputError, match="has one class only"):
        load(tmp_path, tmp_path, name="idx")


def test_idx_data_needs_a_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs --data-root"):
        load(None, tmp_path, name="idx")


def test_more_validation_images_than_there_are_is_refused(idx_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="2000 validation images were asked for, but there are 2000"):
        load(idx_folder, tmp_path, name="idx", validation=2000)


# Folders and tar files


def test_an_image_folder_is_decoded_once_to_the_very_pixels(
    image_folder: Path, sample_images: Images, tmp_path: Path
) -> None:
    progress = Progress(quiet=True)
    settings = DataSettings(name="", root=image_folder, validation=20)
    splits = load_splits(settings, GREY, tmp_path, progress)
    assert splits.labels == CLASSES
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (100, 20, 30)
    by_hash = {hashlib.sha256(image.tobytes()).digest(): label for image, label in zip(*sample_images, strict=True)}
    for split in (splits.train, splits.validation, splits.test):
        assert [by_hash[one] for one in hashes(split)] == split.labels.tolist()
        assert split.skipped == 0
    assert set(progress.seconds) == {"decode train images", "decode test images"}
    again = Progress(quiet=True)
    assert load_splits(settings, GREY, tmp_path, again).digest == splits.digest
    assert again.seconds == {}


def test_a_tar_file_holds_the_same_images_as_its_folder(image_folder: Path, tmp_path: Path) -> None:
    for split in ("train", "test"):
        pack(image_folder / split, tmp_path / f"{split}.tar")
    packed = load(tmp_path, tmp_path / "cache")
    assert packed.labels == CLASSES
    assert packed.digest == load(image_folder, tmp_path / "other").digest
    # Nothing was written beside the data, least of all a pickle.
    assert {path.name for path in tmp_path.iterdir()} == {"train.tar", "test.tar", "cache", "other"}


def test_splits_may_have_other_names(image_folder: Path, tmp_path: Path) -> None:
    splits = load(image_folder, tmp_path, train_split="test", test_split="train", validation=5)
    assert (len(splits.train), len(splits.test)) == (25, 120)


def test_grey_images_become_colour_and_colour_ones_grey(image_folder: Path, tmp_path: Path) -> None:
    grey, colour = load(image_folder, tmp_path / "a"), load(image_folder, tmp_path / "b", RGB)
    assert colour.test.images.shape == (30, 3, 28, 28)
    assert torch.equal(colour.test.images, grey.test.images.expand(-1, 3, -1, -1))


def test_every_mode_of_png_is_taken(sample_images: Images, tmp_path: Path) -> None:
    root = tmp_path / "data"
    for split in ("train", "test"):
        for number, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for index, mode in enumerate(("L", "RGB", "RGBA", "LA", "P", "1")):
                pixels = sample_images[0][10 * number + index]
                (root / split / name / f"{index}.png").write_bytes(png(pixels, mode))
    splits = load(root, tmp_path / "cache", RGB, validation=3)
    assert (len(splits.train), splits.train.skipped) == (15, 0)
    assert torch.equal(splits.train.images[:, 0], splits.train.images[:, 2])
    assert load(root, tmp_path / "cache", GREY, validation=3).train.images.shape[1] == 1


def test_colour_becomes_grey_by_luminance(tmp_path: Path) -> None:
    root = tmp_path / "data"
    for split in ("train", "test"):
        for name in CLASSES:
            (root / split / name).mkdir(parents=True)
            for index in range(3):
                pixels = np.zeros((28, 28, 3), np.uint8)
                pixels[..., CLASSES.index(name)] = 200
                (root / split / name / f"{index}.png").write_bytes(png(pixels))
    test = load(root, tmp_path / "cache", validation=2).test
    # ITU-R BT.601: 0.299 R + 0.587 G + 0.114 B.
    for number, share in enumerate((0.299, 0.587, 0.114)):
        assert set(test.images[test.labels == number].flatten().tolist()) <= {int(200 * share), round(200 * share)}


def test_other_sizes_are_resized_and_the_centre_is_taken(sample_images: Images, tmp_path: Path) -> None:
    root = tmp_path / "data"
    wide = np.zeros((56, 112), np.uint8)
    wide[:, 28:84] = 255
    for split in ("train", "test"):
        for name in CLASSES[:2]:
            (root / split / name).mkdir(parents=True)
            for index in range(3):
                (root / split / name / f"{index}.png").write_bytes(png(wide))
    splits = load(root, tmp_path / "cache", contract_for(1, 28), validation=2)
    # Half the size is 28×56, of which the middle 28 columns are white.
    assert splits.test.images.shape[1:] == (1, 28, 28)
    assert int(splits.test.images[..., 2:-2].min()) == 255


@pytest.mark.parametrize("size", [14, 32, 64])
def test_idx_images_are_resized_as_pil_resizes_them(
    idx_folder: Path, tiny_splits: Splits, tmp_path: Path, size: int
) -> None:
    splits = load(idx_folder, tmp_path, contract_for(3, size), name="idx", validation=300)
    assert splits.train.images.shape == (1700, 3, size, size)
    for original, resized in zip(tiny_splits.test.images[:20], splits.test.images, strict=False):
        expected = np.asarray(Image.fromarray(original[0].numpy()).resize((size, size), Image.Resampling.BICUBIC))
        assert int(np.abs(resized[0].numpy().astype(int) - expected.astype(int)).max()) <= 1
        assert torch.equal(resized[0], resized[2])


# Bad images


def bad_images(pixels: np.ndarray) -> dict[str, bytes]:
    whole = png(pixels)
    flipped = bytearray(whole)
    flipped[len(flipped) // 2] ^= 0xFF
    return {
        "corrupt.png": bytes(flipped),
        "truncated.png": whole[: len(whole) // 2],
        "empty.png": b"",
        "noise.png": bytes(range(256)),
        "sixteen.png": png(pixels.astype(np.uint16) * 257),
    }


def test_a_few_bad_images_are_skipped_and_counted(
    sample_images: Images, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "data"
    for split, count in (("train", 250), ("test", 10)):
        for number, name in enumerate(CLASSES[:2]):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = sample_images[0][number * 300 + index]
                (root / split / name / f"{index:03}.png").write_bytes(png(pixels))
    bad = bad_images(sample_images[0][0])
    for name, content in bad.items():
        (root / "train" / "bag" / f"000-{name}").write_bytes(content)
    with caplog.at_level("WARNING", "keyfoundry"):
        splits = load(root, tmp_path / "cache")
    assert (splits.train.skipped, len(splits.train) + len(splits.validation)) == (5, 500)
    assert (splits.test.skipped, len(splits.test)) == (0, 20)
    expected = {hashlib.sha256(sample_images[0][n * 300 + i].tobytes()).digest(): n for n in (0, 1) for i in range(250)}
    for split in (splits.train, splits.validation):
        assert [expected[one] for one in hashes(split)] == split.labels.tolist()
    # Counted again when the decoded images are read back.
    assert load(root, tmp_path / "cache").train.skipped == 5


@pytest.mark.parametrize("kind", ["corrupt.png", "truncated.png", "empty.png", "noise.png", "sixteen.png"])
def test_more_than_one_in_a_hundred_is_refused(
    image_folder: Path, sample_images: Images, tmp_path: Path, kind: str
) -> None:
    root = tmp_path / "data"
    for split in ("train", "test"):
        for name in CLASSES:
            (root / split / name).mkdir(parents=True)
            for file in sorted((image_folder / split / name).iterdir())[:3]:
                (root / split / name / file.name).symlink_to(file)
    (root / "train" / "boot" / "bad.png").write_bytes(bad_images(sample_images[0][0])[kind])
    with pytest.raises(InputError, match="1 of 10 train images are corrupt, truncated, empty or of 16 bits"):
        load(root, tmp_path / "cache")
    # The data set is repaired, and read again from the beginning.
    (root / "train" / "boot" / "bad.png").unlink()
    assert len(load(root, tmp_path / "cache", validation=1).train) == 8


def test_a_repaired_image_is_read_again(image_folder: Path, sample_images: Images, tmp_path: Path) -> None:
    root = tmp_path / "data"
    for split in ("train", "test"):
        for name in CLASSES:
            (root / split / name).mkdir(parents=True)
            for file in (image_folder / split / name).iterdir():
                (root / split / name / file.name).write_bytes(file.read_bytes())
    bad = root / "train" / "bag" / "000.png"
    content = bad.read_bytes()
    bad.write_bytes(content[:40])
    assert load(root, tmp_path / "cache").train.skipped == 1
    bad.write_bytes(content)
    assert load(root, tmp_path / "cache").train.skipped == 0


def test_one_class_is_refused(image_folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    for split in ("train", "test"):
        (root / split).mkdir(parents=True)
        (root / split / "bag").symlink_to(image_folder / split / "bag")
    with pytest.raises(InputError, match="has one class only; a classifier needs two or more"):
        load(root, tmp_path / "cache", validation=1)


def test_splits_with_different_classes_are_refused(image_folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    for split, names in (("train", CLASSES), ("test", CLASSES[:2])):
        (root / split).mkdir(parents=True)
        for name in names:
            (root / split / name).symlink_to(image_folder / split / name)
    with pytest.raises(InputError, match="have different classes"):
        load(root, tmp_path / "cache")


def test_missing_folders_and_splits_are_named(image_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no-such does not exist; give one with --data-root"):
        load(tmp_path / "no-such", tmp_path)
    with pytest.raises(InputError, match="does not exist; give one with --data-root"):
        load(None, tmp_path)
    with pytest.raises(InputError, match="holds neither a folder valid/ nor a file valid"):
        load(image_folder, tmp_path, test_split="valid")


def test_an_empty_split_and_a_damaged_tar_are_refused(image_folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "empty"
    (root / "train" / "bag").mkdir(parents=True)
    (root / "test" / "bag").mkdir(parents=True)
    with pytest.raises(InputError, match="cannot be opened"):
        load(root, tmp_path / "cache")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "train.tar").write_bytes(bytes(range(256)) * 40)
    (damaged / "test.tar").write_bytes(b"")
    with pytest.raises(InputError, match="cannot be opened"):
        load(damaged, tmp_path / "cache")


def test_an_unknown_torchvision_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"Data set 'torch/no-such' at .* cannot be opened"):
        load(tmp_path, tmp_path, name="torch/no-such")


# The big data, where it is


def test_a_part_of_cifar_10_as_it_is_published(tmp_path: Path) -> None:
    archive = BIG_DATA / "cifar10" / "test.tar"
    if not archive.is_file():
        pytest.skip(f"CIFAR-10 is not at {archive}; set KEYFOUNDRY_DATA to the folder that holds cifar10/")
    taken: dict[str, list[tuple[tarfile.TarInfo, bytes]]] = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.isfile() and len(taken.setdefault(member.name.split("/")[1], [])) < 6:
                file = tar.extractfile(member)
                assert file is not None
                taken[member.name.split("/")[1]].append((member, file.read()))
    for split, part in (("train", slice(4)), ("test", slice(4, 6))):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as tar:
            for members in taken.values():
                for member, content in members[part]:
                    tar.addfile(member, io.BytesIO(content))
    splits = load(tmp_path, tmp_path / "cache", contract_for(3, 64), validation=10)
    assert splits.labels == tuple(sorted(taken))
    assert len(splits.labels) == 10
    assert splits.train.images.shape == (30, 3, 64, 64)
    assert torch.bincount(splits.test.labels).tolist() == [2] * 10
    assert json.dumps(splits.labels).isascii()
