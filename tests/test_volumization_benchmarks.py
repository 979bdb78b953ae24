"""The benchmarks of volumization run, at a tiny size, and print and record what they say; no time is judged here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import order_stability, patch_metrics, sorted_patches
from factory.volumization.metrics import METRICS


def test_the_loop_and_the_batch_give_the_same_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "record.json"
    assert patch_metrics.main(["--images", "3", "--rounds", "1", "--threads", "1", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert all(f"| {name} |" in printed for name in (*METRICS, "order"))
    assert len(json.loads(path.read_text())["results"]) == 2 * (len(METRICS) + 1)


def test_stability_lies_between_none_and_all(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    assert order_stability.main(["--images", "12", "--sides", "7", "--json", str(path)]) == 0
    results = json.loads(path.read_text())["results"]
    assert len(results) == 2 * len(METRICS)
    assert all(0 <= share <= 1 for found in results.values() for share in found.values())
    # Noise of 8/255 leaves hardly an order of 16 patches as it was.
    assert results["noise, 7, max-norm"]["orders"] > 0.5


def test_arms_are_trained_and_attacked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "record.json"
    small = ["--train-images", "200", "--test-images", "60", "--images", "4", "--epochs", "2", "--width", "2"]
    budget = ["--steps", "2", "--climbs", "2", "--threads", "1", "--json", str(path)]
    assert sorted_patches.main([*small, *budget]) == 0
    results = json.loads(path.read_text())["results"]
    assert set(results) == {"vgg2d", *(f"vgg3d, {order}" for _, order in sorted_patches.ARMS if order)}
    assert set(results["vgg3d, mse"]["fooled"]) == {"pgd", "order-clean", "order-flip"}
    assert "order searched" in capsys.readouterr().out
