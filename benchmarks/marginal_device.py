"""What one more device costs to verify, against the first one; and what each threat costs on top.

The judged device is the same in every row, so that nothing but the cache and the threats makes a difference.

Verifying is here what the judge does with a finished package: clean accuracy on all test images, the sources attacked
and self-checked unless they are cached, and the attacked images through onnxruntime. Training, export and parity are
not in it: they cost every device the same. Budget quick: its attacks, steps and self-check on every source; what
queries cost is stated in the output. The sources are the shipped base, one guessed key and devices, all adapted by
the default recipe for one short epoch, so that they classify, but worse than real ones: the number of gradients does
not depend on their weights, but self-checks and queries leave out images that a model gets wrong. Run::

    python -m benchmarks.marginal_device --json FILE
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.rounds import Spent, base_and_sample, cpu_ratio, parser, seconds, table, timed, wall_ratio, write_record
from device_tests.accuracy import accuracy
from device_tests.attacks.attack import Attack
from device_tests.ensemble import Ensemble
from device_tests.evidence import Proportion
from device_tests.threats import Source, Threat
from device_tests.transfer import judge
from exporters.run_onnx import OnnxRuntime
from exporters.run_torch import TorchRuntime
from exporters.to_onnx import export_onnx
from factory.base import Base
from factory.data import Splits
from factory.device_model import block_size, make_device_model
from factory.folding import bake
from factory.packaging import ONNX_NAME
from factory.progress import Progress
from factory.queries import asked_target, bypass_source, query_attacks
from factory.recipes.recipe import RecipeSettings
from factory.recipes.training import TrainingSettings
from factory.settings import VerificationSettings
from factory.verification import Attacked, AttackedSource, attack_source, attacks_of, self_checks, strong_budget
from keys.derive import fixed_guess
from keys.files import sha256_file

GUESSED, SIBLING, OTHER, JUDGED = "guessed-key", "device-1", "device-2", "device-3"
FIRST_COST, MARGINAL = "first device: T0 and T1 from nothing", "device N+1: T0 and T1 cached"
VALIDATION = 200
QUIET = Progress(quiet=True)


@dataclass(frozen=True, eq=False)
class Target:
    """A device's ONNX file in onnxruntime, and the file's digest."""

    runtime: OnnxRuntime
    digest: str


@dataclass(frozen=True, eq=False)
class Bench:
    """What is measured on: the base, the splits, baked models by name, the judged one as exported, budget and seed."""

    base: Base
    public: torch.nn.Module
    splits: Splits
    models: Mapping[str, torch.nn.Module]
    target: Target
    settings: VerificationSettings
    seed: int

    def images(self, cache: Path, count: int | None = None) -> Attacked:
        """The first test images, and a folder for what is made of them."""
        taken = self.splits.test.take(self.settings.images if count is None else count)
        return Attacked(taken.images.numpy(), taken.labels.numpy(), cache)

    def attack(self, source: Source, on: Attacked, attacks: Sequence[Attack] | None = None) -> AttackedSource:
        """One source, attacked or read from the cache, as the factory does it."""
        chosen = attacks_of(self.settings) if attacks is None else attacks
        return attack_source(
            source, chosen, on, perturbation=self.settings.perturbation, budget=strong_budget(self.settings),
            margin=self.settings.self_check_margin, seed=self.seed, progress=QUIET,
        )  # fmt: skip

    def judge(self, made: Sequence[AttackedSource], on: Attacked) -> None:
        """Put what was made through the judged device's onnxruntime."""
        sets = [one.adversarial for one in made]
        judge(self.target.runtime, JUDGED, on.images, on.labels, sets, self_checks(made), required=())

    def public_threats(self, cache: Path) -> None:
        """Clean accuracy, T0 and T1: all that verifying a device needs where it has no siblings."""
        test = self.splits.test
        accuracy(self.target.runtime, test.images.numpy(), test.labels.numpy())
        on = self.images(cache)
        sources = [
            Source("base", Threat.PUBLIC_BASE, self.public, "the public base"),
            Source(GUESSED, Threat.GUESSED_KEY, self.models[GUESSED], "a guessed key"),
        ]
        self.judge([self.attack(source, on) for source in sources], on)

    def one_source(self, source: Source, cache: Path) -> None:
        """Attack one source, and judge what was made on it."""
        on = self.images(cache)
        self.judge([self.attack(source, on)], on)

    def queries(self, attack: Attack, cache: Path) -> None:
        """One query attack on the judged device."""
        target = self.target
        on = self.images(cache, self.settings.query_images)
        self.judge([self.attack(asked_target(JUDGED, target.runtime, target.digest), on, [attack])], on)

    def bypass(self, cache: Path) -> None:
        """Fit a stand-in to the judged device's answers, attack that, and judge."""
        target, on = self.target, self.images(cache, self.settings.query_images)
        source = bypass_source(
            JUDGED, self.public, target.runtime, self.splits.train.images.numpy()[: self.settings.bypass_queries],
            digest=target.digest, block_size=block_size(self.base, RecipeSettings()), seed=self.seed, cache=cache,
            progress=QUIET,
        )  # fmt: skip
        self.judge([self.attack(source, on)], on)


def adapted_model(
    name: str, base: Base, splits: Splits, recipe: RecipeSettings, folder: Path, *, seed: int
) -> torch.nn.Module:
    """Adapt, merge and fold one model; its key is a public guess, which costs the same as a secret one."""
    trained = make_device_model(
        base, fixed_guess(name), recipe, splits, name=name, identity=[name], seed=seed, folder=folder / name,
        shared=folder / "shared", progress=QUIET,
    )  # fmt: skip
    return bake(trained.classifier)


def exported(model: torch.nn.Module, base: Base, folder: Path) -> Target:
    """The model as a device runs it."""
    path = folder / ONNX_NAME
    export_onnx(model, path, base.architecture.contract, base.architecture.labels)
    return Target(OnnxRuntime(path, threads=torch.get_num_threads()), sha256_file(path))


def stages_of(bench: Bench, cache: Path) -> dict[str, Callable[[], None]]:
    """Everything that is timed, in an order in which later stages find what earlier ones cached."""
    models, settings = bench.models, bench.settings
    members = [bench.public, models[SIBLING], models[OTHER]]
    sibling = Source(SIBLING, Threat.SIBLING_DEVICE, models[SIBLING], "a sibling")
    colluding = Source("2-devices-1", Threat.COLLUDING_DEVICES, Ensemble(members), "two devices and the base")
    itself = Source(JUDGED, Threat.SIBLING_DEVICE, models[JUDGED], "the device itself")
    square, walk = query_attacks(settings)
    asked = f"{settings.query_images} images × {settings.queries} queries"
    fitted = f"{settings.bypass_queries} queries, attacked on {settings.query_images} images"
    return {
        FIRST_COST: lambda: bench.public_threats(cache),
        MARGINAL: lambda: bench.public_threats(cache),
        "T2: a sibling attacked": lambda: bench.one_source(sibling, cache),
        "T2 again, the sibling cached": lambda: bench.one_source(sibling, cache),
        "T3: two devices and the base": lambda: bench.one_source(colluding, cache),
        f"T4: {square.name}, {asked}": lambda: bench.queries(square, cache),
        f"T4: {walk.name}, {asked}": lambda: bench.queries(walk, cache),
        f"T4: bypass, {fitted}": lambda: bench.bypass(cache),
        "T5: the device itself attacked": lambda: bench.one_source(itself, cache),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    made = parser("Cost of verifying one more device.", images=300, rounds=3)
    made.add_argument("--train-images", type=int, default=4000, help="that the models are adapted on, one epoch")
    made.add_argument("--test-images", type=int, default=2500, help="that clean accuracy is measured on")
    made.add_argument("--query-images", type=int, default=50)
    made.add_argument("--queries", type=int, default=500, help="for each of those images")
    made.add_argument("--bypass-queries", type=int, default=2000)
    arguments = made.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    base, public, splits = base_and_sample(arguments.base)
    splits = replace(
        splits, validation=splits.validation.take(VALIDATION), test=splits.test.take(arguments.test_images)
    )
    adapted = replace(splits, train=splits.train.take(arguments.train_images))
    settings = VerificationSettings(
        epsilon=arguments.epsilon, images=arguments.images, query_images=arguments.query_images,
        queries=arguments.queries, bypass_queries=arguments.bypass_queries,
    )  # fmt: skip
    recipe = RecipeSettings(training=TrainingSettings(epochs=1))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        models = {
            name: adapted_model(name, base, adapted, recipe, folder, seed=arguments.seed)
            for name in (GUESSED, SIBLING, OTHER, JUDGED)
        }
        clean = {
            name: accuracy(TorchRuntime(model), splits.test.images.numpy(), splits.test.labels.numpy())
            for name, model in models.items()
        }
        bench = Bench(base, public, splits, models, exported(models[JUDGED], base, folder), settings, arguments.seed)
        spent: dict[str, list[Spent]] = {}
        for index in range(arguments.rounds):  # a cache of its own: every round begins with nothing
            for stage, work in stages_of(bench, folder / f"round-{index}").items():
                spent.setdefault(stage, []).append(timed(work)[0])
    report(spent, clean, settings)
    results = {
        stage: {
            "spent": took, "wall_ratio": wall_ratio(took, spent[FIRST_COST]),
            "cpu_ratio": cpu_ratio(took, spent[FIRST_COST]),
        }
        for stage, took in spent.items()
    }  # fmt: skip
    write_record(arguments.json, "marginal_device", arguments, {"clean_accuracy": clean, "stages": results})
    return 0


def report(
    spent: Mapping[str, Sequence[Spent]], clean: Mapping[str, Proportion], settings: VerificationSettings
) -> None:
    """Print what was measured."""
    found = ", ".join(f"{name} {share.value:.3f}" for name, share in clean.items())
    budget = "; ".join(attack.description for attack in attacks_of(settings))
    strong = strong_budget(settings)
    print(f"{settings.images} images, {settings.perturbation}; {budget}")
    print(f"self-check: {strong.describe(10)}, {strong.images} images")
    print(f"clean accuracy on {next(iter(clean.values())).n} images: {found}\n")
    first = spent[FIRST_COST]
    rows = [
        [stage, f"{seconds(took):.2f}", str(wall_ratio(took, first)), str(cpu_ratio(took, first))]
        for stage, took in spent.items()
    ]
    print(table(["what", "seconds", "time ÷ first device", "CPU time ÷"], rows))


if __name__ == "__main__":
    sys.exit(main())
