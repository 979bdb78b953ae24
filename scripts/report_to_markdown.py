"""Print a fleet's report.json as the Markdown tables of docs/results.

uv run python scripts/report_to_markdown.py fleet/report.json
"""

from __future__ import annotations

import sys
from pathlib import Path

from device_tests.evidence import Proportion
from device_tests.report.document import ReportDocument
from exporters.measured import NotMeasured


def figure(value: Proportion | NotMeasured) -> str:
    """A proportion with interval and n, or why there is none."""
    if isinstance(value, NotMeasured):
        return f"not measured: {value.reason}"
    low, high = value.interval
    return f"{value.value:.3f} [{low:.3f}, {high:.3f}], n = {value.n}"


def main(path: Path) -> None:
    """Print the tables."""
    document = ReportDocument.model_validate_json(path.read_bytes())
    print(f"Base: clean accuracy {figure(document.base.clean)}. Data: {document.data.train:,} training, ", end="")
    print(
        f"{document.data.validation:,} validation, {document.data.test:,} test images. Seed {document.seed}, ", end=""
    )
    print(f"ε = {document.verification.epsilon * 255:g}/255, {document.verification.images} attacked images.")
    versions = ", ".join(f"{name} {version}" for name, version in document.versions.items())
    print(f"\nVersions: {versions}. Machine: {document.machine.processor}, {document.machine.cores} cores, CPU only.\n")
    print("| target | clean accuracy | T0 public base | T1 guessed key | T2 siblings | worst case | decision |")
    print("|---|---|---|---|---|---|---|")
    for target in document.targets:
        worst = {result.threat: figure(result.worst) for result in target.threats}
        cells = " | ".join(worst.get(code, "–") for code in ("T0", "T1", "T2"))
        decision = "released" if target.decision.released else "rejected"
        decision = f"would be {decision}" if target.role == "control" else decision
        print(f"| {target.id} | {figure(target.clean)} | {cells} | {figure(target.worst_case)} | {decision} |")
    print(
        "\nFooling rate, per image the worst over the attacks; rows: made on, columns: judged on. *Ceiling*: itself.\n"
    )
    print("| source | " + " | ".join(target.id for target in document.targets) + " |")
    print("|---" * (len(document.targets) + 1) + "|")
    for source in document.sources:
        row = []
        for target in document.targets:
            result = next(result for result in target.by_source if result.source == source.id)
            row.append(figure(result.worst) + (" (*ceiling*)" if source.id == target.id else ""))
        print(f"| {source.id} | " + " | ".join(row) + " |")
    print("\n| source | attack | success on its source | strong attack | its success | believed |")
    print("|---|---|---|---|---|---|")
    for source in document.sources:
        for check in () if isinstance(source.self_checks, NotMeasured) else source.self_checks:
            print(
                f"| {source.id} | {check.attack} | {figure(check.attack_success)} | {check.strong_attack} | "
                f"{figure(check.strong_success)} | {'yes' if check.passed else 'no'} |"
            )
    print("\n| target | format | largest difference / largest logit | same top-1 | n |")
    print("|---|---|---|---|---|")
    for target in document.targets:
        for parity in target.parity:
            if hasattr(parity, "n"):
                print(
                    f"| {target.id} | {parity.format} ({parity.runtime}) | {parity.max_relative_difference:.1e} "
                    f"(limit {parity.limit:g}) | {parity.top1_agreement:.4f} | {parity.n} |"
                )
            else:
                print(f"| {target.id} | {parity.format} | not measured: {parity.not_measured} | – | – |")
    print("\nSeconds of each stage: " + ", ".join(f"{name} {value:.0f}" for name, value in document.seconds.items()))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
