"""How fast PGD and MI-FGSM are here, beside the same attacks of foolbox and torchattacks, at what success.

One process, one model, the same images, ε, number of gradients and batches; every attack in turn, round by round. The
model is given to each library as it is loaded, with parameters that require gradients; foolbox is also run with them
frozen, because that alone makes it faster. The step lengths are each library's usual ones: 2.5·ε/steps for their PGD,
a cosine from 2·ε here, ε/steps for every MI-FGSM. A second table times one gradient of the loss alone. Run::

    python -m benchmarks.attack_throughput --json FILE

It needs torchattacks, which the factory does not.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.rounds import (
    base_and_sample,
    cpu_ratio,
    fooled_after_rounding,
    interleaved,
    parser,
    seconds,
    shown,
    table,
    wall_ratio,
    write_record,
)
from device_tests.attacks.attack import Attack
from device_tests.attacks.gradients import at_rest, batches, loss_gradient
from device_tests.attacks.momentum import MomentumFGSM
from device_tests.attacks.pgd import PGD
from device_tests.images import from_8bit
from device_tests.perturbation import Norm, Perturbation

OURS = "ours, bf16"
"""What the others' times are divided by."""

HALF = "ours, bf16, half the steps"
"""PGD's steps fall along a cosine, so that fewer of them reach the success of the others' equal ones."""

BATCHES = (16, 32, 64, 128)

Case = Callable[[], torch.Tensor]


def cases_of(
    attack: str, model: nn.Module, images: torch.Tensor, labels: torch.Tensor, *, epsilon: float, steps: int, seed: int
) -> dict[str, Case]:
    """Everyone's ``"pgd"`` or ``"mi-fgsm"``, each as a function that gives candidates."""
    foolbox, torchattacks = importlib.import_module("foolbox"), importlib.import_module("torchattacks")
    ours: tuple[Attack, Attack]
    if attack == "pgd":
        ours = PGD(steps=steps), PGD(steps=steps, bf16=True)
        length = 2.5 / steps
        theirs = torchattacks.PGD(model, eps=epsilon, alpha=length * epsilon, steps=steps)
        of_foolbox = foolbox.attacks.LinfProjectedGradientDescentAttack(rel_stepsize=length, steps=steps)
    else:
        ours = MomentumFGSM(steps=steps), MomentumFGSM(steps=steps, bf16=True)
        theirs = torchattacks.MIFGSM(model, eps=epsilon, alpha=epsilon / steps, steps=steps, decay=1.0)
        of_foolbox = foolbox.attacks.LinfMomentumIterativeFastGradientMethod(rel_stepsize=1 / steps, steps=steps)

    def own(one: Attack) -> torch.Tensor:
        return one.generate(model, images, labels, epsilon=epsilon, seed=seed)

    def in_batches(generate: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        torch.manual_seed(seed)
        return torch.cat([generate(images[part], labels[part]) for part in batches(images)])

    def by_foolbox(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        target = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
        return of_foolbox.run(target, x, foolbox.criteria.Misclassification(y), epsilon=epsilon)

    def frozen() -> torch.Tensor:
        with at_rest(model):
            return in_batches(by_foolbox)

    half = {HALF: partial(own, PGD(steps=steps // 2, bf16=True))} if attack == "pgd" else {}
    return {
        OURS: partial(own, ours[1]),
        **half,
        "ours, fp32": partial(own, ours[0]),
        "torchattacks": partial(in_batches, theirs),
        "foolbox": partial(in_batches, by_foolbox),
        "foolbox, parameters frozen": frozen,
    }


def gradient_cases(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor
) -> Iterator[tuple[tuple[int, bool, bool], Callable[[], None]]]:
    """(batch size, bf16, fused attention) and one gradient of all images computed so."""

    def gradients(size: int, bf16: bool, fused: bool) -> None:
        use_fused_attention(model, fused)
        with at_rest(model):
            for x, y in zip(images.split(size), labels.split(size), strict=True):
                loss_gradient(model, x, y, bf16=bf16)

    for size in BATCHES:
        for bf16 in (False, True):
            for fused in (False, True):
                yield (size, bf16, fused), partial(gradients, size, bf16, fused)


def use_fused_attention(model: nn.Module, fused: bool) -> None:
    """Turn torch's fused attention on or off in every block; timm's own switch only acts on models made later."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            setattr(module, "fused_attn", fused)  # noqa: B010 – not an attribute that nn.Module declares


def missing(library: str = "torchattacks") -> str | None:
    """What to install, in one sentence; None if it is there."""
    if importlib.util.find_spec(library) is not None:
        return None
    return f"This benchmark compares with {library}, which is not installed: uv pip install --no-deps {library}"


def main(argv: Sequence[str] | None = None) -> int:
    """Print both tables; returns 1 where torchattacks is missing."""
    made = parser("Attack throughput beside foolbox and torchattacks.", images=256, rounds=5)
    made.add_argument("--steps", type=int, default=20)
    arguments = made.parse_args(argv)
    absent = missing()
    if absent is not None:
        print(absent, file=sys.stderr)
        return 1
    torch.set_num_threads(arguments.threads)
    _, model, splits = base_and_sample(arguments.base)
    test = splits.test.take(arguments.images)
    clean, truth = test.images.numpy(), test.labels.numpy()
    images, labels = torch.from_numpy(from_8bit(clean)), test.labels
    perturbation = Perturbation(Norm.LINF, arguments.epsilon)
    use_fused_attention(model, False)  # as every base here is built
    print(f"{len(images)} images, {perturbation}, {arguments.steps} steps, {arguments.threads} threads, "
          f"{arguments.rounds} rounds, seed {arguments.seed}")  # fmt: skip

    results: dict[str, Any] = {}
    rows: list[list[str]] = []
    for attack in ("pgd", "mi-fgsm"):
        budget: dict[str, Any] = {"epsilon": arguments.epsilon, "seed": arguments.seed}
        warm = cases_of(attack, model, images[:16], labels[:16], steps=1, **budget)
        interleaved(warm, 1)  # the first call of every kernel is slow
        spent, made_by = interleaved(
            cases_of(attack, model, images, labels, steps=arguments.steps, **budget), arguments.rounds
        )
        for name, took in spent.items():
            success = fooled_after_rounding(model, made_by[name], clean, truth, perturbation)
            wall, cpu = wall_ratio(took, spent[OURS]), cpu_ratio(took, spent[OURS])
            done = arguments.steps // 2 if name == HALF else arguments.steps
            rate = len(images) * done / seconds(took)
            rows.append([attack, name, f"{rate:.0f}", str(wall), str(cpu), shown(success)])
            results.setdefault(attack, {})[name] = {
                "spent": took, "wall_ratio": wall, "cpu_ratio": cpu, "success": success
            }  # fmt: skip
    headings = ["attack", "by", "gradients/s", f"time ÷ {OURS}", "CPU time ÷", "success on the source, 8 bits"]
    print(f"\n{table(headings, rows)}\n")

    cases = dict(gradient_cases(model, images[:128], labels[:128]))
    named = {" ".join(map(str, key)): work for key, work in cases.items()}
    interleaved(named, 1)
    spent, _ = interleaved(named, arguments.rounds)
    use_fused_attention(model, False)
    reference = spent[f"{BATCHES[-1]} False False"]
    rows = []
    results["one gradient"] = []
    for (size, bf16, fused), name in zip(cases, named, strict=True):
        wall, cpu = wall_ratio(spent[name], reference), cpu_ratio(spent[name], reference)
        rows.append([str(size), "bf16" if bf16 else "fp32", "on" if fused else "off", str(wall), str(cpu)])
        results["one gradient"].append(
            {"batch": size, "bf16": bf16, "fused": fused, "spent": spent[name], "wall_ratio": wall, "cpu_ratio": cpu}
        )
    headings = ["batch", "arithmetic", "fused attention", f"time ÷ fp32, batch {BATCHES[-1]}, off", "CPU time ÷"]
    print(table(headings, rows))
    write_record(arguments.json, "attack_throughput", arguments, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
