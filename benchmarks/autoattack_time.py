"""AutoAttack here beside the authors' own class (as pyautoattack has it): the same robust accuracy, in what time.

Both run the standard version on the same model, images, ε and seed, in one process, in turns. Robust accuracy is the
share of all images that neither the model gets wrong when clean nor the attack fools it on; unrounded candidates, as
the authors count. With at most 128 images there is one batch, and the candidates are the same too. Run::

    python -m benchmarks.autoattack_time --json FILE

Exits with 1 if the robust accuracies differ.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from pyautoattack.autoattack import AutoAttack as TheirAutoAttack
from torch import nn

from benchmarks.rounds import (
    base_and_sample,
    cpu_ratio,
    interleaved,
    parser,
    seconds,
    shown,
    table,
    wall_ratio,
    write_record,
)
from device_tests.attacks.autoattack import AutoAttack
from device_tests.attacks.gradients import LARGEST_BATCH
from device_tests.evidence import Proportion
from device_tests.images import from_8bit

OURS, THEIRS = "ours", "the authors'"


def theirs(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, *, epsilon: float, seed: int) -> torch.Tensor:
    """Candidates of the authors' class, in batches of the size that is used here; tracing is left as it was."""
    attack = TheirAutoAttack(model, norm="Linf", eps=epsilon, seed=seed, version="standard")
    tracing = sys.gettrace()
    try:
        return attack.run_standard_evaluation(images, labels, batch_size=LARGEST_BATCH)[0]
    finally:
        sys.settrace(tracing)


@torch.no_grad()
def robust_accuracy(model: nn.Module, candidates: torch.Tensor, labels: torch.Tensor) -> Proportion:
    """Share of the candidates that the model gets right."""
    right = [
        model(x).argmax(1) == y
        for x, y in zip(candidates.split(LARGEST_BATCH), labels.split(LARGEST_BATCH), strict=True)
    ]
    return Proportion(int(torch.cat(right).sum()), len(labels))


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; returns 1 where the two disagree."""
    arguments = parser("AutoAttack beside the authors' own code.", images=100, rounds=3).parse_args(argv)
    torch.set_num_threads(arguments.threads)
    _, model, splits = base_and_sample(arguments.base)
    test = splits.test.take(arguments.images)
    images, labels = torch.from_numpy(from_8bit(test.images.numpy())), test.labels
    print(f"{len(images)} images, ε {arguments.epsilon:.5f}, {arguments.threads} threads, {arguments.rounds} rounds, "
          f"seed {arguments.seed}")  # fmt: skip

    spent, candidates = interleaved(
        {
            OURS: lambda: AutoAttack().generate(
                model, images, labels, epsilon=arguments.epsilon, seed=arguments.seed
            ),
            THEIRS: lambda: theirs(model, images, labels, epsilon=arguments.epsilon, seed=arguments.seed),
        },
        arguments.rounds,
    )  # fmt: skip
    robust = {name: robust_accuracy(model, made, labels) for name, made in candidates.items()}
    wall, cpu = wall_ratio(spent[OURS], spent[THEIRS]), cpu_ratio(spent[OURS], spent[THEIRS])
    same = Proportion(int((candidates[OURS] == candidates[THEIRS]).flatten(1).all(1).sum()), len(labels))
    equal = robust[OURS] == robust[THEIRS]
    rows = [[name, f"{seconds(took):.1f}", shown(robust[name])] for name, took in spent.items()]
    print(f"\n{table(['AutoAttack', 'seconds', 'robust accuracy'], rows)}\n")
    print(f"time, ours ÷ the authors': {wall}; CPU time: {cpu}")
    print(f"robust accuracy equal: {'yes' if equal else 'NO'}; images equal bit for bit: {same.successes} of {same.n}")
    results = {
        "spent": spent, "wall_ratio": wall, "cpu_ratio": cpu, "robust_accuracy": robust, "equal": equal,
        "equal_images": same,
    }  # fmt: skip
    write_record(arguments.json, "autoattack_time", arguments, results)
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
