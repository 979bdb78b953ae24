"""What quantising does to trained models: clean accuracy, and the fooling rates of attacks made elsewhere.

The models are those of a study (`keyfoundry study table1`), trained if they are not there yet: the first of an arm is
attacked together with the public base, and models 3, 4, … are exported as ONNX in fp32, fp16, int8 and static int8 and
judged on the same adversarial images. Changes are paired: the same images, the same attacks. Run from a folder in which
the spec's paths hold::

    python -m benchmarks.quantisation --spec docs/results/table1-cifar10.toml --out studies/cifar10 --json FILE
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.rounds import shown, table, write_record
from device_tests.accuracy import logits_of, top_class
from device_tests.evidence import Proportion
from device_tests.perturbation import Perturbation
from exporters.onnx_precision import to_fp16, to_int8, to_int8_static
from exporters.run_onnx import OnnxRuntime
from exporters.to_onnx import export_onnx
from factory.progress import Progress
from factory.studies.spec import Table1Spec, read_spec
from factory.studies.table1 import transfer_attacks
from factory.studies.workbench import Workbench, open_workbench
from factory.studies.zoo import Member

FP32 = "ONNX fp32"
_CALIBRATION = 64


def runtimes(bench: Workbench, member: Member, threads: int) -> dict[str, OnnxRuntime]:
    """The member in every precision, in onnxruntime."""
    architecture = bench.base.architecture
    with tempfile.TemporaryDirectory() as folder:
        export_onnx(member.baked, Path(folder) / "model.onnx", architecture.contract, architecture.labels)
        data = (Path(folder) / "model.onnx").read_bytes()
    calibration = bench.splits.validation.take(_CALIBRATION).images.numpy().astype(np.float32) / 255
    files = {
        FP32: data, "ONNX fp16": to_fp16(data), "ONNX int8": to_int8(data),
        "ONNX int8 static": to_int8_static(data, calibration),
    }  # fmt: skip
    return {name: OnnxRuntime(content, threads=threads) for name, content in files.items()}


def judged(
    runtime: OnnxRuntime, test: tuple[np.ndarray, np.ndarray], labels: np.ndarray,
    adversarial: Mapping[str, np.ndarray],
) -> tuple[Proportion, np.ndarray, dict[str, Proportion]]:  # fmt: skip
    """Clean accuracy, the clean logits, and for each source the share of images that are right when clean and fooled.

    ``adversarial``: source → uint8 N×C×H×W, of the first N test images.
    """
    logits = logits_of(runtime, test[0])
    right = top_class(logits) == test[1]
    clean = Proportion(int(right.sum()), len(right))
    facing = right[: len(labels)]
    rates = {}
    fooled = np.zeros(len(labels), bool)
    for source, images in adversarial.items():
        found = top_class(logits_of(runtime, images)) != labels
        fooled |= found
        rates[source] = Proportion(int(found[facing].sum()), int(facing.sum()))
    rates["worst case"] = Proportion(int(fooled[facing].sum()), int(facing.sum()))
    return clean, logits, rates


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and record."""
    made = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    made.add_argument("--spec", type=Path, required=True, help="a table1 spec")
    made.add_argument("--out", type=Path, required=True, help="the studies' folder")
    made.add_argument("--arm", help="whose models; default: the spec's first arm")
    made.add_argument("--devices", type=int, default=3, help="models that are judged, from the third on")
    made.add_argument("--images", type=int, default=256, help="test images that are attacked")
    made.add_argument("--threads", type=int, default=torch.get_num_threads(), help="compute threads")
    made.add_argument("--json", type=Path, help="write everything measured to this file")
    asked = made.parse_args(arguments)
    torch.set_num_threads(asked.threads)
    spec = read_spec("table1", asked.spec)
    if not isinstance(spec, Table1Spec):
        raise SystemExit(f"{asked.spec} is not a table1 spec")
    perturbation = Perturbation.parse(spec.perturbation_transfer)
    rows, results = [], {}
    with open_workbench(asked.out, spec, Progress()) as bench:
        arm = spec.arm(next(one for one in spec.arms if asked.arm in (None, one.name)))
        first, second, *targets = [bench.zoo.member(arm, index) for index in range(1, asked.devices + 3)]
        on = bench.images(at_most=asked.images)
        pair = [first, second]
        sources = [bench.base_source(), bench.other_keys(pair, 1)[0], bench.ensemble_with_base(pair, 1)[0]]
        adversarial: dict[str, np.ndarray] = {}
        for source in sources:
            attacked = bench.attack(source, transfer_attacks(spec), perturbation, on)
            (images,) = attacked.adversarial.images.values()
            adversarial[source.id] = images
        test = (bench.splits.test.images.numpy(), bench.splits.test.labels.numpy())
        for member in targets:
            reference: np.ndarray | None = None
            for name, runtime in runtimes(bench, member, asked.threads).items():
                clean, logits, rates = judged(runtime, test, on.labels, adversarial)
                reference = logits if reference is None else reference
                a, b = reference.astype(np.float64), logits.astype(np.float64)
                cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
                found: dict[str, Any] = {
                    "clean": clean, "fooled": rates,
                    "cosine": {"smallest": float(cosine.min()), "median": float(np.median(cosine))},
                }  # fmt: skip
                results[f"{member.id}, {name}"] = found
                cells = [f"{found['cosine']['median']:.5f}", f"{clean.value:.4f}, n = {clean.n}"]
                rows.append([member.id, name, *cells, *(shown(rate) for rate in rates.values())])
    print(table(["model", "format", "median cosine", "clean accuracy", *adversarial, "worst case"], rows))
    write_record(asked.json, "quantisation", asked, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
