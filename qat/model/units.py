"""The units of a quantized detector, each of which can be INT8 or float independently.

A unit is one activation quantizer with the weights of every layer that it feeds: a layer is INT8 only when both its
input and its weights are, and consumers of one tensor share its quantizer. Units do not overlap, and together they are
everything that is quantized.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import fx

from qat.lean.modes import quantizers
from qat.lean.quantizer import Quantizer
from qat.model.quantized import QuantizedModel

UNIT_ROLES = ("input", "identity", "add", "concat")


@dataclass(frozen=True)
class Unit:
    """name: `part.quantizer`. quantizers: their paths under the detector's `parts`. layers: `part.path` of the INT8
    layers that it feeds; empty for a unit that only feeds an add."""

    name: str
    part: str
    quantizers: tuple[str, ...]
    layers: tuple[str, ...]


def units(model: QuantizedModel) -> list[Unit]:
    """The units that are on in the model's flavour, in order of execution; quantizers of outputs belong to none."""
    found = []
    for part, inventory in model.inventory.items():
        if part in model.parts_off:
            continue
        graph = model.parts[part]
        assert isinstance(graph, fx.GraphModule)
        fed: dict[str, list[str]] = {}
        for name in inventory.quantizers:
            quantizer = graph.get_submodule(name)
            assert isinstance(quantizer, Quantizer)
            if quantizer.role in UNIT_ROLES and not quantizer._disabled:
                fed[name] = []
        for node in graph.graph.nodes:
            if node.op == "call_module" and node.target in inventory.quantized:
                layer = f"{part}.{node.target}"
                source = node.args[0]
                assert isinstance(source, fx.Node)
                if layer not in fed.get(str(source.target), [layer]):
                    fed[str(source.target)].append(layer)
        for name, layers in fed.items():
            weights = [f"{layer}.weight_quantizer" for layer in layers]
            found.append(Unit(f"{part}.{name}", part, (f"{part}.{name}", *weights), tuple(layers)))
    return found


@contextmanager
def only_on(model: QuantizedModel, chosen: Sequence[Unit]) -> Iterator[None]:
    """Inside the block these units are INT8 and everything else is float."""
    own = quantizers(model.parts)
    before = {name: quantizer._disabled for name, quantizer in own.items()}
    on = {name for unit in chosen for name in unit.quantizers}
    for name, quantizer in own.items():
        quantizer._disabled = name not in on
    try:
        yield
    finally:
        for name, quantizer in own.items():
            quantizer._disabled = before[name]
