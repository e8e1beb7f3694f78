"""mmcv's deformable convolutions (DCN, and DCNv2 with a mask) in plain torch: grid_sample, then a matrix product.

The samples' positions come in pixels; grid_sample's align_corners=False and zeros are mmcv's bilinear reading, outside the
picture included. Gradients are those of the same expression.

Shapes: input [B,C,H,W], weight [O,C/groups,kH,kW], offset [B,G·kH·kW·2,h,w] of y and x, mask [B,G·kH·kW,h,w], output [B,O,h,w].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F


class _Geometry(NamedTuple):
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    offset_groups: int


def deform_conv_forward(
    input: torch.Tensor,
    weight: torch.Tensor,
    offset: torch.Tensor,
    output: torch.Tensor,
    columns: torch.Tensor,
    ones: torch.Tensor,
    **sizes: int,
) -> None:
    """Writes the convolution."""
    output.copy_(_convolved(input, offset, None, weight, _geometry(sizes)))


def deform_conv_backward_input(
    input: torch.Tensor,
    offset: torch.Tensor,
    grad_output: torch.Tensor,
    grad_input: torch.Tensor,
    grad_offset: torch.Tensor,
    weight: torch.Tensor,
    columns: torch.Tensor,
    **sizes: int,
) -> None:
    """Writes the gradients of input and offset."""
    with torch.enable_grad():
        leaves = input, offset = _leaves(input, offset)
        found = _convolved(input, offset, None, weight, _geometry(sizes))
    for out, gradient in zip((grad_input, grad_offset), torch.autograd.grad(found, leaves, grad_output), strict=True):
        out.copy_(gradient)


def deform_conv_backward_parameters(
    input: torch.Tensor,
    offset: torch.Tensor,
    grad_output: torch.Tensor,
    grad_weight: torch.Tensor,
    columns: torch.Tensor,
    ones: torch.Tensor,
    *,
    scale: float,
    **sizes: int,
) -> None:
    """Adds the gradient of the weight, times scale."""
    with torch.enable_grad():
        weight = torch.zeros_like(grad_weight).requires_grad_()  # any weight: the convolution is linear in it
        found = _convolved(input, offset, None, weight, _geometry(sizes))
    grad_weight.add_(torch.autograd.grad(found, weight, grad_output)[0], alpha=scale)


def modulated_deform_conv_forward(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    ones: torch.Tensor,
    offset: torch.Tensor,
    mask: torch.Tensor,
    output: torch.Tensor,
    columns: torch.Tensor,
    *,
    with_bias: bool,
    **sizes: int,
) -> None:
    """Writes the convolution of samples times their mask, plus bias [O] if there is one."""
    found = _convolved(input, offset, mask, weight, _geometry(sizes))
    output.copy_(found + bias[:, None, None] if with_bias else found)


def modulated_deform_conv_backward(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    ones: torch.Tensor,
    offset: torch.Tensor,
    mask: torch.Tensor,
    columns: torch.Tensor,
    grad_input: torch.Tensor,
    grad_weight: torch.Tensor,
    grad_bias: torch.Tensor,
    grad_offset: torch.Tensor,
    grad_mask: torch.Tensor,
    grad_output: torch.Tensor,
    *,
    with_bias: bool,
    **sizes: int,
) -> None:
    """Writes the gradients of everything that goes in."""
    with torch.enable_grad():
        leaves = input, offset, mask, weight = _leaves(input, offset, mask, weight)
        found = _convolved(input, offset, mask, weight, _geometry(sizes))
    gradients = torch.autograd.grad(found, leaves, grad_output)
    for out, gradient in zip((grad_input, grad_offset, grad_mask, grad_weight), gradients, strict=True):
        out.copy_(gradient)
    if with_bias:
        grad_bias.copy_(grad_output.sum((0, 2, 3)))


def _geometry(sizes: dict[str, int]) -> _Geometry:
    """mmcv spells the same sizes in two ways."""
    if "dH" in sizes:
        stride, padding, dilation = ((sizes[f"{name}H"], sizes[f"{name}W"]) for name in ("d", "pad", "dilation"))
    else:
        stride, padding, dilation = ((sizes[f"{name}_h"], sizes[f"{name}_w"]) for name in ("stride", "pad", "dilation"))
    return _Geometry(stride, padding, dilation, sizes["group"], sizes["deformable_group"])


def _leaves(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.detach().requires_grad_() for tensor in tensors]


def _convolved(
    input: torch.Tensor, offset: torch.Tensor, mask: torch.Tensor | None, weight: torch.Tensor, geometry: _Geometry
) -> torch.Tensor:
    stride, padding, dilation, groups, offset_groups = geometry
    batch, channels, height, width = input.shape
    rows, columns = weight.shape[2:]
    taps, (high, wide) = rows * columns, offset.shape[2:]

    exact = torch.promote_types(input.dtype, torch.float32)  # half has no room for a position's fraction

    def steps(count: int, size: int) -> torch.Tensor:
        return torch.arange(count, dtype=exact, device=input.device) * size

    tap_y, tap_x = steps(rows, dilation[0]).repeat_interleave(columns), steps(columns, dilation[1]).repeat(rows)
    from_y, from_x = steps(high, stride[0])[:, None] - padding[0], steps(wide, stride[1]) - padding[1]
    shift = offset.reshape(batch * offset_groups, taps, 2, high, wide)
    y = shift[:, :, 0] + tap_y[:, None, None] + from_y
    x = shift[:, :, 1] + tap_x[:, None, None] + from_x
    samples = F.grid_sample(
        input.to(exact).reshape(batch * offset_groups, channels // offset_groups, height, width),
        torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], -1).flatten(1, 2),
        padding_mode="zeros",
        align_corners=False,
    )
    samples = samples.to(input.dtype).reshape(batch, offset_groups, channels // offset_groups, taps, high, wide)
    if mask is not None:
        samples = samples * mask.reshape(batch, offset_groups, 1, taps, high, wide)
    samples = samples.reshape(batch, groups, channels // groups * taps, high * wide)
    kernels = weight.reshape(groups, weight.shape[0] // groups, channels // groups * taps)
    return torch.matmul(kernels, samples).reshape(batch, weight.shape[0], high, wide)
