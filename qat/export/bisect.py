"""Finds the first layer at which a graph and its PyTorch module diverge.

Tensors inside a graph are matched with module calls by the scopes in node names. torch's TorchScript exporter names a node
after the calls that it was traced in, `/backbone/layer1/layer1.0/conv1/Conv`: for each module, the end of its path from
the last component that is not a number. Calls with the same scope are numbered in order (`relu`,
`relu_1`, …). The same names are made here from a run of the module (`_Calls`), and matched where an operator and a shape
agree; functional operations between modules, and what onnxsim renamed, stay without a match.

A matched tensor has diverged when its SQNR is below the tolerance that its part's outputs have: for a graph that rounds,
one from the SQNR of the fake-quantized module against the float one at this very tensor. Along a chain of layers that is
monotone but for accidents, so a search over the ancestors of the failing output in topological order, POINTS tensors a
pass, finds a diverged tensor. Branches are not a chain: the nearest matched ancestors of what was found are looked at
too, and while one of them has diverged, the search continues among its ancestors. The reported tensor has diverged, and
none of its inputs has.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from qat.core.tensors import compare_tensors
from qat.core.verification import tolerance_db
from qat.engine.onnxruntime_backend import PlainGraph
from qat.export.lookups import constants, producers
from qat.families.family import own_path
from qat.lean.layers import ScaleShift
from qat.lean.modes import quantizers_off
from qat.lean.quantizer import Quantizer
from qat.model.runners import TorchPart

POINTS = 7  # tensors examined in one pass
BYTES = 512 << 20  # bytes of their values in one pass

# Operators that a module's call ends in. Other modules are matched by their scope's last node.
_OPERATORS: tuple[tuple[type[nn.Module], tuple[str, ...]], ...] = (
    (Quantizer, ("DequantizeLinear",)),
    (nn.ConvTranspose2d, ("ConvTranspose",)),
    # A convolution rewritten by `qat.export.conv_as_matmul` ends in a transpose; if `qat.export.sunk_transpose` moved it, the
    # result stays channels-last and has no match.
    (nn.Conv1d, ("Conv", "Transpose")),
    (nn.Conv2d, ("Conv", "Transpose")),
    (nn.Linear, ("Gemm", "MatMul", "Add")),
    (nn.ReLU, ("Relu",)),
)


@dataclass(frozen=True)
class Divergence:
    """A layer. what: "output" if its result differs, "scale" if its quantizer is missing or different. (`qat.export.sites` adds
    a third kind, "site".)

    node, operator: of the ONNX graph; module: its path in the detector. sqnr_db, tolerance_db: of the layer's result
    against PyTorch's, None if the graph has no such tensor. before_db: the lowest SQNR among the nearest matched tensors
    that it is computed from, None if these are the part's inputs. note: for a scale, the difference.
    """

    what: str
    node: str
    operator: str
    module: str
    sqnr_db: float | None
    tolerance_db: float | None
    before_db: float | None
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """The layer as an entry of the manifest."""
        values = asdict(self)
        return {k: round(v, 3) if isinstance(v, float) else v for k, v in values.items() if v not in (None, "")}

    def __str__(self) -> str:
        return describe(self.to_json())


def describe(layer: Mapping[str, Any]) -> str:
    """One line for a manifest's entry of `divergence`."""
    if layer["what"] == "site":
        return str(layer["note"])
    text = f"first diverging layer: {layer['operator']} {layer['node']}, PyTorch's {layer['module']}"
    if "note" in layer:
        text += f": {layer['note']}"
    if "sqnr_db" in layer:
        before = f"{layer['before_db']:.1f} dB before it" if "before_db" in layer else "exact inputs before it"
        text += f": {layer['sqnr_db']:.1f} dB SQNR ({layer['tolerance_db']:.1f} dB or more expected), {before}"
    return text


def _label(path: str) -> str:
    """The end of a module's path that names its scope: `layer1.0` of `backbone.layer1.0`."""
    parts = path.split(".")
    at = len(parts) - 1
    while at > 0 and parts[at].isdigit():
        at -= 1
    return ".".join(parts[at:])


@dataclass
class _Call:
    """One call of a module without children (except quantizers). scope: as in the exporter's names, without a number."""

    path: str
    module: nn.Module
    scope: str
    shape: tuple[int, ...]
    folded: bool = False  # a batch norm whose result is its convolution's
    consumer: str = ""  # path of the first module that reads the result


Visit = Callable[[int, torch.Tensor], None]


class _Calls:
    """The calls of a part's modules in the order of a run, and runs that visit their results."""

    def __init__(self, part: TorchPart, feeds: Mapping[str, np.ndarray]) -> None:
        self.part, self.feeds = part, feeds
        self.calls: list[_Call] = []
        self.outputs: dict[str, np.ndarray] = {}
        # Keyed by a tensor's id, which is unique only during its lifetime: nothing is kept alive for this.
        producers: dict[int, tuple[weakref.ref[torch.Tensor], int]] = {}
        self._stack: list[str] = []
        self._listed: dict[int, list[tuple[str, nn.Module, bool]]] = {}

        def record(path: str, module: nn.Module, inputs: Any, result: torch.Tensor) -> None:
            scope = "".join(f"/{name}" for name in self._stack)
            call = _Call(path, module, scope, tuple(result.shape))
            for value in inputs:
                alive, at = producers.get(id(value), (None, -1))
                if alive is not None and alive() is value:
                    self.calls[at].consumer = self.calls[at].consumer or path
                    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and isinstance(
                        self.calls[at].module, nn.Conv1d | nn.Conv2d | nn.ConvTranspose2d
                    ):
                        self.calls[at].folded = True
            producers[id(result)] = weakref.ref(result), len(self.calls)
            self.calls.append(call)

        with self._watched(record):
            part.run(feeds)
        # A folded convolution's result is that of its batch norm, the next call that reads it.
        self.results = list(range(len(self.calls)))
        for at, call in enumerate(self.calls):
            if call.folded:
                self.results[at] = next(
                    i for i in range(at + 1, len(self.calls)) if self.calls[i].path == call.consumer
                )

    def _modules(self, root: nn.Module) -> list[tuple[str, nn.Module, bool]]:
        """Path, module, and whether it calls only quantizers, for every module except the root."""
        if id(root) not in self._listed:
            found = []
            for path, module in root.named_modules():
                if path:
                    leaf = not any(not isinstance(child, Quantizer) for child in module.children())
                    leaf = leaf or isinstance(module, ScaleShift)  # timm's have their activation function inside
                    # Weight quantizers are called too, but are examined together with their layer.
                    found.append((path, module, leaf and not path.endswith("weight_quantizer")))
            self._listed[id(root)] = found
        return self._listed[id(root)]

    @contextmanager
    def _watched(
        self, record: Callable[[str, nn.Module, Any, torch.Tensor], torch.Tensor | None], root: nn.Module | None = None
    ) -> Iterator[None]:
        """Sets hooks on every module of the part (or of `root`, a copy of it). Calls `record(path, module, inputs, result)` for
        those without children; if it returns something, that replaces the result."""
        root = self.part.wrapper if root is None else root
        self._stack = []
        handles = []
        for path, module, leaf in self._modules(root):

            def before(_: nn.Module, __: Any, label: str = _label(path)) -> None:
                self._stack.append(label)

            def after(
                module: nn.Module,
                inputs: Any,
                result: Any,
                path: str = own_path(path),
                leaf: bool = leaf,
            ) -> torch.Tensor | None:
                other = record(path, module, inputs, result) if leaf and isinstance(result, torch.Tensor) else None
                self._stack.pop()
                return other

            handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def visit(self, wanted: Sequence[int], look: Visit) -> dict[str, np.ndarray]:
        """Runs the part and calls `look(call, result)` for each wanted call, before anything can overwrite the result."""
        results = defaultdict(list)
        for call in wanted:
            results[self.results[call]].append(call)
        count = iter(range(len(self.calls)))

        def record(path: str, module: nn.Module, inputs: Any, result: torch.Tensor) -> None:
            for call in results.get(next(count), ()):
                look(call, result)

        with self._watched(record):
            return self.part.run(self.feeds)


class _Matches:
    """Matches a graph's tensors with the results of calls."""

    def __init__(self, model: onnx.ModelProto, calls: _Calls) -> None:
        self.model, self.calls = model, calls
        self.nodes = list(model.graph.node)
        self.producer = producers(model.graph)
        self.order = {name: at for at, node in enumerate(self.nodes) for name in node.output}
        self.constants = constants(model.graph)
        self.call_of: dict[str, int] = {}
        self._match()
        self.names = {call: name for name, call in self.call_of.items()}

    def _nodes_of(self, module: nn.Module, scope: list[onnx.NodeProto]) -> onnx.NodeProto | None:
        """The node of a scope that computes the module's result."""
        for kind, operators in _OPERATORS:
            if isinstance(module, kind):
                fitting = [node for node in scope if node.op_type in operators]
                return fitting[-1] if fitting else None
        return scope[-1]

    def _match(self) -> None:
        scopes: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in self.nodes:
            if node.name.startswith("/") and node.op_type != "Constant" and node.output:
                scopes[node.name.rpartition("/")[0]].append(node)
        # The third call of "quant_x" is written "quant_x_2", like the first call of a quantizer with that name: their order
        # distinguishes them.
        counts: dict[str, int] = defaultdict(int)
        calls: dict[str, list[int]] = defaultdict(list)
        for at, call in enumerate(self.calls.calls):
            off = isinstance(call.module, Quantizer) and call.module._disabled
            if not off and not isinstance(call.module, nn.Identity | nn.Dropout):
                number = counts[call.scope]
                counts[call.scope] += 1
                calls[f"{call.scope}_{number}" if number else call.scope].append(at)
        for scope, own in calls.items():
            nodes = scopes.get(scope, [])
            if len(own) > 1:
                kinds = [node for node in nodes if node.op_type == nodes[-1].op_type]
                ends = [nodes.index(node) + 1 for node in kinds]
                if len(ends) != len(own):
                    continue
                pieces = [nodes[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)]
            else:
                pieces = [nodes]
            for at, piece in zip(own, pieces, strict=True):
                node = self._nodes_of(self.calls.calls[at].module, piece) if piece else None
                if node is not None:
                    self.call_of[node.output[0]] = at

    def ancestors(self, name: str) -> list[str]:
        """Matched tensors that `name` is computed from, and itself, in topological order."""
        seen, stack = {name}, [name]
        while stack:
            node = self.producer.get(stack.pop())
            for source in node.input if node is not None else ():
                if source not in seen:
                    seen.add(source)
                    stack.append(source)
        return sorted((n for n in seen if n in self.call_of or n == name), key=lambda n: self.order.get(n, -1))

    def nearest(self, name: str) -> list[str]:
        """The nearest matched tensors before `name`."""
        found, seen = [], {name}
        stack = list(self.producer[name].input) if name in self.producer else []
        while stack:
            source = stack.pop()
            if source in seen or source in self.constants:
                continue
            seen.add(source)
            if source in self.call_of:
                found.append(source)
            elif source in self.producer:
                stack += self.producer[source].input
        return sorted(found, key=lambda n: self.order[n])


class _Search:
    """SQNR and tolerance of tensors inside a graph, looked up a few at a time."""

    def __init__(self, matches: _Matches, known: Mapping[str, tuple[float, float] | None]) -> None:
        self.matches, self.calls = matches, matches.calls
        self.rounds = any(node.op_type == "QuantizeLinear" for node in matches.nodes)
        self.known: dict[str, tuple[float, float] | None] = dict(known)

    def look(self, names: Sequence[str]) -> None:
        """Computes the figures of these tensors: one run of the graph and one or two of the module."""
        wanted = [name for name in names if name not in self.known]
        while wanted:
            some: list[str] = []
            size = 0
            while wanted and len(some) < POINTS:
                size += 4 * int(np.prod(self.calls.calls[self.matches.call_of[wanted[0]]].shape))
                if some and size > BYTES:
                    break
                some.append(wanted.pop(0))
            self._pass(some)

    def _pass(self, names: Sequence[str]) -> None:
        model = onnx.ModelProto()
        model.CopyFrom(self.matches.model)
        del model.graph.output[:]
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
        candidates = PlainGraph(model.SerializeToString()).run(self.calls.feeds)
        calls = {self.matches.call_of[name]: name for name in names}
        references: dict[str, np.ndarray] = {}

        def keep(call: int, result: torch.Tensor) -> None:
            references[calls[call]] = result.detach().cpu().numpy().copy()

        self.calls.visit(list(calls), keep)
        limits = dict.fromkeys(names, tolerance_db())
        if self.rounds:

            def limit(call: int, result: torch.Tensor) -> None:
                name = calls[call]
                exact = result.detach().cpu().numpy()
                limits[name] = tolerance_db(compare_tensors(exact, references[name])["sqnr_db"])

            with quantizers_off(self.calls.part.wrapper):
                self.calls.visit(list(calls), limit)
        for name in names:
            if candidates[name].shape != references[name].shape:  # its name matches, but it is another tensor
                self.known[name] = None
                continue
            self.known[name] = (compare_tensors(references[name], candidates[name])["sqnr_db"], limits[name])

    def diverged(self, name: str) -> bool | None:
        """Whether the tensor has diverged; None if it is not a match."""
        figures = self.known[name]
        return None if figures is None else figures[0] < figures[1]

    def first_in(self, chain: list[str]) -> str:
        """A diverged tensor from a list in topological order whose last tensor has diverged."""
        low, high = -1, len(chain) - 1
        while high - low > 1:
            count = min(POINTS, high - low - 1)
            places = sorted({low + (high - low) * (i + 1) // (count + 1) for i in range(count)} - {low, high})
            self.look([chain[i] for i in places])
            for place in places:
                state = self.diverged(chain[place])
                if state is None:
                    continue
                if state:
                    high = place
                    break
                low = place
            else:
                if all(self.diverged(chain[i]) is None for i in places):
                    chain = [name for i, name in enumerate(chain) if i not in places]
                    high -= len(places)
        return chain[high]

    def first(self, output: str) -> str:
        """The first diverged tensor before a diverged output: none of the nearest ones before it has diverged."""
        found = self.first_in(self.matches.ancestors(output))
        while True:
            before = self.matches.nearest(found)
            self.look(before)
            worse = [name for name in before if self.diverged(name)]
            if not worse:
                return found
            found = self.first_in(self.matches.ancestors(worse[0]))

    def before_db(self, name: str) -> float | None:
        """The lowest SQNR of the nearest matched tensors before it."""
        before = self.matches.nearest(name)
        self.look(before)
        return min((figures[0] for figures in map(self.known.get, before) if figures is not None), default=None)

    def divergence(self, name: str, what: str, note: str = "", module: str = "") -> Divergence:
        """A tensor's entry."""
        node = self.matches.producer[name]
        call = self.matches.call_of.get(name)
        if call is not None:
            self.look([name])
            module = module or self.calls.calls[call].path
        figures = self.known.get(name)
        return Divergence(
            what,
            node.name or name,
            node.op_type,
            module or f"operations before the output {name}",
            None if figures is None else figures[0],
            None if figures is None else figures[1],
            self.before_db(name),
            note,
        )


def _scale(quantizer: Any) -> np.ndarray:
    return quantizer.steps.cpu().numpy()


def _scale_of(matches: _Matches, tensor: str) -> np.ndarray | None:
    """The scale of the Q/DQ pair that computes a tensor."""
    node = matches.producer.get(tensor)
    if node is None or node.op_type != "DequantizeLinear":
        return None
    return matches.constants[node.input[1]].ravel()


def _differs(found: np.ndarray | None, expected: np.ndarray) -> str:
    """The difference of a scale, or ""."""
    if found is None:
        return "its quantizer's Q/DQ pair is missing"
    if found.shape != expected.shape:
        return f"found {found.size} scales, its quantizer has {expected.size}"
    wrong = ~np.isclose(found, expected, rtol=1e-6, atol=0)
    if not wrong.any():
        return ""
    at = int(np.argmax(wrong))
    where = f" of channel {at}" if expected.size > 1 else ""
    return f"found scale {found[at]:.6g}{where}, its quantizer has {expected[at]:.6g}"


def _first_scale(search: _Search) -> Divergence | None:
    """The first layer, in the order of the run, whose Q/DQ pair is missing or has another scale than its quantizer."""
    matches = search.matches
    for at, call in enumerate(search.calls.calls):
        name = matches.names.get(at)
        if isinstance(call.module, Quantizer) and not call.module._disabled:
            note = _differs(None if name is None else _scale_of(matches, name), _scale(call.module))
            if not note:
                continue
            taker = next(
                (
                    matches.names[i]
                    for i, other in enumerate(search.calls.calls)
                    if i > at and i in matches.names and other.path == call.consumer
                ),
                None,
            )
            tensor = name if name is not None else taker
            if tensor is None:
                return Divergence("scale", "(none)", "QuantizeLinear", call.path, None, None, None, note)
            return search.divergence(tensor, "scale", note, call.path)
        quantizer = getattr(call.module, "weight_quantizer", None)
        if quantizer is None or quantizer._disabled or name is None:
            continue
        inputs = matches.producer[name].input
        note = _differs(_scale_of(matches, inputs[1]) if len(inputs) > 1 else None, _scale(quantizer))
        if note:
            return search.divergence(name, "scale", f"weight: {note}")
    return None


def diagnose(
    graph: onnx.ModelProto,
    source: onnx.ModelProto,
    part: TorchPart,
    feeds: Mapping[str, np.ndarray],
    output: str,
) -> list[Divergence]:
    """Finds the first layers at which a graph that failed its verification differs from its module.

    Args:
        graph: what the file holds.
        source: the same before a flavour's pass, with the quantizers' own scales; may be `graph`.
        part: the module, its quantizers in the state of the export.
        feeds: the inputs of both, float32 by name.
        output: the output that is furthest out of tolerance.

    Returns:
        the first layer whose Q/DQ pair is missing or has another scale, if there is one, then the first whose result is
        out of tolerance, if `output` is.
    """
    calls = _Calls(part, feeds)
    references = part.run(feeds)
    candidates = PlainGraph(graph.SerializeToString()).run(feeds)
    search = _Search(_Matches(graph, calls), {})
    exact: Mapping[str, np.ndarray] | None = None
    if search.rounds:
        with quantizers_off(part.wrapper):
            exact = part.run(feeds)
    for name, value in references.items():
        quantization = None if exact is None else compare_tensors(exact[name], value)["sqnr_db"]
        search.known[name] = (compare_tensors(value, candidates[name])["sqnr_db"], tolerance_db(quantization))
    found = []
    scale = _first_scale(_Search(_Matches(source, calls), search.known))
    if scale is not None:
        found.append(scale)
    if search.diverged(output):
        found.append(search.divergence(search.first(output), "output"))
    return found
