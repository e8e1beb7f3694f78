"""The quantized model: the float network's parts as fx graphs with quantizers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from pytorch_quantization.nn import TensorQuantizer
from torch import fx, nn

from qat.core.errors import UserError
from qat.families import family_named
from qat.families.family import PartModule, kept_flow, outputs_of
from qat.families.flow import Flow
from qat.lean.background import absorb_backgrounds, backgrounds, correct_backgrounds
from qat.lean.equalize import equalizable, equalize
from qat.lean.flavours import DEFAULT, flavour_of
from qat.lean.fold import fold_batch_norm
from qat.lean.insert import Inventory, quantize_graph, use_flavour
from qat.lean.modes import quantizers
from qat.lean.ops import least_values
from qat.lean.placement import FloatRule
from qat.lean.quantizer import U8_COARSE, Quantizer
from qat.lean.trace import FIXED_BATCH, trace
from qat.plan import Part, Plan, axes_at

Background = Literal[
    "corrected", "absorbed"
]  # the depth map's background, in corrections of biases or absorbed in the biases


class _Taken(Exception):
    """The arguments of a part's core."""


class _Stop(nn.Module):
    def forward(self, *inputs: Any) -> Any:
        raise _Taken(*inputs)


class _Given(nn.Module):
    """Replaces a graph: returns empty tensors with its result's shapes."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__()
        self.result = [graph.graph.output_node().args[0]]

    def forward(self, *inputs: Any) -> Any:
        batch = len(next(x for x in inputs if isinstance(x, torch.Tensor)))

        def empty(node: fx.Node) -> torch.Tensor:
            size = [batch if isinstance(n, torch.SymInt) else int(n) for n in node.meta["val"].shape]
            return torch.empty(size, device="meta")

        return fx.node.map_arg(self.result[0], empty)


class _Tracer:
    """Traces the parts of a network one after the other; inputs have the shapes of the preceding outputs."""

    def __init__(self, family: Any, network: nn.Module, plan: Plan) -> None:
        self.family, self.network, self.plan = family, network, plan
        self.methods = family.traced(network)
        self.shapes: dict[int, dict[str, tuple[int, ...]]] = {2: {}, 1: {}}

    def _module(self, name: str, core: nn.Module) -> PartModule:
        found: PartModule = self.family.parts(self.network, {name: core})[name]
        return found

    def _inputs(self, part: Part, batch: int) -> list[torch.Tensor]:
        known = self.shapes[batch]
        sizes = {
            name: self.plan.tensors[name].sizes(axes_at(self.plan, batch)) or known[name]
            for name in part.inputs.values()
        }
        types = {name: getattr(torch, self.plan.tensors[name].dtype) for name in part.inputs.values()}
        return [torch.empty(sizes[name], dtype=types[name], device="meta") for name in part.inputs.values()]

    def _core_inputs(self, part: Part, batch: int) -> list[Any]:
        device = next(self.network.parameters()).device
        try:
            self._module(part.name, _Stop())(*self._inputs(part, batch))
        except _Taken as taken:
            return [
                torch.empty(x.shape, dtype=x.dtype, device=device) if isinstance(x, torch.Tensor) else x
                for x in taken.args
            ]
        raise ValueError(f"part {part.name}: its forward never calls its core")

    def trace(self, part: Part) -> fx.GraphModule:
        """The canonical graph of a part's core, for any batch if torch.export supports it."""
        method = self.methods[part.name]
        graph = trace(self.network, self._core_inputs(part, 2), method, keep=True)
        if FIXED_BATCH in graph.meta:  # otherwise for one sample
            examples = self._core_inputs(part, 1)
            graph = trace(self.network, examples, method, keep=True)
            graph.meta[FIXED_BATCH] = len(next(x for x in examples if isinstance(x, torch.Tensor)))
        for batch, shapes in self.shapes.items():
            module = self._module(part.name, _Given(graph))
            found = outputs_of(module, module(*self._inputs(part, batch)))
            shapes.update((name, tuple(x.shape)) for name, x in found.items())
        return graph

    def least(self, part: Part, earlier: Mapping[str, fx.GraphModule]) -> dict[str, float]:
        """Lower bounds of a part's core's inputs, by the core's names, if the preceding graph shows them."""
        module = self._module(part.name, _Stop())
        if not module.direct:
            return {}
        names = [node.name for node in earlier[part.name].graph.nodes if node.op == "placeholder"]
        found = {}
        for own, tensor in zip(names, part.inputs.values(), strict=True):
            before = next((p for p in self.plan.parts.values() if tensor in p.outputs), None)
            if before is None or not self._module(before.name, _Stop()).whole:
                continue
            graph = earlier[before.name]
            result = graph.graph.output_node().args[0]
            if isinstance(result, fx.Node):
                found[own] = least_values(graph)[result]
        return found


def traced_parts(network: Any) -> dict[str, fx.GraphModule]:
    """A float network's parts as canonical graphs (`qat.lean.trace`), by scope.

    Raises:
        UserError: torch.export cannot follow one.
    """
    family = family_named(network.family)
    plan = family.flow(network.config).plan
    tracer = _Tracer(family, network, plan)
    return {part.scope: tracer.trace(part) for part in plan.parts.values()}


class QuantizedModel(nn.Module):
    """A family's network with TensorQuantizers. It holds the quantizers of every flavour and computes in one of them,
    `flavour`, which `use` changes. `qat.model.runners` runs it.

    parts: the graph of each part, by its scope. network: the float one, which is not changed (unchanged layers are shared).

    Args:
        keep_float: layers that stay float; None for the family's. parts_off: scopes of parts that do as a whole, in the flavours
            that are named; None for the family's.

    Raises:
        UserError: a part cannot be traced.
    """

    def __init__(
        self,
        network: Any,
        keep_float: Sequence[FloatRule] | None = None,
        parts_off: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        super().__init__()
        network.eval()
        self.family = family_named(network.family)
        self.config = network.config
        recipe = self.family.recipe(self.config)
        self._network = [network]  # not a submodule: its weights are not this model's
        self.keep_float = tuple(recipe.keep_float if keep_float is None else keep_float)
        off = recipe.parts_off if parts_off is None else parts_off
        self.off_in = {name: tuple(flavours) for name, flavours in off.items()}
        self.flavour = DEFAULT
        self.parts = nn.ModuleDict()
        self.inventory: dict[str, Inventory] = {}
        self.equalized: dict[str, torch.Tensor] = {}  # `part.quantizer` → the divisors of its channels
        self.background: Background | None = None
        self.absorbed: frozenset[str] = frozenset()  # `part.path` of layers whose bias includes its correction
        self.fixed_views: int | None = None
        tracer = _Tracer(self.family, network, self.plan)
        graphs: dict[str, fx.GraphModule] = {}
        for name, part in self.plan.parts.items():
            graph = graphs[name] = tracer.trace(part)
            fold_batch_norm(graph)
            if graph.meta.get(FIXED_BATCH) is not None:
                self.fixed_views = graph.meta[FIXED_BATCH]
            least = tracer.least(part, graphs)
            self.inventory[part.scope] = quantize_graph(graph, self.keep_float, least, recipe.round_outputs)
            graph.scope = part.scope  # type: ignore[assignment]  # a name for `PartModule`
            self.parts[part.scope] = graph
        self.use(DEFAULT)
        self.eval()

    @property
    def network(self) -> Any:
        """The float network."""
        return self._network[0]

    @property
    def flow(self) -> Flow:
        """The host's side, for the current config."""
        return kept_flow(self, self.family)

    @property
    def plan(self) -> Plan:
        """The plan."""
        return self.flow.plan

    def use(self, flavour: str, parts_int8: Sequence[str] = ()) -> None:
        """From now on the detector computes the same as this flavour's exports.

        Args:
            parts_int8: parts that are off in this flavour, to quantize anyway.

        Raises:
            UserError: an unknown flavour; a part that is not off, or that has quantizers without a range.
        """
        flavour_of(flavour)
        off = [name for name, flavours in self.off_in.items() if flavour in flavours and name in self.parts]
        for name in parts_int8:
            if name not in off:
                raise UserError(
                    f"parts-int8: found {name!r}, expected a part that calibrate kept float: {', '.join(off) or 'none'}"
                )
        self.flavour = flavour
        self.parts_off = tuple(name for name in off if name not in parts_int8)
        for name, graph in self.parts.items():
            assert isinstance(graph, fx.GraphModule)
            use_flavour(graph, flavour)
            for path, quantizer in quantizers(graph).items():
                if name in self.parts_off:
                    quantizer._disabled = True
                elif name in parts_int8 and not quantizer._disabled and quantizer.amax is None:
                    raise UserError(f"part {name}: found no range for {path}, expected one; calibrate again")
        self._coarse()
        self.correct_background()

    @contextmanager
    def in_flavour(self, flavour: str, parts_int8: Sequence[str] = ()) -> Iterator[None]:
        """Inside the block the detector computes in another flavour."""
        before, extra = self.flavour, [n for n in self._off_in(self.flavour) if n not in self.parts_off]
        self.use(flavour, parts_int8)
        try:
            yield
        finally:
            self.use(before, extra)

    def _off_in(self, flavour: str) -> list[str]:
        return [name for name, flavours in self.off_in.items() if flavour in flavours and name in self.parts]

    def _coarse(self) -> None:
        """Inputs of layers whose biases hold corrections for s8's step keep that step if they are rounded from zero up."""
        for part, graph in self.parts.items():
            assert isinstance(graph, fx.GraphModule)
            for path, taken in backgrounds(graph).items() if self.absorbed else ():
                if (
                    f"{part}.{path}" in self.absorbed
                    and taken.quantizer is not None
                    and taken.quantizer.spec.levels == 255
                ):
                    taken.quantizer.spec = U8_COARSE

    def activation_quantizers(self) -> dict[str, TensorQuantizer]:
        """Quantizers of activations with their own ranges by `part.name`, including those that are off."""
        return {name: q for name, q in quantizers(self.parts).items() if not q.weights and q.shares is None}

    def equalizable(self, kind: str) -> dict[str, list[str]]:
        """Quantizers by `part.name` whose channels can be equalized (`qat.lean.equalize`), with their consumers' paths. kind: INPUTS
        or INSIDE."""
        found = {}
        for part, inventory in self.inventory.items():
            graph = self.parts[part]
            assert isinstance(graph, fx.GraphModule)
            if part in self.parts_off:  # the float form would have one more product
                continue
            for name, layers in equalizable(graph, inventory, kind).items():
                found[f"{part}.{name}"] = [f"{part}.{path}" for path in layers]
        return found

    def equalize(self, name: str, scales: torch.Tensor) -> None:
        """Divides the channels of the tensor that quantizer `part.name` rounds by `scales`, float32[C].

        Raises:
            ValueError: they cannot be divided.
        """
        part, _, quantizer = name.partition(".")
        if part not in self.parts:
            raise ValueError(f"{name}: no such quantizer")
        graph = self.parts[part]
        assert isinstance(graph, fx.GraphModule)
        equalize(graph, quantizer, scales)
        self.equalized[name] = scales

    def keep_background(self) -> None:
        """Keeps the constant that fills most of the depth map's tensors exact (`qat.lean.background`).

        Sets `background` to "corrected". The corrections depend on weights and ranges: call again after those change.
        """
        self.background = "corrected"
        self.correct_background()

    def correct_background(self) -> None:
        """Computes existing corrections again, for the current weights, ranges and steps."""
        if self.background is None:
            return
        for part, graph in self.parts.items():
            assert isinstance(graph, fx.GraphModule)
            own = {name.partition(".")[2] for name in self.absorbed if name.partition(".")[0] == part}
            correct_backgrounds(graph, own)

    def absorb_background(self) -> None:
        """Adds the corrections of layers that are INT8 now to their biases, which may then be trained. Sets `background` to
        "absorbed" if there were any."""
        if self.background is None:
            return
        self.background = "absorbed"
        found = set(self.absorbed)
        for part, graph in self.parts.items():
            assert isinstance(graph, fx.GraphModule)
            found |= {f"{part}.{path}" for path in absorb_backgrounds(graph)}
        self.absorbed = frozenset(found)

    def amax(self) -> dict[str, torch.Tensor]:
        """The range of each quantizer that has its own, by its path."""
        own = quantizers(self.parts)
        return {name: q.amax.detach().clone() for name, q in own.items() if q.shares is None and q.amax is not None}

    def ends(self) -> dict[str, torch.Tensor]:
        """The smallest and the largest value of each quantized tensor, float32[2] by its quantizer's path; of those that were
        observed."""
        own = quantizers(self.parts)
        return {name: torch.tensor(q.ends) for name, q in own.items() if q.ends is not None}

    def float_names(self) -> list[str]:
        """Paths of the quantizers that are off in every flavour."""
        return [name for name, quantizer in quantizers(self.parts).items() if quantizer.off]

    def weights(self) -> dict[str, torch.Tensor]:
        """The parts' parameters by path (batch norm folded), without the quantizers'.

        (No buffers: those belong to the network, or are constants of the trace, whose names torch chooses.)
        """
        own = quantizers(self.parts)
        named = self.parts.named_parameters(remove_duplicate=False)
        return {name: x.detach() for name, x in named if name.rpartition(".")[0] not in own}

    def load_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Sets weights from `weights`; ranges do not change.

        Raises:
            KeyError: the names differ from this detector's. ValueError: a shape does.
        """
        own = self.weights()
        if strange := set(weights) ^ set(own):
            raise KeyError(f"weights differ: {', '.join(sorted(strange)[:5])}")
        for name, tensor in own.items():
            if tensor.shape != weights[name].shape:
                raise ValueError(f"{name}: found shape {list(weights[name].shape)}, expected {list(tensor.shape)}")
            tensor.copy_(weights[name])

    def load_amax(
        self,
        amax: Mapping[str, torch.Tensor],
        disabled: Sequence[str],
        ends: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Sets saved ranges, and the quantizers that are off in every flavour. Those that are off need no range (another tool's
        checkpoint has none for them).

        Raises:
            KeyError: the names differ from this detector's, or one that is on has no range. ValueError: a range is not positive
                and finite, or has another shape.
        """
        own = quantizers(self.parts)
        if strange := sorted((set(amax) | set(disabled) | set(ends or ())) - set(own)):
            raise KeyError(f"found quantizers that the network lacks: {_few(strange)}")
        needed = {name for name, quantizer in own.items() if quantizer.shares is None}
        if without := sorted(needed - set(amax) - set(disabled)):
            raise KeyError(f"found no range (amax) for {len(without)} of {len(needed)} quantizers: {_few(without)}")
        for name, tensor in amax.items():
            before = own[name].amax  # quantizers of weights already have their weights' range; others have none yet
            shape = [] if before is None else list(before.shape)
            if tensor.numel() != 1 and list(tensor.shape) != shape:
                raise ValueError(f"{name}: found a range of shape {list(tensor.shape)}, expected {shape}")
            if not bool(((tensor > 0) & tensor.isfinite()).all()):
                raise ValueError(f"{name}: found a range of {tensor.min().item():g}, expected finite values above 0")
        for name, tensor in (ends or {}).items():
            if tensor.numel() != 2 or not float(tensor[0]) <= float(tensor[1]):
                raise ValueError(f"{name}: found ends {tensor.tolist()}, expected the smallest and the largest value")
        for name, quantizer in own.items():
            assert isinstance(quantizer, Quantizer)
            if name in amax:
                quantizer.set_range(amax[name])
            if ends is not None and name in ends:
                quantizer.ends = (float(ends[name][0]), float(ends[name][1]))
            quantizer.off = name in disabled
        self.use(self.flavour)


def _few(names: Sequence[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (", …" if len(names) > count else "")
