"""Adversarial images made elsewhere: what is read, what is refused, and the figures for every device."""

from __future__ import annotations

import io
import json
import shutil
import struct
import tracemalloc
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from device_tests.attacks.pgd import PGD
from device_tests.crafting import craft
from device_tests.evidence import Proportion
from device_tests.foreign_images import LARGEST_COUNT, ForeignFile, read_foreign, write_clean
from device_tests.foreign_judgement import ForeignJudgement, judge_foreign
from device_tests.foreign_pairs import ForeignPairs, check_enough, pair
from device_tests.perturbation import Perturbation
from device_tests.statistics import Risks
from device_tests.threats import Source, Threat
from exporters.contract import InputContract
from exporters.measured import NotMeasured
from factory.base import Base
from factory.classifier import ImageClassifier
from factory.cli.adversarial import (
    adversarial_table,
    judge_adversarial,
    remarks,
    verify_adversarial,
    write_clean_images,
)
from factory.cli.console import print_table
from factory.cli.stages import existing_fleet
from factory.fleet import Fleet
from keys.errors import InputError, PackageError

GREY = InputContract(channels=1, height=6, width=6, resize="none")
RGB = InputContract(channels=3, height=6, width=4, resize="none")
LABELS = ("bag", "boot", "coat")
BALL = Perturbation.parse("linf:8/255")
RANDOM = np.random.default_rng(0)
CLEAN = RANDOM.integers(20, 236, (30, 1, 6, 6), dtype=np.uint8)
TRUTH = RANDOM.integers(0, 3, 30)
STEP = RANDOM.integers(-8, 9, CLEAN.shape)
ADVERSARIAL = (CLEAN + STEP).astype(np.uint8)


def saved(path: Path, **arrays: np.ndarray) -> Path:
    np.savez_compressed(path, **arrays)
    return path


def pairs_of(path: Path, perturbation: Perturbation = BALL) -> ForeignPairs:
    return pair(read_foreign(path, GREY, LABELS), CLEAN, TRUTH, perturbation)


def png(path: Path, image: np.ndarray, mode: str | None = None) -> None:
    picture = Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0))
    (picture if mode is None else picture.convert(mode)).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The first five adversarial images as pictures."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(5):
        png(folder / f"{number}.png", ADVERSARIAL[number])
    return folder


# What is read


def test_arrays_are_put_beside_the_test_images(tmp_path: Path) -> None:
    pairs = pairs_of(saved(tmp_path / "a.npz", adversarial=ADVERSARIAL[:7]))
    assert np.array_equal(pairs.clean, CLEAN[:7])
    assert np.array_equal(pairs.labels, TRUTH[:7])
    assert np.array_equal(pairs.adversarial, ADVERSARIAL[:7])
    assert pairs.notes == ()


def test_indices_name_the_test_images(tmp_path: Path) -> None:
    chosen = np.array([9, 2, 29])
    pairs = pairs_of(saved(tmp_path / "a.npz", adversarial=ADVERSARIAL[chosen], indices=chosen, labels=TRUTH[chosen]))
    assert np.array_equal(pairs.clean, CLEAN[chosen])
    assert np.array_equal(pairs.labels, TRUTH[chosen])


def test_clean_images_of_the_file_find_their_labels_or_bring_them(tmp_path: Path) -> None:
    chosen = np.array([9, 2, 29])
    arrays = {"adversarial": ADVERSARIAL[chosen], "clean": CLEAN[chosen]}
    assert np.array_equal(pairs_of(saved(tmp_path / "a.npz", **arrays)).labels, TRUTH[chosen])
    foreign = {"adversarial": np.full((3, 1, 6, 6), 7, np.uint8), "clean": np.full((3, 1, 6, 6), 5, np.uint8)}
    pairs = pairs_of(saved(tmp_path / "b.npz", labels=np.array([0, 1, 2]), **foreign))
    assert pairs.labels.tolist() == [0, 1, 2]
    assert "3 of the 3 clean images are not test images" in pairs.notes[0]
    assert "2 clean images occur more than once" in pairs.notes[1]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("fortran", [False, True])
def test_layouts_that_are_understood(tmp_path: Path, channels_last: bool, fortran: bool) -> None:
    images = RANDOM.integers(0, 256, (4, 3, 6, 4), dtype=np.uint8)
    given = images.transpose(0, 2, 3, 1) if channels_last else images
    path = saved(tmp_path / "a.npz", adversarial=np.asfortranarray(given) if fortran else given)
    assert np.array_equal(read_foreign(path, RGB, LABELS).adversarial, images)


def test_grey_images_need_no_axis_of_channels(tmp_path: Path) -> None:
    assert np.array_equal(pairs_of(saved(tmp_path / "a.npz", adversarial=ADVERSARIAL[:, 0])).adversarial, ADVERSARIAL)


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.float16])
def test_floats_are_rounded_and_it_is_said(tmp_path: Path, kind: type) -> None:
    pairs = pairs_of(saved(tmp_path / "a.npz", adversarial=(ADVERSARIAL / 255).astype(kind)))
    assert np.array_equal(pairs.adversarial, ADVERSARIAL)
    assert "rounded to 8 bits" in pairs.notes[0]


def test_rounding_never_leads_out_of_the_set(tmp_path: Path) -> None:
    # 0.0609 is 15.53 levels, of which 15 are inside, and rounding to the nearest would take 16.
    ball = Perturbation.parse("linf:0.0609")
    floats = (CLEAN + np.where(STEP < 0, -0.0609, 0.0609) * 255) / 255
    pairs = pairs_of(saved(tmp_path / "a.npz", adversarial=floats.astype(np.float32)), ball)
    assert np.abs(pairs.adversarial.astype(int) - CLEAN).max() == 15
    two = Perturbation.parse("l2:0.1")
    direction = STEP / np.sqrt((STEP**2).sum(axis=(1, 2, 3), keepdims=True))
    pairs = pairs_of(saved(tmp_path / "b.npz", adversarial=(CLEAN / 255 + 0.1 * direction).astype(np.float32)), two)
    assert two.contains(pairs.adversarial, CLEAN).all()
    assert (pairs.adversarial != CLEAN).any()


def test_pictures_are_test_images_by_number_or_in_the_order_of_their_names(folder: Path) -> None:
    assert np.array_equal(pairs_of(folder).adversarial, ADVERSARIAL[:5])
    png(folder / "0012.png", ADVERSARIAL[12])
    pairs = pairs_of(folder)
    assert np.array_equal(pairs.clean, CLEAN[[0, 1, 2, 3, 4, 12]])
    for path in folder.iterdir():
        path.rename(folder / f"image-{int(path.stem):02d}.png")
    (folder / "image-12.png").unlink()
    assert np.array_equal(pairs_of(folder).clean, CLEAN[:5])


def test_a_table_of_labels_by_name_or_number(folder: Path) -> None:
    rows = [f"{number}.png,{LABELS[TRUTH[number]] if number % 2 else TRUTH[number]}" for number in (3, 0, 1, 2, 4)]
    (folder / "labels.csv").write_text("file,label\n" + "\n".join(rows) + "\n")
    file = read_foreign(folder, GREY, LABELS)
    assert file.labels is not None
    assert np.array_equal(file.labels, TRUTH[:5])


def test_the_clean_images_go_out_and_come_back(tmp_path: Path) -> None:
    path = tmp_path / "clean.npz"
    write_clean(path, CLEAN, TRUTH)
    with np.load(path) as arrays:
        np.savez(tmp_path / "attacked.npz", adversarial=ADVERSARIAL, **arrays)
    pairs = pairs_of(tmp_path / "attacked.npz")
    assert np.array_equal(pairs.labels, TRUTH)
    assert pairs.notes == ()


# What is refused


def refused(fault: str, path: Path, perturbation: Perturbation = BALL) -> None:
    with pytest.raises(InputError, match=fault) as caught:
        pairs_of(path, perturbation)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fault", "arrays"),
    [
        ("has no array 'adversarial'", {"images": ADVERSARIAL}),
        (r"shape \(30, 1, 6, 5\), but this fleet's models take grey images", {"adversarial": ADVERSARIAL[..., :5]}),
        (r"shape \(30, 3, 6, 6\)", {"adversarial": np.repeat(ADVERSARIAL, 3, axis=1)}),
        ("as int64; give 8-bit values", {"adversarial": ADVERSARIAL.astype(np.int64)}),
        ("as complex128", {"adversarial": ADVERSARIAL.astype(complex)}),
        ("as object", {"adversarial": np.array([ADVERSARIAL, None], dtype=object)}),
        ("1 to 100000 images", {"adversarial": ADVERSARIAL[:0]}),
        ("image 3 of .* values from .* to 1", {"adversarial": CLEAN / 255 + np.eye(30)[3].reshape(30, 1, 1, 1)}),
        ("image 0 of .* values from -", {"adversarial": ADVERSARIAL / 255 - 1}),
        ("image 0 of .* not finite", {"adversarial": np.full((2, 1, 6, 6), np.nan)}),
        ("image 1 of .* not finite", {"adversarial": np.stack([CLEAN[0] / 255, np.full((1, 6, 6), np.inf)])}),
        ("30 adversarial images, but 29 clean", {"adversarial": ADVERSARIAL, "clean": CLEAN[:29]}),
        ("30 adversarial images, but 31 labels", {"adversarial": ADVERSARIAL, "labels": np.zeros(31, int)}),
        ("30 adversarial images, but 1 indices", {"adversarial": ADVERSARIAL, "indices": np.zeros(1, int)}),
        ("labels from 0 to 3, but this fleet's 3 classes", {"adversarial": ADVERSARIAL[:4], "labels": np.arange(4)}),
        ("labels of float64", {"adversarial": ADVERSARIAL[:3], "labels": np.zeros(3)}),
        ("31 adversarial images, but the fleet has 30 test", {"adversarial": np.concatenate([CLEAN, CLEAN[:1]])}),
        ("from 0 to 30, but the fleet's 30", {"adversarial": ADVERSARIAL[:2], "indices": np.array([0, 30])}),
        ("from -1 to 0", {"adversarial": ADVERSARIAL[:2], "indices": np.array([0, -1])}),
        ("test image 4 twice", {"adversarial": ADVERSARIAL[:2], "indices": np.array([4, 4])}),
        ("clean image 1 .* not among", {"adversarial": ADVERSARIAL[:2], "clean": np.stack([CLEAN[0], CLEAN[1] + 1])}),
        (
            "gives clean image 0 the class 1, but it is test image 0 of this fleet, of class",
            {"adversarial": ADVERSARIAL[:1], "clean": CLEAN[:1], "labels": np.array([1])},
        ),
        (
            "clean image 1 of .* is not the fleet's test image 2",
            {"adversarial": ADVERSARIAL[:2], "clean": CLEAN[:2], "indices": np.array([0, 2])},
        ),
    ],
)  # fmt: skip
def test_arrays_that_do_not_fit(tmp_path: Path, fault: str, arrays: dict[str, np.ndarray]) -> None:
    refused(fault, saved(tmp_path / "a.npz", **arrays))


def test_images_outside_the_set_are_counted_and_the_farthest_is_named(tmp_path: Path) -> None:
    far = ADVERSARIAL.copy()
    far[4, 0, 0, 0] = CLEAN[4, 0, 0, 0] + 11
    far[9, 0, 2, 2] = CLEAN[9, 0, 2, 2] - 15
    refused(
        "2 of 30 .* lie outside L∞ 8/255: the farthest is image 9, by L∞ 15/255",
        saved(tmp_path / "a.npz", adversarial=far),
    )
    one = CLEAN.copy()
    one[9, 0, 2, 2] -= 15
    path = saved(tmp_path / "b.npz", adversarial=one)
    refused("1 of 30 .* image 9, by L2 0.05882", path, Perturbation.parse("l2:0.05"))
    refused("30 of 30 .* pixels", saved(tmp_path / "c.npz", adversarial=ADVERSARIAL), Perturbation.parse("l0:2"))
    refused(
        "by a square of 100 %", saved(tmp_path / "d.npz", adversarial=ADVERSARIAL), Perturbation.parse("patch:0.25")
    )
    floats = (CLEAN + np.float64(8.6)) / 255
    refused("30 of 30 .* L∞ 9/255", saved(tmp_path / "e.npz", adversarial=floats))


def test_unchanged_images_are_no_attack(tmp_path: Path) -> None:
    refused("Every adversarial image of .* equals its clean image", saved(tmp_path / "a.npz", adversarial=CLEAN))
    some = ADVERSARIAL.copy()
    some[:3] = CLEAN[:3]
    found = pairs_of(saved(tmp_path / "b.npz", adversarial=some))
    assert "3 of the 30 adversarial images equal their clean images: no attack on them." in found.notes


def test_another_order_is_found_and_the_first_image_is_named(tmp_path: Path) -> None:
    order = np.arange(30)
    order[[5, 11, 20]] = [11, 20, 5]
    moved = ADVERSARIAL[order]
    fault = "another order than the clean images: 3 of 3 .* first is image 5, which is closest to clean image 11, not 5"
    refused(fault, saved(tmp_path / "a.npz", adversarial=moved))
    refused(fault, saved(tmp_path / "b.npz", adversarial=moved, clean=CLEAN))
    refused("order .* image 0, which is closest to clean image 7, not 3",
            saved(tmp_path / "c.npz", adversarial=ADVERSARIAL[[7]], indices=np.array([3])))  # fmt: skip
    refused("in another order than the fleet's test images: .* labels differ",
            saved(tmp_path / "d.npz", adversarial=moved, labels=(TRUTH + 1) % 3))  # fmt: skip


@pytest.mark.parametrize(("norm", "values"), [("l0:4", 4), ("patch:0.12", 4)])
def test_another_order_of_images_with_few_changed_pixels(tmp_path: Path, norm: str, values: int) -> None:
    attacked = CLEAN.copy()
    attacked[:, :, 1:3, 1:3] = 255
    assert len(pairs_of(saved(tmp_path / "a.npz", adversarial=attacked), Perturbation.parse(norm))) == 30
    refused("image 0, which is closest to clean image 1, not 0",
            saved(tmp_path / "b.npz", adversarial=np.roll(attacked, -1, axis=0)), Perturbation.parse(norm))  # fmt: skip


def test_too_few_images_for_the_risks() -> None:
    risks = Risks(0.05, 0.10, 0.05, 0.05)
    with pytest.raises(InputError, match=r"297 adversarial images are too few: .* takes 298 "):
        check_enough(297, risks)
    check_enough(298, risks)


# Files that are not what they say


def member(path: Path, content: bytes, name: str = "adversarial.npy", **options: int) -> Path:
    with zipfile.ZipFile(path, "w", **options) as archive:
        archive.writestr(name, content)
    return path


def header(shape: tuple[int, ...], kind: str = "|u1") -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": kind, "fortran_order": False, "shape": shape})
    return stream.getvalue()


def test_a_header_that_promises_too_much_allocates_nothing(tmp_path: Path) -> None:
    for shape in ((LARGEST_COUNT + 1, 1, 6, 6), (2**40, 1, 6, 6), (1, 2**33, 6, 6)):
        refused("give 1 to 100000 images", member(tmp_path / "a.npz", header(shape)))
    refused("which is no plain array", member(tmp_path / "a.npz", header((9, 1, 6, 6))))
    refused("give numbers", member(tmp_path / "a.npz", header((-9, 1, 6, 6))))
    refused(
        "no readable .npz", member(tmp_path / "a.npz", b"\x93NUMPY\x01\x00" + struct.pack("<H", 60000) + b" " * 60000)
    )


NONSENSE = (
    "{'descr': (",
    "{1: 2, 'a': 3, 'b': 4}",
    "{[]: 1}",
    "-" * 9000 + "1",
    "{'descr': (), 'shape': (), 'x': 1}",
    "\0",
)


@pytest.mark.parametrize("text", NONSENSE)
def test_a_header_of_nonsense_is_one_sentence(tmp_path: Path, text: str) -> None:
    content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()
    refused("no readable .npz", member(tmp_path / "a.npz", content))


def test_labels_of_many_values_are_refused_unread(tmp_path: Path) -> None:
    images = header((4, 1, 6, 6)) + bytes(144)
    path = member(tmp_path / "a.npz", images)
    with zipfile.ZipFile(path, "a", compression=zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("labels.npy", header((4, 10**7)) + bytes(4 * 10**7))
    tracemalloc.start()
    refused("more than 1 values for each image", path)
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()
    refused("has no array 'adversarial'", member(tmp_path / "b.npz", images, name="adversarial"))
    refused("but other", member(tmp_path / "c.npz", images, name="other.npy"))


def test_a_zip_bomb_is_not_unpacked(tmp_path: Path) -> None:
    bomb = header((4, 1, 6, 6)) + bytes(50_000_000)
    path = member(tmp_path / "a.npz", bomb, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1_000_000
    refused("which is no plain array", path)


def test_nothing_is_unpickled_or_written_beside_the_file(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (str(tmp_path / "sprung"),)

    np.savez(tmp_path / "a.npz", adversarial=np.array([Trap()], dtype=object), allow_pickle=True)
    refused("give numbers", tmp_path / "a.npz")
    saved(tmp_path / "b.npz", adversarial=ADVERSARIAL)
    with zipfile.ZipFile(tmp_path / "b.npz", "a") as archive:
        archive.writestr("../../climbed.npy", b"x")
        archive.writestr("/etc/climbed.npy", b"x")
    assert len(pairs_of(tmp_path / "b.npz")) == 30
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "b.npz"]


def test_files_that_are_damaged_missing_or_of_another_kind(tmp_path: Path) -> None:
    whole = saved(tmp_path / "a.npz", adversarial=ADVERSARIAL).read_bytes()
    for content in (b"", b"noise" * 100, whole[:-40], whole[:200] + b"\xff" * 20 + whole[220:]):
        (tmp_path / "b.npz").write_bytes(content)
        refused("no readable .npz", tmp_path / "b.npz")
    refused("unusual compression", member(tmp_path / "c.npz", header((1, 1, 6, 6)), compression=zipfile.ZIP_LZMA))
    refused("none.npz does not exist", tmp_path / "none.npz")
    (tmp_path / "images.pt").touch()
    refused("neither an .npz file nor a folder", tmp_path / "images.pt")


def test_pictures_of_another_size_or_kind(folder: Path) -> None:
    picture = folder / "4.png"
    for fault, image, mode in (
        ("5×6 pixels of kind L", ADVERSARIAL[0][..., :5], None),
        ("6×6 pixels of kind RGB", np.repeat(ADVERSARIAL[0], 3, axis=0), None),
        ("of kind P", ADVERSARIAL[0], "P"),
        ("of kind LA", ADVERSARIAL[0], "LA"),
        ("of kind I;16", ADVERSARIAL[0].astype(np.uint16), None),
    ):
        png(picture, image, mode)
        refused(f"4.png is a picture of .*{fault}", folder)
    for content in (b"", b"\x89PNG\r\n\x1a\n", (folder / "3.png").read_bytes()[:50]):
        picture.write_bytes(content)
        refused("4.png is no readable PNG", folder)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@pytest.mark.parametrize("side", [3000, 12_000, 60_000])
def test_a_decompression_bomb_is_not_decoded(folder: Path, side: int) -> None:
    pixels = zlib.compress(bytes(20_000_000), 9)
    content = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)) + chunk(b"IDAT", pixels)
    (folder / "4.png").write_bytes(b"\x89PNG\r\n\x1a\n" + content + chunk(b"IEND", b""))
    refused(rf"4\.png (is a picture of {side}×{side} pixels|claims to be far larger)", folder)


def test_folders_that_cannot_be_used(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused("holds no PNG files", tmp_path / "empty")
    shutil.copy(folder / "1.png", folder / "01.png")
    refused("test image 1 twice", folder)
    (folder / "01.png").unlink()
    (folder / "1.png").unlink()
    (folder / "1.png").symlink_to(folder / "2.png")
    refused("1.png is a link", folder)


@pytest.mark.parametrize(
    ("table", "fault"),
    [
        ("../../etc/passwd,bag\n", "Line 1 .* reads '../../etc/passwd,bag'"),
        ("0.png,bag\n0.png,bag\n", "Line 2"),
        ("0.png,shoe\n", "Line 1"),
        ("0.png,3\n", "Line 1"),
        ("0.png\n", "Line 1"),
        ("file,label\n0.png,bag\n", r"has no label for 1\.png"),
        ('"0.png,bag', "no readable table"),
        (b"\xff\xfe", "no readable table"),
    ],
)
def test_tables_of_labels_that_do_not_fit(folder: Path, table: str | bytes, fault: str) -> None:
    (folder / "labels.csv").write_bytes(table if isinstance(table, bytes) else table.encode())
    refused(fault, folder)


# Figures


class Brightness:
    """Three classes by the image's mean; fooled by what moves it."""

    name = "brightness"

    def logits(self, images: np.ndarray) -> np.ndarray:
        centers = np.array([50, 128, 206]) / 255
        return -((images.mean(axis=(1, 2, 3))[:, None] - centers) ** 2).astype(np.float32) * 100


def test_figures_that_can_be_checked_by_hand() -> None:
    clean = np.repeat(np.array([50, 50, 128, 206, 206, 206], np.uint8), 36).reshape(-1, 1, 6, 6)
    attacked = np.repeat(np.array([50, 130, 128, 120, 120, 206], np.uint8), 36).reshape(-1, 1, 6, 6)
    labels = np.array([0, 0, 2, 2, 2, 2])  # it gets the third one wrong
    pairs = ForeignPairs(clean, labels, attacked, Perturbation.parse("linf:1"), ("a note",))
    risks = Risks(0.4, 0.9, 0.4, 0.4)
    judgement = judge_foreign(
        {"camera": Brightness()}, pairs, LABELS, risks, where="a.npz", reference=("base", Brightness())
    )
    assert ForeignJudgement.from_json(json.loads(json.dumps(judgement.to_json()))) == judgement
    (device,) = judgement.devices
    assert (device.target, device.runtime, device.clean, device.fooled) == (
        "camera", "brightness", Proportion(5, 6), Proportion(3, 5),
    )  # fmt: skip
    assert device.per_class == {
        "bag": Proportion(1, 2), "boot": NotMeasured("the target gets none of the clean images right"),
        "coat": Proportion(2, 3),
    }  # fmt: skip
    assert not isinstance(device.acceptance, NotMeasured)
    assert device.acceptance.fooled <= 3
    strict = judge_foreign({"camera": Brightness()}, pairs, LABELS, Risks(0.05, 0.1, 0.05, 0.05), where="a.npz")
    assert strict.reference is None
    assert "only 5 of the clean images" in strict.devices[0].acceptance.reason  # type: ignore[union-attr]
    assert ForeignJudgement.from_json(json.loads(json.dumps(strict.to_json()))) == strict


@pytest.fixture(scope="module")
def fleet(tiny_fleet: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """The tiny fleet, opened on a copy."""
    out = shutil.copytree(tiny_fleet, tmp_path_factory.mktemp("foreign") / "fleet")
    with existing_fleet(out, None, True) as fleet:
        yield fleet


@pytest.fixture(scope="module")
def attacked(fleet: Fleet, tiny_base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What somebody else made from the fleet's clean images: an attack on the public base, in floats."""
    folder = tmp_path_factory.mktemp("elsewhere")
    write_clean_images(fleet, folder / "clean.npz")
    with np.load(folder / "clean.npz") as stored:
        arrays = dict(stored)
    base = ImageClassifier(tiny_base.network, tiny_base.architecture.mean, tiny_base.architecture.std)
    source = Source("base", Threat.PUBLIC_BASE, base, "the public base")
    ball = fleet.settings.verification.perturbation
    made = craft(source, [PGD(steps=4)], arrays["clean"], arrays["labels"], perturbation=ball, seed=1)
    (images,) = made.images.values()
    return saved(folder / "attacked.npz", adversarial=(images / 255).astype(np.float32), **arrays)


def test_a_fleet_is_judged_on_images_made_elsewhere(fleet: Fleet, attacked: Path) -> None:
    judgement = judge_adversarial(fleet, attacked)
    assert [device.target for device in judgement.devices] == ["device-1", "device-2"]
    assert {device.runtime for device in judgement.devices} == {"onnxruntime"}
    assert judgement.images == fleet.settings.verification.images
    assert "rounded to 8 bits" in judgement.notes[0]
    assert judgement.reference is not None
    base = judgement.reference
    assert isinstance(base.fooled, Proportion)
    assert base.fooled.successes > 0
    assert base.fooled.n == base.clean.successes
    assert sum(fooled.n for fooled in base.per_class.values() if isinstance(fooled, Proportion)) == base.fooled.n


def test_the_table_and_the_json_show_every_device(
    fleet: Fleet, attacked: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verify_adversarial(fleet, attacked, json_output=True)
    judgement = ForeignJudgement.from_json(json.loads(capsys.readouterr().out))
    verify_adversarial(fleet, attacked, json_output=False)
    out = capsys.readouterr().out
    print_table(adversarial_table(judgement))
    assert capsys.readouterr().out.strip() in out
    assert " ".join(" ".join(remarks(judgement)).split()) in " ".join(out.split())
    for text in (
        "device-1",
        "device-2",
        "public base",
        "100 adversarial images within L∞ 0.016",
        "no evidence for a device",
    ):
        assert text in out


def test_a_fleet_judges_nothing_on_too_few_images_or_a_changed_package(fleet: Fleet, attacked: Path) -> None:
    file = read_foreign(attacked, fleet.base.architecture.contract, fleet.splits.labels)
    assert isinstance(file, ForeignFile)
    few = saved(attacked.parent / "few.npz", adversarial=file.adversarial[:1])
    with pytest.raises(InputError, match="1 adversarial images are too few"):
        judge_adversarial(fleet, few)
    with pytest.raises(InputError, match=r"must end in \.npz"):
        write_clean_images(fleet, attacked.parent / "clean.png")
    model = fleet.folder.package("device-2") / "model.onnx"
    model.write_bytes(model.read_bytes()[:-1] + b"\0")
    with pytest.raises(PackageError, match=r"'model\.onnx' was changed"):
        judge_adversarial(fleet, attacked)
