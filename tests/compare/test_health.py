"""The first layer that is not finite, and saturation, where they were put."""

from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from qat.calibrate import calibrate
from qat.compare.health import _Watch, _WatchedPart, check_detector, check_parts, print_health
from qat.families.bevfusion.frames import random_frame
from qat.families.bevfusion.settings import pipeline_settings
from qat.lean.modes import quantizers


def test_a_healthy_detector_is_finite(tiny_model, tiny_frames, capsys):
    found = check_detector(tiny_model, tiny_frames)
    assert found.first is None and found.frames == 3 and not found.saturation
    print_health(found, 0.01)
    assert "every layer is finite on 3 frames" in capsys.readouterr().out


@pytest.mark.parametrize(("value", "kind"), [(float("nan"), "NaN"), (float("inf"), "infinity")])
def test_the_first_layer_is_named_in_a_float_detector(tiny_model, tiny_frames, value, kind):
    """One channel of one convolution in the middle of the decoder; what comes after it is not blamed."""
    with torch.no_grad():
        tiny_model.decoder["backbone"][1][0].conv1.bias = torch.nn.Parameter(torch.zeros(12))
        tiny_model.decoder["backbone"][1][0].conv1.bias[3] = value
    first = check_detector(tiny_model, tiny_frames).first
    assert first.where == "decoder.backbone.1.0.conv1" and first.kind == kind
    assert first.share == pytest.approx(1 / 12) and first.frame == "frame0"


def test_an_operation_between_layers_is_told_by_the_layer_after_it(tiny_model, tiny_frames, monkeypatch):
    real = type(tiny_model).pool

    def spoilt(self, *args):
        return real(self, *args) * float("inf")

    monkeypatch.setattr(type(tiny_model), "pool", spoilt)
    first = check_detector(tiny_model, tiny_frames).first
    assert first.where == "the operations before encoders.camera.vtransform.downsample.0"


def test_a_spoilt_frame_is_not_blamed_on_a_layer(tiny_model, tiny_frames):
    frame = SimpleNamespace(**{**vars(tiny_frames[1]), "img": tiny_frames[1].img * np.float32("nan")})
    first = check_detector(tiny_model, [tiny_frames[0], frame]).first
    assert first.where == "the frame's img" and first.frame == "frame1"


def test_a_saturated_quantizer_is_named_with_its_share(tiny_model, tiny_frames, capsys):
    quantized, _ = calibrate(tiny_model, tiny_frames, "max")
    found = check_detector(quantized, tiny_frames)
    assert found.first is None and max(found.saturation.values()) < 0.01  # rounding before it may pass the largest
    name = next(n for n in found.saturation if n.startswith("parts.decoder"))
    quantizer = quantizers(quantized)[name]
    quantizer.set_range(quantizer._amax / 20)
    found = check_detector(quantized, tiny_frames)
    assert max(found.saturation, key=found.saturation.get) == name and 0.01 < found.saturation[name] < 1
    print_health(found, 0.01)
    assert "quantizers with more than 1.00%" in capsys.readouterr().out


def test_the_first_node_of_an_onnx_graph_is_named(tmp_path):
    nodes = [
        helper.make_node("Sub", ["x", "one"], ["low"], "lower"),
        helper.make_node("Log", ["low"], ["logged"], "logarithm"),
        helper.make_node("Relu", ["logged"], ["y"], "rectify"),
    ]
    one = helper.make_tensor("one", TensorProto.FLOAT, [1], [1.0])
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [4]) for n in "xy")
    onnx.save(
        helper.make_model(
            helper.make_graph(nodes, "g", [x], [y], [one]), opset_imports=[helper.make_opsetid("", 13)], ir_version=8
        ),
        tmp_path / "g.onnx",
    )
    watch = _Watch()
    part = _WatchedPart(tmp_path / "g.onnx", "fuser", watch)
    watch.begin("a")
    assert part.run({"x": np.full(4, 3, np.float32)})["y"] == pytest.approx(np.log(2))
    assert watch.health.first is None
    watch.begin("b")
    part.run({"x": np.array([0, 3, 3, 3], np.float32)})
    first = watch.health.first
    assert first.where == "fuser: Log logarithm (tensor logged)" and (first.kind, first.share) == ("NaN", 0.25)
    assert first.frame == "b"


def test_exported_parts_are_watched_node_by_node(exported_fp32, fresh_config, small_cameras):
    frame = random_frame(pipeline_settings(fresh_config()), 3)
    assert check_parts(exported_fp32, [frame]).first is None
    frame.depth[0, 0, 0, 0] = np.inf
    first = check_parts(exported_fp32, [frame]).first
    assert first.where == "camera.backbone: input depth" and first.kind == "infinity"


def test_saturation_is_read_from_the_graphs_own_scales(tmp_path):
    values = {"scale": np.float32(0.1), "zero": np.int8(0)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], "q"),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"], "d"),
    ]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [4]) for n in "xy")
    constants = [onnx.numpy_helper.from_array(np.asarray(v), n) for n, v in values.items()]
    onnx.save(
        helper.make_model(
            helper.make_graph(nodes, "g", [x], [y], constants),
            opset_imports=[helper.make_opsetid("", 13)],
            ir_version=8,
        ),
        tmp_path / "g.onnx",
    )
    watch = _Watch()
    _WatchedPart(tmp_path / "g.onnx", "fuser", watch).run({"x": np.array([12.74, 12.76, -12.84, -12.9], np.float32)})
    assert watch.health.saturation == {"fuser: x": 0.5}
