"""Valid files of every kind that is read from outside, small ones: what the mutations start from."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import yaml
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from qat.calibrate.checkpoint import save_ptq
from qat.engine import Options
from qat.export import ExportOptions, export_parts
from qat.export.pt2 import export_pt2
from qat.families.bevfusion.detector import build_model
from qat.model.quantized import QuantizedModel
from qat.runtime import build_engines
from tests.conftest import _config

ROOT = Path(__file__).resolve().parents[3]


def _tree(make: Callable[[], dict[str, Any]]) -> str:
    """A config as BEVFusion's own tree writes it: values as expressions over other keys, anchors and merge keys."""
    config = make()
    config["model"]["encoders"]["camera"]["vtransform"] |= {
        "image_size": "${image_size}",
        "feature_size": "${[image_size[0] // 8, image_size[1] // 8]}",
    }
    config["model"]["heads"]["object"]["bbox_coder"]["pc_range"] = "${point_cloud_range}"
    text = yaml.safe_dump(config, sort_keys=False)
    return "shared: &shared\n  bias: auto\n" + text.replace(
        "      norm_bbox: true", "      <<: *shared\n      norm_bbox: true"
    )


def _fusion(make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A camera+lidar model's configs.yaml, of which the camera branch alone is read."""
    config = make()
    config["model"]["fuser"] = {"type": "ConvFuser", "in_channels": [10, 256], "out_channels": 256}
    config["model"]["encoders"]["lidar"] = {"backbone": {"type": "SparseEncoder", "sparse_shape": [1440, 1440, 41]}}
    config["model"]["heads"] = {"object": {"type": "TransFusionHead", "num_proposals": 200}}
    return config


def make_configs(folder: Path) -> None:
    """The three that are shipped, a small one, and the two forms that BEVFusion writes."""
    folder.mkdir(parents=True)
    for path in sorted((ROOT / "model").glob("*/config.yaml")):
        shutil.copy(path, folder / f"{path.parent.name}.yaml")
    (folder / "small.yaml").write_text(yaml.safe_dump(_config(), sort_keys=False))
    (folder / "tree.yaml").write_text(_tree(_config))
    (folder / "fusion.yaml").write_text(yaml.safe_dump(_fusion(_config), sort_keys=False))


class _Block(nn.Module):
    def __init__(self) -> None:
        from pytorch_quantization.nn import TensorQuantizer
        from pytorch_quantization.tensor_quant import QuantDescriptor

        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)
        self.bn = nn.BatchNorm2d(3)
        self.conv._input_quantizer = TensorQuantizer(QuantDescriptor(num_bits=8, amax=1.5))
        self.conv._weight_quantizer = TensorQuantizer(
            QuantDescriptor(num_bits=8, axis=0, amax=np.full((3, 1, 1, 1), 0.5))
        )
        self.layers = nn.ModuleList([nn.Linear(2, 2)])


def detectors() -> tuple[Any, Any]:
    """The small detector with seeded weights, and it quantized with ranges of 4."""
    torch.manual_seed(0)
    detector = build_model(_config()).eval()
    for head in detector.heads["object"].task_heads:
        nn.init.normal_(head.heatmap[-1].weight, std=0.3)
    quantized = QuantizedModel(copy.deepcopy(detector))
    for module in quantized.activation_quantizers().values():
        module.set_range(torch.tensor(4.0))
    return detector, quantized


def make_checkpoints(folder: Path) -> None:
    """torch's two formats of a state dict, of a pickled network and of plain containers; ModelOpt's; ours."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    net = _Block()
    weights = {name: value for name, value in net.state_dict().items() if "quantizer" not in name}
    values: dict[str, Any] = {
        "state": {"state_dict": weights, "meta": {"epoch": 6, "note": "é"}},
        "bare": weights,
        "module": {"model": net, "epoch": 3},
        "mixed": {"state_dict": net.state_dict(), "numbers": [1, 2.5, None, True, 10**20], "when": np.float32(2)},
    }
    for name, value in values.items():
        for zipped in (True, False):
            kind = "zip" if zipped else "legacy"
            torch.save(value, folder / f"{name}-{kind}.pth", _use_new_zipfile_serialization=zipped)
    shutil.copy(ROOT / "tests" / "models" / "modelopt.pth", folder / "modelopt.pth")
    detector, quantized = detectors()
    recipe = {"method": "max", "frames": 1}
    save_ptq(folder / "ptq.pth", quantized, detector, recipe)
    torch.save({"config": _config(), "state_dict": detector.state_dict()}, folder / "float.pth")


def make_manifests(folder: Path) -> None:
    """Folders with a manifest: parts in FP32 and INT8, built engines of both CPU backends, programs of torch.export."""
    detector, quantized = detectors()
    export_parts(detector, folder / "fp32", ExportOptions("fp32"))
    export_parts(quantized, folder / "int8", ExportOptions("int8", flavour="onnxruntime"))
    export_parts(quantized, folder / "strong", ExportOptions("int8", flavour="tensorrt-strong", parts=["fuser"]))
    export_pt2(detector, folder / "pt2", ExportOptions("fp32", parts=["fuser"]))
    options = Options(threads=1, cache=None)
    build_engines(folder / "fp32", "onnxruntime", out=folder / "engines-onnxruntime", options=options)
    build_engines(folder / "fp32", "openvino", out=folder / "engines-openvino", options=options)


def _graph(nodes: list[Any], initializers: list[Any], shape: list[int], out: list[int]) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, out)],
        initializers,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


def _conv(quantized: bool) -> onnx.ModelProto:
    random = np.random.default_rng(0)
    weight = numpy_helper.from_array(random.standard_normal((4, 3, 3, 3)).astype(np.float32), "w")
    scalars = [numpy_helper.from_array(np.float32(0.05), "s"), numpy_helper.from_array(np.int8(0), "z")]
    nodes = []
    names = ["x", "w"]
    if quantized:
        for name in ("x", "w"):
            nodes += [
                helper.make_node("QuantizeLinear", [name, "s", "z"], [f"{name}_q"]),
                helper.make_node("DequantizeLinear", [f"{name}_q", "s", "z"], [f"{name}_d"]),
            ]
        names = ["x_d", "w_d"]
    nodes += [
        helper.make_node("Conv", names, ["c"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["y"]),
    ]
    return _graph(nodes, [weight, *(scalars if quantized else [])], [1, 3, 4, 5], [1, 4, 4, 5])


def _branches() -> onnx.ModelProto:
    """A graph in a graph, and a constant."""
    empty = helper.make_tensor_value_info
    then = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["t"])], "then", [], [empty("t", TensorProto.FLOAT, [2, 2])]
    )
    other = helper.make_graph(
        [helper.make_node("Abs", ["x"], ["e"])], "else", [], [empty("e", TensorProto.FLOAT, [2, 2])]
    )
    condition = helper.make_tensor("value", TensorProto.BOOL, [], [True])
    nodes = [
        helper.make_node("Constant", [], ["k"], value=condition),
        helper.make_node("If", ["k"], ["i"], then_branch=then, else_branch=other),
        helper.make_node("Cast", ["i"], ["h"], to=TensorProto.FLOAT16),
        helper.make_node("Cast", ["h"], ["y"], to=TensorProto.FLOAT),
    ]
    return _graph(nodes, [], [2, 2], [2, 2])


def make_onnx(folder: Path, manifests: Path | None = None) -> None:
    """Small graphs with what parts have (convolutions, Q/DQ, FP16, subgraphs, data in a file beside them); and parts."""
    folder.mkdir(parents=True)
    onnx.save(_conv(False), folder / "conv.onnx")
    onnx.save(_conv(True), folder / "qdq.onnx")
    onnx.save(_branches(), folder / "branches.onnx")
    onnx.save(
        _conv(False), folder / "external.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0
    )
    if manifests is not None:
        for kind in ("fp32", "int8", "strong"):
            shutil.copy(manifests / kind / "fuser.onnx", folder / f"fuser-{kind}.onnx")
        shutil.copy(manifests / "int8" / "head.bbox.onnx", folder / "head-int8.onnx")
