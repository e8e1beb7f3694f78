"""Quantized networks: traced, BN folded, TensorQuantizers placed by rules, calibrated.

module       `quantize`: turns any module into its calibrated simulation
trace        a network as a graph with its module paths; `canonical` writes each operation in one form
fold         batch norm into the layer before it
rules/       where quantizers go, one rule a file; `placement` is their interface
flavours/    what is rounded for each backend, and how; one flavour a file
insert       quantizers into the graph, weights' quantizers into the layers
calibrators  histograms and the searches for a range
"""

from qat.lean import _torchvision  # noqa: F401  isort: skip  (before anything that imports torchvision)
from qat.lean.calibrators import METHODS
from qat.lean.insert import Inventory, quantize_graph
from qat.lean.module import QuantizedModule, quantize

__all__ = [
    "METHODS",
    "Inventory",
    "QuantizedModule",
    "quantize",
    "quantize_graph",
]
