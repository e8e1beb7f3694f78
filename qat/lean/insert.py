"""Puts quantizers into a traced graph where the rules asked for them."""

from __future__ import annotations

import re
from collections.abc import Container, Sequence
from dataclasses import dataclass, field

from torch import fx

from qat.lean import rules  # noqa: F401  (importing registers them)
from qat.lean.placement import RULES, FloatRule, Kept, Placement
from qat.lean.quantizer import input_quantizer, quantized_layer
from qat.lean.trace import replace_module, submodule


@dataclass
class Inventory:
    """What was done to one graph.

    quantizers: activation quantizer name → names of the tensors (fx nodes) that it rounds. quantized: paths of the
    layers with INT8 weights. kept: path of each layer left float → the rule and the reason. watched: quantizer names that are
    calibrated and switched off.
    """

    quantizers: dict[str, list[str]] = field(default_factory=dict)
    quantized: list[str] = field(default_factory=list)
    kept: dict[str, Kept] = field(default_factory=dict)
    watched: list[str] = field(default_factory=list)


def _name(node: fx.Node, taken: Container[str]) -> str:
    """A name after the module that made the tensor. One that is called again (a block's only ReLU) makes another
    tensor, whose quantizer is another: `…_1`."""
    base = "quant_" + re.sub(r"\W", "_", str(node.target) if node.op == "call_module" else node.name)
    name, count = base, 0
    while name in taken:
        count += 1
        name = f"{base}_{count}"
    return name


def quantize_graph(graph: fx.GraphModule, keep_float: Sequence[FloatRule] = ()) -> Inventory:
    """Places quantizers in `graph`, in place: activation quantizers as modules `quant_…` named after the first tensor
    of their group, weight quantizers as `…weight_quantizer` inside their layers."""
    placement = Placement(graph, keep_float)
    for rule in RULES.values():
        rule(placement)
    inventory = Inventory(kept=placement.kept)
    names: dict[fx.Node, str] = {}
    for tensor, consumers in placement.requests.items():
        group = placement.group(tensor)
        if group not in names:
            names[group] = _name(group, names.values())
            graph.add_submodule(names[group], input_quantizer())
        inventory.quantizers.setdefault(names[group], []).append(tensor.name)
        with graph.graph.inserting_after(tensor):
            rounded = graph.graph.call_module(names[group], (tensor,))
        for consumer in consumers:
            consumer.replace_input_with(tensor, rounded)
    for tensor in placement.watched:
        # Beside the graph's way: its value is used by the output only through the statistics it leaves.
        name = _name(tensor, ()) + "_output"
        quantizer = input_quantizer()
        quantizer.disable()
        graph.add_submodule(name, quantizer)
        users = list(tensor.users)
        with graph.graph.inserting_after(tensor):
            watched = graph.graph.call_module(name, (tensor,))
        for user in users:
            user.replace_input_with(tensor, watched)
        inventory.quantizers[name] = [tensor.name]
        inventory.watched.append(name)
    for node in placement.weighted:
        module = submodule(graph, node)
        assert module is not None
        replace_module(graph, str(node.target), quantized_layer(module))
        inventory.quantized.append(str(node.target))
    graph.graph.lint()
    graph.recompile()
    return inventory
