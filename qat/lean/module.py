"""`quantize` turns any module into its calibrated INT8 simulation."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from qat.core.errors import UserError
from qat.lean.calibrators import METHODS
from qat.lean.flavours import DEFAULT, flavour_of
from qat.lean.fold import fold_batch_norm
from qat.lean.insert import Inventory, quantize_graph, use_flavour
from qat.lean.modes import quantizers
from qat.lean.observe import counting_macs, observing, set_ranges
from qat.lean.placement import FloatRule
from qat.lean.trace import UNTRACEABLE, first_line, trace

KEPT = "requested with keep_float"


def float_rules(given: Iterable[str | tuple[str, str] | FloatRule]) -> list[FloatRule]:
    """Rules from patterns of module paths (shell style): `PATTERN`, `PATTERN=reason`, (pattern, reason) or a rule."""
    found = []
    for one in given:
        if isinstance(one, FloatRule):
            found.append(one)
        elif isinstance(one, str):
            pattern, _, reason = one.partition("=")
            if not pattern:
                raise UserError(
                    f"keep-float: found {one!r}, expected PATTERN or PATTERN=reason, such as backbone.conv1"
                )
            found.append(FloatRule(pattern, reason or KEPT))
        else:
            found.append(FloatRule(*one))
    return found


def check_rules(rules: Sequence[FloatRule], kept: Iterable[str], layers: Iterable[str]) -> None:
    """Raises `UserError` for a rule that matches no layer."""
    kept, layers = list(kept), list(layers)
    for rule in rules:
        if not fnmatch.filter(kept, rule.pattern):
            some = ", ".join(layers[:3]) or "none"
            raise UserError(
                f"keep-float {rule.pattern}: matches no layer's path; `bevqat inspect` lists them, such as {some}"
            )


@dataclass
class Summary:
    """int8: paths of the layers that are INT8 in the flavour. floats: path of everything else that multiplies, and every norm and
    softmax → why it stays float. macs: multiply-accumulates of everything that multiplies, by path."""

    int8: list[str] = field(default_factory=list)
    floats: dict[str, str] = field(default_factory=dict)
    macs: dict[str, int] = field(default_factory=dict)

    @property
    def int8_share(self) -> float:
        """Share of all multiply-accumulates that are INT8."""
        total = sum(self.macs.values())
        return sum(self.macs[name] for name in self.int8) / total if total else 0.0


class QuantizedModule(nn.Module):
    """A module with TensorQuantizers, which computes the same as its export in `flavour`; `use` changes the flavour.

    It can be trained, and accepts any batch if the module does.
    """

    def __init__(self, graph: fx.GraphModule, inventory: Inventory, example_inputs: Sequence[object]) -> None:
        super().__init__()
        self.graph, self.inventory = graph, inventory
        self.example_inputs = tuple(example_inputs)
        self.flavour = DEFAULT
        self.macs: dict[str, int] = {}
        self.all_zero: list[str] = []

    def forward(self, *inputs: Any) -> Any:
        """See the original module's forward."""
        return self.graph(*inputs)

    def use(self, flavour: str) -> QuantizedModule:
        """From now on the module computes the same as this flavour's export; returns itself.

        Raises:
            UserError: the flavour does not exist.
        """
        self.flavour = flavour_of(flavour).name
        use_flavour(self.graph, flavour)
        return self

    @contextmanager
    def in_flavour(self, flavour: str) -> Iterator[None]:
        """Inside the block the module computes in another flavour."""
        before = self.flavour
        self.use(flavour)
        try:
            yield
        finally:
            self.use(before)

    def summary(self) -> Summary:
        """INT8 layers and float operations in the current flavour."""
        own = quantizers(self.graph)
        on = [path for path in self.inventory.quantized if not own[f"{path}.weight_quantizer"]._disabled]
        floats = {
            path: kept.reason
            for path, kept in self.inventory.kept.items()
            if not kept.flavours or self.flavour in kept.flavours
        }
        return Summary(on, floats, dict(self.macs))


def quantize(
    module: nn.Module,
    example_inputs: Sequence[object],
    data: Iterable[Any] | None = None,
    flavour: str = DEFAULT,
    keep_float: Iterable[str | tuple[str, str] | FloatRule] = (),
    method: str = "mse",
    percentile: float = 99.99,
    round_outputs: bool = False,
) -> QuantizedModule:
    """Traces a module, folds its batch norms, places quantizers by rules and calibrates them.

        quantized = quantize(model, (images,), data=loader, flavour="onnxruntime", keep_float=["head.*"])

    Args:
        module: any; it is set to eval mode and otherwise not changed.
        example_inputs: the arguments of its forward. Later inputs may have another first dimension, if it is the same for all
            tensors, and 2 or more here.
        data: batches to calibrate with, each a tensor or a sequence of arguments; None for only `example_inputs`.
        flavour: of `qat.lean.flavours`; it can be changed later (`QuantizedModule.use`).
        keep_float: layers that stay float, as patterns of their paths (shell style), `PATTERN=reason` or (pattern, reason).
        method: max, percentile, mse or entropy, for activations; weights take each channel's largest magnitude.
        percentile: share of magnitudes inside the range, in percent, for `percentile`.
        round_outputs: outputs may be rounded too if that lets the layer before them run in integers (ONNX Runtime).

    Returns:
        the simulation; `summary()` lists INT8 layers and float operations, `qat.export.export_module` writes the ONNX file.

    Raises:
        UserError: the module cannot be traced, an unknown flavour or method, a pattern that matches no layer, no batches,
            values that are not finite.
    """
    if method not in METHODS:
        raise UserError(f"method: found {method!r}, expected one of {', '.join(METHODS)}")
    flavour_of(flavour)
    rules = float_rules(keep_float)
    graph = trace(module, example_inputs)
    fold_batch_norm(graph)
    inventory = quantize_graph(graph, rules, round_outputs=round_outputs)
    check_rules(rules, inventory.kept, inventory.quantized)
    made = QuantizedModule(graph, inventory, example_inputs).eval()
    count = 0
    with torch.inference_mode(), observing(graph) as calibrators, counting_macs(made, made.macs):
        for batch in [tuple(example_inputs)] if data is None else data:
            arguments = (batch,) if isinstance(batch, torch.Tensor) else tuple(batch)
            try:
                made(*arguments)
            except UNTRACEABLE as error:
                if isinstance(error, UserError):
                    raise
                raise UserError(
                    f"calibration batch {count}: {type(module).__name__} fails on it: {first_line(error)}"
                ) from error
            count += 1
    if count == 0:
        raise UserError("calibration: found no batches, expected at least one")
    made.macs = {name.removeprefix("graph."): value for name, value in made.macs.items()}
    own = quantizers(graph)
    made.all_zero = set_ranges(own, calibrators, dict.fromkeys(calibrators, method), percentile)
    return made.use(flavour)
