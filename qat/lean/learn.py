"""Training of a quantized network: weights' scales that follow the weights, and scales that are learned.

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
    """Sets every weight's scales from the weights as they are now, so that the two never disagree.

    The weights of a layer whose quantizer is off have their ranges refreshed too: another flavour may switch it on.
    """
    for module in model.parts.modules():
        if isinstance(module, _LAYERS):
            quantizer = module.weight_quantizer
            assert isinstance(quantizer, Quantizer)
            quantizer.set_range(weight_range(module))


def learn_ranges(model: QuantizedModel) -> dict[str, nn.Parameter]:
    """Makes the ranges of the activation quantizers that are on parameters: log2 of the magnitude, by quantizer path.

    In the logarithm a step of Adam is a relative change, whatever the tensor's magnitude, and a range stays positive
    (TQT, Jain et al., MLSys 2020, arXiv 1903.08066).
    """
    learned = {}
    for name, quantizer in model.activation_quantizers().items():
        assert isinstance(quantizer, Quantizer)
        if not quantizer._disabled:
            learned[name] = quantizer.learn_range()
    return learned


def settle_ranges(model: QuantizedModel) -> None:
    """Ranges that were learned become plain ranges again, with the values that they have."""
    for quantizer in quantizers(model.parts).values():
        assert isinstance(quantizer, Quantizer)
        quantizer.settle_range()


def trained_parameters(model: QuantizedModel) -> dict[str, nn.Parameter]:
    """All weights and biases of the parts by path, those of layers that stay float too; not ranges that are learned.

    From here on they want gradients: a bias that folding a batch norm made does not by itself.
    """
    found = {name: p for name, p in model.parts.named_parameters() if not name.endswith(f".{Quantizer.LEARNED}")}
    for parameter in found.values():
        parameter.requires_grad_(True)
    return found
