"""The quantized detector: the float one's parts as fx graphs with quantizers, behind the same interface."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from pytorch_quantization.nn import TensorQuantizer
from torch import fx, nn

from qat.core.errors import UserError
from qat.families.bevfusion.config import camera_names, is_camera_branch, need_boxes, needs_depth
from qat.families.bevfusion.detector import CameraBEVDetector
from qat.families.bevfusion.pooling.geometry import PoolPattern
from qat.lean.background import absorb_backgrounds, backgrounds, correct_backgrounds
from qat.lean.equalize import equalizable, equalize
from qat.lean.flavours import DEFAULT, FLAVOURS, flavour_of
from qat.lean.fold import fold_batch_norm
from qat.lean.insert import Inventory, quantize_graph, use_flavour
from qat.lean.modes import quantizers
from qat.lean.ops import least_values
from qat.lean.placement import FloatRule
from qat.lean.quantizer import U8_COARSE, Quantizer
from qat.lean.trace import FIXED_BATCH, trace

# part name: the detector's method that is traced; a camera branch alone has the first two
PARTS = {"camera": "camera_logits", "vtransform": "downsample", "decoder": "decode_bev", "head": "head"}
BRANCH_PARTS = ("camera", "vtransform")

TENSORRT = ("tensorrt", "tensorrt-strong")
KEEP_FLOAT = (
    FloatRule("encoders.camera.vtransform.dtransform.0", "its input is raw metres: a step would be half a metre"),
    FloatRule(
        "encoders.camera.vtransform.dtransform.*",
        "computed from the depth map alone: on a GPU a few per cent of the time, and s8 there costs mAP",
        TENSORRT,
    ),
)
# How `--method auto` chooses ranges. A BEV cell near the car sums the features of hundreds of pixels, one far away those of
# a few: the decoder's tensors have long tails. What clips them (mse, entropy) raises the SQNR at the head maps, which
# empty far cells dominate, and loses the objects near the car: mAP falls. In the camera part mse does no harm.
# What is computed from the depth map alone has long tails too: its large values are the near points.
AUTO = ("mse", (("decoder.*", "max"), ("head.*", "max"), ("camera.*_dtransform_*", "max")))
# Parts that are float as a whole, and in which flavours. CUDA-BEVFusion builds the vtransform with --fp16 alone, so it
# carries no QDQ unless asked.
PARTS_OFF: dict[str, tuple[str, ...]] = {"vtransform": tuple(FLAVOURS)}


def part_methods(config: Mapping[str, Any]) -> dict[str, str]:
    """`PARTS`, as far as a detector of this config has them."""
    return {name: method for name, method in PARTS.items() if name in BRANCH_PARTS or not is_camera_branch(config)}


def auto_methods(config: Mapping[str, Any]) -> tuple[str, tuple[tuple[str, str], ...]]:
    """`AUTO` for a detector of this config, without the patterns of parts that it lacks."""
    method, by_layer = AUTO
    parts = part_methods(config)
    depth = needs_depth(config)
    return method, tuple(
        (pattern, other)
        for pattern, other in by_layer
        if pattern.partition(".")[0] in parts and (depth or "dtransform" not in pattern)
    )


def trace_parts(detector: CameraBEVDetector) -> dict[str, fx.GraphModule]:
    """A detector's parts as canonical graphs for any number of samples and cameras (`qat.lean.trace`), by name.

    Raises:
        UserError: torch.export cannot follow one.
    """
    config = detector.config
    height, width = config["image_size"]
    view = detector.vtransform
    nx, ny, nz = (int(n) for n in view.nx)
    empty = partial(torch.empty, device=next(detector.parameters()).device)
    examples: list[object] = [empty(2, 3, height, width)]
    examples.append(empty(2, 1, height, width) if needs_depth(config) else None)
    found = {}
    for name, method in part_methods(config).items():
        if name == "vtransform":
            examples = [empty(2, view.C * nz, nx, ny)]
        found[name] = trace(detector, examples, method)
        if name == "camera" and FIXED_BATCH in found[name].meta:  # for one sample, then
            views = len(camera_names(config))
            examples = [None if e is None else empty(views, *e.shape[1:]) for e in examples]  # type: ignore[attr-defined]
            found[name] = trace(detector, examples, method)
            found[name].meta[FIXED_BATCH] = views
        result = found[name].graph.output_node().args[0]
        if isinstance(result, fx.Node):  # the next part takes it
            examples = [empty(2, *(int(n) for n in result.meta["val"].shape[1:]))]
    return found


Background = Literal["corrected", "absorbed"]  # the depth map's, in corrections of biases or in the biases themselves


class QuantizedDetector(nn.Module):
    """A camera detector with TensorQuantizers; lift, pool, downsample, decode_bev, head, patterns and forward are
    CameraBEVDetector's, of a camera branch alone too.

    It holds the quantizers of every flavour, and computes in one of them: `flavour`, which `use` changes.

    Args:
        keep_float: layers that stay float. parts_off: parts that do as a whole, in the flavours that are named.
    """

    def __init__(
        self,
        detector: CameraBEVDetector,
        keep_float: Sequence[FloatRule] = KEEP_FLOAT,
        parts_off: Mapping[str, Sequence[str]] = PARTS_OFF,
    ) -> None:
        super().__init__()
        self.config = detector.config
        self.vtransform = detector.vtransform
        self._pool = detector.pool
        self.keep_float = tuple(keep_float)
        self.off_in = {name: tuple(flavours) for name, flavours in parts_off.items()}
        self.flavour = DEFAULT
        self.parts = nn.ModuleDict()
        self.inventory: dict[str, Inventory] = {}
        self.equalized: dict[str, torch.Tensor] = {}  # `part.quantizer` → what its channels are divided by
        self.background: Background | None = None
        self.absorbed: frozenset[str] = frozenset()  # `part.path` of layers whose bias has its correction in it
        self.fixed_views: int | None = None
        known: dict[str, float] = {}
        for name, graph in trace_parts(detector).items():
            fold_batch_norm(graph)
            if graph.meta.get(FIXED_BATCH) is not None:
                self.fixed_views = graph.meta[FIXED_BATCH]
            self.inventory[name] = quantize_graph(graph, keep_float, known)
            result = graph.graph.output_node().args[0]
            known = {}
            if name != "camera" and isinstance(result, fx.Node):  # pooled features have a sign: a pixel's context has
                known = dict.fromkeys(("x",), least_values(graph)[result])
            self.parts[name] = graph
        self.use(DEFAULT)
        self.eval()

    def use(self, flavour: str, parts_int8: Sequence[str] = ()) -> None:
        """From here on the detector computes what this flavour's exports do.

        Args:
            parts_int8: parts that are off in this flavour, to quantize all the same.

        Raises:
            UserError: an unknown flavour; a part that is not off, or that has quantizers without a range.
        """
        flavour_of(flavour)
        off = [name for name, flavours in self.off_in.items() if flavour in flavours and name in self.parts]
        for name in parts_int8:
            if name not in off:
                raise UserError(
                    f"parts-int8: found {name!r}, expected a part that calibrate left off: {', '.join(off) or 'none'}"
                )
        self.flavour = flavour
        self.parts_off = tuple(name for name in off if name not in parts_int8)
        for name, graph in self.parts.items():
            assert isinstance(graph, fx.GraphModule)
            use_flavour(graph, flavour)
            for path, quantizer in quantizers(graph).items():
                if name in self.parts_off:
                    quantizer._disabled = True
                elif name in parts_int8 and not quantizer._disabled and quantizer.amax is None:
                    raise UserError(f"part {name}: found no range for {path}, expected one; calibrate again")
        self._coarse()
        self.correct_background()

    @contextmanager
    def in_flavour(self, flavour: str, parts_int8: Sequence[str] = ()) -> Iterator[None]:
        """Inside the block the detector computes in another flavour."""
        before, extra = self.flavour, [n for n in self._off_in(self.flavour) if n not in self.parts_off]
        self.use(flavour, parts_int8)
        try:
            yield
        finally:
            self.use(before, extra)

    def _off_in(self, flavour: str) -> list[str]:
        return [name for name, flavours in self.off_in.items() if flavour in flavours and name in self.parts]

    def _coarse(self) -> None:
        """Inputs of layers whose biases hold corrections for s8's step keep that step where they are rounded from zero up."""
        for part, graph in self.parts.items():
            assert isinstance(graph, fx.GraphModule)
            for path, taken in backgrounds(graph).items() if self.absorbed else ():
                if (
                    f"{part}.{path}" in self.absorbed
                    and taken.quantizer is not None
                    and taken.quantizer.spec.levels == 255
                ):
                    taken.quantizer.spec = U8_COARSE

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
        """Quantizers of activations that have ranges of their own by `part.name`, those switched off too."""
        return {name: q for name, q in quantizers(self.parts).items() if not q.weights and q.shares is None}

    def equalizable(self) -> dict[str, list[str]]:
        """Quantizers by `part.name` whose channels can be equalized (`qat.lean.equalize`), with their consumers' paths."""
        found = {}
        for part, inventory in self.inventory.items():
            graph = self.parts[part]
            assert isinstance(graph, fx.GraphModule)
            if part in self.parts_off:  # its float form would have one more product
                continue
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
        self.correct_background()

    def correct_background(self) -> None:
        """Computes the corrections anew, where there are any, for weights, ranges and steps as they are now."""
        if self.background is None:
            return
        for part, graph in self.parts.items():
            assert isinstance(graph, fx.GraphModule)
            own = {name.partition(".")[2] for name in self.absorbed if name.partition(".")[0] == part}
            correct_backgrounds(graph, own)

    def absorb_background(self) -> None:
        """Makes the corrections of the layers that are INT8 now part of their biases, which may then be trained; `background`
        is "absorbed" if there were any."""
        if self.background is None:
            return
        self.background = "absorbed"
        found = set(self.absorbed)
        for part, graph in self.parts.items():
            assert isinstance(graph, fx.GraphModule)
            found |= {f"{part}.{path}" for path in absorb_backgrounds(graph)}
        self.absorbed = frozenset(found)

    def amax(self) -> dict[str, torch.Tensor]:
        """Every quantizer's range by its path; for those that have one of their own."""
        own = quantizers(self.parts)
        return {name: q.amax.detach().clone() for name, q in own.items() if q.shares is None and q.amax is not None}

    def ends(self) -> dict[str, torch.Tensor]:
        """The smallest and the largest value of each quantized tensor, float32[2] by its quantizer's path; of those that were
        observed."""
        own = quantizers(self.parts)
        return {name: torch.tensor(q.ends) for name, q in own.items() if q.ends is not None}

    def float_names(self) -> list[str]:
        """Paths of the quantizers that are off in every flavour."""
        return [name for name, quantizer in quantizers(self.parts).items() if quantizer.off]

    def weights(self) -> dict[str, torch.Tensor]:
        """The parts' parameters by path, as the parts compute with them (batch norm folded), without the quantizers'.

        (No buffers: those are the network's own, or constants of the trace, which torch names as it likes.)
        """
        own = quantizers(self.parts)
        named = self.parts.named_parameters(remove_duplicate=False)
        return {name: x.detach() for name, x in named if name.rpartition(".")[0] not in own}

    def load_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Sets what `weights` gave; ranges are left as they are.

        Raises:
            KeyError: the names are not this detector's. ValueError: a shape is not.
        """
        own = self.weights()
        if strange := set(weights) ^ set(own):
            raise KeyError(f"weights differ: {', '.join(sorted(strange)[:5])}")
        for name, tensor in own.items():
            if tensor.shape != weights[name].shape:
                raise ValueError(f"{name}: found shape {list(weights[name].shape)}, expected {list(tensor.shape)}")
            tensor.copy_(weights[name])

    def load_amax(
        self,
        amax: Mapping[str, torch.Tensor],
        disabled: Sequence[str],
        ends: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Sets ranges, and what is off in every flavour, as saved. One that is off needs no range (another tool's checkpoint
        has none for it).

        Raises:
            KeyError: the names are not this detector's, or one that is on has no range. ValueError: a range is not positive
                and finite, or has another shape.
        """
        own = quantizers(self.parts)
        if strange := sorted((set(amax) | set(disabled) | set(ends or ())) - set(own)):
            raise KeyError(f"found quantizers that the network lacks: {_few(strange)}")
        needed = {name for name, quantizer in own.items() if quantizer.shares is None}
        if without := sorted(needed - set(amax) - set(disabled)):
            raise KeyError(f"found no range (amax) for {len(without)} of {len(needed)} quantizers: {_few(without)}")
        for name, tensor in amax.items():
            before = own[name].amax  # of weights, already that of the weights themselves; others have none yet
            shape = [] if before is None else list(before.shape)
            if tensor.numel() != 1 and list(tensor.shape) != shape:
                raise ValueError(f"{name}: found a range of shape {list(tensor.shape)}, expected {shape}")
            if not bool(((tensor > 0) & tensor.isfinite()).all()):
                raise ValueError(f"{name}: found a range of {tensor.min().item():g}, expected finite values above 0")
        for name, tensor in (ends or {}).items():
            if tensor.numel() != 2 or not float(tensor[0]) <= float(tensor[1]):
                raise ValueError(f"{name}: found ends {tensor.tolist()}, expected the smallest and the largest value")
        for name, quantizer in own.items():
            assert isinstance(quantizer, Quantizer)
            if name in amax:
                quantizer.set_range(amax[name])
            if ends is not None and name in ends:
                quantizer.ends = (float(ends[name][0]), float(ends[name][1]))
            quantizer.off = name in disabled
        self.use(self.flavour)


def _few(names: Sequence[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (", …" if len(names) > count else "")


def quantize_detector(
    detector: CameraBEVDetector,
    keep_float: Sequence[FloatRule] = KEEP_FLOAT,
    parts_off: Mapping[str, Sequence[str]] = PARTS_OFF,
) -> QuantizedDetector:
    """Folds batch norm and places quantizers; ranges of activations are still to be calibrated.

    The float detector is left as it was (its unchanged layers are shared).
    """
    return QuantizedDetector(detector.eval(), keep_float, parts_off)
