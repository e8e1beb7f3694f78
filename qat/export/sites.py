"""The reference of an INT8 graph's sites (`qat.core.sites`): PyTorch's results in each, from the same codes.

A part runs with hooks on its quantizers. Each hook gets the unrounded value and returns codes: those of its rounding, or
given ones. In one run with given codes every segment between two quantizers is computed independently, because the output
of a segment is checked but not used.

Everything that the graph's flavour rounds is rounded in PyTorch too (`prepared`, `_Hooks`): weights, always; biases to the
scale of the products (s32) in the CPU flavours; weights, biases, scales and every layer's result to FP16 in
`tensorrt-strong`, sums and products between layers too.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from qat.core.onnx_cut import Cut, Pair
from qat.core.sites import Site, cut_patch, places, site_line
from qat.core.tensors import in_float64
from qat.export.bisect import _Calls, _Matches
from qat.export.fp16 import LEAST_SCALE
from qat.export.intermediates import fixed_inputs, tensor_types
from qat.export.scale_as_depthwise import weight_steps
from qat.families.family import own_path
from qat.lean.canonical import size
from qat.lean.layers import ScaleShift
from qat.lean.quantizer import Quantizer, Spec
from qat.lean.trace import submodule
from qat.model.runners import TorchPart

NHWC = (0, 2, 3, 1)


def expected_grids(quantizer: Quantizer, half: bool) -> list[tuple[np.ndarray, int, str]]:
    """The (scale, zero point, dtype of codes) that a graph may have for a quantizer: its own, or that with an FP16 scale."""
    scale, zero = quantizer.parameters_of_rounding()
    steps = scale.cpu().numpy().astype(np.float32)
    dtype = "int8" if quantizer.spec.low < 0 else "uint8"
    grids = [(steps, zero, dtype)]
    if half:
        grids.append((steps.astype(np.float16).astype(np.float32), zero, dtype))
    return grids


def _is_one_of(pair: Pair, grids: Sequence[tuple[np.ndarray, int, str]]) -> bool:
    return any(
        pair.dtype == dtype
        and pair.scale.size == scale.size
        and np.allclose(pair.scale.ravel(), scale.ravel(), rtol=2.0**-22, atol=0)
        and bool((pair.zero == zero).all())
        for scale, zero, dtype in grids
    )


def _half(x: torch.Tensor) -> torch.Tensor:
    """x with FP16's 11 bits. Values beyond FP16's range are rounded as if they were within it: the graph keeps them in FP32
    (`qat.export.fp16`), and if it does not, its infinity must not become the reference."""
    rounded = x.half().to(x.dtype)
    if not bool(rounded.isinf().any()):
        return rounded
    fraction, exponent = torch.frexp(x)
    return torch.where(
        rounded.isinf() & x.isfinite(), torch.ldexp((fraction * 2**11).round() / 2**11, exponent), rounded
    )


@torch.no_grad()
def prepared(wrappers: Mapping[str, nn.Module], half: bool) -> dict[str, nn.Module]:
    """A copy of a detector's parts whose weights are the rounded ones, with their quantizers off: hooks round activations."""
    copies = copy.deepcopy(dict(wrappers))
    seen: set[nn.Module] = set()
    for wrapper in copies.values():
        own = [module for module in wrapper.modules() if module not in seen]
        seen.update(own)
        _prepare(own, half)
    return copies


def _prepare(modules: Sequence[nn.Module], half: bool) -> None:
    layer: Any  # nn.Module's attributes are untyped
    for layer in modules:
        quantizer = getattr(layer, "weight_quantizer", None)
        if not isinstance(quantizer, Quantizer) or quantizer._disabled:
            continue
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        # Divided by the scale, as in ONNX's definition: multiplied by its inverse, as in PyTorch, some fall on the other side
        # of a half.
        amax, spec = quantizer.range.detach(), quantizer.spec
        steps = (amax if spec.per_channel else amax.max().reshape([1] * weight.ndim)) / spec.levels
        rounded = (weight / steps).round().clamp(spec.low, spec.high) * steps
        if half:
            # Like `qat.export.flavour_tensorrt_strong`: FP16 scales; a tiny one is rounded again with the smallest in FP16.
            coarse = (steps < LEAST_SCALE) & (steps.max() >= LEAST_SCALE)
            stepped = torch.where(coarse, torch.full_like(steps, LEAST_SCALE), steps)
            codes = torch.where(coarse, (weight / stepped).round(), (rounded / steps).round()).clamp(-128, 127)
            rounded = codes * (stepped.half().float() if bool((stepped >= LEAST_SCALE).all()) else stepped)
        layer.weight = nn.Parameter(rounded, requires_grad=False)
        if (shift := getattr(layer, "background_shift", None)) is not None:
            bias = layer.bias
            layer.bias = nn.Parameter(shift.clone() if bias is None else bias + shift, requires_grad=False)
            layer.background_shift = None
        layer.product_steps = steps.flatten()
    for module in modules:
        if isinstance(module, Quantizer):
            module._disabled = True
        elif half:
            rounded_weight = hasattr(module, "product_steps")
            for name, parameter in module.named_parameters(recurse=False):
                if not (rounded_weight and name == "weight"):
                    parameter.copy_(_half(parameter))


@dataclass
class _Place:
    """A rounded tensor in PyTorch, and its pair in the graph. perm: from PyTorch's layout to the graph's, None for the same."""

    pair: Pair
    perm: tuple[int, ...] | None = None

    def to_graph(self, value: torch.Tensor) -> torch.Tensor:
        return value if self.perm is None else value.permute(*self.perm)

    def to_torch(self, value: torch.Tensor) -> torch.Tensor:
        return value if self.perm is None else value.permute(*np.argsort(self.perm).tolist())


def _codes(value: torch.Tensor, scale: torch.Tensor, zero: Any, limits: tuple[int, int]) -> torch.Tensor:
    """Codes like QuantizeLinear's, in the value's type."""
    return (value / scale).round_().add_(zero).clamp_(*limits)


class _HalfArithmetic(TorchDispatchMode):
    """Sums, products and quotients between modules (a residual sum, a norm that is written out) are rounded to FP16 too."""

    ROUNDED = (torch.ops.aten.add, torch.ops.aten.sub, torch.ops.aten.mul, torch.ops.aten.div)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket in self.ROUNDED and result.dtype == torch.float32:
            return _half(result)
        return result


Look = Callable[[str, torch.Tensor], None]


def _constant_quantizers(wrapper: nn.Module) -> set[nn.Module]:
    """Quantizers of tensors that depend only on sizes, not on inputs: their results are constants in the graph."""
    found: set[nn.Module] = set()
    for graph in wrapper.modules():
        if not isinstance(graph, fx.GraphModule):
            continue
        live: set[fx.Node] = set()
        for node in graph.graph.nodes:
            if node.op == "placeholder" or (node.target is not size and live.intersection(node.all_input_nodes)):
                live.add(node)
        calls = [(node, submodule(graph, node)) for node in graph.graph.nodes]
        own = {module for node, module in calls if isinstance(module, Quantizer) and node not in live}
        found |= own - {module for node, module in calls if module is not None and node in live}
    return found


def _whole_products(bias: torch.Tensor, step: float, steps: torch.Tensor) -> torch.Tensor:
    """A bias in whole steps of the products. In float64, as `qat.export.integer_weights`: in float32 some would fall on the other
    side of a half."""
    scale = (step * steps.double()).float().double()
    return (bias.double() / scale).round() * scale


class _Hooks:
    """A run of one prepared part with its own codes or given ones."""

    def __init__(
        self, owner: SiteReference, wrapper: nn.Module, given: Mapping[str, np.ndarray] | None, look: Look
    ) -> None:
        self.owner, self.wrapper, self.given, self.look = owner, wrapper, given, look
        self.count = 0
        self.rounded: dict[int, tuple[weakref.ref[torch.Tensor], int]] = {}  # by id of the rounded tensor
        self.made: dict[int, tuple[weakref.ref[torch.Tensor], Pair]] = {}  # by id of the result

    def record(self, path: str, module: nn.Module, inputs: Any, result: torch.Tensor) -> torch.Tensor | None:
        with _disable_current_modes():
            return self._record(module, inputs, result)

    def _record(self, module: nn.Module, inputs: Any, result: torch.Tensor) -> torch.Tensor | None:
        at, self.count = self.count, self.count + 1
        place = self.owner.places.get(at)
        if place is None and at in self.owner.constants:  # rounded in the graph's constants
            quantizer = self.owner.constants[at]
            spec: Spec = quantizer.spec
            scale, zero = quantizer.parameters_of_rounding()
            scale = scale.to(inputs[0].dtype)
            return (_codes(inputs[0], scale, zero, (spec.low, spec.high)) - zero) * scale
        if place is None:
            if at in self.owner.lost:
                # Equal pairs on one tensor may be one in the graph.
                alive, source = self.rounded.get(id(inputs[0]), (None, -1))
                if alive is not None and alive() is inputs[0]:
                    self.owner.lost.discard(at)
                    self.owner.same[at] = source
            if at in self.owner.same:
                place = self.owner.places[self.owner.same[at]]
                return self._hand_on(place, inputs[0])
            return _half(result) if self.owner.half and result.dtype == torch.float32 else None
        self.rounded[id(inputs[0])] = weakref.ref(inputs[0]), at
        return self._look_and_round(place, inputs[0])

    def _look_and_round(self, place: _Place, value: torch.Tensor) -> torch.Tensor:
        if self.owner.half and value.dtype == torch.float32:
            value = _half(value)
        self.look(place.pair.codes, place.to_graph(value))
        return self._hand_on(place, value)

    def _hand_on(self, place: _Place, value: torch.Tensor) -> torch.Tensor:
        pair = place.pair
        shape = [1] * value.ndim
        if pair.scale.size > 1:
            shape[1] = -1
        scale = torch.from_numpy(pair.scale.reshape(shape)).to(value.dtype)
        zero = torch.from_numpy(pair.zero.reshape(shape)).to(value.dtype)
        if self.given is None:
            codes = _codes(value, scale, zero, pair.limits)
        else:
            codes = place.to_torch(torch.from_numpy(self.given[pair.codes])).to(value.dtype)
        result = (codes - zero) * scale
        if self.owner.half and result.dtype == torch.float32:
            result = _half(result)
        result = result.contiguous()
        self.made[id(result)] = weakref.ref(result), pair
        return result

    def _input_step(self, inputs: Any) -> float | None:
        """The step of a layer's input, if one quantizer with a single step computed it."""
        alive, pair = self.made.get(id(inputs[0]), (None, None))
        if alive is None or alive() is not inputs[0] or pair is None or pair.scale.size > 1:
            return None
        return float(pair.scale.ravel()[0])

    @torch.no_grad()
    def before_layer(self, layer: Any, inputs: Any) -> None:
        """Rounds a convolution's bias to the scale of its products, as the CPU flavours store it."""
        step = self._input_step(inputs)
        if step is not None:
            layer.bias.copy_(_whole_products(layer.float_bias, step, layer.product_steps))

    @torch.no_grad()
    def before_scale(self, layer: Any, inputs: Any) -> None:
        """Rounds a batch norm's scale and shift like the convolution that replaces it (`qat.export.scale_as_depthwise`)."""
        step = self._input_step(inputs)
        if step is not None:
            scale, shift = layer.floats
            steps = torch.from_numpy(weight_steps(scale.numpy(), shift.numpy(), step))
            layer.scale.copy_((scale / steps).round().double() * steps.double())
            layer.shift.copy_(_whole_products(shift, step, steps))

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        handles = []
        layer: Any  # nn.Module's attributes are untyped
        for path, layer in self.wrapper.named_modules() if self.owner.depthwise else ():
            if own_path(path) in self.owner.depthwise:
                if not hasattr(layer, "floats"):
                    layer.floats = [value.detach().clone().float() for value in (layer.scale, layer.shift)]
                handles.append(layer.register_forward_pre_hook(self.before_scale))
        if self.owner.round_biases:
            for layer in self.wrapper.modules():
                if (
                    isinstance(layer, nn.Conv1d | nn.Conv2d)
                    and hasattr(layer, "product_steps")
                    and layer.bias is not None
                ):
                    if not hasattr(layer, "float_bias"):
                        layer.float_bias = layer.bias.detach().clone()
                    handles.append(layer.register_forward_pre_hook(self.before_layer))
        double = next(self.wrapper.parameters()).dtype == torch.float64
        values = in_float64(feeds) if double else feeds
        try:
            rounding = _HalfArithmetic() if self.owner.half and not double else contextlib.nullcontext()
            with self.owner.calls._watched(self.record, self.wrapper), rounding:
                return TorchPart(self.wrapper).run(values)
        finally:
            for handle in handles:
                handle.remove()


class SiteReference:
    """One INT8 part in PyTorch, matched with its graph's sites.

    cut: the graph's pieces. modules: each site's name → the quantizer's path in the detector. problems: mismatches:
    a quantizer without a pair, a pair without a quantizer, a scale or zero point that is not the quantizer's.
    """

    def __init__(
        self,
        part: TorchPart,
        base: nn.Module,
        exact: Callable[[], nn.Module],
        graph: bytes,
        feeds: Mapping[str, np.ndarray],
        half: bool = False,
    ) -> None:
        """Matches the graph's pairs with the quantizers.

        Args:
            part: in the state of the export.
            base: its copy from `prepared`. exact: returns that in float64.
            graph: the file's bytes.
            feeds: some inputs, to find the order of the calls.
            half: whether the graph is typed FP16.
        """
        self.half, self._base, self._exact = half, base, exact
        self.cut = Cut(graph)
        self.calls = _Calls(part, feeds)
        model = onnx.load_from_string(graph)
        # Convolutions whose biases are s32, as the CPU flavours store them.
        self.round_biases = any(
            node.op_type == "DequantizeLinear" and node.name.endswith("_bias_dq") for node in model.graph.node
        )
        matches = _Matches(model, self.calls)
        operators = {name: node.op_type for node in model.graph.node for name in node.output}
        self.depthwise = {
            self.calls.calls[at].path
            for name, at in matches.call_of.items()
            if isinstance(self.calls.calls[at].module, ScaleShift) and operators[name] == "Conv"
        }
        self.places: dict[int, _Place] = {}
        self.same: dict[int, int] = {}
        self.modules: dict[str, str] = {}
        self.problems: list[str] = []
        back: dict[str, list[str]] = {}
        for node in model.graph.node:
            if node.op_type == "DequantizeLinear":
                back.setdefault(node.input[0], []).append(node.output[0])
        for name, pair in self.cut.pairs.items():
            found = [matches.call_of[o] for o in back.get(name, ()) if o in matches.call_of]
            if not found:  # a pass may have replaced its DequantizeLinear: match by the name of its QuantizeLinear
                scope = pair.node.split("/")[-2:-1]
                found = [
                    at
                    for at, call in enumerate(self.calls.calls)
                    if isinstance(call.module, Quantizer) and [call.path.rpartition(".")[2]] == scope
                ]
                found = found if len(found) == 1 else []
            call = self.calls.calls[found[0]] if found else None
            if call is None or not isinstance(call.module, Quantizer):
                self.problems.append(f"{pair.node or name}: the module has no such quantizer")
                continue
            self.modules[name] = call.path
            self.places[found[0]] = _Place(pair)
            grids = expected_grids(call.module, half)
            if not _is_one_of(pair, grids):
                scale, _, dtype = grids[0]
                self.problems.append(
                    f"{call.path}: found scale {pair.scale.ravel()[0]:.9g}, zero point {pair.zero.ravel()[0]} ({pair.dtype}), "
                    f"its quantizer has {scale[0]:.9g} ({dtype})"
                )
        for name in self.cut.outputs:
            self.modules[name] = f"output {name}"
        constant = _constant_quantizers(part.wrapper)
        self.constants: dict[int, Quantizer] = {}
        for at, call in enumerate(self.calls.calls):
            module = call.module
            if module in constant and isinstance(module, Quantizer) and not module._disabled:
                self.constants[at] = module
        self.lost = {
            at
            for at, call in enumerate(self.calls.calls)
            if isinstance(call.module, Quantizer)
            and not call.module._disabled
            and at not in self.places
            and call.module not in constant
        }
        self._shapes(model, feeds)

    def _shapes(self, model: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> None:
        """The sites with another layout in the graph: a pass may have left their channels last."""
        types = tensor_types(fixed_inputs(model, feeds))
        for at, place in self.places.items():
            here = tuple(d.dim_value for d in types[place.pair.codes].shape.dim)
            there = self.calls.calls[at].shape
            if here != there and len(there) == 4 and here == tuple(there[axis] for axis in NHWC):
                place.perm = NHWC

    def simulate(self, feeds: Mapping[str, np.ndarray], look: Look = lambda name, value: None) -> dict[str, np.ndarray]:
        """The part's outputs in PyTorch's simulation of the graph: the module's own, on the graph's grids.

        `look(site, value)` sees what each quantizer rounds, in the graph's layout.
        """
        found = _Hooks(self, self._base, None, look).run(feeds)
        for at in sorted(self.lost):
            self.problems.append(f"{self.calls.calls[at].path}: its quantizer's Q/DQ pair is missing")
        self.lost = set()
        return found

    def sites(
        self,
        feeds: Mapping[str, np.ndarray],
        codes: Mapping[str, np.ndarray],
        patches: Mapping[str, np.ndarray] | None = None,
    ) -> dict[str, Site]:
        """The reference of every site on these inputs and codes. patches: the repeated patches of codes, to store with it."""
        shapes: dict[str, tuple[int, ...]] = {}

        def run(wrapper: nn.Module) -> dict[str, np.ndarray]:
            found: dict[str, np.ndarray] = {}

            def look(name: str, value: torch.Tensor) -> None:
                pair = self.cut.pairs[name]
                shapes[name] = tuple(value.shape)
                at = places(value.numel())
                if pair.scale.size > 1:
                    shape = [-1 if axis == 1 else 1 for axis in range(value.ndim)]
                    scale, zero = (
                        torch.from_numpy(pair.scale).reshape(shape),
                        torch.from_numpy(pair.zero).reshape(shape),
                    )
                    found[name] = (value / scale + zero).reshape(-1).double().numpy()[at]
                else:
                    flat = value.reshape(-1).numpy()[at].astype(np.float64)
                    found[name] = flat / np.float64(pair.scale.ravel()[0]) + np.float64(pair.zero.ravel()[0])

            for name, value in _Hooks(self, wrapper, codes, look).run(feeds).items():
                shapes[name] = value.shape
                found[name] = value.ravel()[places(value.size)].astype(np.float64)
            return found

        noisy, exact = run(self._base), run(self._exact())
        return {
            name: Site.of(
                name, shapes[name], self.cut.pairs.get(name), (patches or {}).get(name), exact[name], noisy[name]
            )
            for name in self.cut.sites
            if name in exact
        }

    def codes(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Every site's codes on these inputs."""
        found: dict[str, np.ndarray] = {}

        def look(name: str, value: torch.Tensor) -> None:
            pair = self.cut.pairs[name]
            shape = [-1 if axis == 1 and pair.scale.size > 1 else 1 for axis in range(value.ndim)]
            scale, zero = torch.from_numpy(pair.scale).reshape(shape), torch.from_numpy(pair.zero).reshape(shape)
            codes = _codes(value, scale, zero, pair.limits)
            found[name] = np.ascontiguousarray(codes.numpy().astype(pair.dtype))

        self.simulate(feeds, look)
        return found

    def patches(self, codes: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """A patch of each site's codes."""
        modules = {own_path(name): module for name, module in self._base.named_modules()}
        last = {
            place.pair.codes
            for at, place in self.places.items()
            if place.perm is not None or isinstance(modules.get(self.calls.calls[at].consumer), nn.Linear)
        }
        return {
            name: cut_patch(value, value.ndim - 1 if name in last or value.ndim < 4 else 1)
            for name, value in codes.items()
        }

    def failures(self, found: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The failed entries of `check_sites`, in the form of the manifest's `divergence`."""
        rows = []
        for name, entry in found.items():
            if not entry["passed"]:
                pair = self.cut.pairs.get(name)
                module = self.modules.get(name, name)
                row = {**entry, "codes": pair is not None}
                node = name if pair is None else pair.node or name
                rows.append(
                    {
                        "what": "site",
                        "node": node,
                        "operator": "QuantizeLinear" if pair else "output",
                        "module": module,
                        "note": site_line(row, module),
                    }
                )
        return rows
