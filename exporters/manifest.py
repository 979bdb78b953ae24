"""The manifest: what a package is, in one JSON file with one canonical form.

Rules of this module: it does no input or output; it imports nothing but the standard library and the light
parts of this project, because a device runs it; :func:`parse_manifest` believes nothing (types, ranges,
names, unknown or repeated fields are all checked) and is called only after the signature was checked; the
canonical bytes are ASCII JSON with sorted keys, two spaces of indent and a newline at the end.

>>> file_name_fault("model.mlpackage/Data/com.apple.CoreML/weights/weight.bin")
>>> file_name_fault("../model.onnx")
'climbs out of the package folder'
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from typing import Never, TypeVar

from exporters.contract import InputContract
from keys.errors import InputError, PackageError
from keys.identifiers import check_device_id

SCHEMA = 2
MANIFEST_NAME = "manifest.json"
SIGNATURE_NAME = "manifest.sig"

# Bounds that no honest package reaches; a device must not be made to work without end by a hostile one.
MAX_MANIFEST_BYTES = 8 * 2**20
_MAX_FILES = 10_000
_MAX_LABELS = 100_000
_MAX_TEXT = 1_000
_MAX_DEPTH = 32
_MAX_SIZE = 2**53
_MAX_GENERATION = 2**32 - 1

T = TypeVar("T")

_HEX64 = re.compile(r"[0-9a-f]{64}")
_HEX16 = re.compile(r"[0-9a-f]{16}")
_CREATED = "%Y-%m-%dT%H:%M:%SZ"
# ASCII only: no two such names can be equal after Unicode normalisation, and none can confuse a terminal.
_NAME_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,126}")
# Windows opens a device instead of a file for these, with any extension.
_RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10))}


@dataclass(frozen=True)
class FileDigest:
    """What identifies one file's content: SHA-256 as 64 lower-case hex digits, and its size in bytes."""

    sha256: str
    size: int

    @classmethod
    def of(cls, data: bytes) -> FileDigest:
        """The digest of bytes in memory."""
        return cls(hashlib.sha256(data).hexdigest(), len(data))


@dataclass(frozen=True)
class FormatEntry:
    """One exported form of the model: ``path`` is a file or a folder of the package; ``settings`` is plain JSON.

    ``runtime`` and ``precision`` are as in :mod:`exporters.formats`; ``settings`` says the rest, such as the opset.
    """

    path: str
    runtime: str
    precision: str
    settings: Mapping[str, object]

    def to_json(self) -> dict[str, object]:
        """Plain JSON types."""
        return {**vars(self), "settings": dict(self.settings)}


# What a package of schema 1 holds without saying it.
_FORMATS_OF_SCHEMA_1 = {
    "onnx-fp32": FormatEntry("model.onnx", "onnxruntime", "fp32", {}),
    "coreml-fp16": FormatEntry("model.mlpackage", "coreml", "fp16", {}),
    "coreml-fp32": FormatEntry("model-fp32.mlpackage", "coreml", "fp32", {}),
}
_NEW_IN_SCHEMA_2 = ("formats", "kind", "requires")
KINDS = ("model", "base", "adapter")


@dataclass(frozen=True)
class Manifest:
    """Everything a package says about itself; it holds no key material.

    ``kind`` is "model" (runs by itself), "base" (runs, too, and adapters can be put on it) or "adapter" (runs on the
    base package whose manifest has the SHA-256 ``requires``, which is None for the other kinds); ``formats`` maps the
    name of each exported form to what it is.
    ``generation`` counts from 1; ``base_digest`` and ``adapter_digest`` are SHA-256 in hex; ``labels`` names
    the classes in the order of the logits; ``files`` maps each file's relative POSIX path to its digest;
    ``recipe`` and ``evidence`` are JSON objects that the factory gives their meaning; ``created`` is UTC,
    ISO 8601 to the second with a final Z; ``tools`` maps a tool's name to its version.
    """

    device_id: str
    generation: int
    fleet_id: str
    base_digest: str
    adapter_digest: str
    recipe: Mapping[str, object]
    labels: tuple[str, ...]
    input: InputContract
    files: Mapping[str, FileDigest]
    evidence: Mapping[str, object]
    created: str
    tools: Mapping[str, str]
    formats: Mapping[str, FormatEntry] = field(default_factory=dict)
    kind: str = "model"
    requires: str | None = None

    def to_json(self) -> dict[str, object]:
        """Plain JSON types, with the schema's number."""
        return {
            "schema": SCHEMA,
            "device_id": self.device_id,
            "generation": self.generation,
            "fleet_id": self.fleet_id,
            "base_digest": self.base_digest,
            "adapter_digest": self.adapter_digest,
            "recipe": dict(self.recipe),
            "labels": list(self.labels),
            "input": self.input.to_json(),
            "files": {name: {"sha256": d.sha256, "size": d.size} for name, d in self.files.items()},
            "evidence": dict(self.evidence),
            "created": self.created,
            "tools": dict(self.tools),
            "formats": {name: entry.to_json() for name, entry in self.formats.items()},
            "kind": self.kind,
            "requires": self.requires,
        }

    def to_bytes(self) -> bytes:
        """The canonical bytes: what is signed and what the package's digest is taken of.

        Raises :class:`InputError` if a value is not JSON (NaN and infinity are not).
        """
        try:
            text = json.dumps(self.to_json(), sort_keys=True, indent=2, ensure_ascii=True, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise InputError(f"The manifest is not JSON ({error}); give plain values only.") from error
        return text.encode("ascii") + b"\n"


def utc_text(moment: datetime) -> str:
    """A moment as manifests and receipts write it, for example ``2030-01-31T12:00:00Z``."""
    return moment.astimezone(UTC).strftime(_CREATED)


def parse_utc(text: str) -> datetime:
    """The moment that :func:`utc_text` wrote; raises ``ValueError`` for any other text."""
    moment = datetime.strptime(text, _CREATED).replace(tzinfo=UTC)
    if utc_text(moment) != text:
        raise ValueError(f"not a time as manifests write it: {text!r}")
    return moment


def parse_manifest(data: bytes) -> Manifest:
    """Read a manifest's bytes, strictly; raise :class:`PackageError` with one sentence at the first fault."""
    if len(data) > MAX_MANIFEST_BYTES:
        _refuse(f"is larger than {MAX_MANIFEST_BYTES} bytes")
    document = _load_json(data)
    if not isinstance(document, dict):
        _refuse(f"must be a JSON object, not {_kind(document)}")
    schema = _check_schema(document)
    known = [field.name for field in fields(Manifest) if schema > 1 or field.name not in _NEW_IN_SCHEMA_2]
    if unknown := sorted(document.keys() - {*known, "schema"}):
        _refuse(f"has the unknown field {shown(unknown[0])}")
    if missing := [name for name in known if name not in document]:
        _refuse(f"lacks the field {shown(missing[0])}")
    files = _files(document["files"])
    kind = _text(document.get("kind", "model"), "kind")
    if kind not in KINDS:
        _refuse(f"must hold {', '.join(KINDS[:-1])} or {KINDS[-1]} in kind, not {shown(kind)}")
    requires = document.get("requires")
    if (requires is not None) != (kind == "adapter"):
        _refuse("must name the base package in requires for an adapter, and for nothing else")
    return Manifest(
        device_id=_device_id(document["device_id"]),
        generation=_integer(document["generation"], "generation", 1, _MAX_GENERATION),
        fleet_id=_matching(document["fleet_id"], "fleet_id", _HEX16, "16 lower-case hex digits"),
        base_digest=_digest(document["base_digest"], "base_digest"),
        adapter_digest=_digest(document["adapter_digest"], "adapter_digest"),
        recipe=_json_object(document["recipe"], "recipe"),
        labels=_labels(document["labels"]),
        input=_contract(document["input"]),
        files=files,
        evidence=_json_object(document["evidence"], "evidence"),
        created=_created(document["created"]),
        tools={
            _text(name, "tools"): _text(version, f"tools[{shown(name)}]")
            for name, version in _json_object(document["tools"], "tools").items()
        },
        formats=_formats(document["formats"], files) if schema > 1 else _formats_of_schema_1(files),
        kind=kind,
        requires=None if requires is None else _digest(requires, "requires"),
    )


def file_name_fault(name: str) -> str | None:
    """What makes ``name`` unsafe as a file's path inside a package, as the end of a sentence; None if safe.

    Safe is a relative POSIX path whose parts are ASCII letters, digits, dot, dash and underscore, at most 127
    long, not starting or ending with a dot, and not a device's name on Windows.
    """
    if "\\" in name:
        return "holds a backslash"
    if name.startswith("/") or re.match(r"[A-Za-z]:", name):
        return "is an absolute path"
    parts = name.split("/")
    if ".." in parts:
        return "climbs out of the package folder"
    for part in parts:
        if not _NAME_PART.fullmatch(part) or part.endswith("."):
            return "is not made of plain ASCII letters, digits, dots, dashes and underscores"
        if part.split(".")[0].lower() in _RESERVED:
            return "is a device's name on Windows"
    if len(name) > _MAX_TEXT:
        return f"is longer than {_MAX_TEXT} characters"
    return None


def name_clash(names: Iterable[str]) -> tuple[str, str] | None:
    """Two names that are one where case is ignored, or of which one is also the other's folder; else None."""
    seen: dict[str, str] = {}
    ordered = sorted(names)
    for name in ordered:
        if (other := seen.get(name.lower())) is not None:
            return other, name
        seen[name.lower()] = name
    for name in ordered:
        parts = name.lower().split("/")
        for end in range(1, len(parts)):
            if (other := seen.get("/".join(parts[:end]))) is not None:
                return other, name
    return None


def shown(value: object) -> str:
    """A value from an untrusted source as an error may print it: quoted, escaped, cut to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _refuse(fault: str, *, remedy: str = "get the package again from the factory") -> Never:
    raise PackageError(f"{MANIFEST_NAME} {fault}; {remedy}.")


def _load_json(data: bytes) -> object:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        _refuse("is not UTF-8 text")
    try:
        return json.loads(
            text, object_pairs_hook=_object_without_repeats, parse_constant=_no_constant, parse_float=_finite
        )
    except RecursionError:
        _refuse(f"is nested deeper than {_MAX_DEPTH} levels")
    except ValueError as error:
        _refuse(f"is not JSON ({error})")


def _object_without_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result: dict[str, object] = {}
    for name, value in pairs:
        if name in result:
            _refuse(f"has the field {shown(name)} twice")
        result[name] = value
    return result


def _no_constant(name: str) -> Never:
    _refuse(f"holds {name}, which is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        _refuse(f"holds the number {shown(text)}, which is too large")
    return value


def _check_schema(document: Mapping[str, object]) -> int:
    schema = document.get("schema")
    if not isinstance(schema, int) or isinstance(schema, bool) or schema < 1:
        _refuse(f"must name its schema as a whole number from 1, not {shown(schema)}")
    if schema > SCHEMA:
        _refuse(
            f"has schema {shown(schema)}, newer than the {SCHEMA} that this program reads",
            remedy="update keyfoundry",
        )
    return schema


def _kind(value: object) -> str:
    kinds: dict[type, str] = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def _text(value: object, where: str, *, longest: int = _MAX_TEXT) -> str:
    if not isinstance(value, str):
        _refuse(f"must hold text in {where}, not {_kind(value)}")
    if not value or len(value) > longest:
        _refuse(f"must hold 1 to {longest} characters in {where}, not {len(value)}")
    _check_characters(value, where)
    return value


def _check_characters(value: str, where: str) -> None:
    """Half of a surrogate pair can be written in JSON but never in UTF-8, so it would fail much later."""
    if any("\ud800" <= character <= "\udfff" for character in value):
        _refuse(f"holds half a character (a lone surrogate) in {where}")


def _integer(value: object, where: str, low: int, high: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        _refuse(f"must hold a whole number in {where}, not {_kind(value)}")
    if not low <= value <= high:
        _refuse(f"must hold {low} to {high} in {where}, not {shown(value)}")
    return value


def _matching(value: object, where: str, pattern: re.Pattern[str], words: str) -> str:
    text = _text(value, where)
    if not pattern.fullmatch(text):
        _refuse(f"must hold {words} in {where}, not {shown(text)}")
    return text


def _digest(value: object, where: str) -> str:
    return _matching(value, where, _HEX64, "a SHA-256 digest (64 lower-case hex digits)")


def _object(value: object, where: str) -> dict[str, object]:
    if not isinstance(value, dict):
        _refuse(f"must hold an object in {where}, not {_kind(value)}")
    return value


def _json_object(value: object, where: str) -> dict[str, object]:
    result = _object(value, where)
    _check_plain(result, where, _MAX_DEPTH)
    return result


def _check_plain(value: object, where: str, depth: int) -> None:
    if depth == 0:
        _refuse(f"is nested deeper than {_MAX_DEPTH} levels in {where}")
    if isinstance(value, str):
        _check_characters(value, where)
    elif isinstance(value, dict):
        for name, item in value.items():
            _check_characters(name, where)
            _check_plain(item, where, depth - 1)
    elif isinstance(value, list):
        for item in value:
            _check_plain(item, where, depth - 1)


def _device_id(value: object) -> str:
    return _by(lambda: check_device_id(_text(value, "device_id")), "device_id")


def _contract(value: object) -> InputContract:
    return _by(lambda: InputContract.from_json(_json_object(value, "input")), "input")


def _by(parse: Callable[[], T], where: str) -> T:
    """Another module's strict parser, its refusal told as this package's."""
    try:
        return parse()
    except InputError as error:
        raise PackageError(f"{MANIFEST_NAME} has a fault in {where}: {error}") from error


def _labels(value: object) -> tuple[str, ...]:
    if not isinstance(value, list):
        _refuse(f"must hold a list in labels, not {_kind(value)}")
    if not 2 <= len(value) <= _MAX_LABELS:
        _refuse(f"must hold 2 to {_MAX_LABELS} names in labels, not {len(value)}")
    return tuple(_text(name, f"labels[{index}]") for index, name in enumerate(value))


def _files(value: object) -> dict[str, FileDigest]:
    entries = _object(value, "files")
    if not 1 <= len(entries) <= _MAX_FILES:
        _refuse(f"must list 1 to {_MAX_FILES} files, not {len(entries)}")
    for name in entries:
        if fault := file_name_fault(name):
            _refuse(f"lists a file whose name {shown(name)} {fault}")
    if own := [name for name in entries if name.split("/")[0].lower() in (MANIFEST_NAME, SIGNATURE_NAME)]:
        _refuse(f"lists {shown(own[0])}, which is not content")
    if clash := name_clash(entries):
        _refuse(f"lists {shown(clash[0])} and {shown(clash[1])}, which cannot lie side by side on every disk")
    return {name: _file(entry, f"files[{shown(name)}]") for name, entry in entries.items()}


def _file(value: object, where: str) -> FileDigest:
    entry = _object(value, where)
    if entry.keys() != {"sha256", "size"}:
        _refuse(f"must hold exactly sha256 and size in {where}")
    return FileDigest(
        _digest(entry["sha256"], f"{where}.sha256"), _integer(entry["size"], f"{where}.size", 0, _MAX_SIZE)
    )


def _formats(value: object, files: Mapping[str, FileDigest]) -> dict[str, FormatEntry]:
    entries = _json_object(value, "formats")
    return {_text(name, "formats"): _format(entry, f"formats[{shown(name)}]", files) for name, entry in entries.items()}


def _format(value: object, where: str, files: Mapping[str, FileDigest]) -> FormatEntry:
    entry = _object(value, where)
    if entry.keys() != {"path", "runtime", "precision", "settings"}:
        _refuse(f"must hold exactly path, runtime, precision and settings in {where}")
    path = _text(entry["path"], f"{where}.path")
    if not any(name == path or name.startswith(f"{path}/") for name in files):
        _refuse(f"names in {where} the path {shown(path)}, where the package has no file")
    return FormatEntry(
        path, _text(entry["runtime"], f"{where}.runtime"), _text(entry["precision"], f"{where}.precision"),
        _object(entry["settings"], f"{where}.settings"),
    )  # fmt: skip


def _formats_of_schema_1(files: Mapping[str, FileDigest]) -> dict[str, FormatEntry]:
    present = {name.split("/")[0] for name in files}
    return {name: entry for name, entry in _FORMATS_OF_SCHEMA_1.items() if entry.path in present}


def _created(value: object) -> str:
    text = _text(value, "created")
    try:
        parse_utc(text)
    except ValueError:
        _refuse(f"must hold a UTC time like 2030-01-31T12:00:00Z in created, not {shown(text)}")
    return text
