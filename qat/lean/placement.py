"""Requests of the placement rules, and the resulting placement.

A rule reads the graph and requests quantizers; it inserts nothing. Requests are by tensor: `quantize(producer, consumer, role)`
says that `consumer` takes `producer`'s tensor quantized, in the flavours that round tensors in that role. Consumers that request
one tensor share a quantizer, and tensors that were tied (`tie`) share one scale.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import fx, nn

from qat.lean.canonical import PATH
from qat.lean.flavours import FLAVOURS
from qat.lean.trace import submodule

ROLES = {
    "input": "of a layer with INT8 weights, or a product",
    "identity": "of a residual add that is fused into the convolution before it",
    "add": "of an add that no convolution feeds",
    "concat": "that is concatenated with others",
    "output": "of a convolution before a residual add",
    "integer": "of what integer kernels compute, before what follows it",
}


@dataclass(frozen=True)
class FloatRule:
    """Layers that stay float: a pattern of module paths (shell style), the reason, and the flavours in which they do; empty for
    all of them."""

    pattern: str
    reason: str
    flavours: tuple[str, ...] = ()


@dataclass(frozen=True)
class Kept:
    """Something that stays float: the rule, the reason, and the flavours; empty for all."""

    rule: str
    reason: str
    flavours: tuple[str, ...] = ()


@dataclass
class Placement:
    """The requests of all rules over one graph."""

    graph: fx.GraphModule
    keep_float: Sequence[FloatRule] = ()
    round_outputs: bool = False  # whether outputs of the graph may be rounded
    # producer → consumer → the role in which it reads the tensor
    requests: dict[fx.Node, dict[fx.Node, str]] = field(default_factory=dict)
    weighted: list[fx.Node] = field(default_factory=list)
    only: dict[fx.Node, frozenset[str]] = field(
        default_factory=dict
    )  # layers with an INT8 form in some flavours → these
    kept: dict[str, Kept] = field(default_factory=dict)
    _parent: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def nodes(self) -> list[fx.Node]:
        """The graph's nodes, in order of execution."""
        return list(self.graph.graph.nodes)

    def module(self, node: object) -> nn.Module | None:
        """The module that a node calls."""
        return submodule(self.graph, node)

    def float_rules(self, path: str) -> list[FloatRule]:
        """The rules that keep the layer at `path` float in any flavour."""
        return [rule for rule in self.keep_float if fnmatch.fnmatchcase(path, rule.pattern)]

    def flavours(self, node: fx.Node) -> frozenset[str]:
        """The flavours in which a layer may be INT8."""
        kept: set[str] = set()
        for rule in self.float_rules(str(node.meta[PATH])):
            kept.update(rule.flavours or FLAVOURS)
        return self.only.get(node, frozenset(FLAVOURS)) - kept

    def quantize(self, producer: fx.Node, consumer: fx.Node, role: str) -> None:
        """Requests `producer`'s tensor quantized for `consumer`. The first requested role counts."""
        self.requests.setdefault(producer, {}).setdefault(consumer, role)

    def keep(self, name: str, rule: str, reason: str, flavours: tuple[str, ...] = ()) -> None:
        """Keeps the layer or operation with this name float."""
        self.kept[name] = Kept(rule, reason, flavours)

    def group(self, node: fx.Node) -> fx.Node:
        """The representative of the tensors that share a scale with `node`'s."""
        root = node
        while self._parent.get(root, root) is not root:
            root = self._parent[root]
        return root

    def tie(self, a: fx.Node, b: fx.Node) -> None:
        """Makes the two nodes' tensors share one scale."""
        order = {node: i for i, node in enumerate(self.graph.graph.nodes)}
        first, second = sorted((self.group(a), self.group(b)), key=order.__getitem__)
        self._parent[second] = first


Rule = Callable[[Placement], None]
RULES: dict[str, Rule] = {}


def rule(function: Rule) -> Rule:
    """Registers a placement rule under its function's name; rules run in order of import."""
    RULES[function.__name__] = function
    return function
