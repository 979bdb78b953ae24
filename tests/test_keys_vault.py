from __future__ import annotations

import json
import os
import threading
import traceback
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keys.derive import MasterSecret, derive_device_key
from keys.errors import InputError, SecretError
from keys.vault import (
    Argon2Cost,
    PassphraseCustody,
    Vault,
    create_vault,
    generate_passphrase_file,
    open_vault,
    read_passphrase_file,
)

CHEAP = Argon2Cost(memory_kib=64, iterations=1, lanes=1)
PASSPHRASE = "correct horse é"

# Made without keys.vault: AES key wrap from single AES blocks, the code from HMAC. It must open for ever.
GOLDEN: dict[str, Any] = {
    "schema": 1,
    "fleet_id": "0123456789abcdef",
    "custody": {
        "method": "passphrase: argon2id, aes-256 key wrap",
        "salt": "000102030405060708090a0b0c0d0e0f",
        "memory_kib": 64,
        "iterations": 1,
        "lanes": 1,
    },
    "wrapped": {
        "master_secret": "4ce590a41f4bdd15c6d67f15344639e223065b8e15e4964b5315f017d125fd43f60646c3086f0a51",
        "signing_seed": "dc39c829f07b75b98b00c49c7b5f2bde8cb498e59648e59359f5ce575775eae992ca1c32a94d5707",
    },
    "generations": {"camera-01": 2},
    "mac": "95b8b0723d92ba1223e1802934234aec535a946f27dd51ff93f61413bf90af6a",
}
GOLDEN_MASTER = bytes(range(32))
GOLDEN_SEED = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")


def put(path: Path, content: bytes | dict[str, Any]) -> Path:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    path.write_bytes(data)
    path.chmod(0o600)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "vault.json"


@pytest.fixture
def golden(path: Path) -> Path:
    return put(path, GOLDEN)


def refusal(path: Path, passphrase: str = PASSPHRASE) -> str:
    """The sentence with which a vault is refused; checks that it and its traceback show no secret."""
    with pytest.raises(SecretError) as caught:
        open_vault(path, passphrase)
    told = "".join(traceback.format_exception(caught.value))
    for secret in (GOLDEN_MASTER, GOLDEN_SEED):
        assert secret.hex() not in told
        assert repr(secret) not in told
    assert passphrase not in told
    text = str(caught.value)
    assert str(path) in text
    assert "\n" not in text
    return text


# The golden file and the parts it is made of


def test_the_golden_vault_opens(golden: Path):
    vault = open_vault(golden, PASSPHRASE)
    assert vault.fleet_id == "0123456789abcdef"
    assert vault.path == golden
    assert vault.devices() == {"camera-01": 2}
    expected = "51fe057ab6f4b09f08e505044febe529a1b0c21615cf5e1ff4de91af2ce352f3"
    assert vault.device_key("camera-01").secret.hex() == expected
    public = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
    assert vault.signing_key().public_bytes.hex() == public


def test_a_passphrase_typed_on_another_system_opens_it(golden: Path):
    decomposed = "correct horse e\N{COMBINING ACUTE ACCENT}"
    no_break_space = PASSPHRASE.replace(" ", "\N{NO-BREAK SPACE}")
    for passphrase in (decomposed, no_break_space):
        assert passphrase != PASSPHRASE
        assert open_vault(golden, passphrase).fleet_id == "0123456789abcdef"


def test_known_key_wrap():
    # RFC 3394, section 4.6: 256 bits of key data with a 256-bit key.
    custody = PassphraseCustody(bytes(range(32)))
    secret = bytes.fromhex("00112233445566778899aabbccddeeff000102030405060708090a0b0c0d0e0f")
    wrapped = "28c9f404c4b810f4cbccb35cfb87f8263f5786e2d80ed326cbc7f0e71a99f43bfb988b9b7a02dd21"
    assert custody.wrap(secret).hex() == wrapped
    assert custody.unwrap(bytes.fromhex(wrapped)) == secret
    with pytest.raises(SecretError, match="The passphrase is wrong"):
        PassphraseCustody(bytes(32)).unwrap(bytes.fromhex(wrapped))


def test_the_default_cost_is_the_documented_one(path: Path):
    create_vault(path, PASSPHRASE)
    custody = json.loads(path.read_bytes())["custody"]
    assert (custody["memory_kib"], custody["iterations"], custody["lanes"]) == (65536, 3, 4)
    open_vault(path, PASSPHRASE)


@pytest.mark.parametrize(
    ("memory_kib", "iterations", "lanes", "name"),
    [
        (7, 1, 1, "memory_kib"),
        (31, 1, 4, "memory_kib"),
        (2**20 + 1, 1, 1, "memory_kib"),
        (64, 0, 1, "iterations"),
        (64, 17, 1, "iterations"),
        (64, 1, 0, "lanes"),
        (2**20, 1, 17, "lanes"),
    ],
)
def test_a_cost_out_of_bounds_is_refused(memory_kib: int, iterations: int, lanes: int, name: str):
    with pytest.raises(InputError, match=f"Argon2id's {name} is"):
        Argon2Cost(memory_kib, iterations, lanes)


# Making, saving, reopening


def test_a_new_vault_opens_again_and_is_private(path: Path):
    old = os.umask(0)
    try:
        made = create_vault(path, PASSPHRASE, cost=CHEAP)
        made.add_device("camera-01")
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o600
    assert {p.name for p in path.parent.iterdir()} == {"vault.json", ".vault.json.lock"}
    again = open_vault(path, PASSPHRASE)
    assert again.fleet_id == made.fleet_id
    assert len(again.fleet_id) == 16
    assert again.devices() == {"camera-01": 1}
    assert again.device_key("camera-01").secret == made.device_key("camera-01").secret
    assert again.signing_key().seed == made.signing_key().seed


def test_two_vaults_share_nothing(tmp_path: Path):
    a, b = (create_vault(tmp_path / name, PASSPHRASE, cost=CHEAP) for name in ("a", "b"))
    assert a.fleet_id != b.fleet_id
    assert a.device_key("camera-01").secret != b.device_key("camera-01").secret
    assert a.signing_key().seed != b.signing_key().seed
    salts = {json.loads((tmp_path / name).read_bytes())["custody"]["salt"] for name in ("a", "b")}
    assert len(salts) == 2


def test_the_file_holds_no_secret_in_clear(path: Path):
    vault = create_vault(path, PASSPHRASE, cost=CHEAP)
    text = path.read_text()
    for secret in (vault.signing_key().seed, vault.device_key("camera-01").secret):
        assert secret.hex() not in text
    assert PASSPHRASE not in text


def test_nothing_is_ever_overwritten(golden: Path):
    before = golden.read_bytes()
    with pytest.raises(SecretError, match="exists and is never overwritten"):
        create_vault(golden, PASSPHRASE, cost=CHEAP)
    assert golden.read_bytes() == before
    link = golden.with_name("dangling")
    link.symlink_to(golden.with_name("nowhere"))
    for make in (lambda: create_vault(link, PASSPHRASE, cost=CHEAP), lambda: generate_passphrase_file(link)):
        with pytest.raises(SecretError, match="exists and is never overwritten"):
            make()
    assert not golden.with_name("nowhere").exists()


def test_rotation_counts_and_changes_the_key(path: Path):
    vault = create_vault(path, PASSPHRASE, cost=CHEAP)
    assert vault.add_device("camera-02") == 1
    assert vault.add_device("camera-01") == 1
    first = vault.device_key("camera-01").secret
    assert vault.rotate("camera-01") == 2
    assert vault.add_device("camera-01") == 2, "adding again must not turn a rotation back"
    assert vault.devices() == {"camera-01": 2, "camera-02": 1}
    assert list(vault.devices()) == ["camera-01", "camera-02"]
    again = open_vault(path, PASSPHRASE)
    assert again.device_key("camera-01").generation == 2
    assert again.device_key("camera-01").secret != first
    assert again.device_key("camera-02").secret == vault.device_key("camera-02").secret


def test_a_device_that_is_not_listed_has_generation_one_and_nothing_is_written(golden: Path):
    before = golden.read_bytes()
    vault = open_vault(golden, PASSPHRASE)
    key = vault.device_key("camera-09")
    assert key.secret == derive_device_key(MasterSecret(GOLDEN_MASTER), device_id="camera-09", generation=1).secret
    vault.add_device("camera-01")
    assert golden.read_bytes() == before
    assert vault.devices() == {"camera-01": 2}


def test_devices_gives_a_copy(golden: Path):
    vault = open_vault(golden, PASSPHRASE)
    vault.devices()["camera-01"] = 7
    assert vault.devices() == {"camera-01": 2}


def test_bad_devices_are_refused_and_nothing_changes(golden: Path):
    before = golden.read_bytes()
    vault = open_vault(golden, PASSPHRASE)
    with pytest.raises(InputError, match="'camera-09' is not in the vault"):
        vault.rotate("camera-09")
    for use in (vault.add_device, vault.device_key):
        with pytest.raises(InputError, match="is not a device id"):
            use("../camera")
    assert golden.read_bytes() == before


def test_a_rotation_uses_the_newest_file(golden: Path):
    one, two = open_vault(golden, PASSPHRASE), open_vault(golden, PASSPHRASE)
    assert one.rotate("camera-01") == 3
    assert two.rotate("camera-01") == 4
    one.add_device("camera-02")
    assert one.devices() == {"camera-01": 4, "camera-02": 1}


def test_rotations_at_once_all_count(golden: Path):
    def rotate(vault: Vault) -> None:
        for _ in range(10):
            vault.rotate("camera-01")

    threads = [threading.Thread(target=rotate, args=(open_vault(golden, PASSPHRASE),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert open_vault(golden, PASSPHRASE).devices() == {"camera-01": 42}


@pytest.mark.parametrize("change", ["replaced", "altered", "gone", "shared"])
def test_a_file_that_changed_under_an_open_vault_is_refused(golden: Path, change: str):
    vault = open_vault(golden, PASSPHRASE)
    if change == "replaced":
        golden.unlink()
        create_vault(golden, PASSPHRASE, cost=CHEAP).add_device("camera-01")
    elif change == "altered":
        put(golden, {**GOLDEN, "generations": {"camera-01": 1}})
    elif change == "gone":
        golden.unlink()
    else:
        golden.chmod(0o644)
    with pytest.raises(SecretError):
        vault.rotate("camera-01")
    assert vault.devices() == {"camera-01": 2}


devices = st.dictionaries(st.from_regex(r"[a-z0-9][a-z0-9-]{0,62}", fullmatch=True), st.integers(0, 3), max_size=5)


# Few examples: each change of the file is flushed to the disk.
@settings(deadline=None, max_examples=20)
@given(devices)
def test_any_fleet_comes_back_as_it_was_saved(tmp_path_factory: pytest.TempPathFactory, rotations: dict[str, int]):
    path = tmp_path_factory.mktemp("fleet") / "vault.json"
    vault = create_vault(path, PASSPHRASE, cost=CHEAP)
    for device, count in rotations.items():
        vault.add_device(device)
        for _ in range(count):
            vault.rotate(device)
    expected = {device: 1 + count for device, count in rotations.items()}
    assert open_vault(path, PASSPHRASE).devices() == vault.devices() == expected


# Refusals


@pytest.mark.parametrize("passphrase", ["Correct horse é", "correct horse é ", "another one"])
def test_a_wrong_passphrase_is_refused(golden: Path, passphrase: str):
    assert "The passphrase does not open the vault" in refusal(golden, passphrase)


@pytest.mark.parametrize(("passphrase", "sentence"), [("", "is empty"), ("a\udcff", "is not valid UTF-8")])
def test_an_impossible_passphrase_is_refused(golden: Path, tmp_path: Path, passphrase: str, sentence: str):
    with pytest.raises(SecretError, match=sentence):
        open_vault(golden, passphrase)
    with pytest.raises(SecretError, match=sentence):
        create_vault(tmp_path / "new", passphrase, cost=CHEAP)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620, 0o601])
def test_a_vault_that_others_may_use_is_refused(golden: Path, mode: int):
    golden.chmod(mode)
    text = refusal(golden)
    assert f"(mode {mode:04o})" in text
    assert f"chmod 600 {golden}" in text


def test_only_a_regular_file_is_read(golden: Path, tmp_path: Path):
    link = tmp_path / "link"
    link.symlink_to(golden)
    assert "is a symbolic link" in refusal(link)
    folder = tmp_path / "folder"
    folder.mkdir(mode=0o700)
    assert "is not a regular file" in refusal(folder)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe, 0o600)
    assert "is not a regular file" in refusal(pipe)
    assert "There is no file" in refusal(tmp_path / "nothing")
    assert "cannot be read (Not a directory)" in refusal(golden / "vault.json")


def altered(*keys: str, value: Any) -> dict[str, Any]:
    document = json.loads(json.dumps(GOLDEN))
    target = document
    for key in keys[:-1]:
        target = target[key]
    target[keys[-1]] = value
    return document


def flip(text: str) -> str:
    return text[:-1] + ("0" if text[-1] != "0" else "1")


TAMPERED = {
    "fleet id": altered("fleet_id", value=flip(GOLDEN["fleet_id"])),
    "generation back": altered("generations", "camera-01", value=1),
    "device added": altered("generations", "camera-02", value=1),
    "device renamed": altered("generations", value={"camera-02": 2}),
    "device removed": altered("generations", value={}),
    "mac": altered("mac", value=flip(GOLDEN["mac"])),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_altered_values_are_refused(path: Path, name: str):
    assert "was altered or replaced" in refusal(put(path, TAMPERED[name]))


UNOPENABLE = {
    "salt": altered("custody", "salt", value=flip(GOLDEN["custody"]["salt"])),
    "memory": altered("custody", "memory_kib", value=65),
    "iterations": altered("custody", "iterations", value=2),
    "lanes": altered("custody", "lanes", value=2),
    "master": altered("wrapped", "master_secret", value=flip(GOLDEN["wrapped"]["master_secret"])),
    "seed": altered("wrapped", "signing_seed", value=flip(GOLDEN["wrapped"]["signing_seed"])),
}


@pytest.mark.parametrize("name", UNOPENABLE)
def test_altered_locks_do_not_open(path: Path, name: str):
    assert "does not open the vault" in refusal(put(path, UNOPENABLE[name]))


def test_exchanged_secrets_are_refused(path: Path):
    master, seed = GOLDEN["wrapped"]["master_secret"], GOLDEN["wrapped"]["signing_seed"]
    exchanged = altered("wrapped", value={"master_secret": seed, "signing_seed": master})
    assert "was altered or replaced" in refusal(put(path, exchanged))


HOSTILE = {
    "a terabyte of memory": (altered("custody", "memory_kib", value=2**30), "memory_kib is 1073741824"),
    "endless passes": (altered("custody", "iterations", value=2**32), "iterations is 4294967296"),
    "endless lanes": (altered("custody", "lanes", value=2**24), "lanes is 16777216"),
    "a path as a device": (altered("generations", value={"../x": 1}), "is not a device id"),
    "generation zero": (altered("generations", "camera-01", value=0), "Generation 0 is outside"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_values_are_refused_before_any_work(path: Path, name: str):
    document, sentence = HOSTILE[name]
    assert sentence in refusal(put(path, document))


CORRUPT: dict[str, bytes | dict[str, Any]] = {
    "empty": b"",
    "binary": bytes(range(256)),
    "truncated": json.dumps(GOLDEN).encode()[:-30],
    "a list": b"[]",
    "null": b"null",
    "nested": b"[" * 200_000,
    "a huge number": b'{"schema": ' + b"9" * 10_000 + b"}",
    "doubled field": json.dumps(GOLDEN).replace('"schema": 1', '"schema": 1, "schema": 1').encode(),
    "unknown field": {**GOLDEN, "note": "hello"},
    "unknown custody field": altered("custody", "pepper", value=""),
    "missing field": {name: value for name, value in GOLDEN.items() if name != "mac"},
    "missing schema": {name: value for name, value in GOLDEN.items() if name != "schema"},
    "schema zero": altered("schema", value=0),
    "schema true": altered("schema", value=True),
    "schema text": altered("schema", value="1"),
    "another custody": altered("custody", "method", value="plain"),
    "memory as text": altered("custody", "memory_kib", value="64"),
    "memory as float": altered("custody", "memory_kib", value=64.0),
    "generation true": altered("generations", "camera-01", value=True),
    "generations a list": altered("generations", value=["camera-01"]),
    "wrapped a text": altered("wrapped", value="00"),
    "short salt": altered("custody", "salt", value="00"),
    "upper case": altered("fleet_id", value="0123456789ABCDEF"),
    "short mac": altered("mac", value=""),
    "mac null": altered("mac", value=None),
}


@pytest.mark.parametrize("name", CORRUPT)
def test_corrupt_files_are_refused(path: Path, name: str):
    assert "is corrupt or" in refusal(put(path, CORRUPT[name]))


def test_a_newer_schema_is_refused_even_if_its_fields_are_unknown(path: Path):
    text = refusal(put(path, {"schema": 2, "anything": []}))
    assert "has schema 2, but 1 is the newest known; update keyfoundry" in text


@settings(deadline=None)
@given(st.data())
def test_one_flipped_bit_anywhere_is_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject):
    content = bytearray(json.dumps(GOLDEN, indent=2).encode())
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    content[bit // 8] ^= 1 << bit % 8
    refusal(put(tmp_path_factory.getbasetemp() / "flipped.json", bytes(content)))


@settings(deadline=None)
@given(st.data())
def test_a_file_cut_anywhere_is_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject):
    content = json.dumps(GOLDEN, indent=2).encode()
    cut = content[: data.draw(st.integers(0, len(content) - 1))]
    assert "is corrupt or truncated" in refusal(put(tmp_path_factory.getbasetemp() / "cut.json", cut))


def test_a_vault_shows_no_secret(golden: Path):
    vault = open_vault(golden, PASSPHRASE)
    told = repr(vault) + str(vault) + f"{vault}" + repr(PassphraseCustody(GOLDEN_MASTER))
    assert repr(vault) == f"Vault({str(golden)!r}, fleet_id='0123456789abcdef', devices=1)"
    for secret in (GOLDEN_MASTER, GOLDEN_SEED, vault.device_key("camera-01").secret):
        assert secret.hex() not in told
        assert repr(secret) not in told


# Passphrase files


def test_a_generated_passphrase_file_opens_its_vault(tmp_path: Path, path: Path):
    secret = tmp_path / "passphrase"
    passphrase = generate_passphrase_file(secret)
    assert secret.stat().st_mode & 0o777 == 0o600
    assert read_passphrase_file(secret) == passphrase
    assert len(passphrase) == 43, "256 bits in base64"
    assert generate_passphrase_file(tmp_path / "other") != passphrase
    create_vault(path, passphrase, cost=CHEAP)
    open_vault(path, read_passphrase_file(secret))
    with pytest.raises(SecretError, match="exists and is never overwritten"):
        generate_passphrase_file(secret)
    assert read_passphrase_file(secret) == passphrase


@pytest.mark.parametrize(
    ("content", "passphrase"),
    [(b"one two", "one two"), (b"one two\n", "one two"), (b"one\r\n", "one"), ("é ".encode(), "é ")],
)
def test_one_line_is_read_without_its_end(tmp_path: Path, content: bytes, passphrase: str):
    assert read_passphrase_file(put(tmp_path / "passphrase", content)) == passphrase


@pytest.mark.parametrize("content", [b"", b"\n", b"hidden\nhidden\n", b"hidden\n\n", b"hidden\xff"])
def test_a_passphrase_file_without_one_line_is_refused(tmp_path: Path, content: bytes):
    with pytest.raises(SecretError, match="does not hold one line") as caught:
        read_passphrase_file(put(tmp_path / "passphrase", content))
    assert "hidden" not in "".join(traceback.format_exception(caught.value))
    assert caught.value.__context__ is None


def test_a_passphrase_file_that_is_not_private_is_refused(tmp_path: Path):
    secret = put(tmp_path / "passphrase", b"one two\n")
    secret.chmod(0o644)
    with pytest.raises(SecretError, match=r"\(mode 0644\)"):
        read_passphrase_file(secret)
    with pytest.raises(SecretError, match="There is no file"):
        read_passphrase_file(tmp_path / "nothing")
    with pytest.raises(SecretError, match="is larger than"):
        read_passphrase_file(put(tmp_path / "large", b"x" * 5000))
