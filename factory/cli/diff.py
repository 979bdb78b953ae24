"""``keyfoundry diff A B``: what differs between two packages or two models, without a tensor's values."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from factory.cli.console import print_rows, visible
from factory.cli.info import evidence_rows
from factory.cli.options import Json

if TYPE_CHECKING:
    from exporters.inspect_diff import Change, ModelDifference

_SHOWN = 100
_TENSORS_SHOWN = 30


@dataclass(frozen=True)
class _Difference:
    """Everything that differs; ``models`` by format, or by the kind of two single models.

    ``evidence`` are the figures among ``manifest`` that decide about a package, in words.
    """

    manifest: tuple[Change, ...]
    evidence: tuple[Change, ...]
    files: tuple[Change, ...]
    models: dict[str, ModelDifference]

    @property
    def equal(self) -> bool:
        return not (self.manifest or self.files) and all(model.equal for model in self.models.values())


def diff_command(
    a: Annotated[
        Path, typer.Argument(metavar="A", help="A package's folder, or one .onnx, .ort, .mlpackage or .onnx_adapter.")
    ],
    b: Annotated[Path, typer.Argument(metavar="B", help="The same kind of thing.")],
    json_output: Json = False,
) -> None:
    """Say what differs between two packages or two models: manifest, files, graph, tensors. Nothing is verified.

    Exit code 0 if they are equal, 6 if they differ. Tensors are counted and measured, never shown: an order may be a
    key.

    \b
    Examples:
      keyfoundry diff fleet/devices/device-1/package fleet/devices/device-2/package
      keyfoundry diff old/model.onnx new/model.onnx --json
    """
    from exporters.inspection import model_kind
    from keys.errors import CheckFailed, InputError

    are_models = [model_kind(path) is not None for path in (a, b)]
    if are_models[0] != are_models[1]:
        raise InputError("One of the two is a model and the other is not; compare two packages or two models.")
    found = _compare_models(a, b) if are_models[0] else _compare_packages(a, b)
    if json_output:
        models = {name: model.to_json() for name, model in found.models.items()}
        document: dict[str, Any] = {"a": str(a), "b": str(b), "equal": found.equal}
        document |= {"manifest": _plain(found.manifest), "files": _plain(found.files), "models": models}
        typer.echo(json.dumps(document, indent=2))
    else:
        _print_difference(a, b, found)
    if not found.equal:
        raise typer.Exit(CheckFailed.exit_code)


def _compare_models(a: Path, b: Path) -> _Difference:
    from exporters.inspect_diff import compare_models
    from exporters.inspection import read_model

    first, second = read_model(a), read_model(b)
    return _Difference((), (), (), {first.kind: compare_models(first, second)})


def _compare_packages(a: Path, b: Path) -> _Difference:
    from exporters.inspect_diff import Change, changes, compare_files, compare_manifests, compare_models
    from exporters.inspection import model_kind, read_model
    from exporters.package import digest_folder, inspect_package

    (first, signed_a), (second, signed_b) = inspect_package(a), inspect_package(b)
    fields = compare_manifests(first, second)
    if signed_a != signed_b:
        fields = (Change("manifest.sig", *("there" if signed else None for signed in (signed_a, signed_b))), *fields)
    # As they lie there: a manifest that nobody verified may say something else.
    files = compare_files(digest_folder(a), digest_folder(b))
    models: dict[str, ModelDifference] = {}
    for name, entry in first.formats.items():
        other = second.formats.get(name)
        if other is not None and model_kind(Path(entry.path)) and model_kind(Path(other.path)):
            models[name] = compare_models(read_model(a / entry.path), read_model(b / other.path))
    evidence = changes(*(dict(evidence_rows(manifest.evidence)) for manifest in (first, second)))
    return _Difference(fields, evidence, files, models)


def _print_difference(a: Path, b: Path, found: _Difference) -> None:
    typer.echo(f"A: {a}\nB: {b}\n" + ("They are equal." if found.equal else "They differ; nothing was verified."))
    for name, model in found.models.items():
        typer.echo(visible(f"{name}: {model.sentence}"))
    if found.manifest:
        print_rows("manifest", ["field", "A", "B"], _manifest_rows(found))
    if found.files:
        print_rows(
            "files", ["file", "state", "bytes in A", "bytes in B"], [_file_row(change) for change in found.files]
        )
    for name, model in found.models.items():
        if rows := _graph_rows(model):
            print_rows(f"{name}: graph", ["what", "A", "B"], rows)
        if model.changed:
            _print_tensors(name, model)


def _manifest_rows(found: _Difference) -> list[tuple[str, str, str]]:
    """Of the evidence, which is long, the figures that decide, and the names of the rest."""
    fields = [change for change in found.manifest if not change.name.startswith("evidence.")]
    rows = [(change.name, _value(change.a), _value(change.b)) for change in (*fields, *found.evidence)]
    parts = dict.fromkeys(c.name.split(".")[1] for c in found.manifest if c.name.startswith("evidence."))
    if parts:
        rows.append(("evidence", f"differs in {', '.join(parts)}", "--json lists all"))
    return rows


def _print_tensors(name: str, model: ModelDifference) -> None:
    rows = [
        (
            change.name, change.a if change.a == change.b else f"{change.a} → {change.b}",
            "all" if change.differing is None else f"{change.differing:,} of {change.size:,}",
            *(_figure(value) for value in (change.max_absolute, change.max_relative, change.cosine)),
        )
        for change in model.changed[:_TENSORS_SHOWN]
    ]  # fmt: skip
    title = f"{name}: {len(model.changed)} of {model.tensors} tensors differ"
    print_rows(title, ["tensor", "type", "values that differ", "largest difference", "relative", "cosine"], rows)
    if len(model.changed) > _TENSORS_SHOWN:
        typer.echo(f"{len(model.changed) - _TENSORS_SHOWN} more tensors differ; --json lists all.")


def _graph_rows(model: ModelDifference) -> list[tuple[str, str, str]]:
    rows = [(change.name, _value(change.a), _value(change.b)) for change in (*model.ports, *model.versions)]
    rows += [(f"operators {change.name}", _value(change.a), _value(change.b)) for change in model.operators]
    if model.rewired:
        rows.append(("operators with other inputs, outputs or attributes", str(model.rewired), str(model.rewired)))
    if model.reordered:
        rows.append(("operators", "the same", "in another order"))
    rows += [(f"metadata {name}", "differs", "differs") for name in model.metadata]
    for side, names in enumerate((model.only_a, model.only_b)):
        shown = [f"tensor {name}" for name in names[:_TENSORS_SHOWN]]
        if len(names) > _TENSORS_SHOWN:
            shown.append(f"{len(names) - _TENSORS_SHOWN} more tensors")
        rows += [(text, *(("there", "missing") if side == 0 else ("missing", "there"))) for text in shown]
    return rows


def _file_row(change: Change) -> tuple[str, str, str, str]:
    state = "only in B" if change.a is None else "only in A" if change.b is None else "changed"
    sizes = [f"{side['size']:,}" if isinstance(side, dict) else "" for side in (change.a, change.b)]
    return change.name, state, sizes[0], sizes[1]


def _plain(changes: Sequence[Change]) -> list[dict[str, object]]:
    return [asdict(change) for change in changes]


def _value(value: object) -> str:
    if value is None:
        return "missing"
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
