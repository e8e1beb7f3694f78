"""Training of a quantized network: weights' scales that follow the weights, and learned scales.

Rounding passes its gradient on unchanged inside the range and stops it outside (the straight-through estimator, Bengio
et al. 2013, arXiv 1308.3432): torch's own fake-quantize operators do so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from qat.lean.modes import quantizers
from qat.lean.quantizer import QUANTIZED, Quantizer, weight_range

if TYPE_CHECKING:
    from qat.model.quantized import QuantizedModel

_LAYERS = tuple(quantized for _, quantized in QUANTIZED)


def refresh_weight_ranges(model: QuantizedModel) -> None:
    """Sets every weight's scales from the current weights, so that the two always agree.

    The weights of a layer whose quantizer is off have their ranges refreshed too: another flavour may switch it on.
    """
    for module in model.parts.modules():
        if isinstance(module, _LAYERS):
            quantizer = module.weight_quantizer
            assert isinstance(quantizer, Quantizer)
            quantizer.set_range(weight_range(module))


def learn_ranges(model: QuantizedModel) -> dict[str, nn.Parameter]:
    """Turns the ranges of active activation quantizers into parameters: log2 of the magnitude, by quantizer path.

    With the logarithm, a step of Adam is a relative change, whatever the tensor's magnitude, and ranges stay positive
    (TQT, Jain et al., MLSys 2020, arXiv 1903.08066).
    """
    learned = {}
    for name, quantizer in model.activation_quantizers().items():
        assert isinstance(quantizer, Quantizer)
        if not quantizer._disabled:
            learned[name] = quantizer.learn_range()
    return learned


def settle_ranges(model: QuantizedModel) -> None:
    """Turns learned ranges back into plain ranges, with their current values."""
    for quantizer in quantizers(model.parts).values():
        assert isinstance(quantizer, Quantizer)
        quantizer.settle_range()


def trained_parameters(model: QuantizedModel) -> dict[str, nn.Parameter]:
    """All weights and biases of the parts by path, including those of layers that stay float, but not learned ranges.

    Enables their gradients, which a bias made by folding a batch norm lacks.
    """
    found = {name: p for name, p in model.parts.named_parameters() if not name.endswith(f".{Quantizer.LEARNED}")}
    for parameter in found.values():
        parameter.requires_grad_(True)
    return found
