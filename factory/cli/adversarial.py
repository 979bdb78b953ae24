"""``keyfoundry verify --adversarial`` and ``--clean-images``: adversarial images made elsewhere, in and out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from device_tests.evidence import Measured
    from device_tests.foreign_judgement import ForeignJudgement, ForeignResult
    from exporters.run_onnx import OnnxRuntime
    from factory.fleet import Fleet


def verify_adversarial(fleet: Fleet, path: Path, *, json_output: bool) -> None:
    """Judge every device of an open fleet on the adversarial images in ``path``, and print what came out.

    The packages are judged as they lie there, by onnxruntime; nothing in the fleet's folder is changed.
    """
    from factory.cli.console import print_table

    judgement = judge_adversarial(fleet, path)
    if json_output:
        typer.echo(json.dumps(judgement.to_json()))
        return
    print_table(adversarial_table(judgement))
    for note in remarks(judgement):
        typer.echo(note)


def judge_adversarial(fleet: Fleet, path: Path) -> ForeignJudgement:
    """Judge every device of an open fleet, and the public base, on adversarial images made elsewhere.

    Raises InputError if the images cannot be used (see :func:`device_tests.foreign_images.read_foreign` and
    :func:`device_tests.foreign_pairs.pair`) or are too few for the fleet's release rule, and PackageError for a package
    that is missing or was changed.
    """
    from device_tests.foreign_images import read_foreign
    from device_tests.foreign_judgement import judge_foreign
    from device_tests.foreign_pairs import check_enough, pair
    from exporters.run_torch import TorchRuntime
    from factory.pipeline import public_base
    from factory.release import release_rule

    settings, labels, test = fleet.settings, fleet.splits.labels, fleet.splits.test
    risks = release_rule(settings.release).risks
    file = read_foreign(path, fleet.base.architecture.contract, labels)
    pairs = pair(file, test.images.numpy(), test.labels.numpy(), settings.verification.perturbation)
    check_enough(len(pairs), risks)
    devices = {name: _package_model(fleet.folder.package(name)) for name in settings.device_ids}
    reference = ("public base", TorchRuntime(public_base(fleet)))
    return judge_foreign(devices, pairs, labels, risks, where=path.name, reference=reference)


def write_clean_images(fleet: Fleet, path: Path) -> None:
    """Write the test images that the fleet's attacks use as .npz, for attacks made elsewhere."""
    from device_tests.foreign_images import write_clean
    from keys.errors import InputError

    if path.suffix.lower() != ".npz":
        raise InputError(f"The clean images are written as .npz; {path.name!r} must end in .npz.")
    test = fleet.splits.test.take(fleet.settings.verification.images)
    write_clean(path, test.images.numpy(), test.labels.numpy())


def adversarial_table(judgement: ForeignJudgement) -> Table:
    """One row per device, and the public base below them."""
    from rich.table import Table

    table = Table(title=f"{judgement.where}: {judgement.images} adversarial images within {judgement.perturbation}")
    for column in (
        "model",
        "clean accuracy on these",
        "fooled",
        "most fooled class",
        "beside the rule's limit",
    ):
        table.add_column(column)
    for result in judgement.devices:
        table.add_row(*_row(result))
    if judgement.reference is not None:
        table.add_section()
        table.add_row(*_row(judgement.reference))
    return table


def remarks(judgement: ForeignJudgement) -> tuple[str, ...]:
    """What a reader of the table must know."""
    return (
        "Fooled: of the images that a model gets right when clean, with the 95 % interval. How strong the attack was "
        "is not known here: a low rate is no evidence for a device.",
        *judgement.notes,
    )


def _package_model(package: Path) -> OnnxRuntime:
    """The package's ONNX model in onnxruntime, from the very bytes that its manifest lists."""
    from exporters.manifest import FileDigest
    from exporters.package import inspect_package
    from exporters.package_rules import check_file
    from exporters.run_onnx import OnnxRuntime
    from factory.packaging import ONNX_NAME
    from keys.errors import PackageError

    manifest, _ = inspect_package(package)
    try:
        model = (package / ONNX_NAME).read_bytes()
    except OSError as error:
        raise PackageError(
            f"{package / ONNX_NAME} cannot be read ({error.strerror}); export the device again."
        ) from error
    check_file(manifest, ONNX_NAME, FileDigest.of(model))
    return OnnxRuntime(model)


def _row(result: ForeignResult) -> tuple[str, ...]:
    from exporters.measured import NotMeasured

    measured = {name: fooled for name, fooled in result.per_class.items() if not isinstance(fooled, NotMeasured)}
    worst = max(measured, key=lambda name: measured[name].value, default=None)
    acceptance = result.acceptance
    if isinstance(acceptance, NotMeasured):
        test = f"not measured: {acceptance.reason}"
    else:
        # Not "passed": that an attack of unknown strength stays below the limit is no release.
        verdict = "within" if acceptance.passed else "above"
        test = f"{acceptance.fooled} of {acceptance.plan.n} fooled, {verdict} the limit of {acceptance.plan.c}"
    return (
        result.target,
        _text(result.clean),
        _text(result.fooled),
        "" if worst is None else f"{worst} {_text(measured[worst])}",
        test,
    )


def _text(figure: Measured) -> str:
    from exporters.measured import NotMeasured

    if isinstance(figure, NotMeasured):
        return f"not measured: {figure.reason}"
    low, high = figure.interval
    return f"{figure.value:.3f} [{low:.3f}, {high:.3f}] of {figure.n}"
