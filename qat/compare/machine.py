"""Facts about the machine, and PyTorch's share of it."""

from __future__ import annotations

from typing import Any

import torch

from qat.core import machine


def machine_facts(threads: int) -> dict[str, Any]:
    """`qat.core.machine.machine_facts`, with PyTorch's number of threads."""
    return machine.machine_facts(threads) | {"torch_threads": torch.get_num_threads()}
