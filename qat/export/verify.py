"""Each exported graph beside the PyTorch module it came from, on the same inputs.

ONNX Runtime runs the graph as it is in the file (its optimizer off): what is checked is the file, not one backend's
fusions.

Tolerance, as the SQNR of each output against PyTorch's:

- FP32 graphs, 80 dB. Both sides sum in another order: about √n·2⁻²⁴ relative error for a sum of n = 2,000 terms,
  111 dB; forty such layers one after the other, whose errors add in power, 95 dB; the rest is for folded batch norms
  and cancellation.
- INT8 graphs: 3 dB below the SQNR of the fake-quantized module against the float one, on the same inputs. Both sides
  round at the same places, but FP32's rounding error carries a few values over a quantization threshold, each such flip
  changes what follows by part of a step and flips more, and after enough layers the two roundings may be as good as
  independent: then their noises, each that of quantization, add up to 3 dB more. Nothing that is correct exceeds
  it. As little as one lost quantizer stays under it too, so the graph's scales are compared as well: they must be
  the quantizers' own, every one of them (`compare_scales`). The `onnxruntime` flavour is held to the same: its u8
  rounding is finer than the simulated s8, with a quarter of the noise power, and 1 dB is lost to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import numpy_helper

from qat.core.tensors import TensorDifference, compare_tensors

FP32_DB, INT8_MARGIN_DB = 80.0, -3.0


def random_frame(settings: Mapping[str, Any], seed: int) -> Any:
    """A made-up keyframe: noise for images, one pixel in twenty with a depth, the cameras in a ring.

    Returns:
        what `qat.runtime.SampleTensors` describes.
    """
    random = np.random.default_rng(seed)
    count = len(settings["cameras"])
    height, width = settings["image"]["size"]
    low, high, _ = settings["vtransform"]["dbound"]
    depth = random.uniform(low, high, (count, 1, height, width)) * (random.random((count, 1, height, width)) < 0.05)
    intrinsics = np.tile(np.eye(4), (count, 1, 1))
    intrinsics[:, 0, 0] = intrinsics[:, 1, 1] = 0.8 * width
    intrinsics[:, :2, 2] = width / 2, height / 2
    camera2lidar = np.tile(np.eye(4), (count, 1, 1))
    for n, angle in enumerate(np.arange(count) * 2 * np.pi / count):
        c, s = np.cos(angle), np.sin(angle)
        camera2lidar[n, :3, :3] = [[s, 0, c], [-c, 0, s], [0, -1, 0]]
    unmoved = np.tile(np.eye(4), (count, 1, 1))
    arrays = {
        "img": random.standard_normal((count, 3, height, width)),
        "depth": depth,
        "camera_intrinsics": intrinsics,
        "camera2lidar": camera2lidar,
        "img_aug_matrix": unmoved,
        "lidar_aug_matrix": np.eye(4),
    }
    return SimpleNamespace(**{name: array.astype(np.float32) for name, array in arrays.items()})


def _run_file(graph: bytes, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def graph_scales(model: onnx.ModelProto) -> list[np.ndarray]:
    """The scales of every QuantizeLinear, flattened."""
    constants = {value.name: numpy_helper.to_array(value) for value in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant":
            constants[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
    return [constants[node.input[1]].ravel() for node in model.graph.node if node.op_type == "QuantizeLinear"]


def compare_scales(found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> dict[str, Any]:
    """Whether the scales of a graph and those of its quantizers are the same set.

    (A set: one quantizer may serve several tensors, and onnxsim may merge equal pairs on one tensor.)
    """

    def lacks(some: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> int:
        same = [any(a.shape == b.shape and np.allclose(a, b, rtol=1e-6, atol=0) for b in others) for a in some]
        return same.count(False)

    missing, unknown = lacks(expected, found), lacks(found, expected)
    return {"pairs": len(found), "missing": missing, "unknown": unknown, "passed": not (missing or unknown)}


def verify_part(
    graph: bytes,
    reference: Mapping[str, np.ndarray],
    feeds: dict[str, np.ndarray],
    unquantized: Mapping[str, np.ndarray] | None = None,
) -> dict[str, dict[str, Any]]:
    """Compares what one graph computes with what its module did.

    Args:
        graph: the ONNX file's bytes.
        reference: the module's outputs, fake-quantized for an INT8 graph.
        feeds: the inputs of both.
        unquantized: for an INT8 graph, the module's outputs with its quantizers off; None for a graph without QDQ.

    Returns:
        for each output: max_abs, cosine, sqnr_db, tolerance_db, passed, and for INT8 quantization_db, the SQNR of the
        fake-quantized module against the float one.
    """
    candidate = _run_file(graph, feeds)
    report: dict[str, dict[str, Any]] = {}
    for name in reference:
        difference: TensorDifference = compare_tensors(reference[name], candidate[name])
        entry: dict[str, Any] = {**difference, "tolerance_db": FP32_DB}
        if unquantized is not None:
            entry["quantization_db"] = compare_tensors(unquantized[name], reference[name])["sqnr_db"]
            entry["tolerance_db"] = min(FP32_DB, entry["quantization_db"] + INT8_MARGIN_DB)
        entry["passed"] = difference["sqnr_db"] >= entry["tolerance_db"]
        report[name] = entry
    return report
