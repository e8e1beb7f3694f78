"""The first layer with NaN or infinity, and quantizers that saturate.

In PyTorch, every module is observed while a detector runs. In exported parts, every tensor of every graph becomes an output in
ONNX Runtime with its optimizer off, so that reports name nodes of the file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from rich.table import Table
from torch import nn

from qat.core.console import results_console
from qat.core.onnx_file import load_graph
from qat.export.lookups import constants
from qat.families.flow import Session
from qat.lean.quantizer import Quantizer
from qat.manifest import load_manifest, pipeline_of
from qat.model.runners import flow_for, to_numpy, torch_feeds, torch_runners
from qat.plan import run
from qat.runtime import Pipeline


@dataclass(frozen=True)
class Trouble:
    """A tensor that is not finite. kind: "NaN" or "infinity"; share: of its values; frame: the token of the first frame
    in which it happened."""

    where: str
    kind: str
    share: float
    frame: str


@dataclass
class Health:
    """first: the earliest layer, over all frames, with values that are not finite; None if there is none. saturation: for each
    quantizer that is on, the largest share of values beyond its range in any frame."""

    frames: int = 0
    first: Trouble | None = None
    saturation: dict[str, float] = field(default_factory=dict)


class _Watch:
    """Collects findings in the order of execution."""

    def __init__(self) -> None:
        self.health = Health()
        self.frame = ""
        self.spoilt = False  # later tensors are not finite because of this one

    def begin(self, frame: str) -> None:
        self.frame, self.spoilt = frame, False
        self.health.frames += 1

    def see(self, where: str, values: np.ndarray) -> None:
        if self.spoilt or values.dtype.kind != "f":
            return
        finite = np.isfinite(values)
        if finite.all():
            return
        self.spoilt = True
        nan = np.isnan(values)
        kind, share = ("NaN", nan.mean()) if nan.any() else ("infinity", (~finite).mean())
        if self.health.first is None:
            self.health.first = Trouble(where, kind, float(share), self.frame)

    def saturate(self, where: str, share: float) -> None:
        self.health.saturation[where] = max(self.health.saturation.get(where, 0.0), share)


def _arrays(value: Any) -> Iterator[np.ndarray]:
    if isinstance(value, torch.Tensor):
        yield value.detach().cpu().numpy()
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from _arrays(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _arrays(entry)


@contextmanager
def _watched_modules(model: nn.Module, watch: _Watch) -> Iterator[None]:
    def before(name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            for array in _arrays(args):
                watch.see(f"the operations before {name}", array)
            if isinstance(module, Quantizer) and not module._disabled and not name.endswith("weight_quantizer"):
                beyond = args[0].abs() > module.range.max() * (127.5 / 127)
                watch.saturate(name, float(beyond.float().mean()))

        return hook

    def after(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            for array in _arrays(output):
                watch.see(name, array)

        return hook

    handles = []
    for name, module in model.named_modules():
        if not any(not isinstance(child, Quantizer) for child in module.children()):
            handles += [module.register_forward_pre_hook(before(name)), module.register_forward_hook(after(name))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def check_detector(model: Any, frames: Iterable[Any]) -> Health:
    """Runs a float or quantized detector and observes every layer."""
    watch = _Watch()
    flow, runners = flow_for(model), torch_runners(model)
    session = Session(flow)
    with _watched_modules(model, watch), torch.inference_mode():
        for frame in frames:
            watch.begin(frame.token)
            feeds, _ = session.begin(frame)
            for name in flow.plan.frame_inputs:
                watch.see(f"the frame's {name}", feeds[name])
            tensors = run(flow.plan, runners, torch_feeds(model, feeds))
            session.end(to_numpy(tensors))
            for name, value in to_numpy(tensors, flow.plan.outputs).items():
                watch.see(f"the output {name}", value)
    return watch.health


class _WatchedPart:
    """One exported graph with all of its tensors as outputs: a `qat.runtime.PartRunner`."""

    def __init__(self, path: Path, part: str, watch: _Watch) -> None:
        model = load_graph(path)
        self.part, self.watch = part, watch
        self.outputs = [output.name for output in model.graph.output]
        known = {value.name for value in model.graph.output}
        self.nodes = [
            (node.name or node.op_type, node.op_type, name) for node in model.graph.node for name in node.output
        ]
        self.ranges = self._ranges(model)
        for _, _, name in self.nodes:
            if name not in known:
                model.graph.output.append(onnx.ValueInfoProto(name=name))
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 3
        self.session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    @staticmethod
    def _ranges(model: onnx.ModelProto) -> dict[str, tuple[str, float, float]]:
        """For each activation's QuantizeLinear: the tensor that it rounds and the range that it keeps."""
        known = constants(model.graph)
        found = {}
        for node in model.graph.node:
            if node.op_type != "QuantizeLinear" or node.input[0] in known:
                continue
            scale, zero = float(known[node.input[1]].ravel()[0]), known[node.input[2]]
            limits = np.iinfo(zero.dtype)
            low, high = (scale * (float(limit) - float(zero.ravel()[0])) for limit in (limits.min, limits.max))
            found[node.output[0]] = (node.input[0], low - scale / 2, high + scale / 2)
        return found

    def run(self, feeds: Mapping[str, np.ndarray], /) -> dict[str, np.ndarray]:
        """Runs the graph and checks every tensor in the order of the nodes."""
        names = [output.name for output in self.session.get_outputs()]
        found = dict(zip(names, self.session.run(names, dict(feeds)), strict=True))
        values = {**feeds, **found}
        for name, value in feeds.items():
            self.watch.see(f"{self.part}: input {name}", value)
        for node, kind, name in self.nodes:
            self.watch.see(f"{self.part}: {kind} {node} (tensor {name})", values[name])
            if name in self.ranges and self.ranges[name][0] in values:
                source, low, high = self.ranges[name]
                beyond = (values[source] < low) | (values[source] > high)
                self.watch.saturate(f"{self.part}: {source}", float(beyond.mean()))
        return {name: found[name] for name in self.outputs}


def check_parts(folder: str | Path, frames: Iterable[Any]) -> Health:
    """Runs the parts of an exported folder and observes every node.

    Raises:
        UserError: the folder is incomplete or was changed.
    """
    folder = Path(folder)
    manifest = load_manifest(folder)
    watch = _Watch()
    runners = {name: _WatchedPart(folder / part["file"], name, watch) for name, part in manifest["parts"].items()}
    pipeline = Pipeline(runners, pipeline_of(folder, manifest))
    for frame in frames:
        watch.begin(str(getattr(frame, "token", f"number {watch.health.frames + 1}")))
        pipeline.forward(frame)
    return watch.health


def saturated(found: Health, threshold: float) -> dict[str, float]:
    """Quantizers with a larger share of values beyond their range than `threshold`, and that share; the worst first."""
    above = sorted(((share, name) for name, share in found.saturation.items() if share > threshold), reverse=True)
    return {name: share for share, name in above}


def print_health(found: Health, threshold: float) -> None:
    """Prints the first layer that is not finite, and the quantizers that saturate above `threshold`."""
    if found.first is not None:
        first = found.first
        print(f"{first.kind} in {first.where}: {first.share:.2%} of its values, first in frame {first.frame}")
    else:
        print(f"every layer is finite on {found.frames} frames")
    if above := saturated(found, threshold):
        table = Table(
            title=f"quantizers with more than {threshold:.2%} of their values beyond their range", title_justify="left"
        )
        table.add_column("quantizer", overflow="fold")
        table.add_column("beyond", justify="right")
        for name, share in above.items():
            table.add_row(name, f"{share:.2%}")
        results_console(140).print(table)
    elif found.saturation:
        print(
            f"none of {len(found.saturation)} quantizers has more than {threshold:.2%} of its values beyond its range"
        )
