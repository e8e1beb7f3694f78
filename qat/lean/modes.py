"""Temporary states of a module's TensorQuantizers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from pytorch_quantization.nn import TensorQuantizer
from torch import nn

from qat.lean.quantizer import BOUND, Quantizer

SEVEN_BIT_BOUND = 63


def quantizers(module: nn.Module) -> dict[str, Quantizer]:
    """The module's quantizers by path, including those that are off."""
    return {name: child for name, child in module.named_modules() if isinstance(child, Quantizer)}


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
    """Inside the block TensorQuantizers call torch's fake-quantize operators, which the ONNX exporter supports.

    The switch is global to pytorch-quantization (a class attribute), hence the block.
    """
    before = TensorQuantizer.use_fb_fake_quant
    TensorQuantizer.use_fb_fake_quant = True
    try:
        yield
    finally:
        TensorQuantizer.use_fb_fake_quant = before


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
        largest = weight.detach().abs().amax(others, keepdim=True)  # training may have moved it above the range
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
