"""A whole model as model.pt2 and model.onnx, with metadata.json and inputs.html, each file verified against PyTorch."""

from __future__ import annotations

import io
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from qat.checkpoints.reading import saving
from qat.core.errors import NotFiniteError, UserError
from qat.core.files import atomic_directory, sha256, write_json, write_text
from qat.core.provenance import made_by
from qat.core.tensors import compare_tensors
from qat.families.mmdet3d import iree, library
from qat.families.mmdet3d.boxes import Boxes
from qat.families.mmdet3d.inputs import Sample
from qat.families.mmdet3d.model import quiet
from qat.families.mmdet3d.page import inputs_page
from qat.families.mmdet3d.tracing import Flat, naming_failures, runnable, traceable
from qat.families.mmdet3d.tree import Leaf, cloned, leaves

FORMATS = ("pt2", "onnx")
OPSETS = (13, 17)  # of the TorchScript exporter: the second where the first lacks an operator
DYNAMO_OPSET = 18  # the lowest that torch's newer exporter writes
LEAST_DB = 60.0  # of every output, ONNX beside PyTorch: float32 in another order of sums, through a whole network
SHARES = (1.0, 0.6, 0.15)  # of a file's points: the sizes that an export is verified on
BACKENDS = ("onnxruntime", "openvino")
SMALL = "1MB"  # constants below this are folded; larger ones (a canvas of zeros) stay computed


@dataclass
class Options:
    """What an export is asked for.

    formats: of FORMATS. opset: None for the lowest that works. device: where PyTorch runs. seed: of everything drawn.
    """

    formats: tuple[str, ...] = FORMATS
    opset: int | None = None
    device: str = "cpu"
    seed: int = 0


@dataclass
class Entry:
    """A tensor of a tree. name: `input_0`…; "" for one that no output uses. sizes: how its shape varied over `SHARES`."""

    path: str
    tensor: torch.Tensor
    sizes: list[tuple[int, ...]]
    name: str = ""
    axes: dict[int, str] = field(default_factory=dict)

    def described(self) -> dict[str, Any]:
        """As metadata.json has it. shape: on the example; dynamic: the axes that vary, by place."""
        entry: dict[str, Any] = {
            "path": self.path,
            "shape": list(self.tensor.shape),
            "dtype": str(self.tensor.dtype).removeprefix("torch."),
        }
        if self.name:
            entry = {"name": self.name, **entry}
        if self.axes:
            entry["dynamic"] = {str(place): axis for place, axis in self.axes.items()}
        return entry


@dataclass
class Inputs:
    """The analysis of what the pipeline makes. entries: every tensor; constants: what is no tensor; axes: name → (least, most)."""

    samples: list[Sample]
    entries: list[Entry]
    constants: list[Leaf]
    axes: dict[str, tuple[int, int | None]]

    @property
    def used(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.name]

    def tensors(self, sample: Sample, device: str = "cpu") -> tuple[torch.Tensor, ...]:
        """The used tensors of a sample, copied."""
        found = {leaf.path: leaf.value for leaf in leaves(sample.inputs, "inputs")}
        return tuple(found[entry.path].detach().clone().to(device) for entry in self.used)


def _axis_name(path: str, taken: Mapping[tuple[int, ...], str]) -> str:
    base = "voxels" if ".voxels." in path else "points" if ".points" in path else "size"
    count = sum(name.startswith(base) for name in taken.values())
    return base if not count else f"{base}_{count}"


def analyse(samples: Sequence[Sample], most: int | None) -> Inputs:
    """Flattens the first sample and finds which sizes vary from one to the next. most: the config's limit of voxels."""
    first = leaves(samples[0].inputs, "inputs")
    others = [{leaf.path: leaf.value for leaf in leaves(sample.inputs, "inputs")} for sample in samples]
    entries: list[Entry] = []
    named: dict[tuple[int, ...], str] = {}
    for leaf in first:
        if not leaf.is_tensor:
            continue
        sizes = [tuple(other[leaf.path].shape) for other in others]
        axes = {}
        for place in range(leaf.value.dim()):
            seen = tuple(size[place] for size in sizes)
            if len(set(seen)) > 1:
                axes[place] = named.setdefault(seen, _axis_name(leaf.path, named))
        entries.append(Entry(leaf.path, leaf.value, sizes, f"input_{len(entries)}", axes))
    constants = [leaf for leaf in first if not leaf.is_tensor]
    constants += [Leaf(f"data_samples[{n}]", sample) for n, sample in enumerate(samples[0].samples)]
    limits = {name: (2, most if name == "voxels" else None) for name in named.values()}
    return Inputs(list(samples), entries, constants, limits)


def _different(samples: Sequence[Sample]) -> list[Sample]:
    """The samples without those that repeat the first: a picture has no fewer points."""

    def same(sample: Sample) -> bool:
        pairs = zip(leaves(samples[0].inputs, "inputs"), leaves(sample.inputs, "inputs"), strict=False)
        return all(torch.equal(a.value, b.value) for a, b in pairs if a.is_tensor)  # of other shapes: not equal

    return [samples[0], *(sample for sample in samples[1:] if not same(sample))]


def voxel_limit(model: nn.Module) -> int | None:
    """The most voxels that the model's own voxelizer gives at test time."""
    layer = getattr(getattr(model, "data_preprocessor", None), "voxel_layer", None)
    most = getattr(layer, "max_voxels", None)
    most = most[1] if isinstance(most, tuple | list) else most
    return int(most) if isinstance(most, int) and most > 0 else None


class Stuck(Exception):
    """A format could not be written; the message says where and what to do."""


def _what(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    chosen = next(
        (line for line in lines if "Error" in line or "not supported" in line or "Unsupported" in line),
        lines[0] if lines else "",
    )
    return f"{type(error).__name__}: {chosen[:240]}" if not isinstance(error, UserError) else chosen[:240]


def _place(active: Sequence[str], model: nn.Module) -> str:
    """The module that was running, by its path in the model and its class."""
    path = next(
        (name.removeprefix("model.").removeprefix("model") for name in reversed(active) if name.startswith("model.")),
        "",
    )
    if not path:
        return type(model).__name__
    return f"{path} ({type(model.get_submodule(path)).__name__})"


class Reference:
    """What mmdet3d's own forward gives for a sample: `tensors`, and its `boxes`."""

    def __init__(self, model: nn.Module, sample: Sample) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with torch.no_grad(), runnable(model), quiet():
                tree = model(cloned(sample.inputs), sample.samples, mode="tensor")
            found = [leaf for leaf in leaves(tree, "outputs") if leaf.is_tensor]
            self.tensors = [Leaf(leaf.path, leaf.value.detach().clone()) for leaf in found]
            self.boxes = Boxes(model, sample, self.tensors, cloned(tree))


class Export:
    """One model on its way into files. `run` does all of it."""

    def __init__(
        self,
        model: nn.Module,
        config_name: str,
        checkpoint: str | None,
        samples: Sequence[Sample],
        options: Options,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.model, self.options, self.say = model, options, say
        self.config_name, self.checkpoint = config_name, checkpoint
        self.inputs = analyse(_different(samples), voxel_limit(model))
        self.program: torch.export.ExportedProgram | None = None
        self.failures: dict[str, str] = {}
        self.verification: dict[str, Any] = {}
        self.iree: dict[str, Any] | None = None
        self.opset: int | None = None
        self.attempts: list[dict[str, Any]] = []
        self.outputs: list[Entry] = []
        self.references: list[Reference] = []

    # -- PyTorch
    def refer(self) -> None:
        """PyTorch's own outputs on every sample.

        Raises:
            Stuck: mmdet3d cannot run this model here.
        """
        with naming_failures(Flat(self.model, None, None, ())) as active:
            try:
                self.references = [Reference(self.model, sample) for sample in self.inputs.samples]
            except Exception as error:  # whatever a model raises
                raise Stuck(f"{_place(active, self.model)}: PyTorch's own forward raised {_what(error)}") from error
        if not self.references[0].tensors:
            raise Stuck(
                f"{type(self.model).__name__}: mode='tensor' returned no tensors; its parts can be exported one by one"
            )
        shapes = [[tuple(leaf.value.shape) for leaf in found.tensors] for found in self.references]
        named: dict[tuple[int, ...], str] = {}
        for entry in self.inputs.entries:
            for place, axis in entry.axes.items():
                named[tuple(size[place] for size in entry.sizes)] = axis
        for n, leaf in enumerate(self.references[0].tensors):
            sizes = [shape[n] for shape in shapes] if len({len(s) for s in shapes}) == 1 else [shapes[0][n]]
            axes = {
                place: named.get(tuple(size[place] for size in sizes), f"output_{n}_{place}")
                for place in range(leaf.value.dim())
                if len({size[place] for size in sizes}) > 1
            }
            self.outputs.append(Entry(leaf.path, leaf.value, sizes, f"output_{n}", axes))

    @contextmanager
    def _tracing(self, what: str) -> Iterator[tuple[Flat, tuple[torch.Tensor, ...]]]:
        """The model as a module of flat tensors, and those of the first sample. Inside the block it is in the form that is traced and
        nothing is printed; whatever is raised there is `Stuck`, with the module that was running. what: is done there."""
        first = self.inputs.samples[0]
        paths = tuple(entry.path for entry in self.inputs.used)
        wrapper = Flat(self.model, cloned(first.inputs), first.samples, paths).eval()
        with (
            torch.no_grad(),
            warnings.catch_warnings(),
            traceable(self.model),
            naming_failures(wrapper) as active,
            quiet(),
        ):
            warnings.simplefilter("ignore")
            try:
                yield wrapper, self.inputs.tensors(first, self.options.device)
            except Exception as error:  # torch.export and torch.onnx raise what they like
                raise Stuck(f"{_place(active, self.model)}: {what}: {_what(error)}") from error

    def _trace(self) -> torch.export.ExportedProgram:
        """The program. Axes that the model bounds by itself (a sampler wants as many points as it draws) get those bounds, and axes
        that it fixes are no axes."""
        dims: dict[str, Any] = {
            name: torch.export.Dim(name, min=least, **({} if most is None else {"max": most}))
            for name, (least, most) in self.inputs.axes.items()
        }
        try:
            return self._traced(dims)
        except Stuck as error:
            if "onstraint" not in str(error):
                raise
        program = self._traced(dict.fromkeys(dims, torch.export.Dim.AUTO))
        nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
        specs = [spec for spec in program.graph_signature.input_specs if spec.kind.name == "USER_INPUT"]
        bounds: dict[str, tuple[int, int | None]] = {}
        for entry, spec in zip(self.inputs.used, specs, strict=True):
            for place, axis in list(entry.axes.items()):
                size = nodes[spec.arg.name].meta["val"].shape[place]
                limits = None if isinstance(size, int) else program.range_constraints.get(size.node.expr)
                if limits is None:
                    del entry.axes[place]
                else:
                    most = None if limits.upper > 2**31 else int(limits.upper)
                    bounds[axis] = (max(2, int(limits.lower)), most)
        self.inputs.axes = bounds
        return program

    def _traced(self, dims: Mapping[str, Any]) -> torch.export.ExportedProgram:
        shapes = tuple({place: dims[axis] for place, axis in entry.axes.items()} or None for entry in self.inputs.used)
        with self._tracing("torch.export") as (wrapper, tensors):
            return torch.export.export(wrapper, tensors, dynamic_shapes=(shapes,), strict=False)

    def trace(self) -> None:
        """Traces with every tensor, drops those that no output uses, and traces again.

        Raises:
            Stuck: torch.export cannot follow the model.
        """
        from qat.export.pt2 import strip_provenance

        program = self._trace()
        nodes = [node for node in program.graph.nodes if node.op == "placeholder"]
        users = {node.name: bool(node.users) for node in nodes}
        given = [users[spec.arg.name] for spec in program.graph_signature.input_specs if spec.kind.name == "USER_INPUT"]
        unused = {entry.path for entry, used in zip(self.inputs.used, given, strict=True) if not used}
        kept = 0
        for entry in self.inputs.entries:
            entry.name = "" if entry.path in unused else f"input_{kept}"
            kept += entry.path not in unused
        if unused:
            used_axes = {axis for entry in self.inputs.used for axis in entry.axes.values()}
            self.inputs.axes = {name: limits for name, limits in self.inputs.axes.items() if name in used_axes}
            program = self._trace()
        strip_provenance(program)
        self.program = program
        fitting = [n for n in range(len(self.inputs.samples)) if self._fits(n)]
        self.inputs.samples = [self.inputs.samples[n] for n in fitting]
        self.references = [self.references[n] for n in fitting]

    def _fits(self, n: int) -> bool:
        """Whether a sample has the sizes that the traced program takes."""
        for entry in self.inputs.used:
            for place, size in enumerate(entry.sizes[n]):
                least, most = self.inputs.axes.get(entry.axes.get(place, ""), (entry.sizes[0][place],) * 2)
                if size < least or (most is not None and size > most):
                    return False
        return True

    # -- files
    def write_pt2(self, file: Path) -> None:
        """model.pt2, loaded again and compared bit for bit."""
        assert self.program is not None
        with saving(file) as stream, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.export.save(self.program, stream)
        run = torch.export.load(str(file)).module()
        rows = []
        for sample, reference in zip(self.inputs.samples, self.references, strict=True):
            with torch.no_grad():
                found = run(*self.inputs.tensors(sample, self.options.device))
            values = [leaf.value for leaf in leaves(found, "outputs")]
            rows.append(self._row(sample, reference, [value.cpu().numpy() for value in values], exact=True))
        self.verification["pt2"] = {"samples": rows, "passed": all(row["passed"] for row in rows)}

    def offer_to_iree(self, pt2: Path, vmfb: Path) -> dict[str, Any]:
        """model.pt2 compiled by IREE, run on every sample and compared; says so where IREE is not installed."""
        found: dict[str, Any] = {"versions": iree.versions()}
        if not found["versions"]:
            return found | {"failed": f"not installed ({iree.INSTALL})"}
        feeds = [self._feeds(sample) for sample in self.inputs.samples]
        try:
            results = iree.compile_and_run(pt2, vmfb, feeds, len(self.outputs))
        except iree.Failed as error:
            return found | {"failed": str(error)}
        rows = [
            self._row(sample, reference, values, exact=False)
            for sample, reference, values in zip(self.inputs.samples, self.references, results, strict=True)
        ]
        return found | {"samples": rows, "passed": all(row["passed"] for row in rows)}

    def _feeds(self, sample: Sample) -> dict[str, np.ndarray]:
        tensors = self.inputs.tensors(sample)
        return {entry.name: value.numpy() for entry, value in zip(self.inputs.used, tensors, strict=True)}

    def _graphs(self) -> list[tuple[int, bool]]:
        """(opset, by torch's newer exporter) in the order in which they are tried."""
        asked = self.options.opset
        older = [(n, False) for n in ((asked,) if asked else OPSETS)]
        return [*older, *([(max(asked or 0, DYNAMO_OPSET), True)] if not asked or asked >= DYNAMO_OPSET else [])]

    def _onnx(self, opset: int, dynamo: bool) -> bytes:
        import onnx

        from qat.export.graph import simplify

        inputs, outputs = ([entry.name for entry in entries] for entries in (self.inputs.used, self.outputs))
        with self._tracing("torch.onnx") as (wrapper, tensors):
            if dynamo:
                assert self.program is not None
                made = torch.onnx.export(
                    self.program,
                    input_names=inputs,
                    output_names=outputs,
                    opset_version=opset,
                    dynamo=True,
                    optimize=False,
                    verbose=False,
                )
                assert made is not None
                model = made.model_proto
            else:
                buffer = io.BytesIO()
                torch.onnx.export(
                    wrapper,
                    tensors,
                    buffer,  # type: ignore[arg-type]  # the TorchScript exporter takes streams
                    opset_version=opset,
                    dynamo=False,
                    dynamic_axes={e.name: dict(e.axes) for e in (*self.inputs.used, *self.outputs) if e.axes},
                    input_names=inputs,
                    output_names=outputs,
                )
                model = onnx.load_from_string(buffer.getvalue())
        try:
            return simplify(model, "model", folded=SMALL, norms=True, compared=False).SerializeToString(
                deterministic=True
            )
        except UserError as error:
            raise Stuck(str(error)) from error

    def write_onnx(self, file: Path) -> None:
        """model.onnx at the lowest opset whose graph computes what PyTorch does.

        Raises:
            Stuck: no way of writing it gives such a graph.
        """
        last = ""
        for opset, dynamo in self._graphs():
            if last and not dynamo and "opset" not in last:
                continue  # a higher opset has nothing for it
            try:
                if dynamo and self.program is None:
                    raise Stuck("torch.export could not follow the model")
                file.write_bytes(self._onnx(opset, dynamo))
                found = self._verify_onnx(file)
                last = found["worst"]
                self.verification["onnx"], self.opset = found, opset
            except (Stuck, UserError) as error:
                last = str(error)
            self.attempts.append(
                {"opset": opset, "exporter": "torch.export" if dynamo else "TorchScript", "failed": last}
            )
            if not last:
                return
        if "onnx" not in self.verification:
            file.unlink(missing_ok=True)
        raise Stuck(last)

    def _verify_onnx(self, file: Path) -> dict[str, Any]:
        from qat.engine import Options as EngineOptions
        from qat.engine import build

        result: dict[str, Any] = {"backends": {}, "least_db": LEAST_DB}
        for backend in BACKENDS:
            try:
                # Nothing is cached: ONNX Runtime 1.31 writes some optimized graphs with several Scans so that it cannot read them.
                engine = build(file, backend, "fp32", EngineOptions(cache=None))
            except UserError as error:
                result["backends"][backend] = {"samples": [], "passed": False, "note": str(error)}
                continue
            rows = []
            for sample, reference in zip(self.inputs.samples, self.references, strict=True):
                feeds = self._feeds(sample)
                found = engine.run({name: feeds[name] for name in engine.inputs})
                rows.append(self._row(sample, reference, [found[entry.name] for entry in self.outputs], exact=False))
            result["backends"][backend] = {"samples": rows, "passed": all(row["passed"] for row in rows)}
        result["passed"] = all(entry["passed"] for entry in result["backends"].values())
        result["worst"] = next(
            (
                f"{name}: {entry.get('note') or next(row['wrong'] for row in entry['samples'] if not row['passed'])}"
                for name, entry in result["backends"].items()
                if not entry["passed"]
            ),
            "",
        )
        return result

    def _row(self, sample: Sample, reference: Reference, found: Sequence[np.ndarray], exact: bool) -> dict[str, Any]:
        """One sample's comparison: every tensor, and the boxes that mmdet3d's own post-processing makes of it."""
        row: dict[str, Any] = {"source": sample.source, "sizes": {a: self._size(sample, a) for a in self.inputs.axes}}
        tensors: dict[str, dict[str, Any]] = {}
        wrong = ""
        for entry, leaf, value in zip(self.outputs, reference.tensors, found, strict=True):
            try:
                figures = compare_tensors(leaf.value.cpu().numpy(), np.asarray(value), f"{entry.name} ({leaf.path})")
            except (UserError, NotFiniteError) as error:
                wrong = wrong or str(error)
                continue
            same = bool(np.array_equal(leaf.value.cpu().numpy(), value)) if exact else figures["sqnr_db"] >= LEAST_DB
            tensors[entry.name] = {**figures, "passed": same}
            if not same:
                expected = "the same bits" if exact else f"{LEAST_DB:.0f} dB or more"
                wrong = (
                    wrong or f"{entry.name} ({leaf.path}): found {figures['sqnr_db']:.0f} dB SQNR, expected {expected}"
                )
        row["tensors"] = tensors
        row["sqnr_db"] = min((t["sqnr_db"] for t in tensors.values()), default=0.0)
        row["max_abs"] = max((t["max_abs"] for t in tensors.values()), default=0.0)
        if not wrong:
            row["boxes"], wrong = reference.boxes.compared(found)
            if row["boxes"] is None:
                row["no_boxes"] = reference.boxes.why
        row["wrong"], row["passed"] = wrong, not wrong
        return row

    def _size(self, sample: Sample, axis: str) -> int:
        found = {leaf.path: leaf.value for leaf in leaves(sample.inputs, "inputs")}
        return next(int(found[e.path].shape[p]) for e in self.inputs.entries for p, a in e.axes.items() if a == axis)

    # -- all of it
    def run(self, out: Path, more: Callable[[Path], dict[str, Any]] | None = None) -> dict[str, Any]:
        """Writes the folder, whole or not at all; returns metadata.json's content.

        more: writes the INT8 form into the folder, and returns what metadata.json says of it.
        """
        started = time.perf_counter()
        with atomic_directory(out) as folder:
            self.say("PyTorch's own outputs")
            try:
                self.refer()
                self.say("torch.export")
                self.trace()
            except Stuck as error:
                self.failures["pt2"] = self.failures["onnx"] = str(error)
                if self.references and "onnx" in self.options.formats:
                    del self.failures["onnx"]  # the TorchScript exporter may still follow it
            for name in self.options.formats:
                if name in self.failures:
                    continue
                self.say(f"model.{name}: written and compared")
                try:
                    if name == "pt2":
                        self.write_pt2(folder / "model.pt2")
                        self.iree = self.offer_to_iree(folder / "model.pt2", folder / "model.vmfb")
                    else:
                        self.write_onnx(folder / "model.onnx")
                except Stuck as error:
                    self.failures[name] = str(error)
            metadata = self.metadata(folder, time.perf_counter() - started)
            if more is not None:
                metadata["int8"] = more(folder)
            write_json(folder / "metadata.json", metadata)
            write_text(folder / "inputs.html", inputs_page(metadata))
        return metadata

    def success(self, name: str) -> bool | None:
        """Whether a format was written and computes what PyTorch does; None where it was not asked for."""
        if name not in self.options.formats:
            return None
        return name not in self.failures and bool(self.verification.get(name, {}).get("passed"))

    def metadata(self, folder: Path, seconds: float) -> dict[str, Any]:
        """metadata.json: the fields of the tool that this follows, and what a reader needs to trust them."""
        files = {p.name: {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in sorted(folder.glob("model.*"))}
        used = self.inputs.used
        return {
            "config": self.config_name,
            "checkpoint": self.checkpoint,
            "model_type": type(self.model).__name__,
            "tensor_count": len(used),
            "tensors": [entry.described() for entry in used],
            "export_success": {name: self.success(name) for name in FORMATS},
            "outputs": [entry.described() for entry in self.outputs],
            "unused_inputs": [entry.described() for entry in self.inputs.entries if not entry.name],
            "constants": [{"path": leaf.path, "value": _described(leaf.value)} for leaf in self.inputs.constants],
            "dynamic_axes": {
                name: {"min": least, "max": most, "example": self._size(self.inputs.samples[0], name)}
                for name, (least, most) in self.inputs.axes.items()
            },
            "opset": self.opset,
            "attempts": self.attempts,
            "failures": dict(self.failures),
            "files": files,
            "weights": {"checkpoint": self.checkpoint} if self.checkpoint else {"random_seed": self.options.seed},
            "input_source": self.inputs.samples[0].source,
            "verification": self.verification,
            "iree": self.iree,
            "seconds": round(seconds, 1),
            "packages": library.versions(),
            **made_by(),
        }


def _described(value: Any) -> str:
    """A constant in a few words: what it is and which keys it has."""
    keys = getattr(value, "metainfo", None)
    if isinstance(keys, Mapping):
        return f"{type(value).__name__}({', '.join(sorted(map(str, keys)))})"
    text = repr(value)
    return text if len(text) <= 120 else f"{type(value).__name__}"
