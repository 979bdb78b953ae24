"""How fast one device is fine-tuned, beside a plain loop of peft; and what a fleet of N costs per device.

The plain loop is what peft's own examples do: float32, a DataLoader over shuffled tensors, AdamW; it augments nothing.
The factory's is :func:`factory.train.train` with its augmentation, without validation and checkpoint. All recipes take
turns in one process and see the same number of images. With ``--hardening`` seconds, spent once for all fleets, the
cost per device of N devices is drawn to ``--figure``, in units of a device by the plain preset. Run alone::

    python -m benchmarks.fine_tuning --json FILE --compile --hardening 12138 --figure FILE.svg
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.part_cost import trainable, trainings
from benchmarks.rounds import Ratio, Spent, ratio, table, timed, write_record
from factory.base import load_base, read_base
from factory.classifier import ImageClassifier
from factory.data import Split, Splits, load_splits
from factory.progress import Progress
from factory.settings import DataSettings, preset_settings, presets
from keys.derive import fixed_guess

LOOP, PLAIN, COMPILED = "plain loop of peft, float32", "preset plain", ", compiled"


def plain_loop(model: ImageClassifier, split: Split, batch_size: int) -> Callable[[], float]:
    """One pass over the images, as written without a framework: its seconds."""
    images, labels = split.images.float() / 255, split.labels
    loader = DataLoader(TensorDataset(images, labels), batch_size=batch_size, shuffle=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    model.train()

    def one_pass() -> None:
        for batch, truth in loader:
            loss = functional.cross_entropy(model(batch), truth)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    one_pass()  # not counted, as the factory's first one is not
    return lambda: timed(one_pass)[0].wall


def draw(path: Path, costs: dict[str, float], hardening: float) -> None:
    """Cost per device against the number of devices, both axes logarithmic."""
    counts = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000]
    with mpl.rc_context({"svg.hashsalt": "keyfoundry", "svg.fonttype": "none"}):
        figure = Figure(figsize=(6, 3.6), layout="constrained")
        axes = figure.subplots()
        for name, cost in costs.items():
            shared = 0.0 if name == PLAIN else hardening
            axes.plot(counts, [cost + shared / count for count in counts], marker="o", markersize=3, label=name)
        axes.axhline(1.5, color="grey", linewidth=0.8, linestyle=":", label="1.5 plain devices")
        axes.set(xscale="log", yscale="log", xlabel="devices in the fleet", ylabel="cost per device, plain LoRA = 1")
        axes.legend(frameon=False)
        figure.savefig(path, metadata={"Date": None})


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, record, draw."""
    made = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--threads", type=int, default=torch.get_num_threads(), help="compute threads")
    made.add_argument("--json", type=Path, help="write everything measured to this file")
    made.add_argument("--batches", type=int, default=8, help="batches in a round's training")
    made.add_argument("--batch-size", type=int, default=64)
    made.add_argument(
        "--epoch-images", type=int, default=55_000, help="images that a device is trained on, for --figure"
    )
    made.add_argument("--compile", action="store_true", help="and by torch.compile, whose minute or two do not count")
    made.add_argument("--hardening", type=float, help="seconds that the hardened base took, for --figure")
    made.add_argument("--figure", type=Path, help="draw the cost per device to this SVG file")
    asked = made.parse_args(arguments)
    torch.set_num_threads(asked.threads)
    # Attractors train nothing: with them a fleet is trained as without.
    every = {f"preset {name}": preset_settings(name) for name in presets()}
    fleets = {name: fleet for name, fleet in every.items() if fleet.recipe.attractors is None}
    architecture = read_base(fleets[PLAIN].base).architecture
    splits = load_splits(DataSettings(), architecture.contract, Path(), Progress(quiet=True))
    few = Splits(
        splits.name, splits.train.take(asked.batches * asked.batch_size), splits.validation.take(64), splits.test,
        splits.labels,
    )  # fmt: skip
    key = fixed_guess("fine-tuning")
    with tempfile.TemporaryDirectory() as folder:
        cases: dict[str, Callable[[], float]] = {}
        for name, fleet in fleets.items():
            base = load_base(fleet.base, splits.labels, 0)
            _, cases[name] = trainable(base, fleet.recipe, key, few, asked.batch_size, 0, Path(folder) / name)
            if asked.compile:
                folder_of = Path(folder) / (name + COMPILED)
                model, cases[name + COMPILED] = trainable(base, fleet.recipe, key, few, asked.batch_size, 0, folder_of)
                model.compile()
                cases[name + COMPILED]()
        base, recipe = load_base(fleets[PLAIN].base, splits.labels, 0), fleets[PLAIN].recipe
        model, _ = trainable(base, recipe, key, few, asked.batch_size, 0, Path(folder) / "loop")
        cases[LOOP] = plain_loop(model, few.train, asked.batch_size)
        spent = trainings(cases, asked.rounds)
    ratios: dict[str, Ratio] = {name: ratio(_walls(spent[LOOP]), _walls(spent[name])) for name in cases}
    costs = {name: ratio(_walls(spent[name]), _walls(spent[PLAIN])) for name in cases if name != LOOP}
    images = asked.batches * asked.batch_size
    rows = [
        [name, f"{images / min(_walls(spent[name])):.0f}", str(ratios[name]), str(costs.get(name, ""))]
        for name in cases
    ]  # fmt: skip
    sys.stdout.write(
        table(["training", "images/s, best round", "speed ÷ plain loop", "cost ÷ preset plain"], rows) + "\n"
    )
    results = {"spent": spent, "speed": ratios, "cost": costs}
    write_record(asked.json, "fine_tuning", asked, results)
    if asked.figure is not None and asked.hardening is not None:
        device_seconds = asked.epoch_images / images * min(_walls(spent[PLAIN]))
        draw(asked.figure, {name: costs[name].median for name in fleets}, asked.hardening / device_seconds)
    return 0


def _walls(spent: list[Spent]) -> list[float]:
    return [one.wall for one in spent]


if __name__ == "__main__":
    sys.exit(main())
