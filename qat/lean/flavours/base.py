"""What a flavour says."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from qat.lean.quantizer import S8, Spec


@dataclass(frozen=True)
class Flavour:
    """A policy; subclasses say how sites are rounded.

    roles: in which a tensor is rounded. passes: names of the passes over the ONNX graph, in order. integer_weights: weights
    and biases are stored as integers.
    """

    name: str
    roles: frozenset[str]
    passes: tuple[str, ...] = ()

    def activation(self, least: float) -> Spec:
        """How a tensor is rounded that never goes below `least`."""
        return S8

    def weight(self, layer: nn.Module) -> Spec:
        """How a layer's weights are rounded."""
        return S8
