"""Inserts quantizers into a traced graph where the rules request them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import fx

from qat.lean import rules  # noqa: F401  (importing registers them)
from qat.lean.canonical import PATH
from qat.lean.flavours import DEFAULT, FLAVOURS, flavour_of
from qat.lean.ops import least_values
from qat.lean.placement import RULES, FloatRule, Kept, Placement
from qat.lean.quantizer import Quantizer, input_quantizer, quantized_layer
from qat.lean.trace import replace_module, submodule


@dataclass
class Inventory:
    """The changes to one graph.

    quantizers: activation quantizer name → names of the tensors (fx nodes) that it rounds. quantized: paths of the
    layers with INT8 weights, in some flavour. kept: path of each layer left float → the rule, the reason and the flavours.
    """

    quantizers: dict[str, list[str]] = field(default_factory=dict)
    quantized: list[str] = field(default_factory=list)
    kept: dict[str, Kept] = field(default_factory=dict)


def tensor_names(graph: fx.GraphModule) -> dict[fx.Node, str]:
    """A quantizer's name for each node's tensor: the path of the operation, and from its second call on the call's number.

    (A second call of a block's only ReLU computes another tensor, with another quantizer: `…_1`.)
    """
    found: dict[fx.Node, str] = {}
    calls: dict[str, int] = {}
    taken: set[str] = set()
    for node in graph.graph.nodes:
        base = "quant_" + re.sub(r"\W", "_", str(node.meta.get(PATH, node.target)))
        name = base
        while name in taken:
            calls[base] = calls.get(base, 0) + 1
            name = f"{base}_{calls[base]}"
        taken.add(name)
        found[node] = name
    return found


def quantize_graph(
    graph: fx.GraphModule,
    keep_float: Sequence[FloatRule] = (),
    inputs: dict[str, float] | None = None,
    round_outputs: bool = False,
) -> Inventory:
    """Places the quantizers of every flavour in `graph`, in place, and switches those of the default flavour on.

    Activation quantizers are modules `quant_…`, named after the first tensor of their group; a tensor that only some flavours
    round, or only for some of its consumers, has another one, named with its role (`quant_…_output`). Weight quantizers are
    `…weight_quantizer` inside their layers.

    Args:
        inputs: lower bounds of the graph's inputs, by name.
        round_outputs: outputs of the graph may be rounded too, in flavours whose backend is then faster.
    """
    placement = Placement(graph, keep_float, round_outputs)
    for rule in RULES.values():
        rule(placement)
    inventory = Inventory(kept=placement.kept)
    names = tensor_names(graph)
    least = least_values(graph, inputs)
    shared: dict[str, Quantizer] = {}
    firsts: dict[fx.Node, Quantizer] = {}  # of a group without a main quantizer
    own = {node: placement.flavours(node) for node in placement.weighted}
    asked = list(placement.requests.items())
    # Roles of all flavours come first: their quantizer has the tensor's own name.
    for tensor, consumers in asked:
        group = placement.group(tensor)
        edges: dict[tuple[frozenset[str], str], list[fx.Node]] = {}
        for consumer, role in consumers.items():
            on = frozenset(f for f in FLAVOURS if role in FLAVOURS[f].roles) & own.get(consumer, frozenset(FLAVOURS))
            if role in ("output", "integer"):
                on &= own.get(tensor, on)
            everywhere = all(role in flavour.roles for flavour in FLAVOURS.values())
            edges.setdefault((on, "" if everywhere else role), []).append(consumer)
        last = tensor  # quantizers of one tensor are adjacent, the main one first
        for (on, role), takers in sorted(edges.items(), key=lambda item: (item[0][1] != "", -len(item[0][0]))):
            if not on:
                continue
            name = f"{names[tensor]}_{role}" if role else names[group]
            if name in shared and shared[name].flavours != on:
                name = f"{name}_{'_'.join(sorted(on))}".replace("-", "_")
            if name not in shared:
                shared[name] = input_quantizer()
                shared[name].flavours, shared[name].role, shared[name].least = on, role or "input", float("inf")
                main = shared.get(names[group]) or firsts.setdefault(group, shared[name])
                if main is not None and main is not shared[name]:
                    shared[name].shares = main
                graph.add_submodule(name, shared[name])
            quantizer = shared[name]
            for one in (quantizer, quantizer.shares):
                if one is not None:
                    one.least = min(one.least, least[tensor])
            inventory.quantizers.setdefault(name, []).append(tensor.name)
            with graph.graph.inserting_after(last):
                rounded = last = graph.graph.call_module(name, (tensor,))
            rounded.meta = {PATH: name, **({"val": tensor.meta["val"]} if "val" in tensor.meta else {})}
            for consumer in takers:
                consumer.replace_input_with(tensor, rounded)
    placed: set[str] = set()
    for node in placement.weighted:
        path = str(node.target)
        if path in placed:
            continue
        placed.add(path)
        module = submodule(graph, node)
        assert module is not None
        layer = quantized_layer(module)
        weights = layer.weight_quantizer
        assert isinstance(weights, Quantizer)
        weights.flavours = own[node]
        replace_module(graph, path, layer)
        inventory.quantized.append(path)
    graph.graph.lint()
    graph.recompile()
    use_flavour(graph, DEFAULT)
    return inventory


def use_flavour(graph: fx.GraphModule, name: str) -> None:
    """Switches a graph's quantizers on or off and sets their specs, for a flavour."""
    flavour = flavour_of(name)
    for module in graph.modules():
        quantizer = getattr(module, "weight_quantizer", None)
        if isinstance(quantizer, Quantizer):
            quantizer.spec = flavour.weight(module)
            quantizer._disabled = quantizer.off or name not in quantizer.flavours
        elif isinstance(module, Quantizer) and not module.weights:
            module.spec = flavour.activation((module if module.shares is None else module.shares).least)
            module._disabled = module.off or name not in module.flavours
    _only_behind_integers(graph)


def _only_behind_integers(graph: fx.GraphModule) -> None:
    """Removes the quantizer on the output of a convolution that stays float."""
    for node in graph.graph.nodes:
        quantizer = submodule(graph, node)
        if isinstance(quantizer, Quantizer) and quantizer.role in ("output", "integer"):
            layer = submodule(graph, node.args[0])
            weights = getattr(layer, "weight_quantizer", None)
            if weights is not None and weights._disabled:
                quantizer._disabled = True
