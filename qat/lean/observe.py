"""Observes a calibration: every quantizer's tensor in the float network, and each layer's multiply-accumulates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from qat.lean.calibrators import HistogramCalibrator
from qat.lean.layers import MULTIPLIES, TRANSPOSED, WEIGHTED
from qat.lean.modes import quantizers
from qat.lean.quantizer import Quantizer

ALL_ZERO = 1e-6  # amax of a tensor that was zero on every frame: any positive scale works


@contextmanager
def observing(
    module: nn.Module, by_channel: Mapping[str, Any] | None = None
) -> Iterator[dict[str, HistogramCalibrator]]:
    """Inside the block the network computes in float and every activation quantizer records, in all flavours.

    by_channel: paths of quantizers that record each channel's largest magnitude and energy.
    """
    own = quantizers(module)
    before = {name: quantizer._disabled for name, quantizer in own.items()}
    calibrators = {}
    for name, quantizer in own.items():
        records = not quantizer.weights and quantizer.shares is None
        quantizer._disabled = not records
        quantizer._if_quant = False
        if records:
            calibrators[name] = quantizer._calibrator = HistogramCalibrator(name, name in (by_channel or ()))
            quantizer._if_calib = True
    try:
        yield calibrators
    finally:
        for name, quantizer in own.items():
            quantizer._disabled = before[name]
            quantizer._if_quant, quantizer._if_calib, quantizer._calibrator = True, False, None


def set_ranges(
    own: Mapping[str, Quantizer],
    calibrators: Mapping[str, HistogramCalibrator],
    methods: Mapping[str, str],
    percentile: float,
) -> list[str]:
    """Sets each observed quantizer's range; returns those whose tensor was zero throughout."""
    all_zero = []
    for name, calibrator in calibrators.items():
        amax = calibrator.compute_amax(methods[name], percentile)
        if amax < ALL_ZERO:
            all_zero.append(name)
        own[name].set_range(torch.tensor(max(amax, ALL_ZERO)))
        own[name].ends = (calibrator.least, calibrator.most)
    return all_zero


def layer_macs(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> int:
    """Multiply-accumulates of one call of a layer or product."""
    if isinstance(module, MULTIPLIES):
        return int(module.macs(inputs, output))
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    if isinstance(module, TRANSPOSED):
        return inputs[0].numel() // weight.shape[0] * weight.numel()
    return output.numel() // weight.shape[0] * weight.numel()


@contextmanager
def counting_macs(root: nn.Module, macs: dict[str, int]) -> Iterator[None]:
    """Inside the block, records the multiply-accumulates of everything under `root` that multiplies, by path: the sum over all
    calls in the last pass of its child of `root`.

    Counts layers with weights and products of two activations.
    """
    passes: dict[str, int] = {}
    seen: dict[str, int] = {}

    def begin(name: str) -> Callable[..., None]:
        def start(*_: object) -> None:
            passes[name] = passes.get(name, 0) + 1

        return start

    def hook(name: str, top: str) -> Callable[..., None]:
        def count(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            now = passes.get(top, 0)
            again = seen.get(name) == now and now > 0
            macs[name] = (macs[name] if again else 0) + layer_macs(module, inputs, output)
            seen[name] = now

        return count

    handles = [child.register_forward_pre_hook(begin(name)) for name, child in root.named_children()]
    for name, module in root.named_modules():
        if isinstance(module, (*WEIGHTED, *MULTIPLIES)):
            handles.append(module.register_forward_hook(hook(name, name.partition(".")[0])))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
