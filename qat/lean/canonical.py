"""Rewrites a traced network so that each operation has one form.

    traced     conv2d(x, w, b) ─► batch_norm ─► relu_ ─► view(·, [s·4, 8]) ─► matmul(·, kᵀ)
    canonical  conv1 ─► bn1 (ScaleShift) ─► act1 (ReLU) ─► reshape(·, [−1, 8]) ─► attn.matmul (Product)

Layers with constant weights, batch norms, activation functions and products of two tensors become modules at the paths of the
network's modules; a function that a module calls itself is placed under its path with the operation's name. Weights that are
computed from parameters (weight normalisation, standardised weights) are computed once. Other constants are computed too,
unless they depend on a parameter, which training may change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn

from qat.core.errors import UserError
from qat.lean.layers import (
    Conv1d,
    Conv2d,
    Conv3d,
    ConvTranspose1d,
    ConvTranspose2d,
    ConvTranspose3d,
    DynamicConvolution,
    Einsum,
    Linear,
    Product,
    ScaleShift,
)
from qat.lean.trace import aten, tree

PATH = "path"  # in a node's meta: the path of the operation in the network
INERT = (
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
    aten.alias.default,
    aten.detach.default,
    aten.lift_fresh_copy.default,
    aten.native_dropout.default,
)
RESHAPES = (
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.unflatten.int,
    aten.flatten.using_ints,
)
CONVOLUTIONS: dict[Any, type[nn.Module]] = {
    aten.conv1d.default: Conv1d,
    aten.conv2d.default: Conv2d,
    aten.conv3d.default: Conv3d,
    aten.conv1d.padding: Conv1d,
    aten.conv2d.padding: Conv2d,
    aten.conv3d.padding: Conv3d,
    aten.conv_transpose1d.default: ConvTranspose1d,
    aten.conv_transpose2d.input: ConvTranspose2d,
    aten.conv_transpose3d.input: ConvTranspose3d,
}
PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.mm.default)


def _activation(kind: Callable[..., nn.Module], *names: str) -> Callable[[Mapping[str, Any]], nn.Module]:
    return lambda given: kind(*(given[name] for name in names))


# ATen's function → the module that computes it, from the function's arguments by name
ACTIVATIONS: dict[Any, Callable[[Mapping[str, Any]], nn.Module]] = {
    aten.relu.default: _activation(nn.ReLU),
    aten.relu6.default: _activation(nn.ReLU6),
    aten.hardtanh.default: lambda given: (
        nn.ReLU6()
        if (given["min_val"], given["max_val"]) == (0, 6)
        else nn.Hardtanh(given["min_val"], given["max_val"])
    ),
    aten.leaky_relu.default: _activation(nn.LeakyReLU, "negative_slope"),
    aten.silu.default: _activation(nn.SiLU),
    aten.gelu.default: lambda given: nn.GELU(approximate=given["approximate"]),
    aten.hardswish.default: _activation(nn.Hardswish),
    aten.hardsigmoid.default: _activation(nn.Hardsigmoid),
    aten.sigmoid.default: _activation(nn.Sigmoid),
    aten.tanh.default: _activation(nn.Tanh),
    aten.mish.default: _activation(nn.Mish),
    aten.softplus.default: _activation(nn.Softplus, "beta", "threshold"),
    aten.softmax.int: lambda given: nn.Softmax(given["dim"]),
    aten._softmax.default: lambda given: nn.Softmax(given["dim"]),
}


def arguments(node: fx.Node) -> dict[str, Any]:
    """A function node's arguments by the names of ATen's schema, with defaults filled in."""
    schema = node.target._schema  # type: ignore[union-attr]
    found = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    found.update(zip([a.name for a in schema.arguments], node.args, strict=False))
    found.update(node.kwargs)
    return found


def is_view(node: fx.Node) -> bool:
    """Whether a function's result shares memory with its input."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)


def mutates(node: fx.Node) -> bool:
    """Whether a function changes its first argument."""
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and schema.is_mutable


def out_of_place(graph: fx.Graph) -> None:
    """Functions that change their first argument return a new tensor instead.

    Raises:
        UserError: a function changes part of another tensor in memory, which the graph does not show.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if not mutates(node):
            continue
        name = str(node.target).split(".")[1].removesuffix("_")
        changed = node.args[0]
        packet = getattr(aten, name, None)
        overload = getattr(packet, str(node.target).rpartition(".")[2], None) if packet is not None else None
        base, alone = changed, True
        while isinstance(base, fx.Node) and is_view(base) and not mutates(base):
            base = base.args[0]
            alone &= isinstance(base, fx.Node) and base.op == "call_function" and len(base.users) == 1
        if overload is None or not isinstance(changed, fx.Node) or not (base is changed or alone):
            raise UserError(f"{node.name}: changes a part of a tensor in place; compute a new tensor instead")
        node.target = overload
        for user in list(changed.users):
            if user is not node and order[user] > order[node]:
                user.replace_input_with(changed, node)


class _Canonical:
    """The passes over one graph, in place."""

    def __init__(self, graph: fx.Graph, values: Mapping[str, Any]) -> None:
        self.graph, self.tensors = graph, dict(values)
        self.made: dict[tuple[Any, ...], str] = {}  # a module's source → its path
        self.placed: dict[str, nn.Module] = {}
        self.taken: set[str] = set()
        self.leaves = self._leaves()

    # Paths

    def _stack(self, node: fx.Node) -> str:
        stack = node.meta.get("nn_module_stack") or {}
        for path, _ in reversed(list(stack.values())):
            if "_empty_nn_module_stack" not in path:
                return str(path).removeprefix("net").lstrip(".")
        return ""

    def _leaves(self) -> set[str]:
        """Paths of modules that call a single kind of function directly, and no other module."""
        kinds: dict[str, set[str]] = {}
        for node in self.graph.nodes:
            if node.op == "call_function" and "nn_module_stack" in node.meta:
                kinds.setdefault(self._stack(node), set()).add(
                    str(node.target).split(".")[1] if "aten" in str(node.target) else str(node.target)
                )
        return {
            path
            for path, found in kinds.items()
            if path and len(found) == 1 and not any(other.startswith(f"{path}.") for other in kinds)
        }

    def path(self, node: fx.Node, name: str) -> str:
        """The path of a function node's operation: the module that calls it, followed by `name` if that calls others too."""
        if PATH in node.meta:
            return str(node.meta[PATH])
        stack = self._stack(node)
        if stack in self.leaves:
            return stack
        return f"{stack}.{name}" if stack else name

    def _free(self, path: str) -> str:
        """`path`, with a number if it is taken."""
        found, count = path, 0
        while found in self.taken:
            count += 1
            found = f"{path}_{count}"
        self.taken.add(found)
        return found

    def place(
        self, node: fx.Node, path: str, module: nn.Module, sources: tuple[fx.Node, ...], key: tuple[Any, ...]
    ) -> None:
        """Replaces a node by a call of `module`; a module made from the same `key` is called again."""
        key = (path, type(module), *key)
        if key not in self.made:
            self.made[key] = self._free(path)
            self.placed[self.made[key]] = module.eval()
        with self.graph.inserting_before(node):
            call = self.graph.call_module(self.made[key], sources)
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        self.graph.erase_node(node)

    # Constants

    def constant(self, node: object) -> Any:
        """The value of a node that depends only on parameters, buffers and numbers; None for any other."""
        if not isinstance(node, fx.Node):
            return None
        if node.op == "get_attr":
            return self.tensors[str(node.target)]
        if node.op != "call_function" or not self._is_constant(node, {}, True):
            return None
        return self._evaluate(node)

    def _evaluate(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            return self.tensors[str(node.target)]
        given, named = fx.node.map_arg((node.args, node.kwargs), self._evaluate)
        with torch.no_grad():
            return node.target(*given, **named)  # type: ignore[operator]

    def _is_constant(self, node: fx.Node, known: dict[fx.Node, bool], parameters: bool) -> bool:
        if node not in known:
            if node.op == "get_attr":
                value = self.tensors[str(node.target)]
                known[node] = isinstance(value, torch.Tensor) and (parameters or not isinstance(value, nn.Parameter))
            else:
                random = "rand" in str(node.target) or "normal" in str(node.target)
                known[node] = (
                    node.op == "call_function"
                    and not random
                    and all(self._is_constant(source, known, parameters) for source in node.all_input_nodes)
                )
        return known[node]

    def fold_constants(self) -> None:
        known: dict[fx.Node, bool] = {}
        for node in list(self.graph.nodes):
            if node.op != "call_function" or not self._is_constant(node, known, False):
                continue
            if all(self._is_constant(user, known, False) for user in node.users):
                continue  # of a larger constant
            value = self._evaluate(node)
            if isinstance(value, torch.Tensor):
                path = self._free(
                    f"constants.{self.path(node, node.name)}".replace("constants.constants.", "constants.")
                )
                self.tensors[path] = value.clone()
                with self.graph.inserting_before(node):
                    stored = self.graph.get_attr(path)
                stored.meta = dict(node.meta)
                node.replace_all_uses_with(stored)
            elif isinstance(value, int | float | bool):
                node.replace_all_uses_with(value)
        drop_dead(self.graph)

    # Passes

    def erase_inert(self) -> None:
        for node in list(self.graph.nodes):
            source = node.args[0] if node.args else None
            if node.target is aten.cat.default and isinstance(source, list | tuple) and len(source) == 1:
                node.replace_all_uses_with(source[0])  # of one tensor
                self.graph.erase_node(node)
                continue
            if node.op != "call_function" or not isinstance(source, fx.Node):
                continue
            same = node.target in INERT or (
                str(node.target).startswith(("aten.to.", "aten._to_copy", "aten.type_as", "aten.clone"))
                and getattr(node.meta.get("val"), "dtype", 0) == getattr(source.meta.get("val"), "dtype", 1)
            )
            if same:
                node.replace_all_uses_with(source)
                self.graph.erase_node(node)

    def fix_sizes(self) -> None:
        """Gives reshapes numbers, with −1 for the batch; sizes that are still needed are read from the tensor."""
        for node in list(self.graph.nodes):
            if node.op != "call_function":
                continue
            if node.target in RESHAPES:
                shape = list(node.meta["val"].shape)
                open_sizes = [i for i, n in enumerate(shape) if not isinstance(n, int)]
                if len(open_sizes) <= 1:
                    sizes = [n if isinstance(n, int) else -1 for n in shape]
                elif node.target in (aten.flatten.using_ints, aten.unflatten.int):
                    continue
                else:
                    sizes = node.args[1]
                node.target, node.args, node.kwargs = torch.reshape, (node.args[0], sizes), {}
            elif node.target is aten.expand.default:
                source, wanted = node.args[0].meta["val"].shape, list(node.meta["val"].shape)
                lead = len(wanted) - len(source)
                given = list(node.args[1])
                kept = [-1 if i >= lead and str(source[i - lead]) == str(n) else given[i] for i, n in enumerate(wanted)]
                node.op, node.target, node.args = "call_method", "expand", (node.args[0], *kept)
            elif node.target is aten.sym_size.int:
                node.target = size
        drop_dead(self.graph)

    def unfuse_attention(self) -> None:
        """q, k, v ─► scaled_dot_product_attention becomes its formula, which opset 13 has (Vaswani et al., 2017, eq. 1)."""
        for node in list(self.graph.nodes):
            if node.target is not aten.scaled_dot_product_attention.default:
                continue
            given = arguments(node)
            query, key, value, mask = (given[name] for name in ("query", "key", "value", "attn_mask"))
            if given.get("enable_gqa"):
                raise UserError(f"{self._stack(node)}: found grouped-query attention, expected as many keys as queries")
            depth = int(query.meta["val"].shape[-1])
            factor = 1.0 / math.sqrt(depth) if given.get("scale") is None else given["scale"]

            def call(target: Any, *args: Any, meta: Mapping[str, Any] = node.meta) -> fx.Node:
                made = self.graph.call_function(target, args)
                made.meta = {"nn_module_stack": meta.get("nn_module_stack")}
                return made

            with self.graph.inserting_before(node):
                scaled = call(aten.mul.Tensor, query, factor)
                turned = call(aten.transpose.int, key, -2, -1)
                product = call(aten.matmul.default, scaled, turned)
                if given.get("is_causal"):
                    length = [int(tensor.meta["val"].shape[-2]) for tensor in (query, key)]
                    allowed = torch.ones(length, dtype=torch.bool).tril()
                    path = self._free("constants.causal")
                    self.tensors[path] = torch.zeros(length).masked_fill(~allowed, -math.inf)
                    product = call(aten.add.Tensor, product, self.graph.get_attr(path))
                elif mask is not None:
                    if mask.meta["val"].dtype == torch.bool:
                        mask = call(
                            aten.masked_fill.Scalar,
                            call(aten.zeros_like.default, call(aten.to.dtype, mask, torch.float32)),
                            call(aten.logical_not.default, mask),
                            -math.inf,
                        )
                    product = call(aten.add.Tensor, product, mask)
                weights = call(aten.softmax.int, product, -1)
                result = call(aten.matmul.default, weights, value)
            node.replace_all_uses_with(result)
            self.graph.erase_node(node)

    def unfuse_gates(self) -> None:
        """Writes HardSwish as x · gate(x), as in opset 13: the value between may be rounded."""
        gates = {aten.hardswish.default: aten.hardsigmoid.default}
        for node in list(self.graph.nodes):
            if node.target not in gates:
                continue
            source = node.args[0]
            with self.graph.inserting_before(node):
                gate = self.graph.call_function(gates[node.target], (source,))
                product = self.graph.call_function(aten.mul.Tensor, (source, gate))
            gate.meta, product.meta = dict(node.meta), dict(node.meta)
            path = self.path(node, str(node.target).split(".")[1])
            gate.meta[PATH], product.meta[PATH] = f"{path}.gate", path
            node.replace_all_uses_with(product)
            self.graph.erase_node(node)

    def layers(self) -> None:
        known: dict[fx.Node, bool] = {}
        for node in list(self.graph.nodes):
            if node.op != "call_function" or self._is_constant(node, known, True):
                continue  # of a weight that is computed from parameters, which `constant` evaluates
            if node.target in CONVOLUTIONS:
                self._convolution(node)
            elif node.target is aten.linear.default:
                weight, bias = node.args[1], node.args[2] if len(node.args) > 2 else None
                self._linear(node, node.args[0], weight, bias, transposed=False)
            elif node.target in PRODUCTS:
                self._product(node)
            elif node.target is aten.addmm.default and all(v == 1 for v in node.kwargs.values()):
                self._linear(node, node.args[1], node.args[2], node.args[0], transposed=True)
            elif node.target is aten.einsum.default:
                equation, tensors = node.args[0], tuple(node.args[1])
                self.place(node, self.path(node, "einsum"), Einsum(str(equation)), tensors, (id(node),))
            elif node.target is aten.batch_norm.default:
                self._batch_norm(node)
            elif node.target in ACTIVATIONS:
                given = arguments(node)
                module = ACTIVATIONS[node.target](given)
                source = next(iter(given.values())) if "self" not in given else given["self"]
                name = type(module).__name__.lower()
                self.place(node, self.path(node, name), module, (given.get("input", source),), (repr(module),))

    def _parameter(self, value: torch.Tensor) -> nn.Parameter:
        if isinstance(value, nn.Parameter):
            return value
        return nn.Parameter(value.detach().clone(), requires_grad=value.is_floating_point())

    def _owner(self, node: fx.Node, weight: object, name: str) -> str:
        """The path of a layer: the module with this `weight`, or else the caller."""
        if isinstance(weight, fx.Node) and weight.op == "get_attr":
            path = str(weight.target)
            if path.endswith(".weight"):
                return path.removesuffix(".weight")
            if path.endswith("_weight"):  # MultiheadAttention's in_proj_weight
                return path.removesuffix("_weight")
        stack = self._stack(node)
        kinds = [str(kind) for _, kind in (node.meta.get("nn_module_stack") or {}).values()]
        own = bool(kinds) and any(word in kinds[-1].rpartition(".")[2] for word in ("Conv", "Linear"))
        if stack and (own or stack in self.leaves):
            return stack
        return f"{stack}.{name}" if stack else name

    def _build(
        self, kind: type[nn.Module], weight: torch.Tensor, bias: torch.Tensor | None, **options: Any
    ) -> nn.Module:
        layer = kind(**options, bias=bias is not None, device="meta")
        layer.weight = self._parameter(weight)
        if bias is not None:
            layer.bias = self._parameter(bias)
        return layer

    def _convolution(self, node: fx.Node) -> None:
        given = arguments(node)
        kind = CONVOLUTIONS[node.target]
        weight, bias = self.constant(given["weight"]), self.constant(given["bias"])
        dims = int(kind.__name__[-2])
        if weight is None or (given["bias"] is not None and bias is None):
            sources = tuple(v for v in (given["input"], given["weight"], given["bias"]) if isinstance(v, fx.Node))
            kept = {k: v for k, v in given.items() if k not in ("input", "weight", "bias")}
            module = DynamicConvolution(node.target, kept)
            self.place(node, self.path(node, "conv"), module, sources, (id(node),))
            return

        def spread(value: Any) -> tuple[int, ...]:
            values = list(value) if isinstance(value, list | tuple) else [value]
            return tuple(int(v) for v in (values * dims if len(values) == 1 else values))

        transposed = "Transpose" in kind.__name__
        stride, dilation = spread(given["stride"]), spread(given["dilation"])
        groups, padding, pad = int(given["groups"]), given["padding"], None
        kernel = tuple(weight.shape[2:])
        if isinstance(padding, str):
            total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
            padding = [t // 2 for t in total]
            if any(t % 2 for t in total):
                pad = tuple(n for t in reversed(total) for n in (t // 2, t - t // 2))
                padding = [0] * dims
        options: dict[str, Any] = {
            "in_channels": weight.shape[0] if transposed else weight.shape[1] * groups,
            "out_channels": weight.shape[1] * groups if transposed else weight.shape[0],
            "kernel_size": kernel,
            "stride": stride,
            "padding": spread(padding),
            "dilation": dilation,
            "groups": groups,
        }
        if transposed:
            options["output_padding"] = spread(given["output_padding"])
        source = given["input"]
        if not transposed and pad is None and (before := self._zero_pad(source, dims)) is not None:
            pad, source = before, source.args[0]
        layer = self._build(kind, weight, bias, **options)
        if pad is not None:
            layer.pad = pad  # type: ignore[assignment]
        key = (self._identity(given["weight"], node), self._identity(given["bias"], node), repr(options), pad)
        self.place(node, self._owner(node, given["weight"], "conv"), layer, (source,), key)

    def _identity(self, node: object, caller: fx.Node) -> object:
        """The identity of a constant: a parameter's path, or the node for a computed constant."""
        if isinstance(node, fx.Node):
            return node.target if node.op == "get_attr" else node.name
        return None

    def _zero_pad(self, node: object, dims: int) -> tuple[int, ...] | None:
        """The widths of a Pad with zeros around the spatial dimensions; None for another node."""
        if not isinstance(node, fx.Node) or node.target not in (aten.constant_pad_nd.default, aten.pad.default):
            return None
        given = arguments(node)
        widths = list(given["pad"])
        if given.get("mode", "constant") != "constant" or (given.get("value") or 0) != 0 or len(widths) > 2 * dims:
            return None
        if not all(isinstance(n, int) and n >= 0 for n in widths):
            return None
        return tuple(widths)

    def _linear(self, node: fx.Node, source: Any, weight_node: Any, bias_node: Any, transposed: bool) -> None:
        weight, bias = self.constant(weight_node), self.constant(bias_node)
        if weight is None or weight.ndim != 2 or (bias_node is not None and (bias is None or bias.ndim != 1)):
            if node.target is aten.linear.default:
                sources = tuple(v for v in (source, weight_node, bias_node) if isinstance(v, fx.Node))
                module = DynamicConvolution(node.target, {})
                self.place(node, self.path(node, "linear"), module, sources, (id(node),))
            return
        own = weight.t().contiguous() if transposed else weight
        layer = self._build(Linear, own, bias, in_features=own.shape[1], out_features=own.shape[0])
        key = (self._identity(weight_node, node), self._identity(bias_node, node), transposed)
        self.place(node, self._owner(node, weight_node, "linear"), layer, (source,), key)

    def _product(self, node: fx.Node) -> None:
        left, right = node.args[:2]
        weight = self.constant(right)
        if weight is not None and weight.ndim == 2 and node.target is not aten.bmm.default:
            self._linear(node, left, right, None, transposed=True)
            return
        self.place(node, self.path(node, "matmul"), Product(), (left, right), (node.name,))  # type: ignore[arg-type]

    def _batch_norm(self, node: fx.Node) -> None:
        given = arguments(node)
        values = [self.constant(given[name]) for name in ("weight", "bias", "running_mean", "running_var")]
        stack = self._stack(node)
        if given["training"] or values[2] is None or values[3] is None:
            raise UserError(
                f"{stack or node.name}: found a batch norm without running statistics, expected one that has them: it "
                "normalises by the current batch, which cannot be exported; set track_running_stats=True and train"
            )
        weight, bias, mean, variance = values
        module = ScaleShift(weight, bias, mean, variance, float(given["eps"]))
        key = tuple(self._identity(given[n], node) for n in ("weight", "bias", "running_mean", "running_var"))
        source = given["running_mean"]
        owner = str(source.target).removesuffix(".running_mean") if isinstance(source, fx.Node) else stack
        self.place(node, owner, module, (given["input"],), key)

    def name_paths(self) -> None:
        """`meta["path"]` of each node that computes."""
        for node in self.graph.nodes:
            if node.op == "call_module":
                node.meta[PATH] = str(node.target)
            elif node.op == "call_function":
                name = getattr(node.target, "_opname", None) or getattr(node.target, "__name__", str(node.target))
                node.meta[PATH] = self.path(node, str(name).rstrip("_"))
            else:
                node.meta[PATH] = str(node.target)

    def finish(self) -> fx.GraphModule:
        """The graph module, with the modules and tensors that it uses."""
        used = {str(node.target) for node in self.graph.nodes if node.op == "call_module"}
        values: dict[str, Any] = {path: layer for path, layer in self.placed.items() if path in used}
        for node in self.graph.nodes:
            if node.op != "get_attr":
                continue
            path, value = str(node.target), self.tensors[str(node.target)]
            owner, _, name = path.rpartition(".")
            if owner in values and getattr(values[owner], name, value) is not value:
                node.target = path = f"constants.{path}"  # a layer has another tensor with this name
            values[path] = value
        copied = fx.Graph()  # whose nodes are renamed
        twins: dict[fx.Node, fx.Node] = {}
        for node in self.graph.nodes:
            args, kwargs = (fx.node.map_arg(given, twins.__getitem__) for given in (node.args, node.kwargs))
            twins[node] = copied.create_node(node.op, node.target, args, kwargs)
            twins[node].meta = node.meta
        made = fx.GraphModule(tree(values), copied)
        made.graph.lint()
        return made


def merge_equal(graph: fx.Graph) -> None:
    """Merges operations that are computed twice from the same tensors, so that one tensor has one quantizer."""
    first: dict[str, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op not in ("call_function", "call_module", "get_attr") or "rand" in str(node.target):
            continue
        key = f"{node.op} {node.target} {node.args} {node.kwargs}"
        same = first.setdefault(key, node)
        if same is not node:
            node.replace_all_uses_with(same)
            graph.erase_node(node)


def drop_dead(graph: fx.Graph) -> None:
    """Removes nodes that no output needs."""
    for node in reversed(list(graph.nodes)):
        if node.op not in ("placeholder", "output") and not node.users:
            graph.erase_node(node)


def size(x: torch.Tensor, dim: int) -> Any:
    """One size of a tensor; while the exporter traces, a value of the graph."""
    return x.shape[dim]


def canonicalize(graph: fx.Graph, values: Mapping[str, Any]) -> fx.GraphModule:
    """The canonical graph of a traced one, which is consumed.

    Args:
        values: what the graph's get_attr nodes read, by path.

    Raises:
        UserError: an unsupported operation: a batch norm without statistics, a tensor that is changed in part.
    """
    out_of_place(graph)
    passes = _Canonical(graph, values)
    passes.erase_inert()
    passes.fix_sizes()
    passes.fold_constants()
    passes.unfuse_attention()
    passes.unfuse_gates()
    passes.layers()
    merge_equal(graph)
    passes.name_paths()
    drop_dead(graph)
    return passes.finish()
