"""The comparison with peers runs to its end on a tiny network; no time is asserted."""

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml

ROOT = Path(__file__).parents[2]


@pytest.fixture
def peers(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.chdir(ROOT)
    import peers_latency

    return peers_latency


@pytest.fixture
def config(tmp_path, tiny_config) -> Path:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.yaml").write_text(yaml.safe_dump(tiny_config))
    return tmp_path / "tiny" / "config.yaml"


FLAGS = ("--frames", 2, "--held-out", 1, "--rounds", 2, "--threads", 1)


def run(peers, *flags) -> int:
    return peers.main([str(flag) for flag in (*FLAGS, *flags)])


def test_rows_are_told_apart_and_ranked(peers, config, tmp_path, capsys):
    flags = ("--config", config, "--peers", "torch", "openvino", "--backends", "openvino", "--only", "part")
    assert run(peers, *flags, "--json", tmp_path / "a.json") == 0
    result = json.loads((tmp_path / "a.json").read_text())
    rows = {row["name"]: row for row in result["rows"]}
    int8 = {"ours on OpenVINO", "ours, all INT8 on OpenVINO"}
    halves = {f"{name}, the rest in bfloat16" for name in int8} if peers.multiplies_bfloat16() else set()
    assert {name for name, row in rows.items() if row["ours"]} == {*int8, *halves, "ours FP32 on OpenVINO"}
    assert {"PyTorch eager FP32", "OpenVINO FP32"} <= rows.keys()
    medians = [row["latency_ms"]["median"] for row in result["rows"]]
    assert medians == sorted(medians)
    best = min(row["latency_ms"]["median"] for row in rows.values() if row["precision"] == "fp32")
    for row in rows.values():
        assert row["speedup_vs_best_fp32"] == pytest.approx(best / row["latency_ms"]["median"], rel=1e-3)
        assert [len(times) for times in row["rounds_ms"]] == [1, 1]
        assert row["memory_peak_mb"] > 0 and row["size_mb"] > 0
    fastest, speed = result["goals"]
    assert (fastest["least"], speed["least"]) == (1.0, 3.5)
    assert result["end_to_end"] == []
    printed = capsys.readouterr().out
    missed = [entry for entry in (fastest, speed) if not entry["met"]]
    assert printed.count("MISSED") == len(missed)
    assert bool(result["slowest_layers"]) == bool(missed) == ("slowest layers" in printed)


def test_images_to_boxes_beside_fp32(peers, config, tmp_path):
    flags = ("--only", "end-to-end", "--end-to-end", config, "--backends", "onnxruntime")
    assert run(peers, *flags, "--json", tmp_path / "a.json") == 0
    (whole,) = json.loads((tmp_path / "a.json").read_text())["end_to_end"]
    assert {row["name"] for row in whole["rows"]} == {
        "onnxruntime fp32",
        "onnxruntime int8 (int8_onnxruntime)",
        "onnxruntime int8 (int8_vtransform_onnxruntime)",
    }
    medians = {row["name"]: row["latency_ms"]["median"] for row in whole["rows"]}
    exact = min(median for name, median in medians.items() if "fp32" in name)
    ours = min(median for name, median in medians.items() if "int8" in name)
    assert whole["goal"]["value"] == pytest.approx(exact / ours, rel=1e-3)
    assert bool(whole["slowest"]) == (not whole["goal"]["met"])


def test_a_peer_that_fails_is_skipped_with_its_reason_and_ours_is_not(peers, tmp_path):
    from latency_rows import EngineRow

    from qat.core.errors import UserError

    def row(ours):
        arguments = (tmp_path / "none.onnx", "onnxruntime", "fp32", 1, [])
        return peers.Row("a", ours, "onnxruntime", "fp32", (EngineRow, *arguments))

    measured, skipped = peers.measure([row(False)], 1, 1, lambda text: None)
    assert measured == [] and list(skipped) == ["a"] and "none.onnx: no such file" in skipped["a"]
    with pytest.raises(UserError, match=r"none\.onnx: no such file"):
        peers.measure([row(True)], 1, 1, lambda text: None)


def test_torch_runs_the_network_that_the_graphs_are_made_of(peers, tiny_config, tiny_model, tiny_frames, tmp_path):
    from latency_rows import TorchRow

    torch.save(tiny_model.state_dict(), tmp_path / "state.pth")
    feeds = [{"img": tiny_frames[0].img[None], "depth": tiny_frames[0].depth[None]}]
    found = TorchRow(tiny_config, tmp_path / "state.pth", peers.PART, False, 1, feeds).run(feeds[0])
    with torch.inference_mode():
        weights, context = tiny_model.lift(torch.from_numpy(feeds[0]["img"][0]), torch.from_numpy(feeds[0]["depth"][0]))
    torch.testing.assert_close(torch.from_numpy(found["camera_depth_weights"]), weights, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        torch.from_numpy(found["camera_feature"]), context.permute(0, 2, 3, 1), rtol=1e-4, atol=1e-4
    )


def test_goals_compare_the_best_of_each_side(peers):
    def row(name, ours, precision, milliseconds):
        return peers.Row(name, ours, "openvino", precision, (), rounds_ms=[[milliseconds]])

    rows = [
        row("ours", True, "int8", 12.0),
        row("ours, all INT8", True, "int8", 10.0),
        row("ours FP32", True, "fp32", 40.0),
        row("eager", False, "fp32", 50.0),
        row("peer", False, "int8", 9.0),
    ]
    fastest, speed = peers.part_goals(rows)
    assert fastest == {
        "goal": "camera.backbone: fastest peer (peer) / ours (ours, all INT8)", "value": 0.9, "least": 1.0, "met": False,
    }  # fmt: skip
    assert (speed["value"], speed["met"]) == (4.0, True)
    assert peers.result_rows(rows)[0]["name"] == "peer"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--rounds", 0), "error: --rounds: found 0, expected at least 1\n"),
        (("--threads", -1), "error: --threads: found -1, expected at least 0\n"),
        (("--config", "nowhere.yaml"), "nowhere.yaml: cannot be read"),
    ],
)
def test_bad_flags_are_one_line(peers, capsys, flags, message):
    assert run(peers, *flags) == 2
    assert message in capsys.readouterr().err
