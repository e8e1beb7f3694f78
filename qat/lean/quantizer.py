"""TensorQuantizers that compute the same as a QDQ pair."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pytorch_quantization.nn import TensorQuantizer
from pytorch_quantization.tensor_quant import QuantDescriptor
from torch import nn
from torch.nn import functional as F

from qat.lean.layers import TRANSPOSED, Conv1d, Conv2d, Conv3d

BOUND = 127


@dataclass(frozen=True)
class Spec:
    """How a tensor is rounded to integers.

    low, high: the integers. levels: number of steps from zero to the range's magnitude (amax). zero_point: the integer for 0;
    None to fit the observed range [least, most]. per_channel: for a weight, one scale for each output channel instead of one
    for all.
    """

    low: int = -128
    high: int = 127
    levels: int = 127
    zero_point: int | None = 0
    per_channel: bool = True


S8 = Spec()
S8_TENSOR = Spec(per_channel=False)
U8 = Spec(0, 255, 255, 0)  # from zero up: twice as fine as s8
U8_COARSE = Spec(0, 255, 127, 0)  # from zero up, with s8's step
U8_AFFINE = Spec(0, 255, 255, None)  # from the smallest value to the largest


def _round(x: torch.Tensor, scale: float, spec: Spec) -> torch.Tensor:
    """`torch.fake_quantize_per_tensor_affine` with zero point 0, bit for bit, without its mask for gradients: four times as
    fast."""
    step = np.float32(scale)
    return x.mul(float(np.float32(1) / step)).round_().clamp_(spec.low, spec.high).mul_(float(step))


class Quantizer(TensorQuantizer):
    """A TensorQuantizer that rounds like ONNX's QuantizeLinear and DequantizeLinear, to the integers of `spec`.

    (pytorch-quantization's simulation saturates at −127, its export at −128; a simulation must equal its export.)

    spec: how it rounds now; a flavour sets it. flavours: names of those in which it rounds. role: the tensor's purpose
    (`qat.lean.placement.ROLES`). least: lower bound of the tensor for any input. off: float in every flavour.
    shares: another quantizer of the same tensor, whose range it uses. weights: it rounds a layer's weights.
    ends: the smallest and the largest value seen, None if not observed.
    """

    LEARNED = "log2_range"  # the parameter's name, while the range is learned
    spec: Spec = S8
    flavours: frozenset[str] = frozenset()
    role: str = "input"
    least: float = -float("inf")
    off: bool = False
    weights: bool = False
    ends: tuple[float, float] | None = None
    shares: Quantizer | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "shares":  # not a child: its state belongs to another module
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def amax(self) -> torch.Tensor | None:
        """Like `range`; None if none was set."""
        return getattr(self if self.shares is None else self.shares, "_amax", None)

    @amax.setter
    def amax(self, value: torch.Tensor) -> None:
        self.set_range(value)

    @property
    def range(self) -> torch.Tensor:
        """The magnitude that `spec.levels` steps reach: one value, or one for each channel with all dimensions kept.

        Raises:
            AttributeError: none was set.
        """
        amax = (self if self.shares is None else self.shares)._amax
        assert isinstance(amax, torch.Tensor)
        return amax

    @property
    def steps(self) -> torch.Tensor:
        """One step of rounding: float32[1], or [channels]."""
        return self.parameters_of_rounding()[0]

    def parameters_of_rounding(self) -> tuple[torch.Tensor, int]:
        """Scales, float32[1] or [channels], and the zero point."""
        amax, spec = self.range.detach(), self.spec
        if amax.numel() > 1:
            amax = amax.flatten() if spec.per_channel else amax.max()
        if spec.zero_point is not None:
            return (amax / spec.levels).reshape(-1), spec.zero_point
        owner = self if self.shares is None else self.shares
        most = float(amax)
        low, high = owner.ends or (-most, most)
        low, high = min(0.0, max(low, -most, self.least)), max(0.0, min(high, most))
        scale = torch.tensor([max(high - low, 1e-6) / (spec.high - spec.low)], dtype=torch.float32, device=amax.device)
        zero = int(np.clip(np.rint(spec.low - low / float(scale)), spec.low, spec.high))
        return scale, zero

    def set_range(self, amax: torch.Tensor) -> None:
        """Sets the magnitude that the range reaches: one value, or one for each channel with all dimensions kept.

        (The parent's `amax` property warns about every tensor that it is given.)
        """
        self._buffers.pop("_amax", None)
        self.register_buffer("_amax", amax.detach().clone())

    def learn_range(self) -> nn.Parameter:
        """Turns the range, one value, into a parameter: log2 of the magnitude. It is in use until `settle_range`."""
        learned = nn.Parameter(self._amax.detach().log2())
        self.register_parameter(self.LEARNED, learned)
        return learned

    def settle_range(self) -> None:
        """Turns the learned range back into a plain one, with its current value."""
        learned = self._parameters.pop(self.LEARNED, None)
        if learned is not None:
            self.set_range(learned.detach().exp2())

    def _quant_forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if inputs.dtype in (torch.bfloat16, torch.float16):
            inputs = inputs.float()  # under autocast: in half precision, adjacent steps of a scale would be equal
        spec = self.spec
        learned = self._parameters.get(self.LEARNED)
        if learned is not None:
            return self._learned(inputs, learned)
        scales, zero = self.parameters_of_rounding()
        if scales.numel() == 1:
            # In Python's double precision, as torch's operator and its exporter take it; from the range, so that no
            # precision is lost on the way.
            scale = self.range.max().item() / spec.levels if spec.zero_point is not None else scales.item()
            if zero == 0 and not (torch.is_grad_enabled() or torch.jit.is_tracing()):
                return _round(inputs, scale, spec)
            return torch.fake_quantize_per_tensor_affine(inputs, scale, zero, spec.low, spec.high)
        axis = next(i for i, size in enumerate(self.range.shape) if size > 1)
        zeros = torch.zeros(len(scales), dtype=torch.int32, device=scales.device)
        return torch.fake_quantize_per_channel_affine(inputs, scales, zeros, axis, spec.low, spec.high)

    def _learned(self, x: torch.Tensor, log2_range: torch.Tensor) -> torch.Tensor:
        """With a gradient for the scale (LSQ, Esser et al., ICLR 2020, arXiv 1902.08153, eq. 3 and its factor
        1/√(values · levels))."""
        spec = self.spec
        scale = torch.exp2(log2_range).reshape(1) / spec.levels
        factor = 1.0 / (x.numel() * spec.levels) ** 0.5
        zero = torch.full_like(scale, float(spec.zero_point or 0))
        return torch._fake_quantize_learnable_per_tensor_affine(x, scale, zero, spec.low, spec.high, factor)


def input_quantizer() -> Quantizer:
    """One scale for the whole tensor; without a range yet."""
    quantizer = Quantizer(QuantDescriptor(num_bits=8))
    quantizer._calibrator = None
    return quantizer


def weight_axis(module: nn.Module) -> int:
    """The dimension of the weight that the output channels are on."""
    return 1 if isinstance(module, TRANSPOSED) else 0


def weight_range(module: nn.Module) -> torch.Tensor:
    """The largest magnitude of each output channel's weights, all dimensions kept."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    other = [d for d in range(weight.ndim) if d != weight_axis(module)]
    amax = weight.detach().abs().amax(dim=other, keepdim=True)
    # A channel of zeros has no range: the floor keeps its scale above zero and its weights at zero.
    return torch.maximum(amax, amax.max().clamp(min=1e-6) * 2.0**-16)


def weight_quantizer(module: nn.Module) -> Quantizer:
    """One scale for each output channel, from the weights' largest magnitudes."""
    quantizer = Quantizer(QuantDescriptor(num_bits=8, axis=(weight_axis(module),)))
    quantizer._calibrator = None
    quantizer.weights = True
    quantizer.set_range(weight_range(module))
    return quantizer


class _Rounded:
    """A convolution whose weight goes through `weight_quantizer`.

    background_shift: added to the bias while the weight is rounded (`qat.lean.background`), float32[out channels].
    """

    weight_quantizer: Quantizer
    background_shift: torch.Tensor | None

    def forward(self: Any, input: torch.Tensor) -> torch.Tensor:
        bias: torch.Tensor | None = self.bias
        if self.background_shift is not None and not self.weight_quantizer._disabled:
            bias = self.background_shift if bias is None else bias + self.background_shift
        weight = self.weight_quantizer(self.weight)
        result: torch.Tensor = self._conv_forward(self.padded(input), weight, bias)
        return result


class QuantizedConv1d(_Rounded, Conv1d):
    """`_Rounded`, of one dimension."""


class QuantizedConv2d(_Rounded, Conv2d):
    """`_Rounded`, of two dimensions."""


class QuantizedConv3d(_Rounded, Conv3d):
    """`_Rounded`, of three dimensions."""


class _RoundedTranspose:
    """A transposed convolution whose weight passes `weight_quantizer`."""

    weight_quantizer: Quantizer

    def forward(self: Any, input: torch.Tensor, output_size: list[int] | None = None) -> torch.Tensor:
        function: Any = {3: F.conv_transpose1d, 4: F.conv_transpose2d, 5: F.conv_transpose3d}[self.weight.ndim]
        weight = self.weight_quantizer(self.weight)
        form = self.stride, self.padding, self.output_padding, self.groups, self.dilation
        result: torch.Tensor = function(input, weight, self.bias, *form)
        return result


class QuantizedConvTranspose1d(_RoundedTranspose, nn.ConvTranspose1d):
    """`_RoundedTranspose`, of one dimension."""


class QuantizedConvTranspose2d(_RoundedTranspose, nn.ConvTranspose2d):
    """`_RoundedTranspose`, of two dimensions."""


class QuantizedConvTranspose3d(_RoundedTranspose, nn.ConvTranspose3d):
    """`_RoundedTranspose`, of three dimensions."""


class QuantizedLinear(nn.Linear):
    """A linear layer whose weight passes `weight_quantizer`."""

    weight_quantizer: Quantizer

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.linear(input, self.weight_quantizer(self.weight), self.bias)


QUANTIZED: tuple[tuple[type[nn.Module], type[nn.Module]], ...] = (
    (nn.ConvTranspose1d, QuantizedConvTranspose1d),
    (nn.ConvTranspose2d, QuantizedConvTranspose2d),
    (nn.ConvTranspose3d, QuantizedConvTranspose3d),
    (nn.Conv1d, QuantizedConv1d),
    (nn.Conv2d, QuantizedConv2d),
    (nn.Conv3d, QuantizedConv3d),
    (nn.Linear, QuantizedLinear),
)


def quantized_layer(module: nn.Module) -> nn.Module:
    """A layer like `module`, sharing its parameters, with a quantizer on its weight."""
    for plain, quantized in QUANTIZED:
        if isinstance(module, plain):
            layer = quantized.__new__(quantized)
            layer.__dict__.update({k: v.copy() if isinstance(v, dict) else v for k, v in module.__dict__.items()})
            layer.weight_quantizer = weight_quantizer(module)
            if isinstance(layer, _Rounded):
                layer.register_buffer("background_shift", None, persistent=False)
            return layer
    raise TypeError(f"{type(module).__name__} has no quantized form")
