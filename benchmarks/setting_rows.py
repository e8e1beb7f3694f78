"""The rows of engine_settings.py, each in a process of its own (`qat.benchmark.worker.Worker`)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qat.benchmark.worker import memory_mb
from qat.engine import Options


@dataclass(frozen=True)
class Setting:
    """One row. options: fields of `qat.engine.Options`. raw: the backend's own settings, over what we tell it: OpenVINO's
    properties, or ONNX Runtime's session entries, attributes of SessionOptions ("options.NAME") and run entries
    ("run.NAME"). built: whether it loads the built engine or builds it from the graph."""

    name: str
    backend: str
    options: Mapping[str, Any] = field(default_factory=dict)
    raw: Mapping[str, Any] = field(default_factory=dict)
    built: bool = True


def onnxruntime_run(file: Path, setting: Setting, options: Options, feeds: dict[str, np.ndarray]) -> Callable[[], Any]:
    """A session with the setting; what it returns runs once."""
    import onnxruntime as ort

    from qat.engine.onnxruntime_backend import session_options

    told, run = session_options(options), ort.RunOptions()
    if setting.built:
        told.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    for name, value in setting.raw.items():
        if name.startswith("options."):
            value = getattr(ort.ExecutionMode, value) if name.endswith("execution_mode") else value
            setattr(told, name.removeprefix("options."), value)
        elif name.startswith("run."):
            run.add_run_config_entry(name.removeprefix("run."), value)
        else:
            told.add_session_config_entry(name, value)
    session = ort.InferenceSession(str(file), told, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, feeds, run)


def openvino_run(
    file: Path, setting: Setting, options: Options, feeds: dict[str, np.ndarray], precision: str
) -> Callable[[], Any]:
    """A request with the setting; what it returns runs once."""
    import openvino as ov

    from qat.engine import openvino_backend

    told = {**openvino_backend.settings(precision, options, "CPU"), **setting.raw}
    if setting.built:
        compiled = ov.Core().import_model(file.read_bytes(), "CPU", told)
    else:
        model = ov.Core().read_model(file)
        openvino_backend.shift_concatenated(model)
        compiled = ov.Core().compile_model(model, "CPU", told)
    request, arrays = compiled.create_infer_request(), list(feeds.values())

    def run() -> list[np.ndarray]:
        results = request.infer(arrays, share_inputs=True, share_outputs=True)
        return [results[i].copy() for i in range(len(compiled.outputs))]

    return run


class SettingRow:
    """A setting's engine, loaded. described: {"load_ms"}."""

    def __init__(
        self, setting: Setting, file: Path, threads: int, precision: str, feeds: Mapping[str, np.ndarray], pause: float
    ) -> None:
        """pause: seconds before each run, as a robot's camera makes it."""
        options = Options(**{"threads": threads, "cache": None, **setting.options})
        self._pause = pause
        begin = time.perf_counter()
        if setting.backend == "openvino":
            self._run = openvino_run(file, setting, options, dict(feeds), precision)
        else:
            self._run = onnxruntime_run(file, setting, options, dict(feeds))
        self.described = {"load_ms": (time.perf_counter() - begin) * 1e3}
        self._run()

    def turn(self, repeats: int) -> dict[str, Any]:
        """One run that is not counted, then `repeats` that are: milliseconds of each, and of processor time with its pause."""
        self._run()
        wall, cpu = [], []
        for _ in range(repeats):
            time.sleep(self._pause)
            used, begin = time.process_time(), time.perf_counter()
            self._run()
            wall.append((time.perf_counter() - begin) * 1e3)
            time.sleep(self._pause)
            cpu.append((time.process_time() - used) * 1e3)
        return {"ms": wall, "cpu_ms": cpu, "peak_rss_mb": memory_mb("VmHWM") or 0.0}
