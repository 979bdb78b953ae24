"""What the timed benchmarks share: interleaved rounds, ratios, the model and images, and the record they write.

Rule: whatever is compared runs in one process, in turns, so that a busy machine slows all of it alike; a ratio is taken
within each round, and the median, the lowest and the highest of them are given. CPU time beside wall time shows what
the machine's other work did.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from device_tests.accuracy import predict
from device_tests.evidence import Proportion
from device_tests.perturbation import Perturbation
from exporters.run_torch import TorchRuntime
from factory.base import Base, load_base, read_architecture
from factory.classifier import ImageClassifier
from factory.data import Splits, load_splits
from factory.progress import Progress
from factory.settings import BaseSettings, DataSettings

PACKAGES = ("torch", "timm", "onnxruntime", "numpy", "foolbox", "torchattacks", "pyautoattack")

ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class Spent:
    """Seconds of one run: by the clock, and of this process's CPU time in all threads."""

    wall: float
    cpu: float


@dataclass(frozen=True)
class Ratio:
    """Median, lowest and highest of the ratios of some rounds."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        digits = 2 if self.median >= 1 else 3
        return f"{self.median:.{digits}f} ({self.low:.{digits}f}–{self.high:.{digits}f})"


def timed(work: Callable[[], ResultT]) -> tuple[Spent, ResultT]:
    """Run ``work`` once: what it took, and what it gave."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    return Spent(time.perf_counter() - wall, time.process_time() - cpu), result


def interleaved(
    cases: Mapping[str, Callable[[], ResultT]], rounds: int
) -> tuple[dict[str, list[Spent]], dict[str, ResultT]]:
    """Run every case once in each round, every other round backwards: the times, and what each gave last."""
    spent: dict[str, list[Spent]] = {name: [] for name in cases}
    results: dict[str, ResultT] = {}
    for index in range(rounds):
        for name in list(cases) if index % 2 == 0 else reversed(list(cases)):
            took, results[name] = timed(cases[name])
            spent[name].append(took)
    return spent, results


def wall_ratio(numerator: Sequence[Spent], denominator: Sequence[Spent]) -> Ratio:
    """Ratio of wall times, round by round."""
    return ratio([one.wall for one in numerator], [one.wall for one in denominator])


def cpu_ratio(numerator: Sequence[Spent], denominator: Sequence[Spent]) -> Ratio:
    """Ratio of CPU times, round by round."""
    return ratio([one.cpu for one in numerator], [one.cpu for one in denominator])


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Ratio:
    """Ratio of what belongs together."""
    quotients = [one / other for one, other in zip(numerators, denominators, strict=True)]
    return Ratio(statistics.median(quotients), min(quotients), max(quotients))


def seconds(spent: Sequence[Spent]) -> float:
    """Median wall time."""
    return statistics.median(one.wall for one in spent)


def parser(description: str, *, images: int, rounds: int) -> argparse.ArgumentParser:
    """The arguments that all timed benchmarks have."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--images", type=int, default=images, help="test images that are attacked")
    made.add_argument("--rounds", type=int, default=rounds)
    made.add_argument("--epsilon", type=float, default=8 / 255, help="L-infinity radius on inputs in [0, 1]")
    made.add_argument("--base", default="shipped", help="or the path of another checkpoint of the same ten classes")
    made.add_argument("--threads", type=int, default=torch.get_num_threads(), help="compute threads")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--json", type=Path, help="write everything measured to this file")
    return made


def base_and_sample(name: str) -> tuple[Base, ImageClassifier, Splits]:
    """The base, the base as a classifier of images in [0, 1], and the shipped Fashion-MNIST sample at its size."""
    settings = BaseSettings(name=name)
    base = load_base(settings, read_architecture(settings).labels, 0)
    model = ImageClassifier(base.network, base.architecture.mean, base.architecture.std).eval()
    return base, model, load_splits(DataSettings(), base.architecture.contract, Path(), Progress(quiet=True))


def fooled_after_rounding(
    model: torch.nn.Module, candidates: torch.Tensor, images: np.ndarray, labels: np.ndarray, perturbation: Perturbation
) -> Proportion:
    """Success as the judge counts it: 8-bit images, among those (uint8) that the model gets right when clean."""
    runtime = TorchRuntime(model)
    right = predict(runtime, images) == labels
    attacked = perturbation.to_8bit(candidates.detach().numpy(), images)
    return Proportion(int((predict(runtime, attacked) != labels)[right].sum()), int(right.sum()))


def shown(share: Proportion) -> str:
    """A proportion with its counts and 95 % Wilson interval."""
    low, high = share.interval
    return f"{share.value:.3f} ({share.successes} of {share.n}; {low:.3f}–{high:.3f})"


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine() -> dict[str, Any]:
    """Where this was measured: versions, processor, threads, and how busy the machine was."""
    versions: dict[str, str] = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "versions": versions | {"python": platform.python_version()},
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def write_record(path: Path | None, benchmark: str, arguments: argparse.Namespace, results: Mapping[str, Any]) -> None:
    """Write one benchmark's record as JSON, if a file was asked for."""
    if path is None:
        return
    asked = {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}
    record = {"benchmark": benchmark, "arguments": asked, "machine": machine(), "results": results}
    path.write_text(json.dumps(record, indent=1, default=_plain) + "\n")


def _plain(value: Any) -> Any:
    return value.to_json() if isinstance(value, Proportion) else asdict(value)
