"""Makes files such as CUDA-BEVFusion's `bevfusion_ptq.pth`, in a process of its own: python make_bevfusion_ptq.py CONFIG OUT

The original cannot be had for tests, so a detector is put together as its script does: batch norm folded into the
convolutions and replaced by Identity, pytorch-quantization's own TensorQuantizers on every layer of the camera encoder and
the decoder, shared where theirs are, residual adds and the neck's concatenation with quantizers of their own, forwards
replaced by objects, one layer switched off, the whole inside MMDataParallel. Every class is in a module that exists in this
process alone. OUT gets ptq-zip.pth, ptq-legacy.pth, and expected.pth with inputs and what this network makes of them.
"""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import torch
from pytorch_quantization.nn import TensorQuantizer
from pytorch_quantization.tensor_quant import QuantDescriptor
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from qat.families.bevfusion.detector import build_model

NORMS = (nn.BatchNorm2d,)
FLOAT = "encoders.camera.vtransform.depthnet.6"


def elsewhere(module: str, cls: type) -> type:
    """The class as one of a package that only this process has."""
    for end in range(module.count(".") + 1):
        name = ".".join(module.split(".")[: end + 1])
        sys.modules.setdefault(name, types.ModuleType(name))
    cls.__module__, cls.__qualname__ = module, cls.__name__
    setattr(sys.modules[module], cls.__name__, cls)
    return cls


class QuantConv2d(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(self._input_quantizer(x), self._weight_quantizer(self.weight), self.bias)


class QuantConcat(nn.Module):
    def __init__(self):
        super().__init__()
        self._input_quantizer = activation()

    def forward(self, x, y):
        return torch.cat([self._input_quantizer(x), self._input_quantizer(y)], dim=1)


class hook_block_forward:
    def __init__(self, obj):
        self.obj = obj

    def __call__(self, x):
        block = self.obj
        act = getattr(block, "act1", getattr(block, "relu", None))
        identity = x if block.downsample is None else block.downsample(x)
        out = block.bn2(block.conv2(act(block.bn1(block.conv1(x)))))
        if hasattr(block, "residual_quantizer"):
            identity = block.residual_quantizer(identity)
        return act(out + identity)


class hook_neck_forward:
    def __init__(self, obj):
        self.obj = obj

    def __call__(self, inputs):
        fine, coarse = inputs
        coarse = F.interpolate(coarse, size=fine.shape[2:], **self.obj.upsample_cfg)
        return [self.obj.fpn_convs[0](self.obj.lateral_convs[0](self.obj.quant_concat0(fine, coarse)))]


class MMDataParallel(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module
        self.device_ids = [0]


def activation() -> TensorQuantizer:
    return TensorQuantizer(QuantDescriptor(num_bits=8))


def fold(module: nn.Module) -> None:
    last = None
    for name, child in list(module.named_children()):
        if isinstance(child, NORMS) and last is not None:
            module._modules[last] = fuse_conv_bn_eval(module._modules[last], child)
            module._modules[name] = nn.Identity()
            last = None
        elif isinstance(child, nn.Conv2d):
            last = name
        else:
            fold(child)


def quantize(module: nn.Module) -> None:
    for child in list(module.modules()):
        if type(child) is nn.Conv2d:
            child.__class__ = QuantConv2d
            child._input_quantizer = activation()
            child._weight_quantizer = TensorQuantizer(QuantDescriptor(num_bits=8, axis=(0)))
        if hasattr(child, "conv2") and hasattr(child, "downsample"):
            if child.downsample is not None:
                child.residual_quantizer = activation()
            child.forward = hook_block_forward(child)
    for child in list(module.modules()):
        if hasattr(child, "conv2") and hasattr(child, "downsample"):
            if child.downsample is None:
                child.residual_quantizer = child.conv1._input_quantizer
            else:
                child.downsample[0]._input_quantizer = child.conv1._input_quantizer


def main(config: Path, out: Path) -> None:
    torch.manual_seed(0)
    model = build_model(json.loads(config.read_text())).eval()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.7, 1.4)
            nn.init.uniform_(module.weight, 0.7, 1.3)
    camera = model.encoders["camera"]
    torch.save(model.state_dict(), out / "float.pth")
    fold(model)
    for part in (camera["backbone"], camera["neck"], camera["vtransform"].dtransform, camera["vtransform"].depthnet):
        quantize(part)
    quantize(model.decoder)
    neck = camera["neck"]
    neck.quant_concat0 = QuantConcat()
    neck.forward = hook_neck_forward(neck)
    major = camera["backbone"].layer3[0].conv1._input_quantizer
    neck.quant_concat0._input_quantizer = neck.lateral_convs[0].conv._input_quantizer = major
    camera["backbone"].layer3[0].downsample[0]._input_quantizer = major
    # Theirs has no such sharing in the decoder; without it our one quantizer could not equal their three.
    major = model.decoder["backbone"][1][0].conv1._input_quantizer
    model.decoder["backbone"][1][0].downsample[0]._input_quantizer = major
    model.decoder["neck"].fuse[0]._input_quantizer = major

    img, bev = torch.randn(2, 3, 64, 96), torch.randn(1, 10, 32, 32)
    depth = torch.rand(2, 1, 64, 96) * 12 * (torch.rand(2, 1, 64, 96) < 0.05)

    def forward():
        with torch.inference_mode():
            return model.camera_logits(img, depth), model.decode_bev(model.downsample(bev))

    quantizers = [module for module in model.modules() if isinstance(module, TensorQuantizer)]
    for quantizer in quantizers:
        quantizer.disable_quant()
        quantizer.enable_calib()
    forward()
    for quantizer in quantizers:
        quantizer.enable_quant()
        quantizer.disable_calib()
        quantizer.load_calib_amax(strict=False)
    for quantizer in model.get_submodule(FLOAT).children():
        quantizer.disable()
    TensorQuantizer.use_fb_fake_quant = True  # [−128, 127], as TensorRT rounds and as ONNX has it
    logits, middle = forward()
    torch.save({"img": img, "depth": depth, "bev": bev, "logits": logits, "middle": middle}, out / "expected.pth")

    for cls in (QuantConcat, hook_block_forward, hook_neck_forward):
        elsewhere("lean.quantize", cls)
    elsewhere("pytorch_quantization_2021.nn.modules.quant_conv", QuantConv2d)
    elsewhere("mmcv.parallel.data_parallel", MMDataParallel)
    moved: dict[type, type] = {}
    for module in model.modules():
        cls = type(module)
        if cls is TensorQuantizer:
            home, name = "pytorch_quantization_2021.nn.modules.tensor_quantizer", cls.__name__
        elif cls is type(model):
            home, name = "mmdet3d.models.fusion_models.bevfusion", "BEVFusion"
        elif cls.__module__.split(".")[0] in ("qat", "timm"):
            home, name = f"mmdet3d.models.{cls.__module__.replace('.', '_')}", cls.__name__
        else:
            continue
        if cls not in moved:
            moved[cls] = elsewhere(home, type(name, (cls,), {}))
        module.__class__ = moved[cls]
    for kind in ("zip", "legacy"):
        torch.save(MMDataParallel(model), out / f"ptq-{kind}.pth", _use_new_zipfile_serialization=kind == "zip")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
