"""Temporary states of a module's TensorQuantizers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from pytorch_quantization.nn import TensorQuantizer
from torch import nn

from qat.lean.quantizer import BOUND


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
def recording_scales(module: nn.Module) -> Iterator[list[np.ndarray]]:
    """Inside the block, every call of a quantizer that is on appends its scales, float32[1] or float32[channels]."""
    scales: list[np.ndarray] = []

    def record(quantizer: nn.Module, *_: object) -> None:
        if not quantizer._disabled:
            scales.append((quantizer._amax.detach().flatten() / BOUND).cpu().numpy())  # type: ignore[operator]

    handles = [quantizer.register_forward_hook(record) for quantizer in quantizers(module).values()]
    try:
        yield scales
    finally:
        for handle in handles:
            handle.remove()
