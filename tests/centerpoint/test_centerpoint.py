"""CenterPoint over pillars: the plan's walk and our decoding equal mmdet3d's own, on a grid that is not square."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lidar import CENTERPOINT, cloud, need_mmdet3d

from qat.cli import main
from qat.families import family_named
from qat.families.centerpoint.flow import MAPS, CenterPoint, names_of
from qat.families.mmdet3d.config import read
from qat.families.mmdet3d.exporter import Reference
from qat.families.mmdet3d.inputs import Reader
from qat.families.mmdet3d.model import build
from qat.model.opening import random_model
from qat.model.runners import flow_for, run_frame

need_mmdet3d()

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def network():
    return random_model(CENTERPOINT, 0).network


def test_outputs_are_in_autowares_order(network):
    names = list(flow_for(network).plan.outputs)
    assert names == [f"{name}_{task}" for task in range(2) for name in MAPS]
    assert [tensor for tensor, _, _ in names_of(1, MAPS)] == ["heatmap", "reg", "height", "dim", "rot", "vel"]


def test_the_walk_is_mmdet3ds(network):
    model = build(read(CENTERPOINT))
    model.load_state_dict(network.state_dict())
    sample = Reader(read(CENTERPOINT), model).of_points(cloud(columns=5), "cloud")
    reference = Reference(model, sample)
    with torch.no_grad():
        tensors = run_frame(network, flow_for(network).prepare(cloud()))
    assert len(reference.tensors) == 12
    for leaf in reference.tensors:
        task, name = re.fullmatch(r"outputs\[(\d)\]\[0\]\.(\w+)", leaf.path).groups()
        torch.testing.assert_close(tensors[f"{name}_{task}"], leaf.value, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("nms", ["rotate", "circle"])
@pytest.mark.parametrize("velocities", [True, False])
def test_decoding_equals_mmdet3ds_on_random_maps(nms, velocities):
    config = copy.deepcopy(read(CENTERPOINT).model.to_dict())
    head = config["pts_bbox_head"]
    config["test_cfg"]["pts"].update(nms_type=nms)
    if not velocities:
        del head["common_heads"]["vel"]
        head["bbox_coder"]["code_size"] = 7
    family = family_named("centerpoint")
    settings = family.settings({**family.load_config(CENTERPOINT), "model": config})
    flow = CenterPoint(settings)
    rng = np.random.default_rng(0)
    maps, tasks = {}, []
    for task, classes in enumerate((6, 4)):
        own = {}
        for name in MAPS:
            if name == "vel" and not velocities:
                continue
            channels = classes if name == "heatmap" else head["common_heads"][name][0]
            own[name] = rng.normal(size=(1, channels, 32, 48)).astype(np.float32) * (0.3 if name == "dim" else 1)
            maps[f"{name}_{task}"] = own[name]
        own["heatmap"] -= 2
        tasks.append([{name: torch.from_numpy(value) for name, value in own.items()}])
    built = build(SimpleNamespace(model=config, source="test")).pts_bbox_head
    from mmdet3d.structures import LiDARInstance3DBoxes

    expected = built.predict_by_feat(tuple(tasks), [{"box_type_3d": LiDARInstance3DBoxes}])[0]
    found = flow.decode(maps)
    boxes = expected.bboxes_3d.tensor.numpy()
    assert found.convention == "mmdet3d" and len(found) == len(boxes) > 50
    ours = np.lexsort((found.boxes[:, 0], -found.scores))
    theirs = np.lexsort((boxes[:, 0], -expected.scores_3d.numpy()))
    np.testing.assert_allclose(found.scores[ours], expected.scores_3d.numpy()[theirs], atol=1e-6)
    np.testing.assert_array_equal(found.labels[ours], expected.labels_3d.numpy()[theirs])
    np.testing.assert_allclose(found.boxes[ours][:, : boxes.shape[1]], boxes[theirs], atol=1e-4)
    # A transposed map gives other boxes: the grid is not square.
    other = flow.decode({name: np.ascontiguousarray(value.swapaxes(2, 3)) for name, value in maps.items()})
    assert len(other) != len(found) or not np.allclose(other.boxes[: len(found)], found.boxes, atol=0.1)


def test_from_checkpoint_to_comparison_on_example_data(tmp_path, network):
    """Calibrate, export, compare and report on nuScenes-format keyframes, which the devkit scores."""
    torch.save({"state_dict": network.state_dict()}, tmp_path / "model.pth")
    data = ["--data", str(ROOT / "example-data")]
    made = ["--ckpt", str(tmp_path / "model.pth"), "--config", str(CENTERPOINT), "--out", str(tmp_path / "ptq.pth")]
    assert main(["calibrate", *made, *data, "--frames", "2"]) == 0
    fp32, int8 = tmp_path / "fp32", tmp_path / "int8"
    assert main(["export", "--ckpt", str(tmp_path / "ptq.pth"), "--precision", "fp32", "--out", str(fp32), *data]) == 0
    words = ["--flavour", "onnxruntime", "--out", str(int8), *data]
    assert main(["export", "--ckpt", str(tmp_path / "ptq.pth"), *words]) == 0
    made = ["--ckpt", str(tmp_path / "model.pth"), "--config", str(CENTERPOINT), "--ptq", str(tmp_path / "ptq.pth")]
    compared = [
        "compare",
        *made,
        "--onnx",
        str(fp32),
        str(int8),
        *data,
        "--frames",
        "2",
        "--out",
        str(tmp_path / "compared"),
    ]
    assert main([*compared, "--split", "eval", "--rounds", "1", "--repeats", "1"]) == 0
    results = json.loads((tmp_path / "compared" / "results.json").read_text())
    assert {(row["backend"], row["precision"]) for row in results["rows"]} >= {
        ("pytorch", "fp32"),
        ("onnxruntime", "int8"),
    }
    assert set(results["rows"][1]["sqnr_db"]) == {"pillar_features", "spatial_features", "heads"}
    assert results["dataset"]["cameras"] == []
    page = (tmp_path / "compared" / "report.html").read_text()
    assert "BEV, scattered" in page
