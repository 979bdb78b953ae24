"""The timed benchmarks run, at a tiny size, and print their ratios; no time is judged here."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks import attack_throughput, autoattack_time, marginal_device

RATIO = re.compile(r"\d+\.\d{2,3} \(\d+\.\d{2,3}–\d+\.\d{2,3}\)")

SIZES = {
    attack_throughput: ["--images", "6", "--steps", "2"],
    autoattack_time: ["--images", "2", "--epsilon", "0.5"],
    marginal_device: [
        "--images", "4", "--train-images", "64", "--test-images", "20", "--query-images", "2", "--queries", "101",
        "--bypass-queries", "128",
    ],
}  # fmt: skip


@pytest.mark.parametrize("benchmark", SIZES, ids=lambda module: module.__name__)
def test_prints_and_records_its_ratios(
    benchmark: ModuleType, tiny_base_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if benchmark is attack_throughput and attack_throughput.missing():
        pytest.skip("torchattacks is not installed")
    path = tmp_path / "record.json"
    arguments = ["--rounds", "1", "--base", str(tiny_base_path), "--threads", "1", "--json", str(path)]
    assert benchmark.main([*SIZES[benchmark], *arguments]) == 0
    printed = capsys.readouterr().out
    assert RATIO.search(printed), printed
    record = json.loads(path.read_text())
    assert record["machine"]["threads"] == 1
    assert record["arguments"]["rounds"] == 1
    assert record["machine"]["versions"]["torch"]
    assert '"median"' in path.read_text()
    if benchmark is autoattack_time:
        assert "robust accuracy equal: yes" in printed


def test_a_missing_library_is_named_with_the_command_that_installs_it() -> None:
    assert attack_throughput.missing("no-such-library") == (
        "This benchmark compares with no-such-library, which is not installed: uv pip install --no-deps no-such-library"
    )
