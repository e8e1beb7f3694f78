"""TensorQuantizers that compute what a QDQ pair computes."""

from __future__ import annotations

import numpy as np
import torch
from pytorch_quantization.nn import TensorQuantizer
from pytorch_quantization.tensor_quant import QuantDescriptor
from torch import nn
from torch.nn import functional as F

BOUND = 127


def _round(x: torch.Tensor, amax: float) -> torch.Tensor:
    """`torch.fake_quantize_per_tensor_affine` bit for bit, without the mask that it makes for gradients: a quarter of
    its time."""
    scale = np.float32(amax / BOUND)
    return x.mul(float(np.float32(1) / scale)).round_().clamp_(-BOUND - 1, BOUND).mul_(float(scale))


def _round_learned(x: torch.Tensor, log2_range: torch.Tensor) -> torch.Tensor:
    """As `_round`, with a gradient for the scale (LSQ, Esser et al., ICLR 2020, arXiv 1902.08153, eq. 3 and its factor
    1/√(values · levels))."""
    scale = torch.exp2(log2_range).reshape(1) / BOUND
    factor = 1.0 / (x.numel() * BOUND) ** 0.5
    return torch._fake_quantize_learnable_per_tensor_affine(
        x, scale, torch.zeros_like(scale), -BOUND - 1, BOUND, factor
    )


class Quantizer(TensorQuantizer):
    """A TensorQuantizer that rounds to the whole s8 range [−128, 127] with scale amax/127, as ONNX's QuantizeLinear.

    (pytorch-quantization's own simulation saturates at −127, its export at −128; a simulation must equal its export.)
    """

    LEARNED = "log2_range"  # the parameter's name, while the range is learned
    # Steps that the range has on u8, [0, 255] from zero up, in place of s8; for tensors that are never negative.
    unsigned: int | None = None

    @property
    def steps(self) -> torch.Tensor:
        """One step of rounding: float32[1], or [channels]."""
        return self._amax.detach().flatten() / (self.unsigned or BOUND)

    def set_range(self, amax: torch.Tensor) -> None:
        """Sets the magnitude that 127 stands for: one value, or one for each channel with all dimensions kept.

        (The parent's `amax` property warns about every tensor that it is given.)
        """
        self._buffers.pop("_amax", None)
        self.register_buffer("_amax", amax.detach().clone())

    def learn_range(self) -> nn.Parameter:
        """Makes the range, one value, a parameter: log2 of the magnitude. Until `settle_range` it counts."""
        learned = nn.Parameter(self._amax.detach().log2())
        self.register_parameter(self.LEARNED, learned)
        return learned

    def settle_range(self) -> None:
        """The range is a plain one again, with the value that it has."""
        learned = self._parameters.pop(self.LEARNED, None)
        if learned is not None:
            self.set_range(learned.detach().exp2())

    def _quant_forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if inputs.dtype in (torch.bfloat16, torch.float16):
            inputs = inputs.float()  # under autocast: in half precision neighbouring steps of a scale fall together
        learned = self._parameters.get(self.LEARNED)
        if learned is not None:
            return _round_learned(inputs, learned)
        amax = self._amax
        if self.unsigned:
            return torch.fake_quantize_per_tensor_affine(inputs, amax.item() / self.unsigned, 0, 0, 255)
        if amax.numel() == 1:
            if not (torch.is_grad_enabled() or torch.jit.is_tracing()):
                return _round(inputs, amax.item())
            return torch.fake_quantize_per_tensor_affine(inputs, amax.item() / BOUND, 0, -BOUND - 1, BOUND)
        axis = next(i for i, size in enumerate(amax.shape) if size > 1)
        scale = amax.flatten() / BOUND
        return torch.fake_quantize_per_channel_affine(
            inputs, scale, torch.zeros(len(scale), dtype=torch.int32, device=scale.device), axis, -BOUND - 1, BOUND
        )


def input_quantizer() -> Quantizer:
    """One scale for the whole tensor; without a range yet."""
    quantizer = Quantizer(QuantDescriptor(num_bits=8))
    quantizer._calibrator = None
    return quantizer


def weight_axis(module: nn.Module) -> int:
    """The dimension of the weight that the output channels are on."""
    return 1 if isinstance(module, nn.ConvTranspose2d) else 0


def weight_range(module: nn.Module) -> torch.Tensor:
    """The largest magnitude of each output channel's weights, all dimensions kept."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    other = [d for d in range(weight.ndim) if d != weight_axis(module)]
    amax = weight.detach().abs().amax(dim=other, keepdim=True)
    # A channel of zeros has no range of its own: the floor keeps its scale above zero and its weights at zero.
    return torch.maximum(amax, amax.max().clamp(min=1e-6) * 2.0**-16)


def weight_quantizer(module: nn.Module) -> Quantizer:
    """One scale for each output channel, from the weights' largest magnitudes."""
    quantizer = Quantizer(QuantDescriptor(num_bits=8, axis=(weight_axis(module),)))
    quantizer._calibrator = None
    quantizer.set_range(weight_range(module))
    return quantizer


class QuantizedConv2d(nn.Conv2d):
    """A convolution whose weight passes `weight_quantizer`.

    background_shift: added to the bias while the weight is rounded (`qat.lean.background`), float32[out channels].
    """

    weight_quantizer: Quantizer
    background_shift: torch.Tensor | None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        bias = self.bias
        if self.background_shift is not None and not self.weight_quantizer._disabled:
            bias = self.background_shift if bias is None else bias + self.background_shift
        return self._conv_forward(input, self.weight_quantizer(self.weight), bias)


class QuantizedConvTranspose2d(nn.ConvTranspose2d):
    """A transposed convolution whose weight passes `weight_quantizer`."""

    weight_quantizer: Quantizer

    def forward(self, input: torch.Tensor, output_size: list[int] | None = None) -> torch.Tensor:
        return F.conv_transpose2d(
            input,
            self.weight_quantizer(self.weight),
            self.bias,
            self.stride,
            self.padding,  # type: ignore[arg-type]  # a transposed convolution's is never a word
            self.output_padding,
            self.groups,
            self.dilation,
        )


class QuantizedLinear(nn.Linear):
    """A linear layer whose weight passes `weight_quantizer`."""

    weight_quantizer: Quantizer

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.linear(input, self.weight_quantizer(self.weight), self.bias)


QUANTIZED: tuple[tuple[type[nn.Module], type[nn.Module]], ...] = (
    (nn.ConvTranspose2d, QuantizedConvTranspose2d),
    (nn.Conv2d, QuantizedConv2d),
    (nn.Linear, QuantizedLinear),
)


def quantized_layer(module: nn.Module) -> nn.Module:
    """A layer like `module`, sharing its parameters, with a quantizer on its weight."""
    for plain, quantized in QUANTIZED:
        if isinstance(module, plain):
            layer = quantized.__new__(quantized)
            layer.__dict__.update({k: v.copy() if isinstance(v, dict) else v for k, v in module.__dict__.items()})
            layer.weight_quantizer = weight_quantizer(module)
            if isinstance(layer, QuantizedConv2d):
                layer.register_buffer("background_shift", None, persistent=False)
            return layer
    raise TypeError(f"{type(module).__name__} has no quantized form")
