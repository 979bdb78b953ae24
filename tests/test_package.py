"""The package: what is released opens, and each way to tamper with it is refused with its own sentence."""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from exporters.golden import Golden, read_arrays, read_golden
from exporters.manifest import MAX_MANIFEST_BYTES, FileDigest, Manifest, parse_manifest
from exporters.package import (
    add_evidence,
    digest_folder,
    inspect_package,
    open_package,
    sign_package,
    write_package,
)
from exporters.package_rules import signed_message, verify_package
from keys.errors import InputError, PackageError
from keys.files import folder_being_written
from keys.signing import SigningKey

FILES = {
    "model.onnx": b"onnx bytes",
    "golden.npz": b"npz bytes, longer",
    "model.mlpackage/Manifest.json": b"{}",
    "model.mlpackage/Data/com.apple.CoreML/weights/weight.bin": b"\0\1\2\3weights",
}


@pytest.fixture
def package(tmp_path: Path, manifest: Manifest, signing_key: SigningKey) -> Path:
    path = tmp_path / "package"
    with folder_being_written(path) as folder:
        for name, data in FILES.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        write_package(folder, manifest)
    sign_package(path, signing_key)
    return path


def resign(package: Path, key: SigningKey, change: Callable[[dict[str, object]], object]) -> None:
    """Change the manifest as a factory with another program could, and sign what came out."""
    document = json.loads((package / "manifest.json").read_bytes())
    change(document)
    data = json.dumps(document).encode()
    (package / "manifest.json").write_bytes(data)
    (package / "manifest.sig").write_bytes(key.sign(signed_message(data)))


def test_a_released_package_opens_and_gives_its_files(package: Path, signing_key: SigningKey) -> None:
    key, fleet = signing_key.public_bytes, "00112233445566ff"
    opened = open_package(package, key, device_id="camera-01", fleet_id=fleet)
    assert {name: opened.read(name) for name in opened.manifest.files} == FILES
    assert opened.manifest.labels == ("bag", "boot", "coat")


def test_the_signature_is_ed25519_over_a_separated_message(package: Path, signing_key: SigningKey) -> None:
    manifest = (package / "manifest.json").read_bytes()
    expected = signing_key.sign(b"keyfoundry manifest v1\0" + manifest)
    assert (package / "manifest.sig").read_bytes() == expected
    assert len(expected) == 64


def test_a_bare_signature_over_the_manifest_is_refused(package: Path, signing_key: SigningKey) -> None:
    manifest = (package / "manifest.json").read_bytes()
    (package / "manifest.sig").write_bytes(signing_key.sign(manifest))
    with pytest.raises(PackageError, match="does not fit"):
        open_package(package, signing_key.public_bytes)


def test_verifying_is_a_function_of_bytes_and_digests(manifest: Manifest, signing_key: SigningKey) -> None:
    files = {name: FileDigest.of(data) for name, data in FILES.items()}
    data = Manifest(**{**vars(manifest), "files": files}).to_bytes()
    verified = verify_package(data, signing_key.sign(signed_message(data)), files, signing_key.public_bytes)
    assert verified.manifest == parse_manifest(data)
    with pytest.raises(PackageError, match="was changed"):
        verify_package(
            data,
            signing_key.sign(signed_message(data)),
            {**files, "model.onnx": FileDigest("0" * 64, len(FILES["model.onnx"]))},
            signing_key.public_bytes,
        )


def _flip(name: str, at: int = 0) -> Callable[[Path], object]:
    def tamper(package: Path) -> None:
        data = bytearray((package / name).read_bytes())
        data[at] ^= 1
        (package / name).write_bytes(bytes(data))

    return tamper


def _write(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda package: (package / name).write_bytes(data)


def _remove(name: str) -> Callable[[Path], object]:
    return lambda package: (package / name).unlink()


def _move(old: str, new: str) -> Callable[[Path], object]:
    return lambda package: (package / old).rename(package / new)


def _symlink(name: str) -> Callable[[Path], object]:
    def tamper(package: Path) -> None:
        target = package.parent / "elsewhere"
        (package / name).rename(target)
        (package / name).symlink_to(target)

    return tamper


def _hard_link(name: str) -> Callable[[Path], object]:
    return lambda package: os.link(package / name, package.parent / "elsewhere")


def _pipe_in_place_of(name: str) -> Callable[[Path], object]:
    def tamper(package: Path) -> None:
        (package / name).unlink()
        os.mkfifo(package / name)

    return tamper


def _folder_in_place_of(name: str) -> Callable[[Path], object]:
    def tamper(package: Path) -> None:
        (package / name).unlink()
        (package / name).mkdir()

    return tamper


def _name_that_is_not_utf8(package: Path) -> None:
    Path(os.fsdecode(os.fsencode(package) + b"/\xff.bin")).write_bytes(b"x")


WEIGHTS = "model.mlpackage/Data/com.apple.CoreML/weights/weight.bin"

# What was done to the released package, and what the refusal says about it.
TAMPERS: list[tuple[str, Callable[[Path], object], str]] = [
    ("a byte of the manifest was flipped", _flip("manifest.json", 40), "manifest.sig does not fit"),
    ("a space was added to the manifest", _write("manifest.json", b" {}"), "does not fit"),
    ("a byte of the signature was flipped", _flip("manifest.sig"), "does not fit"),
    ("the last byte of the signature was flipped", _flip("manifest.sig", 63), "does not fit"),
    ("the signature was cut", _write("manifest.sig", b"x" * 63), "manifest.sig holds 63 bytes, not 64"),
    ("the signature grew", _write("manifest.sig", b"x" * 1000), "manifest.sig holds 65 bytes, not 64"),
    ("the signature was emptied", _write("manifest.sig", b""), "manifest.sig holds 0 bytes"),
    ("the signature was removed", _remove("manifest.sig"), "no manifest.sig: the factory did not release"),
    ("the manifest was removed", _remove("manifest.json"), "is not a package, without manifest.json"),
    ("the manifest is huge", _write("manifest.json", b" " * (MAX_MANIFEST_BYTES + 1)), "json has over"),
    ("a byte of the model was flipped", _flip("model.onnx"), "'model.onnx' was changed"),
    ("a byte of weight.bin was flipped", _flip(WEIGHTS, 3), "weight.bin' was changed"),
    ("a byte of the golden images was flipped", _flip("golden.npz"), "'golden.npz' was changed"),
    ("the model was cut", _write("model.onnx", b"onnx"), "'model.onnx' has 4 bytes, not the 10"),
    ("the model was removed", _remove("model.onnx"), "'model.onnx' is missing"),
    ("a file was added", _write("readme.txt", b"hello"), "'readme.txt' is in the package but not in its"),
    ("a file was added deep inside", _write("model.mlpackage/Data/x", b""), "/Data/x' is in the package but"),
    ("a hidden file was added", _write(".DS_Store", b"x"), "'.DS_Store' is in the package but"),
    ("a file's name was put in another case", _move("model.onnx", "Model.onnx"), "a file was renamed"),
    ("a file was renamed", _move("model.onnx", "other.onnx"), "'other.onnx' of the same size is there"),
    ("a folder was renamed", _move("model.mlpackage", "other.mlpackage"), "a file was renamed"),
    ("an empty folder was added", lambda p: (p / "empty").mkdir(), "holds the empty folder 'empty/'"),
    ("the model became a symbolic link", _symlink("model.onnx"), "'model.onnx' is a symbolic link"),
    ("a folder became a symbolic link", _symlink("model.mlpackage"), "'model.mlpackage' is a symbolic link"),
    ("the manifest became a symbolic link", _symlink("manifest.json"), "'manifest.json' is a symbolic link"),
    ("the signature became a symbolic link", _symlink("manifest.sig"), "'manifest.sig' is a symbolic link"),
    ("a dangling link was added", lambda p: (p / "x").symlink_to("nowhere"), "'x' is a symbolic link"),
    ("the model became a hard link", _hard_link("model.onnx"), "'model.onnx' is a hard link"),
    ("the manifest became a hard link", _hard_link("manifest.json"), "'manifest.json' is a hard link"),
    ("the model became a pipe", _pipe_in_place_of("model.onnx"), "'model.onnx' is not a plain file"),
    ("the manifest became a pipe", _pipe_in_place_of("manifest.json"), "'manifest.json' is not a plain file"),
    ("the manifest became a folder", _folder_in_place_of("manifest.json"), "json' is not a plain file"),
    ("a file was added whose name is not UTF-8", _name_that_is_not_utf8, "is not UTF-8"),
    ("the folder was removed", shutil.rmtree, "There is no package folder"),
]  # fmt: skip


@pytest.mark.parametrize(("what", "tamper", "sentence"), TAMPERS, ids=[what for what, _, _ in TAMPERS])
def test_a_package_is_refused_when(
    what: str, tamper: Callable[[Path], object], sentence: str, package: Path, signing_key: SigningKey
) -> None:
    tamper(package)
    with pytest.raises(PackageError, match=sentence) as refusal:
        open_package(package, signing_key.public_bytes)
    assert "\n" not in str(refusal.value)
    assert str(refusal.value).endswith(".")


# What a factory with the right key signed, and what the refusal says about it.
SIGNED_FAULTS: list[tuple[str, Callable[[dict[str, object]], object], str]] = [
    ("the schema is newer", lambda m: m.update(schema=3), "newer than the 2 that this program reads; update"),
    ("a field is unknown", lambda m: m.update(extra=1), "unknown field 'extra'"),
    ("a name climbs out", lambda m: m.update(files={"../x": {"sha256": "a" * 64, "size": 1}}), "climbs out"),
    ("the generation is text", lambda m: m.update(generation="1"), "whole number in generation"),
]  # fmt: skip


@pytest.mark.parametrize(("what", "change", "sentence"), SIGNED_FAULTS, ids=[f[0] for f in SIGNED_FAULTS])
def test_even_a_signed_manifest_is_refused_when(
    what: str,
    change: Callable[[dict[str, object]], object],
    sentence: str,
    package: Path,
    signing_key: SigningKey,
) -> None:
    resign(package, signing_key, change)
    with pytest.raises(PackageError, match=sentence):
        open_package(package, signing_key.public_bytes)


def test_nothing_is_believed_before_the_signature(package: Path, signing_key: SigningKey) -> None:
    """A newer schema, another device and a climbing name, under a wrong key: none of them is spoken of."""
    forger = SigningKey(bytes(32))
    resign(package, forger, lambda m: m.update(schema=9, device_id="evil", files={"../x": 1}))
    with pytest.raises(PackageError, match="does not fit") as refusal:
        open_package(package, signing_key.public_bytes, device_id="camera-01")
    assert not any(word in str(refusal.value) for word in ["schema", "evil", "../x"])


def test_a_package_of_another_factory_is_refused(package: Path) -> None:
    with pytest.raises(PackageError, match="another factory's key signed it"):
        open_package(package, SigningKey(bytes(32)).public_bytes)


def test_a_package_of_another_device_is_refused(package: Path, signing_key: SigningKey) -> None:
    with pytest.raises(PackageError, match="made for device 'camera-01', not for 'camera-02'"):
        open_package(package, signing_key.public_bytes, device_id="camera-02")


def test_a_package_of_another_fleet_is_refused(package: Path, signing_key: SigningKey) -> None:
    with pytest.raises(PackageError, match="belongs to fleet 00112233445566ff, not to 'ffffffffffffffff'"):
        open_package(package, signing_key.public_bytes, fleet_id="f" * 16)


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path, signing_key: SigningKey) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(PackageError, match="is a file and no package"):
        open_package(tmp_path / "file", signing_key.public_bytes)


def test_a_socket_in_the_folder_is_refused(
    package: Path, signing_key: SigningKey, tmp_path_factory: pytest.TempPathFactory
) -> None:
    # A socket's path is bounded at about 100 bytes, so it is bound elsewhere and moved in.
    short = tmp_path_factory.mktemp("s") / "s"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(short))
        short.rename(package / "socket")
    with pytest.raises(PackageError, match="'socket' is not a plain file"):
        open_package(package, signing_key.public_bytes)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_single_flipped_bit_of_any_file_is_refused(
    data: st.DataObject, package: Path, signing_key: SigningKey
) -> None:
    name = data.draw(st.sampled_from([*FILES, "manifest.json", "manifest.sig"]))
    good = (package / name).read_bytes()
    bit = data.draw(st.integers(0, len(good) * 8 - 1))
    bad = bytearray(good)
    bad[bit // 8] ^= 1 << (bit % 8)
    (package / name).write_bytes(bytes(bad))
    with pytest.raises(PackageError):
        open_package(package, signing_key.public_bytes)
    (package / name).write_bytes(good)
    open_package(package, signing_key.public_bytes)


def test_a_file_changed_after_opening_is_never_used(package: Path, signing_key: SigningKey) -> None:
    opened = open_package(package, signing_key.public_bytes)
    _flip("model.onnx")(package)
    with pytest.raises(PackageError, match=r"'model\.onnx' was changed"):
        opened.read("model.onnx")
    _flip(WEIGHTS)(package)
    with pytest.raises(PackageError, match="was changed"):
        opened.copy_folder("model.mlpackage", package.parent / "copy")


def test_a_pipe_put_in_place_after_opening_is_not_waited_for(package: Path, signing_key: SigningKey) -> None:
    opened = open_package(package, signing_key.public_bytes)
    _pipe_in_place_of("model.onnx")(package)
    with pytest.raises(PackageError, match="not a plain file"):
        opened.read("model.onnx")


def test_a_file_that_the_package_does_not_have_is_refused(package: Path, signing_key: SigningKey) -> None:
    opened = open_package(package, signing_key.public_bytes)
    for name in ["manifest.json", "../../etc/passwd", "model-fp32.onnx"]:
        with pytest.raises(PackageError, match="has no file"):
            opened.read(name)
    with pytest.raises(PackageError, match=r"has no folder 'model-fp32\.mlpackage'"):
        opened.copy_folder("model-fp32.mlpackage", package.parent / "copy")


def test_a_folder_is_copied_with_all_its_files(package: Path, signing_key: SigningKey) -> None:
    opened = open_package(package, signing_key.public_bytes)
    copy = opened.copy_folder("model.mlpackage", package.parent / "copy")
    files = {name: data for name, data in FILES.items() if name.startswith("model.mlpackage/")}
    assert {str(p.relative_to(copy.parent)): p.read_bytes() for p in copy.rglob("*") if p.is_file()} == files


def test_a_package_without_rights_to_read_is_refused(package: Path, signing_key: SigningKey) -> None:
    if os.geteuid() == 0:
        pytest.skip("the superuser reads every file")
    (package / "model.onnx").chmod(0)
    with pytest.raises(PackageError, match=r"'model\.onnx' cannot be read"):
        open_package(package, signing_key.public_bytes)


def test_evidence_belongs_to_the_files_it_was_measured_on(package: Path, signing_key: SigningKey) -> None:
    add_evidence(package, {"accuracy": 0.9})
    assert inspect_package(package)[1] is False
    with pytest.raises(PackageError, match=r"has no manifest\.sig"):
        open_package(package, signing_key.public_bytes)
    sign_package(package, signing_key)
    assert open_package(package, signing_key.public_bytes).manifest.evidence == {"accuracy": 0.9}
    _flip("model.onnx")(package)
    with pytest.raises(PackageError, match=r"'model\.onnx' was changed"):
        add_evidence(package, {"accuracy": 0.91})


def test_a_package_whose_files_changed_is_not_signed(package: Path, signing_key: SigningKey) -> None:
    before = (package / "manifest.sig").read_bytes()
    (package / "manifest.sig").unlink()
    _flip("golden.npz")(package)
    with pytest.raises(PackageError, match="was changed"):
        sign_package(package, signing_key)
    assert not (package / "manifest.sig").exists()
    _flip("golden.npz")(package)
    sign_package(package, signing_key)
    assert (package / "manifest.sig").read_bytes() == before


def test_writing_a_package_again_drops_its_signature(package: Path, manifest: Manifest) -> None:
    (package / "model.onnx").write_bytes(b"another model")
    written = write_package(package, manifest)
    assert not (package / "manifest.sig").exists()
    assert written.files["model.onnx"] == FileDigest.of(b"another model")
    assert inspect_package(package) == (written, False)


def test_a_hidden_file_or_a_link_cannot_be_packaged(package: Path, manifest: Manifest) -> None:
    (package / ".hidden").write_bytes(b"x")
    with pytest.raises(PackageError, match=r"'\.hidden' is not made of plain ASCII"):
        write_package(package, manifest)
    (package / ".hidden").unlink()
    (package / "link").symlink_to("model.onnx")
    with pytest.raises(PackageError, match="'link' is a symbolic link"):
        digest_folder(package)


def test_a_manifest_holds_no_key_material(package: Path, signing_key: SigningKey) -> None:
    text = (package / "manifest.json").read_bytes()
    assert signing_key.seed not in text
    assert signing_key.seed.hex().encode() not in text


GOLDEN = Golden(np.zeros((2, 1, 8, 8), np.uint8), np.ones((2, 3), np.float32))


def test_golden_images_survive_the_round_trip(manifest: Manifest) -> None:
    read = read_golden(GOLDEN.to_bytes(), manifest.input, 3)
    np.testing.assert_array_equal(read.images, GOLDEN.images)
    np.testing.assert_array_equal(read.logits, GOLDEN.logits)
    assert GOLDEN.to_bytes() == GOLDEN.to_bytes()


def _npz(**arrays: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **arrays)  # type: ignore[arg-type]
    return stream.getvalue()


def _golden(**changes: np.ndarray) -> bytes:
    arrays: Mapping[str, np.ndarray] = {"images": GOLDEN.images, "logits": GOLDEN.logits}
    return _npz(**{**arrays, **changes})


GOLDEN_FAULTS = [
    ("it is no archive", b"no archive", "no readable .npz"),
    ("it is cut short", GOLDEN.to_bytes()[:-30], "no readable .npz"),
    ("the logits are missing", _npz(images=GOLDEN.images), "has no array 'logits'"),
    ("an image is a float", _golden(images=np.zeros((2, 1, 8, 8))), "images of float64"),
    ("an image has another size", _golden(images=np.zeros((2, 1, 8, 9), np.uint8)), "shape .2, 1, 8, 9."),
    ("there are no images", _golden(images=np.zeros((0, 1, 8, 8), np.uint8)), "holds 0 images"),
    ("there is a class too many", _golden(logits=np.ones((2, 4), np.float32)), "logits of float32 and shape"),
    ("the logits are doubles", _golden(logits=np.ones((2, 3))), "logits of float64"),
    ("a logit is NaN", _golden(logits=np.full((2, 3), np.nan, np.float32)), "not finite"),
    ("it holds Python objects", _golden(logits=np.array([None, {}])), "no plain array"),
]


@pytest.mark.parametrize(("what", "data", "sentence"), GOLDEN_FAULTS, ids=[f[0] for f in GOLDEN_FAULTS])
def test_golden_images_are_refused_when(what: str, data: bytes, sentence: str, manifest: Manifest) -> None:
    with pytest.raises(PackageError, match=sentence):
        read_golden(data, manifest.input, 3)


def test_an_array_that_claims_more_than_it_holds_is_refused_before_memory_is_taken() -> None:
    """A header may claim any shape; reading it naively would ask for a terabyte."""
    header, archive = io.BytesIO(), io.BytesIO()
    claim = {"descr": "|u1", "fortran_order": False, "shape": (10**6, 1, 1000, 1000)}
    np.lib.format.write_array_header_1_0(header, claim)
    with zipfile.ZipFile(archive, "w") as npz:
        npz.writestr("images.npy", header.getvalue() + b"few bytes")
    with pytest.raises(InputError, match="in 9 bytes, which is no plain array"):
        read_arrays(archive.getvalue(), ["images"], "images.npz")
