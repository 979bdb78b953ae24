"""``keyfoundry pretrain``: train a base, from scratch or on from another one."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from keys.errors import InputError

OF_THE_START = ("architecture", "model_arg", "image_size", "channels")


def pretrain_command(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Checkpoint to write (.safetensors); its model card lies beside it.")],
    data: Annotated[
        str, typer.Option(help="sample, idx, or any timm.data.create_dataset name ('' for a folder).")
    ] = "sample",
    data_root: Annotated[Path | None, typer.Option(help="Folder of the data set.")] = None,
    start: Annotated[
        str | None,
        typer.Option(
            help="Go on from this base: shipped, hardened, or a checkpoint; it says architecture, size and channels."
        ),
    ] = None,
    architecture: Annotated[str, typer.Option(help="A timm name, or one of docs/bases.md.")] = "vit_tiny_patch16_224",
    model_arg: Annotated[
        list[str] | None, typer.Option(help="Argument of the timm model, as name=value; repeatable.")
    ] = None,
    image_size: Annotated[int, typer.Option(help="Input size in pixels.")] = 28,
    channels: Annotated[int, typer.Option(help="1 for grey, 3 for RGB.")] = 1,
    epochs: Annotated[int, typer.Option()] = 20,
    batch_size: Annotated[int, typer.Option()] = 128,
    learning_rate: Annotated[float, typer.Option()] = 7e-4,
    weight_decay: Annotated[float, typer.Option()] = 0.05,
    label_smoothing: Annotated[float, typer.Option()] = 0.1,
    shift: Annotated[int, typer.Option(help="Largest random shift in pixels.")] = 1,
    erase: Annotated[float, typer.Option(help="Probability of erasing a random rectangle.")] = 0.1,
    validation: Annotated[int, typer.Option(help="Training images held out.")] = 5000,
    recipe: Annotated[
        Path | None,
        typer.Option(help="Fleet file whose [recipe] says how to train: transform, objective, …"),
    ] = None,
    labels: Annotated[str | None, typer.Option(help="Class names, separated by commas, for IDX files.")] = None,
    seed: Annotated[int, typer.Option()] = 0,
    json_output: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Train a base from scratch, or on from another; a killed run goes on from its last whole epoch.

    \b
    Examples:
      keyfoundry pretrain --data idx --data-root ../shared/data/fashion-mnist \\
        --model-arg depth=6 --model-arg patch_size=7 --out base.safetensors
      keyfoundry pretrain --data '' --data-root ../shared/data/cifar10 --image-size 64 --channels 3 \\
        --model-arg depth=6 --model-arg patch_size=16 --out cifar10.safetensors
      keyfoundry pretrain --architecture resnet18_small --epochs 5 --out resnet18.safetensors
      keyfoundry pretrain --start shipped --recipe adversarial.toml --epochs 3 --out hardened.safetensors
      keyfoundry pretrain --architecture vgg3d --model-arg patch_size=14 --recipe volumes.toml --out vgg3d.safetensors
    """
    from factory.base import contract_for, load_base, read_base, timm_architecture
    from factory.data import load_splits
    from factory.pretrain import pretrain, write_model_card
    from factory.progress import Progress, log_to
    from factory.recipes.recipe import RecipeSettings
    from factory.recipes.training import TrainingSettings
    from factory.settings import BaseSettings, DataSettings, parse, read_fleet_file

    if out.suffix != ".safetensors":
        raise InputError(f"--out {out} must end in .safetensors.")
    if start is not None:
        _check_start(context, start, out)
    arguments: dict[str, object] = {"in_chans": channels}
    for pair in model_arg or []:
        key, separator, value = pair.partition("=")
        if not separator:
            raise InputError(f"--model-arg {pair!r} is not name=value.")
        try:
            arguments[key] = json.loads(value)
        except ValueError:
            arguments[key] = value
    progress = Progress()
    log_to(out.with_suffix(".log"))
    training = parse(
        TrainingSettings,
        {"epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate, "weight_decay": weight_decay,
         "label_smoothing": label_smoothing, "shift": shift, "erase": erase},
        "the options",
    )  # fmt: skip
    settings = parse(
        DataSettings,
        {"name": data, "root": data_root, "validation": validation, "labels": labels and labels.split(",")},
        "the options",
    )
    chosen = None
    if recipe is not None:
        values = read_fleet_file(recipe)
        if "recipe" not in values:
            raise InputError(f"{recipe} has no table [recipe]; it says how to train.")
        chosen = parse(RecipeSettings, values["recipe"], str(recipe))
        if "training" in values["recipe"]:
            progress.say("Epochs, rates and augmentation are those of the options; recipe.training is for devices.")
    known = BaseSettings(name=start) if start else None
    contract = read_base(known).architecture.contract if known else contract_for(channels, image_size)
    splits = load_splits(settings, contract, out.parent / "cache", progress)
    begin = (
        load_base(known, splits.labels, seed) if known
        else timm_architecture(architecture, splits.labels, image_size, arguments)
    )  # fmt: skip
    result = pretrain(begin, splits, training, seed=seed, out=out, progress=progress, recipe=chosen)
    command = shlex.join(["keyfoundry", *sys.argv[1:]])
    write_model_card(result, splits, training, seed=seed, out=out, command=command)
    low, high = result.test_accuracy.interval
    if json_output:
        typer.echo(json.dumps({"checkpoint": str(out), "validation_accuracy": result.validation_accuracy,
                               "test_accuracy": result.test_accuracy.to_json()}))  # fmt: skip
    else:
        typer.echo(
            f"{out}: test accuracy {result.test_accuracy.value:.4f} [{low:.4f}, {high:.4f}] on "
            f"{result.test_accuracy.n} images, validation {result.validation_accuracy:.4f}"
        )


def _check_start(context: typer.Context, start: str, out: Path) -> None:
    """Raise InputError unless ``start`` is a checkpoint of its own, and no option says what it says already."""
    for name in OF_THE_START:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise InputError(f"The base of --start says --{name.replace('_', '-')} already; leave one of them out.")
    from factory.base import EMBEDDED

    path = EMBEDDED.get(start, Path(start))
    if path.suffix != ".safetensors":
        raise InputError(
            f"--start {start} must be {', '.join(map(repr, EMBEDDED))} or a .safetensors file written by 'keyfoundry "
            "pretrain'."
        )
    if path.resolve() == out.resolve():
        raise InputError(f"--start and --out are both {out}: the base would be written over; name another --out.")
