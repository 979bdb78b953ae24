"""Quantised formats under the same rule as the model they were made of: quantising must not silently change robustness.

Every format of 8 bits or fewer in a package is measured by itself: clean accuracy, and transfer of every attack that
was made on the sources, against the exported file. Its worst case goes through the release rule's own acceptance test.
ONNX formats answer all test images; Core ML formats, which a slower evaluator runs, the attacked ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from device_tests.accuracy import accuracy
from device_tests.evidence import Proportion
from device_tests.threats import Threat
from device_tests.transfer import judge
from exporters.formats import FORMATS
from exporters.package import inspect_package
from exporters.run_torch import TorchRuntime
from factory.fleet import Candidate, Fleet, Quantised
from factory.packaging import open_format
from factory.verification import Attacked, AttackedSource, self_checks, weak_sources


def judge_quantised(
    fleet: Fleet, candidate: Candidate, base: nn.Module, base_clean: Proportion, sources: Sequence[AttackedSource],
    on: Attacked, required: Sequence[Threat],
) -> Mapping[str, Quantised]:  # fmt: skip
    """What each quantised format of a candidate's package answers, by the format's title.

    ``base``: the public base, and ``base_clean`` its accuracy on all test images; ``sources``: those judged on the
    candidate.
    """
    manifest, _ = inspect_package(candidate.package)
    formats = [one for one in FORMATS.values() if one.quantised and one.name in manifest.formats]
    judged: dict[str, Quantised] = {}
    if not formats:
        return judged
    test = fleet.splits.test
    answered = {"onnxruntime": (test.images.numpy(), test.labels.numpy(), base_clean)}
    if any(one.runtime == "coreml" for one in formats):
        answered["coreml"] = (on.images, on.labels, accuracy(TorchRuntime(base), on.images, on.labels))
    with fleet.progress.stage(f"judge quantised {candidate.name}", total=len(formats), unit="formats") as stage:
        for one in formats:
            runtime = open_format(candidate.package / one.path, one.runtime)
            images, labels, of_base = answered[one.runtime]
            clean = accuracy(runtime, images, labels)
            judgement = judge(
                runtime, candidate.name, on.images, on.labels, [source.adversarial for source in sources],
                self_checks(sources), required=required, weak=weak_sources(sources, clean),
            )  # fmt: skip
            judged[one.title] = Quantised(of_base, clean, judgement)
            stage.advance(note=one.title)
    return judged
