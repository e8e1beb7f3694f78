"""Which form of an operator answers a call: numba on the CPU, or torch where a graph is traced or the tensors are on a GPU."""

from __future__ import annotations

import torch

from qat.core.errors import UserError


def traced() -> bool:
    """Whether torch.export, torch.compile or the TorchScript exporter is looking."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def plain(*tensors: torch.Tensor) -> bool:
    """Whether numba may read the tensors where they are: on the CPU, and nothing is traced."""
    return not traced() and all(tensor.device.type == "cpu" for tensor in tensors)


def untraced(operator: str) -> None:
    """For operators whose output's size depends on values, or that read tensors on the host: they are in no graph."""
    if traced():
        raise UserError(
            f"mmcv's operator {operator} cannot be exported: its result is computed on the host. Export the part of the model "
            "before it"
        )
