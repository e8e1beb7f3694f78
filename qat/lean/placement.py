"""What the placement rules say, and what comes of it.

A rule reads the graph and asks for quantizers; it inserts nothing. Asking is by tensor: `quantize(producer, consumer)`
says that `consumer` takes `producer`'s tensor quantized. All consumers that ask for one tensor get one quantizer, and
tensors that were tied (`tie`) share one scale, hence one TensorQuantizer.
"""

from __future__ import annotations

import fnmatch
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx, nn
from torch.nn import functional as F

from qat.lean.trace import submodule

WEIGHTED = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
ADDS = (operator.add, operator.iadd, torch.add, "add", "add_")
CONCATS = (torch.cat, torch.concat)
RESHAPES = (torch.flatten, "flatten", "view", "reshape", "permute", "transpose", "contiguous")


@dataclass(frozen=True)
class FloatRule:
    """Layers that stay float: a pattern of module paths (shell style) and the reason."""

    pattern: str
    reason: str


@dataclass(frozen=True)
class Kept:
    """Something that stays float: the rule that says so, and why."""

    rule: str
    reason: str


@dataclass
class Placement:
    """The requests of all rules over one graph."""

    graph: fx.GraphModule
    keep_float: Sequence[FloatRule] = ()
    requests: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)
    watched: list[fx.Node] = field(default_factory=list)
    weighted: list[fx.Node] = field(default_factory=list)
    kept: dict[str, Kept] = field(default_factory=dict)
    _parent: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def nodes(self) -> list[fx.Node]:
        """The graph's nodes, in order of execution."""
        return list(self.graph.graph.nodes)

    def module(self, node: object) -> nn.Module | None:
        """The module that a node calls."""
        return submodule(self.graph, node) if isinstance(node, fx.Node) else None

    def float_reason(self, node: fx.Node) -> str | None:
        """Why this node's layer stays float; None if it need not."""
        for rule in self.keep_float:
            if fnmatch.fnmatchcase(str(node.target), rule.pattern):
                return rule.reason
        return None

    def quantize(self, producer: fx.Node, consumer: fx.Node) -> None:
        """`consumer` takes `producer`'s tensor quantized."""
        users = self.requests.setdefault(producer, [])
        if consumer not in users:
            users.append(consumer)

    def keep(self, name: str, rule: str, reason: str) -> None:
        """The layer or operation of this name stays float."""
        self.kept[name] = Kept(rule, reason)

    def watch(self, producer: fx.Node) -> None:
        """Statistics of this tensor are recorded, but the default flavour does not quantize it."""
        if producer not in self.watched:
            self.watched.append(producer)

    def group(self, node: fx.Node) -> fx.Node:
        """The representative of the tensors that share a scale with `node`'s."""
        root = node
        while self._parent.get(root, root) is not root:
            root = self._parent[root]
        return root

    def tie(self, a: fx.Node, b: fx.Node) -> None:
        """The two nodes' tensors share one scale."""
        order = {node: i for i, node in enumerate(self.graph.graph.nodes)}
        first, second = sorted((self.group(a), self.group(b)), key=order.__getitem__)
        self._parent[second] = first


Rule = Callable[[Placement], None]
RULES: dict[str, Rule] = {}


def rule(function: Rule) -> Rule:
    """Registers a placement rule under its function's name; rules run in order of import."""
    RULES[function.__name__] = function
    return function


def is_add(node: fx.Node) -> bool:
    """Whether the node adds two tensors."""
    tensors = [a for a in node.args[:2] if isinstance(a, fx.Node)]
    return node.op in ("call_function", "call_method") and node.target in ADDS and len(tensors) == 2


def is_concat(node: fx.Node) -> bool:
    """Whether the node concatenates."""
    return node.op == "call_function" and node.target in CONCATS


def is_resize(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node interpolates."""
    upsample = isinstance(submodule(graph, node), nn.Upsample)
    return upsample or (node.op == "call_function" and node.target is F.interpolate)


def passes_values_on(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether every output value is one of the inputs' values: pooling by maximum, reshapes, dropout at inference."""
    module = submodule(graph, node)
    if isinstance(module, nn.MaxPool2d | nn.Identity | nn.Dropout | nn.Flatten):
        return True
    if node.op == "call_function":
        return node.target in (F.max_pool2d, F.dropout, *RESHAPES)
    return node.op == "call_method" and node.target in RESHAPES
