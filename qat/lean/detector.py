"""The quantized detector: the float one's parts as fx graphs with quantizers, behind the same interface."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from pytorch_quantization.nn import TensorQuantizer
from torch import fx, nn

from qat.core.config import is_camera_branch, need_boxes, needs_depth
from qat.core.geometry import PoolPattern
from qat.lean.background import absorb_backgrounds, correct_backgrounds
from qat.lean.clean import clean
from qat.lean.equalize import equalizable, equalize
from qat.lean.fold import fold_batch_norm
from qat.lean.insert import Inventory, quantize_graph
from qat.lean.modes import quantizers
from qat.lean.placement import FloatRule
from qat.lean.quantizer import Quantizer
from qat.lean.trace import trace
from qat.models import CameraBEVDetector

# part name: the detector's method that is traced; a camera branch alone has the first two
PARTS = {"camera": "camera_logits", "vtransform": "downsample", "decoder": "decode_bev", "head": "head"}
BRANCH_PARTS = ("camera", "vtransform")

KEEP_FLOAT = (
    FloatRule("encoders.camera.vtransform.dtransform.0", "its input is raw metres: a step would be half a metre"),
)
# How `--method auto` chooses ranges. A BEV cell near the car sums the features of hundreds of pixels, one far away those of
# a few: the decoder's tensors have long tails. What clips them (mse, entropy) raises the SQNR at the head maps, which
# empty far cells dominate, and loses the objects near the car: mAP falls. In the camera part mse does no harm.
# What is computed from the depth map alone has long tails too: its large values are the near points.
AUTO = ("mse", (("decoder.*", "max"), ("head.*", "max"), ("camera.*_dtransform_*", "max")))
# CUDA-BEVFusion builds the vtransform with --fp16 alone, so it carries no QDQ unless asked.
PARTS_OFF = ("vtransform",)


def part_methods(config: Mapping[str, Any]) -> dict[str, str]:
    """`PARTS`, as far as a detector of this config has them."""
    return {name: method for name, method in PARTS.items() if name in BRANCH_PARTS or not is_camera_branch(config)}


def auto_methods(config: Mapping[str, Any]) -> tuple[str, tuple[tuple[str, str], ...]]:
    """`AUTO` for a detector of this config: without the patterns of parts that it has not."""
    method, by_layer = AUTO
    parts = part_methods(config)
    depth = needs_depth(config)
    return method, tuple(
        (pattern, other)
        for pattern, other in by_layer
        if pattern.partition(".")[0] in parts and (depth or "dtransform" not in pattern)
    )


Background = Literal["corrected", "absorbed"]  # the depth map's, in corrections of biases or in the biases themselves


class QuantizedDetector(nn.Module):
    """A camera detector with TensorQuantizers; lift, pool, downsample, decode_bev, head, patterns and forward are
    CameraBEVDetector's, of a camera branch alone too."""

    def __init__(
        self,
        detector: CameraBEVDetector,
        keep_float: Sequence[FloatRule] = KEEP_FLOAT,
        parts_off: Sequence[str] = PARTS_OFF,
    ) -> None:
        super().__init__()
        self.config = detector.config
        self.vtransform = detector.vtransform
        self._pool = detector.pool
        self.keep_float = tuple(keep_float)
        self.parts_off = tuple(parts_off)
        self.parts = nn.ModuleDict()
        self.inventory: dict[str, Inventory] = {}
        self.equalized: dict[str, torch.Tensor] = {}  # `part.quantizer` → what its channels are divided by
        self.background: Background | None = None
        for name, method in part_methods(self.config).items():
            graph = trace(detector, method)
            clean(graph)
            fold_batch_norm(graph)
            self.inventory[name] = quantize_graph(graph, keep_float)
            if name in parts_off:
                for quantizer in quantizers(graph).values():
                    quantizer.disable()
            self.parts[name] = graph
        self.eval()

    def camera_logits(self, img: torch.Tensor, depth: torch.Tensor | None) -> torch.Tensor:
        """img [B·N,3,H,W], depth [B·N,1,H,W] → depth logits and context, [B·N,D+C,fH,fW]."""
        return self.parts["camera"](img, depth)

    def lift(self, img: torch.Tensor, depth: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """img [B,N,3,H,W], depth [B,N,1,H,W] → depth weights [B·N,D,fH,fW] (softmax in float), context."""
        flat = None if depth is None else depth.flatten(0, -4)
        return self.vtransform.split(self.camera_logits(img.flatten(0, -4), flat))

    def pool(self, depth_weights: torch.Tensor, context: torch.Tensor, patterns: Sequence[PoolPattern]) -> torch.Tensor:
        """As `CameraBEVDetector.pool`; in float."""
        return self._pool(depth_weights, context, patterns)

    def downsample(self, bev: torch.Tensor) -> torch.Tensor:
        """As `CameraBEVDetector.downsample`."""
        return self.parts["vtransform"](bev)

    def decode_bev(self, x: torch.Tensor) -> torch.Tensor:
        """As `CameraBEVDetector.decode_bev`."""
        self._need_boxes("decode_bev")
        return self.parts["decoder"](x)

    def head(self, x: torch.Tensor) -> list[dict[str, torch.Tensor]]:
        """As `CameraBEVDetector.head`."""
        self._need_boxes("head")
        return self.parts["head"](x)

    def _need_boxes(self, method: str) -> None:
        need_boxes(self.config, f"QuantizedDetector.{method}", "forward gives the features")

    def bev_head(self, bev: torch.Tensor) -> list[dict[str, torch.Tensor]]:
        """As `CameraBEVDetector.bev_head`."""
        return self.head(self.decode_bev(self.downsample(bev)))

    def patterns(self, *matrices: np.ndarray) -> list[PoolPattern]:
        """As `CameraBEVDetector.patterns`."""
        return [self.vtransform.pattern(*sample) for sample in zip(*matrices, strict=True)]

    def forward(
        self, img: torch.Tensor, depth: torch.Tensor | None, patterns: Sequence[PoolPattern]
    ) -> list[dict[str, torch.Tensor]]:
        """As `CameraBEVDetector.forward`."""
        bev = self.pool(*self.lift(img, depth), patterns)
        return [{"feat_out": self.downsample(bev)}] if is_camera_branch(self.config) else self.bev_head(bev)

    def activation_quantizers(self) -> dict[str, TensorQuantizer]:
        """Quantizers of activations by `part.name`, those switched off too."""
        named = quantizers(self.parts)
        return {name: q for name, q in named.items() if not name.endswith("weight_quantizer")}

    def equalizable(self) -> dict[str, list[str]]:
        """Quantizers by `part.name` whose channels can be equalized (`qat.lean.equalize`), with their consumers' paths."""
        found = {}
        for part, inventory in self.inventory.items():
            graph = self.parts[part]
            assert isinstance(graph, fx.GraphModule)
            for name, layers in equalizable(graph, inventory).items():
                found[f"{part}.{name}"] = [f"{part}.{path}" for path in layers]
        return found

    def equalize(self, name: str, scales: torch.Tensor) -> None:
        """Divides the channels of the tensor that quantizer `part.name` rounds by `scales`, float32[C].

        Raises:
            ValueError: they cannot be.
        """
        part, _, quantizer = name.partition(".")
        if part not in self.parts:
            raise ValueError(f"{name}: there is no such quantizer")
        graph = self.parts[part]
        assert isinstance(graph, fx.GraphModule)
        equalize(graph, quantizer, scales)
        self.equalized[name] = scales

    def keep_background(self) -> None:
        """Keeps the constant that the depth map's tensors hold nearly everywhere exact (`qat.lean.background`).

        From here on `background` is "corrected". The corrections depend on weights and ranges: call again when those changed.
        """
        self.background = "corrected"
        for graph in self.parts.values():
            assert isinstance(graph, fx.GraphModule)
            correct_backgrounds(graph)

    def absorb_background(self) -> None:
        """Makes the corrections of `keep_background` part of the biases, which may then be trained; `background` is
        "absorbed" if there were any."""
        self.background = "absorbed" if self.background else None
        for graph in self.parts.values():
            assert isinstance(graph, fx.GraphModule)
            absorb_backgrounds(graph)

    def amax(self) -> dict[str, torch.Tensor]:
        """Every quantizer's range by its path; for those that have one."""
        return {name: q.amax.detach().clone() for name, q in quantizers(self.parts).items() if q.amax is not None}

    def weights(self) -> dict[str, torch.Tensor]:
        """The parts' parameters and buffers by path, as the parts compute with them (batch norm folded), without the
        quantizers'."""
        own = quantizers(self.parts)
        return {name: x.detach() for name, x in self.parts.state_dict().items() if name.rpartition(".")[0] not in own}

    def load_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Sets what `weights` gave; ranges are left as they are.

        Raises:
            KeyError: the names are not this detector's. ValueError: a shape is not.
        """
        own = self.weights()
        strange = set(weights) ^ set(own)
        if strange:
            raise KeyError(f"weights differ: {', '.join(sorted(strange)[:5])}")
        for name, tensor in own.items():
            if tensor.shape != weights[name].shape:
                raise ValueError(f"{name}: found shape {list(weights[name].shape)}, expected {list(tensor.shape)}")
            tensor.copy_(weights[name])

    def load_amax(self, amax: Mapping[str, torch.Tensor], disabled: Sequence[str]) -> None:
        """Sets ranges and on/off as saved. One that is off needs no range (another tool's checkpoint has none for it).

        Raises:
            KeyError: the names are not this detector's, or one that is on has no range. ValueError: a range is not positive
                and finite, or has another shape.
        """
        own = quantizers(self.parts)
        if strange := sorted((set(amax) | set(disabled)) - set(own)):
            raise KeyError(f"found quantizers that the network has not: {_few(strange)}")
        if without := sorted(set(own) - set(amax) - set(disabled)):
            raise KeyError(f"found no range (amax) for {len(without)} of {len(own)} quantizers: {_few(without)}")
        for name, tensor in amax.items():
            before = own[name].amax  # of weights, already that of the weights themselves; others have none yet
            shape = [] if before is None else list(before.shape)
            if tensor.numel() != 1 and list(tensor.shape) != shape:
                raise ValueError(f"{name}: found a range of shape {list(tensor.shape)}, expected {shape}")
            if not bool(((tensor > 0) & tensor.isfinite()).all()):
                raise ValueError(f"{name}: found a range of {tensor.min().item():g}, expected finite values above 0")
        for name, quantizer in own.items():
            assert isinstance(quantizer, Quantizer)
            if name in amax:
                quantizer.set_range(amax[name])
            quantizer._disabled = name in disabled


def _few(names: Sequence[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (", …" if len(names) > count else "")


def quantize_detector(
    detector: CameraBEVDetector, keep_float: Sequence[FloatRule] = KEEP_FLOAT, parts_off: Sequence[str] = PARTS_OFF
) -> QuantizedDetector:
    """Folds batch norm and places quantizers; ranges of activations are still to be calibrated.

    The float detector is left as it was (its unchanged layers are shared).
    """
    return QuantizedDetector(detector.eval(), keep_float, parts_off)
