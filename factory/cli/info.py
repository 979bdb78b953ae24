"""``keyfoundry info PATH``: what a package or a model holds, and what was measured about it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from factory.cli.console import print_rows
from factory.cli.options import Json

if TYPE_CHECKING:
    from exporters.inspection import Model, Port
    from exporters.manifest import Manifest

_LABELS_SHOWN = 10


def info_command(
    path: Annotated[Path, typer.Argument(help="A package's folder, or one .onnx, .ort, .mlpackage or .onnx_adapter.")],
    public_key: Annotated[
        Path | None, typer.Option(help="Verify the package against this key; without it nothing is verified.")
    ] = None,
    json_output: Json = False,
) -> None:
    """Show what a package or a model holds: inputs, outputs, operators, sizes, precision, versions, evidence.

    \b
    Examples:
      keyfoundry info fleet/devices/device-1/package --public-key fleet/signing-key.pub
      keyfoundry info fleet/devices/device-1/package/model.mlpackage --json
    """
    from exporters.inspection import model_kind, read_model
    from keys.errors import InputError

    # By its name first: where case is ignored, the Manifest.json of a .mlpackage looks like a package's.
    if model_kind(path) is not None:
        if public_key is not None:
            raise InputError(f"{path} is a model, and only packages are signed; leave out --public-key.")
        _show_model(path, read_model(path), json_output)
    else:
        _show_package(path, public_key, json_output)


def _show_model(path: Path, model: Model, json_output: bool) -> None:
    if json_output:
        typer.echo(json.dumps({"path": str(path), "model": model.to_json()}, indent=2))
        return
    _print_models({model.kind: model})


def _show_package(path: Path, public_key: Path | None, json_output: bool) -> None:
    from exporters.inspection import model_kind, read_model
    from exporters.manifest import MANIFEST_NAME
    from exporters.package import inspect_package, open_package
    from keys.files import sha256_file
    from keys.signing import read_public_key

    if public_key is not None:
        package = open_package(path, read_public_key(public_key))
        manifest, digest = package.manifest, package.digest
        state = "signature and digests verified"
    else:
        manifest, signed = inspect_package(path)
        digest = sha256_file(path / MANIFEST_NAME)
        state = ("has a signature" if signed else "unsigned (rejected, or not judged yet)") + "; nothing was verified"
    # Other forms, such as a list of changes to a Core ML package, are files like any other.
    known = {name: path / entry.path for name, entry in manifest.formats.items() if model_kind(Path(entry.path))}
    models = {name: read_model(file) for name, file in known.items()}
    if json_output:
        described = {name: model.to_json() for name, model in models.items()}
        document = {"state": state, "digest": digest, "manifest": manifest.to_json(), "models": described}
        typer.echo(json.dumps(document, indent=2))
        return
    typer.echo(f"{path}: {state}")
    print_rows("package", ["field", "value"], _package_rows(manifest, digest))
    if models:
        _print_models(models)
    print_rows("files", ["file", "bytes", "SHA-256"], [(n, f"{f.size:,}", f.sha256) for n, f in manifest.files.items()])
    if rows := list(evidence_rows(manifest.evidence)):
        print_rows("evidence", ["what", "measured"], rows)


def _package_rows(manifest: Manifest, digest: str) -> list[tuple[str, str]]:
    contract, labels = manifest.input, manifest.labels
    more = f" and {len(labels) - _LABELS_SHOWN} more" if len(labels) > _LABELS_SHOWN else ""
    rows = [
        ("kind", manifest.kind),
        ("requires", f"the base package with the digest {manifest.requires}" if manifest.requires else "nothing"),
        ("digest", digest),
        *((name, str(getattr(manifest, name))) for name in ("device_id", "generation", "fleet_id", "created")),
        ("base_digest", manifest.base_digest),
        ("adapter_digest", manifest.adapter_digest),
        ("input", f"{contract.color} {contract.channels}×{contract.height}×{contract.width}; {contract.resize}"),
        ("labels", f"{len(labels)}: {', '.join(labels[:_LABELS_SHOWN])}{more}"),
        ("recipe", json.dumps(dict(manifest.recipe), sort_keys=True)),
        ("tools", ", ".join(f"{name} {version}" for name, version in sorted(manifest.tools.items()))),
    ]
    return [row for row in rows if row[1]]


def _print_models(models: Mapping[str, Model]) -> None:
    """Two tables with one column for each model: what it is, and its operators."""
    described = {name: _model_rows(model) for name, model in models.items()}
    fields = list(dict.fromkeys(field for rows in described.values() for field in rows))
    rows = [(field, *(values.get(field, "") for values in described.values())) for field in fields]
    print_rows("models", ["", *models], rows)
    counts = {name: model.operators for name, model in models.items()}
    kinds = sorted({kind for count in counts.values() for kind in count})
    total = ("all", *(f"{sum(count.values()):,}" for count in counts.values()))
    print_rows(
        "operators", ["type", *models],
        [*((kind, *(str(count.get(kind, "")) for count in counts.values())) for kind in kinds), total],
    )  # fmt: skip


def _model_rows(model: Model) -> dict[str, str]:
    return {
        "file": model.path.name,
        "format": model.kind,
        "inputs": "; ".join(map(_port, model.inputs)),
        "outputs": "; ".join(map(_port, model.outputs)),
        "batch": model.batch,
        "parameters": f"{model.parameters:,}",
        "weights": f"{model.weight_bytes:,} bytes",
        "graph": f"{model.graph_bytes:,} bytes",
        "precision": ", ".join(f"{kind} {size:,} bytes" for kind, size in model.precision.items()),
        **model.versions,
        "metadata": ", ".join(model.metadata),
    }


def _port(port: Port) -> str:
    return f"{port.name} ({port.type}{' ' if port.shape else ''}{'×'.join(map(str, port.shape))})"


def evidence_rows(evidence: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """The figures that decide about a package, in words; what another program wrote is shown as it is."""
    for name in ("accuracy", "base_accuracy", "worst_case"):
        if name in evidence:
            yield name.replace("_", " "), proportion(evidence[name])
    parity = evidence.get("parity")
    for name, value in parity.items() if isinstance(parity, dict) else ():
        yield f"parity {name}", _parity(value)
    decision = evidence.get("decision")
    if isinstance(decision, dict):
        yield "decision", "released" if decision.get("released") is True else "rejected"
        conditions = decision.get("conditions")
        for condition in conditions if isinstance(conditions, list) else ():
            if isinstance(condition, dict):
                met = "met" if condition.get("met") is True else "not met"
                yield f"condition {condition.get('name')}", f"{met}: {condition.get('sentence')}"


def proportion(value: Any) -> str:
    """A proportion with its interval and n, or why there is none.

    >>> proportion({"successes": 1, "n": 4, "value": 0.25, "interval": [0.05, 0.7]})
    '0.250 [0.050, 0.700] (n = 4)'
    """
    try:
        low, high = value["interval"]
        return f"{value['value']:.3f} [{low:.3f}, {high:.3f}] (n = {value['n']})"
    except (TypeError, KeyError, ValueError, OverflowError):
        return _not_measured(value)


def _parity(value: Any) -> str:
    try:
        passed = "passed" if value["passed"] is True else "failed"
        return (
            f"{passed}: same class {value['top1_agreement']:.4f} (at least {value['top1_limit']}), largest difference "
            f"{value['max_relative_difference']:.2g} (at most {value['limit']}), n = {value['n']}, {value['runtime']}"
        )
    except (TypeError, KeyError, ValueError, OverflowError):
        return _not_measured(value)


def _not_measured(value: Any) -> str:
    if isinstance(value, dict) and "not_measured" in value:
        return f"not measured: {value['not_measured']}"
    return json.dumps(value)
