"""The installed TensorRT's capabilities, read from the module itself: 8.5, 8.6, 10 and 11 differ in what they have, and so do builds
of one version (Jetson, RTX). The version string is kept for messages and for matching plans, and decides nothing here.
"""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType
from typing import Any

from qat.core.errors import UserError


@cache
def tensorrt_module() -> ModuleType:
    """The package tensorrt.

    Raises:
        UserError: it is not installed, or its libraries do not load.
    """
    try:
        return importlib.import_module("tensorrt")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "tensorrt":
            raise UserError(f"TensorRT: its package does not import: {' '.join(str(error).split())}") from None
        raise UserError(
            "the package tensorrt is not installed; fix by: pip install tensorrt, or on a Jetson: JetPack's own "
            "(docs/tensorrt.md)"
        ) from None
    except (ImportError, OSError) as error:
        raise UserError(
            f"TensorRT: its libraries do not load: {' '.join(str(error).split())}; put their folder on LD_LIBRARY_PATH "
            "(docs/tensorrt.md)"
        ) from None


def _members(module: Any, enum: str) -> frozenset[str]:
    return frozenset(getattr(getattr(module, enum, None), "__members__", ()))


class Capabilities:
    """Capabilities of a module tensorrt, which is not changed; no builder is made.

    version: for messages, and for matching a plan with its runtime.
    weak_typing: precision by builder flags (8.5 to 10; gone in 11).
    strong_typing: networks whose types are the graph's can be made (10 and 11).
    explicit_batch_flag: networks need the explicit-batch flag (8.5 and 8.6).
    version_compatible: plans for later versions can be built (8.6 on).
    optimization_level: a builder has an option for how long to search (8.6 on).
    progress: a build reports its progress and can be stopped (10 on).
    node_names: parser errors name the ONNX node (10 on).
    tactic_sources: names that a builder knows (11 has no cuBLAS and cuDNN).
    memory_attribute: of an engine, bytes of its scratch memory.
    """

    def __init__(self, module: Any) -> None:
        flags = _members(module, "BuilderFlag")
        self.version = str(getattr(module, "__version__", "?"))
        self.weak_typing = {"FP16", "INT8"} <= flags
        self.strong_typing = "STRONGLY_TYPED" in _members(module, "NetworkDefinitionCreationFlag")
        self.explicit_batch_flag = hasattr(module.Builder, "max_batch_size")
        self.version_compatible = "VERSION_COMPATIBLE" in flags
        self.optimization_level = hasattr(module.IBuilderConfig, "builder_optimization_level")
        self.progress = hasattr(module, "IProgressMonitor") and hasattr(module.IBuilderConfig, "progress_monitor")
        self.node_names = hasattr(module.ParserError, "node_name")
        self.tactic_sources = _members(module, "TacticSource")
        newer = "device_memory_size_v2"
        self.memory_attribute = newer if hasattr(module.ICudaEngine, newer) else "device_memory_size"
