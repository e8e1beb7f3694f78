"""What a quantized network is: traced with torch.fx, BN folded, TensorQuantizers placed by rules, calibrated.

trace        a detector's parts as fx graphs that keep the module paths
fold         batch norm into the convolution before it
rules/       where quantizers go, one rule a file; `placement` is what they speak to
insert       quantizers into the graph, weights' quantizers into the layers
calibrators  histograms and the searches for a range
detector     the quantized detector, with the float one's interface
"""

from qat.lean.calibrators import METHODS
from qat.lean.detector import AUTO, QuantizedDetector, auto_methods, quantize_detector
from qat.lean.insert import Inventory, quantize_graph

__all__ = ["AUTO", "METHODS", "Inventory", "QuantizedDetector", "auto_methods", "quantize_detector", "quantize_graph"]
