"""The interface of a flavour."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from qat.lean.quantizer import S8, U8, U8_AFFINE, Spec


@dataclass(frozen=True)
class Flavour:
    """A policy; subclasses define how sites are rounded.

    roles: in which a tensor is rounded. passes: names of the passes over the ONNX graph, in order. conv1d: whether the
    backend has INT8 convolutions in one dimension.
    """

    name: str
    roles: frozenset[str]
    passes: tuple[str, ...] = ()
    conv1d: bool = False

    def activation(self, least: float) -> Spec:
        """How a tensor that never goes below `least` is rounded."""
        return S8

    def weight(self, layer: nn.Module) -> Spec:
        """How a layer's weights are rounded."""
        return S8


@dataclass(frozen=True)
class UnsignedFlavour(Flavour):
    """Activations in u8: from zero up if no value is negative, otherwise from the smallest to the largest value.

    In one dimension ONNX Runtime takes 0.35 of the float convolution's time, OpenVINO 0.4 (256 channels, 1024 places).
    """

    conv1d: bool = True

    def activation(self, least: float) -> Spec:
        return U8 if least >= 0 else U8_AFFINE
