"""Clean accuracy of one arm minus another's, of the same or of two table1 specs, with its interval.

On all test images; missing models are trained into the studies' folder, as the studies themselves would. The two specs
may have different bases (full fine-tuning from the plain base, beside LoRA from the hardened one), but one data set.
Run::

    python -m benchmarks.clean_difference docs/results/protection-plain.toml:full-m7 \\
        docs/results/protection.toml:hardened-m7 --studies studies --json FILE
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from device_tests.fleet_statistics import group_difference
from factory.progress import Progress
from factory.studies.spec import ArmSettings, Spec, read_spec
from factory.studies.workbench import Workbench, rate_over_models, right, studies_folder
from keys.errors import InputError, KeyfoundryError


def named_arm(text: str) -> tuple[Spec, ArmSettings]:
    """The spec and the arm of ``FILE:ARM``; raises InputError for another form, a faulty file, or an arm it has not."""
    file, separator, name = text.rpartition(":")
    if not separator:
        raise InputError(f"{text!r} names no arm; write FILE:ARM.")
    spec = read_spec("table1", Path(file))
    if not isinstance(spec, Spec):
        raise InputError(f"{file} is a study of no arms with recipes.")
    arms = {arm.name: arm for arm in spec.arms}
    if name not in arms:
        raise InputError(f"{file} has no arm {name!r}; there are {', '.join(arms)}.")
    return spec, arms[name]


def measured(first: str, second: str, studies: Path, progress: Progress) -> dict[str, Any]:
    """Both arms' accuracies over models and all test images, and the first minus the second, with intervals.

    Raises InputError if the two specs have other images.
    """
    arms = [named_arm(name) for name in (first, second)]
    with studies_folder(studies):
        benches = [Workbench(studies, spec, progress) for spec, _ in arms]
        test = benches[0].splits.test
        if benches[1].splits.digest != benches[0].splits.digest:
            raise InputError(f"{first} and {second} are of other images; a difference takes the same ones.")
        images, labels = test.images.numpy(), test.labels.numpy()
        correct = [
            np.array([right(member.baked, images, labels) for member in bench.members(arm)])
            for bench, (_, arm) in zip(benches, arms, strict=True)
        ]
    one, other = correct
    return {
        "first": {"arm": first} | rate_over_models(one, np.ones_like(one)).to_json(),
        "second": {"arm": second} | rate_over_models(other, np.ones_like(other)).to_json(),
        "difference": group_difference(one, np.ones_like(one), other, np.ones_like(other)).to_json(),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Print and record the difference; exit with 1 if the first may be better by more than the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", help="FILE:ARM")
    parser.add_argument("second", help="FILE:ARM")
    parser.add_argument("--studies", type=Path, default=Path("studies"), help="folder of models and attacks")
    parser.add_argument("--limit", type=float, default=0.01, help="how much better the first may be")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args(arguments)
    if options.json is not None and not options.json.parent.is_dir():
        print(f"There is no folder {options.json.parent} to write to.", file=sys.stderr)
        return InputError.exit_code
    try:
        record = measured(options.first, options.second, options.studies, Progress())
    except KeyfoundryError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    if options.json is not None:
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    for what in ("first", "second", "difference"):
        print(f"{what}: {json.dumps(record[what])}")
    interval = record["difference"].get("interval")
    return 0 if interval is not None and interval[1] <= options.limit else 1


if __name__ == "__main__":
    sys.exit(main())
