"""What a backend can do at best on this machine, measured on the spot, and how fast its memory is."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from qat.core.errors import UserError
from qat.core.machine import threads_of
from qat.engine import Options, build, find_backend

# Convolutions of many channels, of sizes that fill the vector units and stay in the caches: a backend's best is the better of
# its matrix products (1×1) and its 3×3 kernels. (channels, kernel)
# A device of its own has far more of both, and launching a layer takes it longer than computing these.
SHAPES, SIDE = ((512, 1), (256, 3)), 32
DEVICE_SHAPES, DEVICE_SIDE = ((1024, 1), (512, 3)), 64
LAYERS = 8
SECONDS, LEAST_RUNS = 0.7, 5
COPIED_MB = 256  # far beyond any cache


def peak_macs(channels: int, kernel: int, side: int = SIDE) -> int:
    """Multiply-accumulates of `peak_graph`."""
    return (channels * kernel * side) ** 2 * LAYERS


def peak_graph(precision: str, flavour: str, channels: int, kernel: int, side: int = SIDE) -> bytes:
    """LAYERS convolutions with ReLU, one after the other, over float32[1, channels, side, side].

    Args:
        precision: "fp32", "fp16" (FP32-typed: the builder's flag makes it FP16) or "int8", with Q/DQ as `flavour` has it: for
            CPUs u8 activations and s8 weights stored as integers, else s8 activations and float weights in Q/DQ.
    """
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)
    signed = flavour.startswith("tensorrt")
    nodes, constants = [], []

    def constant(name: str, value: np.ndarray) -> str:
        constants.append(numpy_helper.from_array(value, name))
        return name

    def rounded(name: str) -> str:
        nodes.append(helper.make_node("QuantizeLinear", [name, "scale", "zero"], [f"{name}_q"]))
        nodes.append(helper.make_node("DequantizeLinear", [f"{name}_q", "scale", "zero"], [f"{name}_d"]))
        return f"{name}_d"

    integer = precision == "int8"
    if integer:
        constant("scale", np.asarray(8 / (127 if signed else 255), np.float32))
        constant("zero", np.asarray(0, np.int8 if signed else np.uint8))
    value = rounded("x") if integer else "x"
    for n in range(LAYERS):
        deviation = (2 / channels) ** 0.5 / kernel
        weight = deviation * random.standard_normal((channels, channels, kernel, kernel), np.float32)
        if integer:
            step = np.abs(weight).max(axis=(1, 2, 3)) / np.float32(127)
            scale = constant(f"s{n}", step.astype(np.float32))
            zero = constant(f"z{n}", np.zeros(channels, np.int8))
            if signed:
                nodes.append(
                    helper.make_node("QuantizeLinear", [constant(f"w{n}", weight), scale, zero], [f"i{n}"], axis=0)
                )
            else:
                constant(f"i{n}", np.round(weight / step[:, None, None, None]).astype(np.int8))
            nodes.append(helper.make_node("DequantizeLinear", [f"i{n}", scale, zero], [f"d{n}"], axis=0))
            weights = f"d{n}"
        else:
            weights = constant(f"w{n}", weight)
        nodes.append(helper.make_node("Conv", [value, weights], [f"c{n}"], pads=[kernel // 2] * 4))
        nodes.append(helper.make_node("Relu", [f"c{n}"], [f"r{n}"]))
        value = rounded(f"r{n}") if integer else f"r{n}"
    nodes.append(helper.make_node("Identity", [value], ["y"]))
    shape = [1, channels, side, side]
    graph = helper.make_graph(
        nodes,
        "peak",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        constants,
    )
    return bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8).SerializeToString()
    )


def copy_bandwidth(threads: int, megabytes: int = COPIED_MB, seconds: float = SECONDS) -> float:
    """GB/s of the fastest copy of `megabytes` by so many threads, 0 for one on each core; read and written bytes both count."""
    count = threads_of(threads)
    source = np.ones(megabytes * 1_000_000 // 4, np.float32)
    target = np.empty_like(source)
    pieces = list(zip(np.array_split(target, count), np.array_split(source, count), strict=True))
    best, runs, begin = float("inf"), 0, time.monotonic()
    with ThreadPoolExecutor(count) as pool:  # numpy lets the others run while it copies
        while runs < LEAST_RUNS or time.monotonic() - begin < seconds:
            start = time.perf_counter()
            list(pool.map(lambda pair: np.copyto(*pair), pieces))
            best, runs = min(best, time.perf_counter() - start), runs + 1
    return 2 * source.nbytes / best / 1e9


class Peaks:
    """One backend's peaks; made in a process of its own (`qat.benchmark.worker.Worker`)."""

    def __init__(self, backend: str, options: Options) -> None:
        """options: what the rows are built with; of TensorRT's those that name a graph's own tensors are left out."""
        self.backend = backend
        tensorrt = replace(options.tensorrt, profiles=(), input_formats=(), output_formats=())
        self.options = replace(options, cache=None, tensorrt=tensorrt)
        self._on_cpu = find_backend(backend).device.startswith("CPU")

    def compute(self, precision: str) -> float | None:
        """10⁹ multiply-accumulates a second of the best run of a `peak_graph`; None where the backend does not do the
        precision. On a device with memory of its own, by the device's own clock: the host's would tell what launching takes.

        Raises:
            UserError: the backend's engines do not tell the device's time.
        """
        shapes, side = (SHAPES, SIDE) if self._on_cpu else (DEVICE_SHAPES, DEVICE_SIDE)
        found = 0.0
        for channels, kernel in shapes:
            with TemporaryDirectory() as folder:
                path = Path(folder) / "peak.onnx"
                path.write_bytes(peak_graph(precision, find_backend(self.backend).flavour, channels, kernel, side))
                try:
                    engine: Any = build(path, self.backend, precision, self.options)
                except UserError:
                    return None
                if not self._on_cpu and not hasattr(engine, "compute_ms"):
                    raise UserError(
                        f"{self.backend}: its engines do not tell the device's own time, so it has no roofline"
                    )
                feeds = {"x": np.random.default_rng(1).random((1, channels, side, side), np.float32)}
                best, runs, begin = float("inf"), 0, time.monotonic()
                while runs < LEAST_RUNS or time.monotonic() - begin < SECONDS:
                    start = time.perf_counter()
                    engine.run(feeds)
                    took = time.perf_counter() - start if self._on_cpu else engine.compute_ms / 1e3
                    best, runs = min(best, took), runs + 1
            found = max(found, peak_macs(channels, kernel, side) / best / 1e9)
        return found

    def bandwidth(self) -> float | None:
        """`copy_bandwidth`; None for a backend whose device has memory of its own."""
        return copy_bandwidth(self.options.threads) if self._on_cpu else None


def measure_peaks(worker: Any, precisions: list[str]) -> dict[str, Any]:
    """Asks a process's `Peaks`: {"gmacs": by precision, "gb_per_s"}."""
    gmacs = {precision: worker.ask("compute", precision) for precision in precisions}
    return {"gmacs": {p: round(v, 2) for p, v in gmacs.items() if v is not None}, "gb_per_s": worker.ask("bandwidth")}
