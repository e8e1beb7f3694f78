"""The layers of a canonical graph: torch's, and the others that a traced network needs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class _Padded:
    """pad: zeros added before the convolution, as in `F.pad`; None for only those of `padding`.

    (Asymmetric padding, such as SAME's, belongs to the layer: a Pad in the graph would be between the quantizer and the
    convolution, and engines could not fuse them.)
    """

    pad: tuple[int, ...] | None = None

    def padded(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.pad is None else F.pad(x, self.pad)


class Conv1d(_Padded, nn.Conv1d):
    """[B,Cin,L] → [B,Cout,L']."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(self.padded(input), self.weight, self.bias)


class Conv2d(_Padded, nn.Conv2d):
    """[B,Cin,H,W] → [B,Cout,H',W']."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(self.padded(input), self.weight, self.bias)


class Conv3d(_Padded, nn.Conv3d):
    """[B,Cin,D,H,W] → [B,Cout,D',H',W']."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(self.padded(input), self.weight, self.bias)


ConvTranspose1d, ConvTranspose2d, ConvTranspose3d = nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d
Linear = nn.Linear

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
WEIGHTED = (*CONVOLUTIONS, nn.Linear)


class Product(nn.Module):
    """The matrix product of two tensors: [..., n, k] · [..., k, m] → [..., n, m]."""

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.matmul(a, b)

    @staticmethod
    def macs(inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> int:
        """Multiply-accumulates of a call."""
        return output.numel() * inputs[0].shape[-1]


class Einsum(nn.Module):
    """torch.einsum with a fixed equation."""

    def __init__(self, equation: str) -> None:
        super().__init__()
        self.equation = equation

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        return torch.einsum(self.equation, *tensors)

    def macs(self, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> int:
        """Multiply-accumulates of a call: one for each combination of all indices."""
        terms = self.equation.replace(" ", "").split("->")[0].split(",")
        sizes: dict[str, int] = {}
        for term, tensor in zip(terms, inputs, strict=True):
            letters = [c for c in term if c.isalpha()]
            if "..." in term:
                sizes[f"...{len(sizes)}"] = math.prod(tensor.shape[: tensor.ndim - len(letters)])
            sizes.update(zip(letters, tensor.shape[tensor.ndim - len(letters) :], strict=True))
        return math.prod(sizes.values())


class DynamicConvolution(nn.Module):
    """A convolution or linear layer whose weight is computed from the input.

    function: of torch.ops.aten. options: its arguments except input, weight and bias.
    """

    def __init__(self, function: Any, options: Mapping[str, Any]) -> None:
        super().__init__()
        self.function, self.options = function, dict(options)

    def forward(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return self.function(input, weight, bias, **self.options)

    @staticmethod
    def macs(inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> int:
        """Multiply-accumulates of a call."""
        return output.numel() * inputs[1][0].numel()


class ScaleShift(nn.Module):
    """A batch norm at inference: y = x·scale + shift, one of each for every channel (dimension 1).

    It keeps the original statistics, for folding into a convolution (`qat.lean.fold`).
    """

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(
        self,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        mean: torch.Tensor,
        variance: torch.Tensor,
        eps: float,
    ) -> None:
        super().__init__()
        weight = torch.ones_like(mean) if weight is None else weight
        bias = torch.zeros_like(mean) if bias is None else bias
        self.statistics = tuple(value.detach() for value in (weight, bias, mean, variance))
        self.eps = eps
        scale = self.statistics[0] * torch.rsqrt(self.statistics[3] + eps)
        self.scale = nn.Parameter(scale)
        self.shift = nn.Parameter(self.statistics[1] - self.statistics[2] * scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = (1, -1) + (1,) * (x.ndim - 2)
        return x * self.scale.reshape(shape) + self.shift.reshape(shape)


MULTIPLIES = (Product, Einsum, DynamicConvolution)  # two tensors, neither of them constant
