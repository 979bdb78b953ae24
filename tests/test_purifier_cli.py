"""``keyfoundry purify``: images in and out, a run that is killed, models of all kinds, one sentence a fault."""

from __future__ import annotations

import io
import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from onnx import TensorProto, helper, load_model_from_string
from PIL import Image

from exporters.contract import InputContract
from factory.purifier.image_files import read_images
from keys.errors import InputError
from keys.signing import SigningKey, write_public_key

GREY_8X8 = InputContract(channels=1, height=8, width=8, resize="bicubic to 8x8, no crop")
QUICK = ("--steps", 40, "--every", 5, "--width", 4, "--recognisable", 10, "--quiet")


@pytest.fixture(scope="module")
def small_images(sample_images: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Six real images, shrunk to uint8 6×8×8."""
    return np.stack([np.asarray(Image.fromarray(image).resize((8, 8))) for image in sample_images[0][:6]])


@pytest.fixture
def files(small_images: np.ndarray, tmp_path: Path) -> list[Path]:
    """Five images in three files: a PNG, a JPEG, and a .npy of three."""
    folder = tmp_path / "images"
    folder.mkdir()
    Image.fromarray(small_images[0]).save(folder / "shirt.png")
    Image.fromarray(small_images[1]).save(folder / "boot.jpg", quality=95)
    np.save(folder / "many.npy", small_images[2:5])
    return [folder / name for name in ("shirt.png", "boot.jpg", "many.npy")]


@pytest.fixture
def onnx_path(device_package: Path) -> Path:
    """A plain ONNX file: one linear layer on 8×8 grey images, three classes."""
    return device_package / "model.onnx"


NAMES = ("shirt", "boot", "many-0", "many-1", "many-2")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def test_every_image_gets_three_files_and_a_second_run_does_nothing(
    keyfoundry: Callable[..., Any], files: list[Path], onnx_path: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = ("purify", *files, "--model", onnx_path, "--out", out, *QUICK, "--batch", 2)
    done = keyfoundry(*command)
    assert done.code == 0, done.err
    written = contents(out)
    assert set(written) == {f"{name}{end}" for name in NAMES for end in (".png", ".trajectory.png", ".json")}
    for name in NAMES:
        purified = Image.open(io.BytesIO(written[f"{name}.png"]))
        assert (purified.size, purified.mode) == ((8, 8), "L")
        assert Image.open(io.BytesIO(written[f"{name}.trajectory.png"])).size[0] > 500
        record = json.loads(written[f"{name}.json"])
        assert record["trajectory"]["steps"] == [5, 10, 15, 20, 25, 30, 35, 40]
        np.testing.assert_allclose(np.sum(record["trajectory"]["probabilities"], axis=1), 1, atol=1e-3)
        assert record["settings"]["steps"] == 40
        assert (record["purified"]["label"] == record["given"]["label"]) == (not record["boundaries"])
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    again = keyfoundry(*command, "--json")
    assert [record["image"] for record in json.loads(again.out)] == list(NAMES)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir() if path in before} == before
    # Other settings are another result.
    assert keyfoundry("purify", files[0], "--model", onnx_path, "--out", out, *QUICK, "--seed", 1).code == 0
    assert contents(out)["shirt.json"] != written["shirt.json"]


def test_a_killed_run_goes_on_and_ends_in_the_same_files(
    keyfoundry: Callable[..., Any], start_keyfoundry: Callable[..., subprocess.Popen[str]], files: list[Path],
    onnx_path: Path, tmp_path: Path,
) -> None:  # fmt: skip
    def command(out: str) -> tuple[object, ...]:
        return (
            "purify", files[0], "--model", onnx_path, "--out", tmp_path / out, "--steps", 600, "--every", 50,
            "--width", 4, "--quiet",
        )  # fmt: skip

    process = start_keyfoundry(*command("killed"))
    until = time.monotonic() + 120
    while not list((tmp_path / "killed").glob("unfinished/*.safetensors")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert not list((tmp_path / "killed").glob("*.json"))
    assert keyfoundry(*command("killed")).code == 0
    assert keyfoundry(*command("whole")).code == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert not (tmp_path / "killed" / "unfinished").exists()


def test_a_package_is_verified_where_a_key_is_given(
    keyfoundry: Callable[..., Any], files: list[Path], device_package: Path, signing_key: SigningKey, tmp_path: Path
) -> None:
    key, out = tmp_path / "signing-key.pub", tmp_path / "out"
    write_public_key(key, signing_key.public_bytes)
    command = ("purify", files[0], "--model", device_package, "--out", out, *QUICK)
    done = keyfoundry(*command, "--public-key", key)
    assert done.code == 0, done.err
    record = json.loads((out / "shirt.json").read_text())
    assert record["model_state"] == "signature and digests verified"
    assert record["given"]["name"] in ("bag", "boot", "coat")
    assert "not verified" in keyfoundry(*command, "--seed", 1).out
    (device_package / "model.onnx").write_bytes(b"changed")
    for more in ((), ("--public-key", key)):
        refused = keyfoundry(*command, *more)
        assert refused.code == 5
        assert refused.err.count("\n") == 1


def test_a_diverging_optimisation_fails_with_the_names_and_writes_the_record(
    keyfoundry: Callable[..., Any], files: list[Path], onnx_path: Path, tmp_path: Path
) -> None:
    command = ("purify", *files[:2], "--model", onnx_path, "--out", tmp_path, *QUICK, "--learning-rate", 1000)
    for _ in range(2):
        done = keyfoundry(*command)
        assert done.code == 6
        assert done.err.count("\n") == 1
        assert "2 of 2 images diverged (boot: " in done.err
    assert "failure" in json.loads((tmp_path / "shirt.json").read_text())
    assert not (tmp_path / "shirt.png").exists()


def test_no_image_is_written_over(
    keyfoundry: Callable[..., Any], onnx_path: Path, small_images: np.ndarray, tmp_path: Path
) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    photo, drawn = folder / "photo.png", folder / "photo.trajectory.png"
    for path in (photo, drawn):
        Image.fromarray(small_images[0]).save(path)
    before = contents(folder)
    for images, out, said in (
        ([photo], folder, "photo.png is one of the images to purify"),
        ([photo, drawn], tmp_path / "out", "would be written for photo and for photo.trajectory"),
    ):
        refused = keyfoundry("purify", *images, "--model", onnx_path, "--out", out, *QUICK, "--learning-rate", 1000)
        assert refused.code == 3
        assert said in refused.err
    assert contents(folder) == before


def test_a_folder_in_use_is_left_alone(
    keyfoundry: Callable[..., Any], files: list[Path], onnx_path: Path, tmp_path: Path
) -> None:
    with FileLock(tmp_path / ".lock"):
        done = keyfoundry("purify", files[0], "--model", onnx_path, "--out", tmp_path, *QUICK)
    assert done.code == 7
    assert "Another run is purifying" in done.err


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("gone.png", None, "cannot be read"),
        ("broken.png", b"\x89PNG\r\n\x1a\nno picture", "is no readable PNG file"),
        ("text.npy", b"hello", "is no readable .npy file"),
        ("notes.txt", b"hello", "is no PNG, JPEG or .npy file"),
    ],
)
def test_an_unreadable_image_is_one_sentence(
    keyfoundry: Callable[..., Any], onnx_path: Path, tmp_path: Path, name: str, data: bytes | None, said: str
) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    done = keyfoundry("purify", tmp_path / name, "--model", onnx_path, "--out", tmp_path / "out", *QUICK)
    assert done.code == 3
    assert done.err.count("\n") == 1
    assert said in done.err


def saved(path: Path, image: Image.Image) -> Path:
    image.save(path)
    return path


def test_pictures_of_another_size_or_kind_are_refused(tmp_path: Path) -> None:
    grey = Image.new("L", (9, 8))
    with pytest.raises(InputError, match="1 channel, 8×9 pixels, but the model takes grey of 1 channel, 8×8"):
        read_images([saved(tmp_path / "a.png", grey)], GREY_8X8)
    with pytest.raises(InputError, match="3 channels"):
        read_images([saved(tmp_path / "b.png", Image.new("RGB", (8, 8)))], GREY_8X8)
    with pytest.raises(InputError, match="of kind P"):
        read_images([saved(tmp_path / "c.png", Image.new("P", (8, 8)))], None)
    with pytest.raises(InputError, match="purify images of one size"):
        read_images([tmp_path / "a.png", saved(tmp_path / "d.png", Image.new("L", (8, 8)))], None)
    (tmp_path / "other").mkdir()
    with pytest.raises(InputError, match="Two images are called 'd'"):
        read_images([tmp_path / "d.png", saved(tmp_path / "other" / "d.png", Image.new("L", (8, 8)))], None)


@pytest.mark.parametrize(
    ("shape", "count"),
    [((8, 8), 1), ((1, 8, 8), 1), ((8, 8, 1), 1), ((4, 8, 8), 4), ((2, 1, 8, 8), 2), ((2, 8, 8, 1), 2)],
)
def test_arrays_of_every_layout_are_read(tmp_path: Path, shape: tuple[int, ...], count: int) -> None:
    values = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    for name, array in (("levels", values), ("floats", values / 255)):
        np.save(tmp_path / f"{name}.npy", array)
        found = read_images([tmp_path / f"{name}.npy"], GREY_8X8)
        assert len(found) == count
        np.testing.assert_allclose(np.stack([one.pixels for one in found]).ravel(), values.ravel() / 255, atol=1e-6)


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.zeros((8, 9)), "1 channel, 8×9 pixels, but"),
        (np.full((8, 8), 2.0), r"outside \[0, 1\]"),
        (np.full((8, 8), np.nan), r"outside \[0, 1\]"),
        (np.zeros((8, 8), dtype=np.int32), "no 8-bit values and no floats"),
        (np.zeros((0, 8, 8)), "holds no images"),
        (np.zeros((2, 3, 4, 8, 8)), "which is no image"),
    ],
)
def test_arrays_that_are_no_images_are_refused(tmp_path: Path, array: np.ndarray, said: str) -> None:
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(InputError, match=said):
        read_images([tmp_path / "x.npy"], GREY_8X8)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match=r"is no readable \.npy file of numbers"):
        read_images([tmp_path / "x.npy"], None)


def with_softmax(model: bytes) -> bytes:
    proto = load_model_from_string(model)
    proto.graph.node[-1].output[0] = "raw"
    proto.graph.node.append(helper.make_node("Softmax", ["raw"], ["logits"]))
    return proto.SerializeToString()


def with_three_axes(model: bytes) -> bytes:
    proto = load_model_from_string(model)
    proto.graph.input[0].CopyFrom(helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 8, 8]))
    return proto.SerializeToString()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (with_softmax, "gives probabilities"),
        (with_three_axes, "a source takes float32 N×C×H×W"),
        (lambda model: model[:50], "is no ONNX file"),
    ],
)
def test_a_model_that_cannot_be_asked_is_refused(
    keyfoundry: Callable[..., Any], files: list[Path], onnx_path: Path, tmp_path: Path,
    change: Callable[[bytes], bytes], said: str,
) -> None:  # fmt: skip
    path = tmp_path / "other.onnx"
    path.write_bytes(change(onnx_path.read_bytes()))
    done = keyfoundry("purify", files[0], "--model", path, "--out", tmp_path / "out", *QUICK)
    assert done.code == 3
    assert done.err.count("\n") == 1
    assert said in done.err


def test_a_key_belongs_to_packages_only(
    keyfoundry: Callable[..., Any], files: list[Path], onnx_path: Path, tmp_path: Path
) -> None:
    done = keyfoundry(
        "purify", files[0], "--model", onnx_path, "--public-key", "key.pub", "--out", tmp_path / "out", *QUICK
    )
    assert done.code == 3
    assert "only packages are signed" in done.err
