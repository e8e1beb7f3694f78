"""Temporary states of a module's TensorQuantizers."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from pytorch_quantization.nn import TensorQuantizer
from torch import nn

from qat.core.errors import UserError
from qat.lean.background import on_unsigned
from qat.lean.quantizer import BOUND, Quantizer

SEVEN_BIT_BOUND = 63


def quantizers(module: nn.Module) -> dict[str, TensorQuantizer]:
    """The module's TensorQuantizers by their path, those switched off too."""
    return {name: child for name, child in module.named_modules() if isinstance(child, TensorQuantizer)}


@contextmanager
def quantizers_off(module: nn.Module) -> Iterator[None]:
    """Inside the block the module computes in float, as if it had no quantizers."""
    before = {quantizer: quantizer._disabled for quantizer in quantizers(module).values()}
    for quantizer in before:
        quantizer._disabled = True
    try:
        yield
    finally:
        for quantizer, state in before.items():
            quantizer._disabled = state


@contextmanager
def qdq_tracing() -> Iterator[None]:
    """Inside the block TensorQuantizers call torch's own fake-quantize operators, which the ONNX exporter knows.

    The switch is global to pytorch-quantization (a class attribute), hence the block.
    """
    before = TensorQuantizer.use_fb_fake_quant
    TensorQuantizer.use_fb_fake_quant = True
    try:
        yield
    finally:
        TensorQuantizer.use_fb_fake_quant = before


@contextmanager
def watched_on(detector: Any) -> Iterator[None]:
    """Inside the block a QuantizedDetector's watched quantizers round too: those of convolutions before residual adds.

    They are calibrated with the others, and are part of the `onnxruntime` flavour alone. That of a convolution which was
    left float stays off, and so does one without a range (of a checkpoint from elsewhere).
    """
    changed = []
    for name, inventory in detector.inventory.items():
        if name in detector.parts_off:
            continue
        graph = detector.parts[name]
        rounded = {node.target: node.args[0] for node in graph.graph.nodes if node.op == "call_module"}
        for watched in inventory.watched:
            layer = graph.get_submodule(str(rounded[watched].target))
            quantizer = graph.get_submodule(watched)
            if layer.weight_quantizer._disabled or quantizer.amax is None:
                continue
            changed.append((quantizer, quantizer._disabled))
            quantizer._disabled = False
    try:
        yield
    finally:
        for quantizer, state in changed:
            quantizer._disabled = state


@contextmanager
def parts_on(detector: Any, names: Collection[str]) -> Iterator[None]:
    """Inside the block, parts of a QuantizedDetector that were left off as a whole (`parts_off`) are quantized.

    Their ranges were calibrated with the others. Watched quantizers stay off: they are `watched_on`'s.

    Raises:
        UserError: a part has quantizers without a range.
    """
    changed = []
    for name in names:
        watched = set(detector.inventory[name].watched)
        for path, quantizer in quantizers(detector.parts[name]).items():
            if path in watched or not quantizer._disabled:
                continue
            if quantizer.amax is None:
                raise UserError(f"part {name}: found no range for {path}, expected one; calibrate again")
            changed.append(quantizer)
            quantizer._disabled = False
    before = detector.parts_off
    detector.parts_off = tuple(name for name in before if name not in names)
    try:
        yield
    finally:
        detector.parts_off = before
        for quantizer in changed:
            quantizer._disabled = True


@contextmanager
def unsigned_background(detector: Any) -> Iterator[None]:
    """Inside the block a QuantizedDetector whose biases are corrected for the depth map's background rounds it to u8, and is
    corrected for that (`qat.lean.background`). Nothing changes in one that is not: its exports to u8 need not keep a step."""
    if detector.background is None:
        yield
        return
    with on_unsigned(detector.parts.values(), 255 if detector.background == "corrected" else 127):
        yield


@contextmanager
def seven_bit_weights(module: nn.Module) -> Iterator[None]:
    """Inside the block weights are rounded to [−63, 63]: s8 over twice the range.

    A CPU without VNNI adds pairs of u8·s8 products in 16 bits: 2 · 255 · 63 is below 2¹⁵, 2 · 255 · 127 is not.
    """
    before: list[tuple[Quantizer, torch.Tensor]] = []
    for layer in module.modules():
        quantizer, weight = getattr(layer, "weight_quantizer", None), getattr(layer, "weight", None)
        if not isinstance(quantizer, Quantizer) or not isinstance(weight, torch.Tensor):
            continue
        amax = quantizer._amax
        before.append((quantizer, amax))
        others = [d for d in range(weight.ndim) if amax.shape[d] == 1]
        largest = weight.detach().abs().amax(others, keepdim=True)  # training may have left it above the range
        quantizer.set_range(torch.maximum(amax, largest) * (BOUND / SEVEN_BIT_BOUND))
    try:
        yield
    finally:
        for quantizer, amax in before:
            quantizer.set_range(amax)


@contextmanager
def recording_scales(module: nn.Module) -> Iterator[list[np.ndarray]]:
    """Inside the block, every call of a quantizer that is on appends its scales, float32[1] or float32[channels]."""
    scales: list[np.ndarray] = []

    def record(quantizer: nn.Module, *_: object) -> None:
        if not quantizer._disabled:
            assert isinstance(quantizer, Quantizer)
            scales.append(quantizer.steps.cpu().numpy())

    handles = [quantizer.register_forward_hook(record) for quantizer in quantizers(module).values()]
    try:
        yield scales
    finally:
        for handle in handles:
            handle.remove()
