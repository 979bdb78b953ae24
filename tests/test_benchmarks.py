"""The timed benchmarks run, at a tiny size, and print their ratios; no time is judged here."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks import (
    attack_throughput,
    autoattack_time,
    export_fleet,
    export_time,
    fine_tuning,
    keyed_latency,
    latency,
    marginal_device,
    part_cost,
    training_cost,
    undoing_keys,
    untrained_replication,
)

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


def test_exporting_is_timed_beside_copying_and_converting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "record.json"
    small = ["--base", "vit_tiny_patch16_224", "--image-size", "32", "--rounds", "1", "--threads", "1"]
    assert export_time.main([*small, "--formats", "onnx-int8", "--folder", str(tmp_path), "--json", str(path)]) == 0
    assert RATIO.search(capsys.readouterr().out)
    found = json.loads(path.read_text())["results"]["onnx-int8"]
    assert set(found["seconds"]) == {"copy", "marginal", "full"}
    assert list(tmp_path.iterdir()) == [path]


def test_fine_tuning_is_timed_beside_a_plain_loop_and_a_fleets_cost_is_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, figure = tmp_path / "record.json", tmp_path / "cost.svg"
    small = ["--rounds", "2", "--batches", "1", "--batch-size", "16", "--threads", "1", "--json", str(path)]
    assert fine_tuning.main([*small, "--hardening", "60", "--figure", str(figure)]) == 0
    printed = capsys.readouterr().out
    assert RATIO.search(printed), printed
    results = json.loads(path.read_text())["results"]
    assert set(results["spent"]) == {"plain loop of peft, float32", "preset plain", "preset hardened"}
    assert all(len(spent) == 2 and min(one["wall"] for one in spent) > 0 for spent in results["spent"].values())
    assert results["cost"]["preset plain"]["median"] == 1
    assert results["cost"]["preset hardened"]["median"] > 0
    drawn = figure.read_text()
    assert "devices in the fleet" in drawn
    assert "preset hardened" in drawn


def test_devices_without_training_are_asked_for_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "record.json"
    small = ["--images", "40", "--asked", "2", "--targets", "2", "--queries", "120", "--json", str(path)]
    assert untrained_replication.main(small) == 0
    results = json.loads(path.read_text())["results"]
    assert 30 <= results["found"] <= 40
    # So few questions end far out, where devices agree.
    assert 0.2 < results["replicates"]["mean"] < 0.9
    assert f"{results['replicates']['mean']:.4f} [" in capsys.readouterr().out
    assert untrained_replication.main([*small[:1], "10", *small[2:8]]) == 1
    assert "30 at least" in capsys.readouterr().err


def test_a_fleets_packages_are_counted(
    tiny_base_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "record.json"
    arguments = ["--devices", "3", "--base", str(tiny_base_path), "--threads", "1", "--json", str(path)]
    assert export_fleet.main(arguments) == 0
    assert "packages per second" in capsys.readouterr().out
    results = json.loads(path.read_text())["results"]
    assert [row["devices"] for row in results["rows"]] == [1, 2, 3]
    assert results["packages_per_second"] > 0


def test_latency_is_compared_in_turns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "record.json"
    small = ["--base", "vit_tiny_patch16_224", "--image-size", "32", "--classes", "10", "--rounds", "2"]
    assert latency.main([*small, "--threads", "1", "--json", str(path)]) == 0
    assert "times as fast" in capsys.readouterr().out
    results = json.loads(path.read_text())["results"]
    assert results["plain"]["ratio"] == 1
    assert min(results["plain, int8"]["cosines"]) > 0.9
    assert results["plain, int8"]["bytes"] < results["plain, fp16 weights"]["bytes"] < results["plain"]["bytes"]


def test_adaptations_are_trained_in_turns(
    tiny_base_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "record.json"
    small = ["--base", str(tiny_base_path), "--batch-size", "4", "--steps", "1", "--rounds", "2", "--threads", "1"]
    assert training_cost.main([*small, "--json", str(path)]) == 0
    assert RATIO.search(capsys.readouterr().out)
    results = json.loads(path.read_text())["results"]
    assert set(results) == {"full", "lora", "patch-embedding-head"}
    assert results["full"]["share"] == 1
    assert results["full"]["time over full"]["median"] == 1
    for cheap in ("lora", "patch-embedding-head"):
        assert results[cheap]["trainable_parameters"] < results["full"]["trainable_parameters"]
        assert results[cheap]["kept_bytes"] < results["full"]["kept_bytes"]
    assert results["full"]["kept_bytes"] > 4 * results["full"]["trainable_parameters"]


def test_a_first_layer_of_enough_rank_undoes_what_is_affine(
    tiny_base_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "record.json"
    small = ["--base", str(tiny_base_path), "--images", "200", "--keys", "2", "--ranks", "0", "4", "49"]
    assert undoing_keys.main([*small, "--json", str(path)]) == 0
    assert "rank for every patch" in capsys.readouterr().out
    results = json.loads(path.read_text())["results"]
    for found in results.values():
        for line in found["left_over"]:
            assert line["0"] > line["4"] > line["49"] >= 0
    assert results["bit flip"]["rank_to_undo"] == [24, 24]
    assert max(line["49"] for line in results["shuffle"]["left_over"]) < 1e-3
    assert min(line["49"] for line in results["format-preserving"]["left_over"]) > 0.01


def test_every_way_to_key_a_device_is_timed_in_turns(
    tiny_base_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "record.json"
    small = ["--base", str(tiny_base_path), "--keys", "2", "--rounds", "1", "--repeats", "2"]
    assert keyed_latency.main([*small, "--json", str(path)]) == 0
    assert RATIO.search(capsys.readouterr().out)
    results = json.loads(path.read_text())["results"]
    assert len(results) == 7
    for name, found in results.items():
        # The graph around the weights counts in a model as small as this.
        assert found["bytes over one"] == pytest.approx(2 if "2 keys" in name else 1, rel=0.1)


def test_every_part_is_timed_beside_the_plain_recipe_of_its_network(
    tiny_base_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "record.json"
    small = ["--base", str(tiny_base_path), "--batch-size", "4", "--steps", "1", "--rounds", "1", "--repeats", "2"]
    assert part_cost.main([*small, "--only", "2 keys, average", "order key", "--json", str(path)]) == 0
    assert RATIO.search(capsys.readouterr().out)
    results = json.loads(path.read_text())["results"]
    assert list(results) == [
        part_cost.PLAIN, "2 keys, average", part_cost.UNDEFENDED, "vgg3d, order key", part_cost.PURIFIER,
    ]  # fmt: skip
    for plain in (part_cost.PLAIN, part_cost.UNDEFENDED):
        assert all(results[plain][kind]["median"] == 1 for kind in ("train", "torch", "onnx", "coreml"))
    assert results["2 keys, average"]["onnx_bytes"] > 1.8 * results[part_cost.PLAIN]["onnx_bytes"]
