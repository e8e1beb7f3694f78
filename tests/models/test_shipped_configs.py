"""The full-size configs in model/: their shapes are CUDA-BEVFusion's. On torch's meta device, which computes shapes alone."""

from pathlib import Path

import pytest
import torch

from qat.families.bevfusion.config import load_config
from qat.families.bevfusion.detector import build_model
from qat.families.bevfusion.reading import read_pipeline

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", ["resnet50", "swint"])
def test_the_full_size_parts_have_the_references_shapes(name):
    config = load_config(ROOT / "model" / name / "config.yaml")
    model = build_model(config).to("meta").eval()
    with torch.device("meta"):
        weights, context = model.lift(torch.zeros(1, 6, 3, 256, 704), torch.zeros(1, 6, 1, 256, 704))
        bev = model.downsample(torch.zeros(1, 80, 360, 360))
        maps = model.head(model.decode_bev(bev))
    assert weights.shape == (6, 118, 32, 88) and context.shape == (6, 80, 32, 88)
    assert bev.shape == (1, 80, 180, 180)
    bounds = config["model"]["encoders"]["camera"]["vtransform"]
    assert [round((high - low) / step) for low, high, step in (bounds["xbound"], bounds["ybound"])] == [360, 360]
    assert [tuple(task["heatmap"].shape) for task in maps] == [(1, n, 180, 180) for n in (1, 2, 2, 1, 2, 2)]
    assert read_pipeline(config).resize_crop.final_dim == (256, 704)
