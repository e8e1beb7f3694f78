"""Compares each exported graph with its PyTorch module on the same inputs: a generated frame and real ones.

ONNX Runtime runs the graph with its optimizer off, to check the file itself; then once with the optimizer on, whose
rewrites may compute something else (onnxruntime#24737). An INT8 graph is also checked site by site
(`qat.export.sites`). docs/verify.md derives the tolerances, and says what verification.npz holds for `bevqat verify`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from qat.core.files import sha256
from qat.core.sites import Runner, check_sites, runner_of, tile
from qat.core.tensors import compare_tensors, digest, in_float64
from qat.core.verification import (
    FILE,
    input_patch,
    judge,
    made_feeds,
    pack,
    round_input,
    store,
    write_summary,
)
from qat.engine.onnxruntime_backend import PlainGraph
from qat.export.bisect import diagnose
from qat.export.flavour_tensorrt_strong import verify_strong
from qat.export.lookups import constants
from qat.export.sites import SiteReference, prepared
from qat.lean.modes import quantizers_off, recording_scales
from qat.model.runners import TorchPart, flow_for, torch_ops
from qat.plan import BATCH, Op

__all__ = ["Verification", "compare_scales", "graph_scales", "verify_part"]


def graph_scales(model: onnx.ModelProto) -> list[np.ndarray]:
    """The scales of every QuantizeLinear, flattened."""
    known = constants(model.graph)
    return [known[node.input[1]].ravel() for node in model.graph.node if node.op_type == "QuantizeLinear"]


def compare_scales(found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> dict[str, Any]:
    """Whether the scales of a graph and those of its quantizers are the same set.

    (A set: one quantizer may serve several tensors, and onnxsim may merge equal pairs on one tensor.)
    """

    def lacks(some: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> int:
        same = [any(a.shape == b.shape and np.allclose(a, b, rtol=1e-6, atol=0) for b in others) for a in some]
        return same.count(False)

    missing, unknown = lacks(expected, found), lacks(found, expected)
    return {"pairs": len(found), "missing": missing, "unknown": unknown, "passed": not (missing or unknown)}


def verify_part(
    graph: bytes | PlainGraph,
    reference: Mapping[str, np.ndarray],
    feeds: Mapping[str, np.ndarray],
    unquantized: Mapping[str, np.ndarray] | None = None,
    where: str = "compare",
    pytorch: Mapping[str, np.ndarray] | None = None,
) -> dict[str, dict[str, Any]]:
    """Compares one graph's outputs with its module's.

    Args:
        graph: the ONNX file's bytes, or the graph opened.
        reference: the module's outputs, fake-quantized for an INT8 graph.
        feeds: the inputs of both.
        unquantized: for an INT8 graph, the module's outputs with its quantizers off; None for a graph without QDQ.
        where: the frame and the part, for messages.
        pytorch: if `reference` is in float64, PyTorch's float32 result.

    Returns:
        for each output the result of `judge`.
    """
    opened = graph if isinstance(graph, PlainGraph) else PlainGraph(graph)
    candidate = opened.run({name: feeds[name].astype(spec.dtype, copy=False) for name, spec in opened.inputs.items()})
    found = {}
    for name, value in reference.items():
        own, exact = (None if arrays is None else arrays[name] for arrays in (pytorch, unquantized))
        found[name] = judge(
            compare_tensors(value, candidate[name], f"{where}: {name}"),
            None if exact is None else compare_tensors(exact, value, f"{where}: {name} quantized")["sqnr_db"],
            None if exact is None else compare_tensors(exact, candidate[name], f"{where}: {name}")["sqnr_db"],
            None if own is None else compare_tensors(value, own, f"{where}: {name} in PyTorch")["sqnr_db"],
        )
    return found


def _rounded(entry: Mapping[str, Any]) -> dict[str, Any]:
    """An entry in the manifest's form."""
    digits = {"cosine": 9}
    return {
        name: value
        if isinstance(value, bool)
        else float(f"{value:.4g}")
        if name == "max_abs"
        else round(value, digits.get(name, 3))
        for name, value in entry.items()
    }


def _reserve(entry: Mapping[str, Any]) -> float:
    """An entry's smallest margin to its tolerances, in dB."""
    found = min(entry[key] for key in ("sqnr_db", "runtime_db", "optimized_db") if key in entry)
    reserves = [found - entry["tolerance_db"]]
    if "float_db" in entry:
        reserves.append(entry["float_db"] - entry["float_tolerance_db"])
    return min(reserves)


def _worst(entries: Sequence[Mapping[str, Any]], tokens: Sequence[str]) -> dict[str, Any]:
    """The figures of the frame that is nearest to its tolerance, its token, and the figures of all frames in a row."""
    at = min(range(len(entries)), key=lambda i: (entries[i]["passed"], _reserve(entries[i])))
    rows = [_rounded(entry) for entry in entries]
    return {
        **rows[at],
        "passed": all(entry["passed"] for entry in entries),
        "frame": tokens[at],
        "frames": {
            name: [row.get(name) for row in rows]
            for name in dict.fromkeys(k for row in rows for k in row)
            if name != "passed"
        },
    }


def _doubled(wrappers: Mapping[str, torch.nn.Module]) -> dict[str, torch.nn.Module]:
    """A copy of a detector's parts in float64."""
    return {name: wrapper.double() for name, wrapper in copy.deepcopy(dict(wrappers)).items()}


@dataclass
class _Running:
    """A batch of frames on its way through the plan. tensors: those that later steps read. patches: of repeated tensors."""

    token: str
    tensors: dict[str, Any]
    patches: dict[str, np.ndarray] = field(default_factory=dict)


class Verification:
    """The frames that go through a model's plan in PyTorch and, part by part, through the parts' graphs.

        verification = Verification(model, parts, frames, seed=0)
        for name in parts:                                   # in their order
            feeds = verification.feeds(name)                 # of the first frame, to trace with
            …
            manifest["parts"][name] |= verification.check(name, graph, model)
        manifest["verification"] = verification.write(folder)

    Each frame keeps only the tensors that later steps read. PyTorch's tensors, rounded (`round_input`), are passed from part to
    part, so that one part's error does not count against the next.
    """

    def __init__(
        self,
        detector: Any,
        parts: Mapping[str, TorchPart],
        frames: Sequence[Any] = (),
        seed: int = 0,
        batches: Sequence[int] = (1,),
    ) -> None:
        """Runs the frames.

        Args:
            detector: float, or quantized and ready for export.
            parts: its parts, in their order.
            frames: real ones; a generated one is added.
            seed: of the generated frame; of a batch of them, of the first.
            batches: samples in an input: that of the file, or one that a graph for any number is traced with, and others
                that it is verified with too, on generated frames. A real frame fills its batch alone.

        Raises:
            UserError: a frame does not fit the parts.
        """
        self.detector, self.parts, self.seed = detector, dict(parts), seed
        self.flow = flow_for(detector)
        self.plan = self.flow.plan
        self.batch = batches[0]
        self.ops = torch_ops(detector)

        def made(count: int) -> dict[str, Any]:
            return self.flow.first_feeds([self.flow.made_frame(seed + n) for n in range(count)])

        self.running = [_Running(f"made-up:{seed}", made(self.batch))]
        for frame in frames:
            arrays = self.flow.first_feeds([frame] * self.batch)
            token = str(getattr(frame, "token", None) or digest(arrays))
            self.flow.check_frame(frame, token)
            self.running.append(_Running(token, arrays))
        self.kept = len(self.running)
        self.running += [_Running(f"made-up:{seed} in a batch of {count}", made(count)) for count in batches[1:]]
        self.made_sha256 = digest(made_feeds(self.flow, seed, self.batch))
        # Between the parts, tensors are large: those of one frame are kept, a real one if there is one.
        self.whole = 1 if self.kept > 1 else 0
        self.stored: dict[str, list[int]] = {}
        self.arrays: dict[str, np.ndarray] = {}
        self.passed = True
        self._made: dict[str, dict[str, torch.nn.Module]] = {}
        self.varying = {
            n for n, t in self.plan.tensors.items() if any(isinstance(d, str) and d != BATCH for d in t.shape)
        }
        self._settled: set[str] = set(self.plan.inputs)  # tensors in the form that the parts accept
        self._ops_until(next(iter(self.parts)))

    def feeds(self, name: str) -> dict[str, np.ndarray]:
        """Inputs of the next part for the first frame."""
        return self.all_feeds(name)[0]

    def all_feeds(self, name: str) -> list[dict[str, np.ndarray]]:
        """Inputs of the next part for every frame."""
        return [self._feeds(name, running) for running in self.running]

    def _feeds(self, name: str, running: _Running) -> dict[str, np.ndarray]:
        return {own: running.tensors[tensor] for own, tensor in self.plan.parts[name].inputs.items()}

    def check(
        self, name: str, graph: bytes, model: onnx.ModelProto, typed: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Verifies a part's graph on every frame, and advances the frames to the next part.

        Args:
            graph: the file's bytes.
            model: the graph with the quantizers' own scales: before a flavour's pass that changes them.
            typed: of a strongly typed graph, what was done to it (`to_tensorrt_strong`): it is held to the tolerance of its
                types.

        Returns:
            the part's `verification` (each output's figures), `scales` (see `compare_scales`), of an INT8 graph `sites`, and
            where something is out of tolerance, `divergence`: the sites that are, and the first diverging layers. (These not
            of a strongly typed graph, where every layer rounds: check the same detector's `tensorrt` flavour.)
        """
        part = self.parts[name]
        opened, optimized = PlainGraph(graph), PlainGraph(graph, optimized=True)
        written = onnx.load_from_string(graph)
        rounds = any(node.op_type == "QuantizeLinear" for node in model.graph.node)
        raw = self.plan.is_raw(self.plan.parts[name])
        self.stored[name] = list(range(self.kept)) if raw else [self.whole]
        sites = None
        if rounds:
            half = typed is not None
            base = self._copies("base", lambda: prepared({n: p.wrapper for n, p in self.parts.items()}, half))
            sites = SiteReference(
                part,
                base[name],
                lambda: self._copies("exact", lambda: _doubled(base))[name],
                graph,
                self._feeds(name, self.running[self.whole]),
                half,
            )
        entries: dict[str, list[dict[str, Any]]] = {}
        scales: list[np.ndarray] = []
        outputs = []
        for index, running in enumerate(self.running):
            feeds, where = self._feeds(name, running), f"frame {running.token}: {name}"
            exact: dict[str, np.ndarray] | None = None
            own: dict[str, np.ndarray] | None = None
            if rounds:
                with quantizers_off(self.detector):
                    exact = part.run(feeds)
            if index == 0:
                with recording_scales(self.detector) as scales:
                    reference = part.run(feeds)
            if sites is not None and typed is None:
                reference = sites.simulate(feeds)
            elif index:
                reference = part.run(feeds)

            def compare(
                reference: Mapping[str, np.ndarray],
                own: Mapping[str, np.ndarray] | None = None,
                index: int = index,
                feeds: Mapping[str, np.ndarray] = feeds,
                exact: Mapping[str, np.ndarray] | None = exact,
                where: str = where,
            ) -> dict[str, dict[str, Any]]:
                if typed is None:
                    compared = verify_part(opened, reference, feeds, exact, where, own)
                else:
                    compared = verify_strong(written, typed, reference, feeds, exact, where)
                if index == self.whole:
                    again = verify_part(optimized, reference, feeds, exact, where, own)
                    for output, entry in compared.items():
                        entry["optimized_db"] = again[output]["sqnr_db"]
                        entry["passed"] &= entry["optimized_db"] >= entry["tolerance_db"]
                return compared

            compared = compare(reference)
            if not rounds and typed is None and not all(entry["passed"] for entry in compared.values()):
                reference, own = self._in_float64(name, feeds), reference
                compared = compare(reference, own)
            for output, entry in compared.items():
                entries.setdefault(output, []).append(entry)
            if index in self.stored[name]:
                tolerances = {output: entry["tolerance_db"] for output, entry in compared.items()}
                self._keep(index, name, feeds, reference, exact, tolerances)
            outputs.append(reference if own is None else own)
        report = {output: _worst(found, [r.token for r in self.running]) for output, found in entries.items()}
        kept = compare_scales(graph_scales(model), scales)
        result: dict[str, Any] = {"verification": report, "scales": kept}
        passed = kept["passed"] and all(entry["passed"] for entry in report.values())
        wrong: list[dict[str, Any]] = []
        if sites is not None:
            result["sites"], wrong = self._check_sites(name, sites)
        if not passed and typed is None:
            plain = [(o, i) for o, found in entries.items() for i in range(len(found))]
            output, frame = min(plain, key=lambda at: _reserve(entries[at[0]][at[1]]))
            wrong += [
                {**layer.to_json(), "output": output, "frame": self.running[frame].token}
                for layer in diagnose(written, model, part, self._feeds(name, self.running[frame]), output)
            ]
        if wrong:
            result["divergence"] = wrong
        if not passed or (sites is not None and not result["sites"]["passed"]):
            self.passed = False
        self._advance(name, outputs)
        return result

    def _copies(self, kind: str, make: Callable[[], dict[str, torch.nn.Module]]) -> dict[str, torch.nn.Module]:
        """A copy of the parts, made when it is first needed."""
        if kind not in self._made:
            self._made[kind] = make()
        return self._made[kind]

    def _in_float64(self, name: str, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """A part's float64 outputs, computed in PyTorch."""
        wrappers = {n: p.wrapper for n, p in self.parts.items()}
        exact = TorchPart(self._copies("float64", lambda: _doubled(wrappers))[name])
        return exact.run(in_float64(feeds))

    def _check_sites(self, name: str, reference: SiteReference) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The part's `sites` and those that diverge: on the codes of a real frame, and on patches of these, which are kept,
        with the optimizer on too."""
        feeds = self._feeds(name, self.running[self.whole])
        codes = reference.codes(feeds)
        patches = reference.patches(codes)
        repeated = {site: tile(patch, codes[site].shape) for site, patch in patches.items()}
        cut = reference.cut
        wrong: dict[str, dict[str, Any]] = {}
        runners: dict[bool, Runner] = {}
        figures: list[dict[str, Any]] = []
        for given, kept in ((codes, None), (repeated, patches)):
            if reference.problems:
                break
            sites = reference.sites(feeds, given, kept)
            if missing := sorted(set(cut.sites) - set(sites)):
                reference.problems += [f"{site}: PyTorch has no such site" for site in missing]
                break
            for optimized in (False, True) if kept else (False,):
                if optimized not in runners:
                    runners[optimized] = runner_of(cut, sites, optimized=optimized)
                found = check_sites(cut, sites, feeds, given, runners[optimized])
                for row in reference.failures(found):
                    row["note"] += " with ONNX Runtime's optimizer on" if optimized else ""
                    wrong.setdefault(row["node"], row)
                figures += found.values()
            if kept is not None:
                for index, site in enumerate(sites):
                    for key, value in sites[site].pack().items():
                        self.arrays[f"sites/{name}/{index}/{key}"] = value
        pairs = [
            {
                "tensor": pair.codes,
                "node": pair.node,
                "module": reference.modules.get(pair.codes, pair.node),
                "dtype": pair.dtype,
                "scale": pair.scale.ravel().tolist(),
                "zero_point": pair.zero.ravel().tolist(),
            }
            for pair in cut.pairs.values()
        ]
        worst = max(
            figures, key=lambda entry: entry["off"] - entry["slack"], default={"off": 0.0, "slack": 0.0, "share": 0.0}
        )
        about = {
            "frame": self.whole,
            "pairs": pairs,
            "outputs": cut.outputs,
            "problems": reference.problems,
            "failed": len(wrong),
            "worst": {key: float(f"{worst[key]:.4g}") for key in ("off", "slack", "share")},
            "passed": not (wrong or reference.problems),
        }
        return about, list(wrong.values())

    def skip(self, name: str) -> None:
        """Advances the frames past a part that is not written."""
        self._advance(name, [self.parts[name].run(self._feeds(name, running)) for running in self.running])

    def _keep(
        self,
        index: int,
        name: str,
        feeds: Mapping[str, np.ndarray],
        reference: Mapping[str, np.ndarray],
        unquantized: Mapping[str, np.ndarray] | None,
        tolerances: Mapping[str, float],
    ) -> None:
        stem = f"{index}/{name}"
        own = self.plan.parts[name]
        if index > 0 or not self.plan.is_raw(own):  # the generated frame is made again from its seed
            for tensor, array in feeds.items():
                patch = self.running[index].patches.get(own.inputs[tensor])
                packed = pack(array if patch is None else patch, self.flow.image)
                if own.inputs[tensor] in self.varying:
                    packed["shape"] = np.array(array.shape, np.int64)
                if patch is not None:
                    packed["patch_shape"] = np.array(patch.shape, np.int64)
                for key, value in packed.items():
                    self.arrays[f"{stem}/in/{tensor}/{key}"] = value
        for kind, arrays in (("out", reference), ("float", unquantized or {})):
            for output, array in arrays.items():
                for key, value in store(array, tolerances[output], len(arrays)).items():
                    self.arrays[f"{stem}/{kind}/{output}/{key}"] = value

    def _advance(self, name: str, outputs: Sequence[Mapping[str, np.ndarray]]) -> None:
        """Advances every frame past a part and the ops after it."""
        for running, output in zip(self.running, outputs, strict=True):
            running.tensors.update(output)
        names = list(self.parts)
        following = names[names.index(name) + 1 :][:1]
        if not following:
            return
        self._ops_until(following[0], after=name)
        needed = self.plan.needed_from(following[0])
        taken = set(self.plan.parts[following[0]].inputs.values())
        for running in self.running:
            running.tensors = {tensor: x for tensor, x in running.tensors.items() if tensor in needed}
            for tensor in sorted(taken - self._settled):
                value = round_input(running.tensors[tensor])
                # In the stored frame, a large tensor is replaced by a repeated patch.
                patch = input_patch(value) if running is self.running[self.whole] else None
                running.tensors[tensor] = value if patch is None else tile(patch, value.shape)
                if patch is not None:
                    running.patches[tensor] = patch
        self._settled |= taken

    def _ops_until(self, name: str, after: str | None = None) -> None:
        """Runs the ops between the previous part and this one, in torch."""
        for step in self.plan.between(after, name):
            if not isinstance(step, Op):
                continue
            for running in self.running:
                given = {n: running.tensors[n] for n in step.inputs}
                computed = [n for part in self.plan.parts.values() for n in part.outputs]
                as_torch = {n: torch.from_numpy(x) if n in computed else x for n, x in given.items()}
                with torch.inference_mode():
                    result = self.ops[step.name](as_torch)
                running.tensors.update({n: x.numpy() if isinstance(x, torch.Tensor) else x for n, x in result.items()})

    def write(self, folder: Path) -> dict[str, Any]:
        """Writes verification.npz and returns the manifest's `verification` section."""
        write_summary(folder / FILE, self.arrays)
        return {
            "runtime": "onnxruntime, optimizer off",
            "seed": self.seed,
            "batch": self.batch,
            "frames": [running.token for running in self.running],
            "passed": self.passed,
            "file": FILE,
            "sha256": sha256(folder / FILE),
            "stored": self.stored,
            "made_sha256": self.made_sha256,
        }
