"""A results.json as compare writes it, by hand: six rows of a detector that INT8 serves well on OpenVINO alone."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

CLASSES = {
    "car": (0.78, 320), "truck": (0.61, 90), "construction_vehicle": (0.35, 31), "bus": (0.66, 40),
    "trailer": (0.33, 28), "barrier": (0.52, 150), "motorcycle": (0.48, 44), "bicycle": (0.41, 39),
    "pedestrian": (0.59, 280), "traffic_cone": (0.44, 120),
}  # fmt: skip
STAGES = {
    "camera.backbone": 0.62,
    "pooling": 0.05,
    "camera.vtransform": 0.08,
    "fuser": 0.13,
    "head.bbox": 0.08,
    "decode": 0.04,
}
CAMERAS = ("CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_FRONT_LEFT", "CAM_BACK", "CAM_BACK_LEFT", "CAM_BACK_RIGHT")


def _row(backend: str, precision: str, loss: float, median: float, speedup: float | None, sqnr: float) -> dict:
    return {
        "backend": backend,
        "precision": precision,
        "flavour": "tensorrt" if precision.startswith("int8") else None,
        "map": 0.517 - loss,
        "nds": 0.552 - 0.8 * loss,
        "per_class_ap": {name: ap - loss * (0.5 + n / 10) for n, (name, (ap, _)) in enumerate(CLASSES.items())},
        "tp_errors": {"trans_err": 0.41, "scale_err": 0.2, "orient_err": 0.35, "vel_err": 0.6, "attr_err": None},
        "latency_ms": {"median": median, "p99": 1.24 * median, "samples": 30},
        "stages_ms": {name: share * median for name, share in STAGES.items()},
        "speedup_vs_fp32": speedup,
        "size_mb": 18.9,
        "sqnr_db": {
            "camera_feature": sqnr, "camera_depth_weights": sqnr + 4, "feat_in": sqnr + 2, "middle": sqnr - 3,
            "heads": sqnr - 5,
        },
    }  # fmt: skip


def _jpeg(seed: int) -> str:
    shade = np.linspace(60, 200, 64, dtype=np.uint8)[:, None] + np.zeros((1, 176), np.uint8)
    image = np.stack([shade, np.roll(shade, 9 * seed, 0), shade[::-1]], -1)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG")
    return base64.b64encode(buffer.getvalue()).decode()


def _box(label: str, x: float, y: float, shift: float, score: float | None) -> dict:
    corners = [[x + shift - 1, y + 2], [x + shift + 1, y + 2], [x + shift + 1, y - 2], [x + shift - 1, y - 2]]
    left, top = 60 + 8 * shift, 30.0
    square = [
        [left, top, left + 40, top],
        [left + 40, top, left + 40, top + 20],
        [left, top + 20, left + 40, top + 20],
        [left, top, left, top + 20],
    ]
    return {"label": label, "score": score, "corners": corners, "outlines": {"CAM_FRONT": square}}  # fmt: skip


def _frame() -> dict:
    places = [("car", 4, 12), ("truck", -8, 20), ("pedestrian", 9, -14)]
    return {
        "token": "0f9e8d",
        "reference": 0,
        "candidate": 3,
        "only_reference": 1,
        "only_candidate": 0,
        "min_score": 0.3,
        "range": 51.2,
        "image_size": [176, 64],
        "cameras": [{"name": name, "jpeg": _jpeg(n)} for n, name in enumerate(CAMERAS)],
        "boxes": {
            "truth": [_box(name, x, y, 0.0, None) for name, x, y in places],
            "reference": [_box(name, x, y, 0.2, 0.8) for name, x, y in places],
            "candidate": [_box(name, x, y, 0.5, 0.7) for name, x, y in places[:2]],
        },
    }


def _unit(name: str, layers: list[str], share: float, objects: float, drop: float) -> dict:
    return {
        "name": name,
        "layers": layers,
        "macs_share": share,
        "sqnr_db": {"bev": objects - 9, "heads": objects - 4, "objects": objects},
        "metric": {"map": 0.51 - drop, "nds": 0.55 - drop / 2},
        "drop": {"map": drop, "nds": drop / 2},
    }


def _histogram(unit: str, amax: float, largest: float, clipped: float) -> dict:
    counts = [int(2e6 * 0.78**n) for n in range(59)] + [3]
    return {
        "unit": unit, "layers": ["decoder.backbone.0.conv1"], "method": "mse", "amax": amax, "largest": largest,
        "values": 9_000_000, "zeros": 0.41, "to_zero": 0.123, "clipped": clipped, "bin_width": largest / 60,
        "counts": counts,
    }  # fmt: skip


def _sensitivity() -> dict:
    units = [
        _unit("decoder.quant_x", ["decoder.backbone.0.conv1"], 0.021, 31.0, 0.0042),
        _unit("camera.quant_encoders_camera_backbone_act1", ["camera.encoders.camera.backbone.layer1.conv1"], 0.2, 34.0, 0.0),
        _unit("head.quant_heads_object_shared_conv_activate", [f"head.heads.object.{n}" for n in "abc"], 0.095, 41.0, -0.001),
    ]  # fmt: skip
    return {
        "checkpoint": {"file": "ptq.pth", "sha256": "cd" * 32},
        "dataset": {"name": "example-data", "version": "v1.0-synth", "split": "calib"},
        "frames": 4,
        "units": units,
        "units_in_all": 43,
        "together": _unit("all of them", ["many"] * 50, 0.916, 27.5, 0.005),
        "reference": {"map": 0.51, "nds": 0.55},
        "floats": [
            {
                "part": "vtransform", "rule": "parts_off", "reason": "built in FP16, without QDQ",
                "layers": ["vtransform.downsample.0", "vtransform.downsample.3"], "macs_share": 0.0839,
            },
            {
                "part": "camera", "rule": "budget", "reason": "INT8 costs more map than the budget of 0.001 allows",
                "layers": ["camera.depthnet.6"], "macs_share": 0.00013,
            },
        ],
        "histograms": [
            _histogram("decoder.quant_x", 40.0, 60.0, 0.00031),
            _histogram("camera.quant_encoders_camera_backbone_act1", 12.5, 12.0, 0.0),
        ],
    }  # fmt: skip


@pytest.fixture
def results() -> dict:
    """A whole results.json, fresh for each test."""
    return {
        "schema": 1,
        "model": "camera-tiny",
        "dataset": {
            "name": "example-data", "version": "v1.0-synth", "split": "eval", "samples": 40, "scenes": 8,
            "cameras": list(CAMERAS), "image_size": [352, 128],
            "objects": {name: count for name, (_, count) in CLASSES.items()},
        },
        "machine": {
            "cpu": "Example CPU @ 2.50GHz", "cores": 2, "threads": 2, "int8_instructions": ["avx512_vnni"],
            "memory_gb": 7.6,
        },
        "measurement": {"rounds": 10, "repeats": 3, "frames": 4, "pattern_rebuild_ms": 12.3, "resamples": 1000},
        "rows": [
            _row("pytorch", "fp32", 0.0, 118.0, 1.0, 200.0),
            _row("pytorch", "int8-fake", 0.004, 320.0, 0.37, 28.0),
            _row("openvino", "fp32", 0.0, 71.0, 1.0, 120.0),
            {
                **_row("openvino", "int8", 0.005, 33.0, 71 / 33, 27.0),
                "change": {
                    "map": {"difference": -0.005, "low": -0.009, "high": 0.002, "confidence": 0.95},
                    "nds": {"difference": -0.004, "low": -0.0071, "high": 0.0012, "confidence": 0.95},
                },
            },
            _row("onnxruntime", "fp32", 0.0, 74.0, 1.0, 118.0),
            _row("onnxruntime", "int8", 0.0042, 96.0, 74 / 96, 27.5),
        ],
        "frames": [_frame()],
        "sensitivity": _sensitivity(),
        "provenance": {
            "command": "bevqat compare --ckpt model/camera-tiny/model.pth --out runs/demo",
            "commands": [
                {
                    "what": "ptq.pth", "command": "bevqat calibrate --out runs/demo/ptq.pth",
                    "versions": {"torch": "2.12.0"},
                },
                {"what": "onnx_fp32", "command": "bevqat export-camera --ckpt runs/demo/ptq.pth --fp32"},
                {"what": "these results", "command": "bevqat compare --ckpt model/camera-tiny/model.pth --out runs/demo"},
            ],
            "created": "2026-11-21T06:20:00+00:00",
            "versions": {"bevqat": "0.1.0", "torch": "2.13.0", "openvino": "2026.4.1"},
            "calibration": {"method": "entropy", "frames": 16},
            "files": [{"what": "float checkpoint", "file": "model.pth", "sha256": "ab" * 32}],
        },
    }  # fmt: skip
