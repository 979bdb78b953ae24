"""The manifest: canonical bytes, and one refusal for everything that is not a manifest."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exporters.contract import InputContract
from exporters.manifest import (
    MAX_MANIFEST_BYTES,
    FileDigest,
    FormatEntry,
    Manifest,
    file_name_fault,
    name_clash,
    parse_manifest,
    shown,
    utc_text,
)
from exporters.package_rules import signed_message
from keys.errors import InputError, PackageError
from keys.signing import SigningKey

KNOWN = Manifest(
    device_id="camera-01",
    generation=2,
    fleet_id="00112233445566ff",
    base_digest="a" * 64,
    adapter_digest="b" * 64,
    recipe={"rank": 16, "dropout": 0.1, "mode": "lora"},
    labels=("Ärmel", "boot"),
    input=InputContract(channels=3, height=32, width=32, resize="bicubic to 32x32, no crop"),
    files={"a/b.bin": FileDigest("d" * 64, 0), "model.onnx": FileDigest("c" * 64, 7)},
    evidence={"accuracy": None},
    created="2030-01-31T12:00:00Z",
    tools={"onnx": "1.23.2"},
    formats={"onnx-fp32": FormatEntry("model.onnx", "onnxruntime", "fp32", {"opset": 20})},
)

KNOWN_BYTES = """\
{
  "adapter_digest": "bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb",
  "base_digest": "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
  "created": "2030-01-31T12:00:00Z",
  "device_id": "camera-01",
  "evidence": {
    "accuracy": null
  },
  "files": {
    "a/b.bin": {
      "sha256": "dddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddd",
      "size": 0
    },
    "model.onnx": {
      "sha256": "cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc",
      "size": 7
    }
  },
  "fleet_id": "00112233445566ff",
  "formats": {
    "onnx-fp32": {
      "path": "model.onnx",
      "precision": "fp32",
      "runtime": "onnxruntime",
      "settings": {
        "opset": 20
      }
    }
  },
  "generation": 2,
  "input": {
    "channels": 3,
    "height": 32,
    "resize": "bicubic to 32x32, no crop",
    "width": 32
  },
  "kind": "model",
  "labels": [
    "\\u00c4rmel",
    "boot"
  ],
  "recipe": {
    "dropout": 0.1,
    "mode": "lora",
    "rank": 16
  },
  "requires": null,
  "schema": 2,
  "tools": {
    "onnx": "1.23.2"
  }
}
"""

# What packages were released with before formats were listed; they open for ever.
SCHEMA_1_BYTES = """\
{
  "adapter_digest": "bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb",
  "base_digest": "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
  "created": "2030-01-31T12:00:00Z",
  "device_id": "camera-01",
  "evidence": {
    "accuracy": null
  },
  "files": {
    "a/b.bin": {
      "sha256": "dddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddd",
      "size": 0
    },
    "model.onnx": {
      "sha256": "cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc",
      "size": 7
    }
  },
  "fleet_id": "00112233445566ff",
  "generation": 2,
  "input": {
    "channels": 3,
    "height": 32,
    "resize": "bicubic to 32x32, no crop",
    "width": 32
  },
  "labels": [
    "\\u00c4rmel",
    "boot"
  ],
  "recipe": {
    "dropout": 0.1,
    "mode": "lora",
    "rank": 16
  },
  "schema": 1,
  "tools": {
    "onnx": "1.23.2"
  }
}
"""


def test_the_canonical_bytes_and_their_digest_are_known() -> None:
    assert KNOWN.to_bytes() == KNOWN_BYTES.encode()
    digest = "703129cec63e40ba5c02b2b315cb23032bb5b271ee6a6cbf4405f3f4c50ec89a"
    assert hashlib.sha256(KNOWN.to_bytes()).hexdigest() == digest


def test_a_manifest_of_schema_1_is_read_for_ever() -> None:
    manifest = parse_manifest(SCHEMA_1_BYTES.encode())
    assert manifest.formats == {"onnx-fp32": FormatEntry("model.onnx", "onnxruntime", "fp32", {})}
    assert (manifest.kind, manifest.requires) == ("model", None)


def test_an_adapter_names_its_base_package() -> None:
    adapter = dataclasses.replace(KNOWN, kind="adapter", requires="e" * 64)
    assert parse_manifest(adapter.to_bytes()) == adapter


def test_the_signature_of_the_known_manifest_is_known() -> None:
    """Ed25519 is deterministic, so another prefix, another encoding or another key cannot pass unnoticed."""
    signature = SigningKey(bytes(range(32))).sign(signed_message(KNOWN.to_bytes()))
    expected = (
        "d278cbd5fcd1a984cb0fb61a02b6c556fbda3bc1adc6a6823a8861adbe72e7a8"
        "79928c607fa4034fb40d012d9e07844a84ef4c46c8d686d3a99655815fcced06"
    )
    assert signature.hex() == expected


def test_what_is_written_is_read_back() -> None:
    assert parse_manifest(KNOWN.to_bytes()) == KNOWN


def test_the_order_of_fields_in_memory_does_not_change_the_bytes() -> None:
    turned = dataclasses.replace(KNOWN, files=dict(sorted(KNOWN.files.items(), reverse=True)))
    assert turned.to_bytes() == KNOWN.to_bytes()


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=3)
    ),
    max_leaves=10,
)


@settings(deadline=None)
@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), json_values, max_size=3))
def test_any_plain_evidence_survives_the_round_trip(evidence: dict[str, Any]) -> None:
    manifest = dataclasses.replace(KNOWN, evidence=evidence)
    assert parse_manifest(manifest.to_bytes()) == manifest


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_no_bytes_at_all_cause_anything_but_a_refusal(data: bytes) -> None:
    with pytest.raises(PackageError):
        parse_manifest(data)


@settings(deadline=None)
@given(st.sampled_from(sorted(KNOWN.to_json())), json_values)
def test_no_value_in_any_field_causes_anything_but_a_refusal(field: str, value: object) -> None:
    document = {**KNOWN.to_json(), field: value}
    try:
        parse_manifest(json.dumps(document).encode())
    except PackageError:
        return


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, b"bytes"])
def test_a_value_that_is_not_json_is_not_written(value: object) -> None:
    with pytest.raises(InputError, match="The manifest is not JSON"):
        dataclasses.replace(KNOWN, evidence={"value": value}).to_bytes()


def _with(**changes: object) -> Callable[[], bytes]:
    return lambda: json.dumps({**KNOWN.to_json(), **changes}).encode()


def _without(field: str) -> Callable[[], bytes]:
    return lambda: json.dumps({k: v for k, v in KNOWN.to_json().items() if k != field}).encode()


def _file(name: str, **entry: object) -> Callable[[], bytes]:
    return _with(files={name: {"sha256": "a" * 64, "size": 1, **entry}})


def _two(first: str, second: str) -> Callable[[], bytes]:
    entry = {"sha256": "a" * 64, "size": 1}
    return _with(files={first: entry, second: entry})


# What was done to the manifest, and what the refusal says about it.
FAULTS: list[tuple[str, Callable[[], bytes], str]] = [
    ("it is empty", lambda: b"", "is not JSON"),
    ("it is not UTF-8", lambda: b"\xff" + KNOWN.to_bytes(), "is not UTF-8"),
    ("it is cut short", lambda: KNOWN.to_bytes()[:-5], "is not JSON"),
    ("it is a list", lambda: b"[]", "must be a JSON object, not a list"),
    ("it is huge", lambda: b" " * (MAX_MANIFEST_BYTES + 1), "is larger than"),
    ("it is nested without end", lambda: b"[" * 100_000, "is nested deeper"),
    ("a field is there twice", lambda: KNOWN.to_bytes()[:-3] + b',"schema":2}', "'schema' twice"),
    ("a field inside is there twice", lambda: KNOWN.to_bytes().replace(b'"rank"', b'"mode"'), "'mode' twice"),
    ("a number is NaN", lambda: KNOWN.to_bytes().replace(b"0.1,", b"NaN,"), "NaN"),
    ("a number is infinite", lambda: KNOWN.to_bytes().replace(b"0.1,", b"-Infinity,"), "-Infinity"),
    ("a number overflows", lambda: KNOWN.to_bytes().replace(b"0.1,", b"1e999,"), "too large"),
    ("a number has too many digits", lambda: KNOWN.to_bytes().replace(b"16", b"1" * 5000), "is not JSON"),
    ("the schema is newer", _with(schema=3), "newer than the 2 that this program reads; update keyfoundry"),
    ("the schema is newer and unlike this one", lambda: b'{"schema": 7}', "schema 7, newer"),
    ("the schema is zero", _with(schema=0), "whole number from 1, not 0"),
    ("the schema is text", _with(schema="1"), "whole number from 1, not '1'"),
    ("the schema is true", _with(schema=True), "whole number from 1, not True"),
    ("the schema is missing", _without("schema"), "whole number from 1, not None"),
    ("a field is unknown", _with(extra=1), "unknown field 'extra'"),
    *[(f"{name} is missing", _without(name), f"lacks the field '{name}'") for name in vars(KNOWN)],
    ("the device id is a number", _with(device_id=7), "text in device_id, not a number"),
    ("the device id climbs", _with(device_id="../x"), "fault in device_id"),
    ("the generation is zero", _with(generation=0), "in generation, not 0"),
    ("the generation is too large", _with(generation=2**32), "in generation, not 4294967296"),
    ("the generation is a fraction", _with(generation=1.0), "whole number in generation, not a number"),
    ("the generation is true", _with(generation=True), "whole number in generation, not true or false"),
    ("the fleet id is not hex", _with(fleet_id="x" * 16), "16 lower-case hex digits in fleet_id"),
    ("a digest is short", _with(base_digest="ab"), "SHA-256 digest .* in base_digest"),
    ("a digest is upper case", _with(adapter_digest="A" * 64), "SHA-256 digest .* in adapter_digest"),
    ("the recipe is text", _with(recipe="lora"), "an object in recipe, not text"),
    ("the evidence is deep", _with(evidence={"a": json.loads("[" * 40 + "]" * 40)}), "deeper .* in evidence"),
    ("a text holds half a character", _with(evidence={"a": "\ud800"}), "lone surrogate"),
    ("a name holds half a character", _with(evidence={"\ud800": 1}), "lone surrogate"),
    ("the labels are text", _with(labels="bag"), "a list in labels, not text"),
    ("there is one label", _with(labels=["bag"]), "names in labels, not 1"),
    ("a label is empty", _with(labels=["bag", ""]), "characters in labels.1., not 0"),
    ("a label is a number", _with(labels=["bag", 1]), "text in labels.1., not a number"),
    ("the kind is unknown", _with(kind="model2"), "model, base or adapter in kind"),
    ("an adapter names no base", _with(kind="adapter"), "must name the base package in requires"),
    ("a model names a base", _with(requires="e" * 64), "must name the base package in requires"),
    ("a format is text", _with(formats={"a": "b"}), "an object in formats"),
    ("a format lacks a field", _with(formats={"a": {"path": "model.onnx"}}), "exactly path, runtime, precision"),
    (
        "a format names a file that is not there",
        _with(formats={"a": {"path": "b", "runtime": "x", "precision": "y", "settings": {}}}),
        "'b', where the package has no file",
    ),
    ("fields of schema 2 are in schema 1", _with(schema=1), "unknown field 'formats'"),
    ("the input lacks a field", _with(input={"channels": 1}), "fault in input"),
    ("the input has two channels", _with(input={**KNOWN.input.to_json(), "channels": 2}), "fault in input"),
    ("the input is null", _with(input=None), "an object in input, not null"),
    ("the time has no zone", _with(created="2030-01-31T12:00:00"), "UTC time"),
    ("the time is no date", _with(created="2030-02-31T12:00:00Z"), "UTC time"),
    ("the time is written loosely", _with(created="2030-1-31T12:00:00Z"), "UTC time"),
    ("a tool's version is a number", _with(tools={"onnx": 1}), "text in tools"),
    ("no file is listed", _with(files={}), "files, not 0"),
    ("a file entry is a digest only", _with(files={"a": "c" * 64}), "an object in files"),
    ("a file entry has more", _file("a", mode=7), "exactly sha256 and size"),
    ("a size is negative", _file("a", size=-1), "size, not -1"),
    ("a size is a fraction", _file("a", size=1.5), "whole number in"),
    ("a file's digest is no digest", _file("a", sha256="x"), "SHA-256 digest"),
    ("a file climbs out", _file("../../etc/passwd"), "climbs out of the package folder"),
    ("a file climbs in the middle", _file("a/../../b"), "climbs out of the package folder"),
    ("a file is absolute", _file("/etc/passwd"), "is an absolute path"),
    ("a file is absolute on Windows", _file("C:/x"), "is an absolute path"),
    ("a file has a backslash", _file("..\\x"), "holds a backslash"),
    ("a file's name is empty", _file(""), "plain ASCII"),
    ("a file's folder is empty", _file("a//b"), "plain ASCII"),
    ("a file's name is a dot", _file("./a"), "plain ASCII"),
    ("a file's name ends with a dot", _file("a."), "plain ASCII"),
    ("a file's name ends with a space", _file("a "), "plain ASCII"),
    ("a file is hidden", _file(".hidden"), "plain ASCII"),
    ("a file's name has a zero byte", _file("a\0b"), "plain ASCII"),
    ("a file's name has a line feed", _file("a\n"), "plain ASCII"),
    ("a file's name is not ASCII", _file("modèle.onnx"), "plain ASCII"),
    ("a file's name is endless", _file("/".join(["a" * 100] * 20)), "longer than"),
    ("a file is a device on Windows", _file("data/Con.txt"), "a device's name on Windows"),
    ("a file is the manifest", _file("Manifest.json"), "which is not content"),
    ("a file is the signature", _file("manifest.sig"), "which is not content"),
    ("two files differ in case only", _two("Model.onnx", "model.onnx"), "side by side"),
    ("a file is also a folder", _two("Model", "model/weight.bin"), "side by side"),
]  # fmt: skip


@pytest.mark.parametrize(("fault", "make", "sentence"), FAULTS, ids=[fault for fault, _, _ in FAULTS])
def test_a_manifest_is_refused_when(fault: str, make: Callable[[], bytes], sentence: str) -> None:
    with pytest.raises(PackageError, match=sentence) as refusal:
        parse_manifest(make())
    assert str(refusal.value).count("\n") == 0
    assert str(refusal.value).endswith(".")


def test_the_names_that_exporters_write_are_allowed() -> None:
    names = [
        "model.onnx",
        "golden.npz",
        "model.mlpackage/Manifest.json",
        "model.mlpackage/Data/com.apple.CoreML/model.mlmodel",
        "model.mlpackage/Data/com.apple.CoreML/weights/weight.bin",
        "model-fp32.mlpackage/Manifest.json",
    ]
    assert [file_name_fault(name) for name in names] == [None] * len(names)
    assert name_clash(names) is None


def test_a_hostile_value_is_shown_short_and_escaped() -> None:
    assert shown("\x1b[2J\u202e") == r"'\x1b[2J\u202e'"
    assert len(shown("x" * 1000)) == 80


def test_times_are_written_in_utc_to_the_second() -> None:
    assert utc_text(datetime(2030, 1, 31, 12, 0, 0, 999, tzinfo=UTC)) == "2030-01-31T12:00:00Z"
    east = timezone(timedelta(hours=2))
    assert utc_text(datetime(2030, 1, 31, 1, 0, 0, tzinfo=east)) == "2030-01-30T23:00:00Z"
