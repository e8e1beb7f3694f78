"""Traces a network into a graph in which each operation has one form.

torch.export traces the network (keywords, functions, methods, subclasses and SAME padding all become the same ATen operators);
`qat.lean.canonical` then turns layers with weights, activation functions and products of two tensors into modules at the
network's own paths:

    network   x ─► self.conv1 ─► F.relu ─► …            graph   x ─► conv1 (Conv2d) ─► relu (ReLU) ─► …

The graph can be trained, accepts any batch, and is exported by torch's TorchScript exporter at opset 13.
"""

from __future__ import annotations

import hashlib
import inspect
import io
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from qat.core.errors import UserError

aten = torch.ops.aten
NET = "net"  # the traced module's name inside `_Method`
FIXED_BATCH = "fixed_batch"  # in a graph's meta: the batch that it requires, if it accepts no other
# Exceptions of tracing and its decompositions for unsupported networks.
UNTRACEABLE = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, NotImplementedError, AssertionError)
# Checks that torch.export leaves in the graph; they compute nothing.
ASSERTIONS = (
    aten._assert_async.msg,
    aten._assert_scalar.default,
    aten._assert_tensor_metadata.default,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
)


class _Method(nn.Module):
    """Calls one method of a module, with fixed values for arguments that are not tensors."""

    def __init__(self, module: nn.Module, method: str, arguments: Sequence[object]) -> None:
        super().__init__()
        self.net = module
        self.method, self.arguments = method, tuple(arguments)

    def forward(self, *tensors: torch.Tensor) -> Any:
        given = iter(tensors)
        return getattr(self.net, self.method)(
            *(next(given) if isinstance(a, torch.Tensor) else a for a in self.arguments)
        )


@contextmanager
def _tracing() -> Any:
    """Inside the block attention modules use their training path, and torch.export's warnings are off."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@dataclass(frozen=True)
class _Program:
    """torch.export's result. graph: of ATen's functions; it must not be changed. constants: tensors read by its get_attr nodes
    that are not the network's, by path."""

    graph: fx.Graph
    out_spec: Any
    constants: Mapping[str, Any]


_known: OrderedDict[Hashable, _Program] = OrderedDict()  # the last `KEPT` programs
KEPT = 32


def trace(
    module: nn.Module, example_inputs: Sequence[object], method: str = "forward", keep: bool = False
) -> fx.GraphModule:
    """The graph of `module.method`, in eval mode, on inputs like these; it shares the module's parameters.

    Args:
        example_inputs: the method's arguments: tensors, whose first dimension (if it is the same everywhere and above 1) may
            vary in the graph, and other values, which are fixed. The tensors' contents do not matter.
        keep: in this process, the next network that differs only in its weights reuses torch.export's result (a command that
            opens several checkpoints of a model traces it once).

    Returns:
        the graph, with each layer at its path in `module`. `graph.meta["fixed_batch"]` has the batch if the network fixes it.

    Raises:
        UserError: torch.export cannot trace the network, for example because its operations depend on the values of its inputs.
    """
    from qat.lean.canonical import canonicalize

    module.eval()
    batches = {len(x) if x.ndim else 0 for x in example_inputs if isinstance(x, torch.Tensor)}
    key = _key(module, example_inputs, method) if keep else None
    program = None if key is None else _known.get(key)
    if program is None:
        dynamic = len(batches) == 1 and min(batches) > 1
        program = _export(module, example_inputs, method, dynamic)
        if key is not None and not any(isinstance(value, nn.Module) for value in program.constants.values()):
            _known[key] = program
            if len(_known) > KEPT:
                _known.popitem(last=False)
    graph, values = _plain(program, module, method, example_inputs)
    made = canonicalize(graph, values)
    made.meta["class"] = type(module).__name__
    placeholders = [node for node in made.graph.nodes if node.op == "placeholder" and "val" in node.meta]
    if not all(isinstance(node.meta["val"].shape[0], torch.SymInt) for node in placeholders):
        made.meta[FIXED_BATCH] = next(iter(batches)) if len(batches) == 1 else None
    return made


def _export(module: nn.Module, arguments: Sequence[object], method: str, dynamic: bool) -> _Program:
    inputs = tuple(value for value in arguments if isinstance(value, torch.Tensor))
    wrapper = _Method(module, method, arguments).eval()
    axes = (tuple({0: torch.export.Dim.AUTO} for _ in inputs),) if dynamic else None
    with _tracing():
        try:
            program = torch.export.export(wrapper, inputs, dynamic_shapes=axes, strict=False)
        except UNTRACEABLE as error:
            raise UserError(
                f"{type(module).__name__}.{method}: torch.export cannot trace it: {first_line(error)}; "
                "rewrite what depends on the values of its inputs"
            ) from error
        traced = program.module(check_guards=False)
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    own = {f"{NET}.{name}" for name, _ in tensors}
    read = {str(node.target) for node in traced.graph.nodes if node.op == "get_attr"}
    constants = {path: _attribute(traced, path) for path in read - own}
    graph = fx.Graph()
    graph.output(graph.graph_copy(traced.graph, {}))
    return _Program(graph, traced._out_spec, constants)


class _Fingerprint(pickle.Pickler):
    """Pickles a network without the contents of its parameters and buffers, which do not affect a trace."""

    def __init__(self, file: io.BytesIO, network: nn.Module) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.fast = True  # does not record which attributes are the same object: torch.export copies some
        named = [*network.named_parameters(), *network.named_buffers()]
        self.own = {id(tensor): (name, tensor) for name, tensor in named}

    def reducer_override(self, value: object) -> Any:
        if id(value) not in self.own:
            return NotImplemented
        name, x = self.own[id(value)]
        layout = tuple(x.shape), x.stride(), x.requires_grad
        return tuple, ((name, type(x).__name__, str(x.dtype), str(x.device), *layout),)


def _key(module: nn.Module, arguments: Sequence[object], method: str) -> Hashable:
    """The key of a trace: the network without its weights, its classes' code, and the inputs' shapes. None if the network has
    something that cannot be pickled (a hook, a lambda)."""
    file = io.BytesIO()
    inputs = [(str(v.dtype), tuple(v.shape), str(v.device)) if isinstance(v, torch.Tensor) else v for v in arguments]
    try:
        _Fingerprint(file, module).dump((module, inputs))
    except (pickle.PicklingError, TypeError, ValueError, AttributeError, RuntimeError):
        return None
    code = tuple((type(m), type(m).forward) for m in module.modules())  # another class may have the same name
    return hashlib.sha256(file.getbuffer()).digest(), code, getattr(type(module), method), torch.get_default_dtype()


def first_line(error: BaseException) -> str:
    """An exception's message, on one line of at most 200 characters."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return text if len(text) <= 200 else text[:197] + "…"


def _plain(
    program: _Program, module: nn.Module, method: str, arguments: Sequence[object]
) -> tuple[fx.Graph, dict[str, Any]]:
    """The traced graph over `module`'s paths, with the method's arguments and its nested output, without guards; and the
    tensors that its get_attr nodes read, by path."""
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    root: dict[str, Any] = {}
    placeholders = _arguments(graph, module, method, arguments)
    for node in program.graph.nodes:
        if node.op == "placeholder":
            values[node] = next(placeholders)
            values[node].meta = {"val": node.meta["val"]}
        elif node.op == "get_attr":
            path, target = _inner(str(node.target)), str(node.target)
            value = program.constants[target] if target in program.constants else _attribute(module, path)
            if path == target and not isinstance(value, nn.Module):
                path = f"constants.{path}"  # constants of the trace: must not take a name of the network
            root[path] = value
            values[node] = graph.get_attr(path)
            values[node].meta = dict(node.meta)
        elif node.op == "output":
            flat = node.args[0]
            nested = pytree.tree_unflatten(
                [values[leaf] if isinstance(leaf, fx.Node) else leaf for leaf in flat], program.out_spec
            )
            graph.output(nested)
        elif node.target not in ASSERTIONS and not str(node.target).startswith("_guards"):
            values[node] = graph.node_copy(node, values.__getitem__)
    return graph, root


def _inner(path: str) -> str:
    return path.removeprefix(f"{NET}.")


def _arguments(graph: fx.Graph, module: nn.Module, method: str, arguments: Sequence[object]) -> Any:
    """Names placeholders like the method's arguments; yields those of tensors."""
    parameters = list(inspect.signature(getattr(module, method)).parameters.values())
    plain = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    names = [plain[i] if i < len(plain) else f"input_{i}" for i in range(len(arguments))]
    made = [
        graph.placeholder(name) if isinstance(value, torch.Tensor) else graph.placeholder(name, default_value=value)
        for name, value in zip(names, arguments, strict=True)
    ]
    return iter([node for node, value in zip(made, arguments, strict=True) if isinstance(value, torch.Tensor)])


def tree(values: Mapping[str, Any]) -> nn.Module:
    """A module with these parameters, buffers and modules at these paths."""
    root = nn.Module()
    for path, value in sorted(values.items(), key=lambda item: item[0].count(".")):  # parents first
        *parents, name = path.split(".")
        at = root
        for parent in parents:
            if not hasattr(at, parent):
                at.add_module(parent, nn.Module())
            at = getattr(at, parent)
        put(at, name, value)
    return root


def put(module: nn.Module, name: str, value: Any) -> None:
    """Sets an attribute of a module: a parameter, a module, or a tensor as a buffer outside the state dict."""
    if isinstance(value, nn.Parameter | nn.Module) or not isinstance(value, torch.Tensor):
        setattr(module, name, value)
    else:
        module.register_buffer(name, value, persistent=False)


def _attribute(module: nn.Module, path: str) -> Any:
    value: Any = module
    for name in path.split("."):
        value = getattr(value, name)
    return value


def attribute(graph: fx.GraphModule, node: object) -> Any:
    """The value of a get_attr node; None for other nodes."""
    return _attribute(graph, str(node.target)) if isinstance(node, fx.Node) and node.op == "get_attr" else None


def submodule(graph: fx.GraphModule, node: object) -> nn.Module | None:
    """The module that a node calls, None if it calls none."""
    if isinstance(node, fx.Node) and node.op == "call_module" and isinstance(node.target, str):
        return graph.get_submodule(node.target)
    return None


def replace_module(graph: fx.GraphModule, path: str, module: nn.Module) -> None:
    """Sets `module` at `path`."""
    parent, _, name = path.rpartition(".")
    at: nn.Module = graph
    for step in parent.split(".") if parent else ():
        if not hasattr(at, step):
            at.add_module(step, nn.Module())
        at = getattr(at, step)
    setattr(at, name, module)
