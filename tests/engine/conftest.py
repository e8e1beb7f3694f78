"""The small detector's BEV decoder, exported in every form that TensorRT may be given; and TensorRT's releases, as tables."""

from __future__ import annotations

from enum import Enum
from types import SimpleNamespace

import pytest
import torch

OLD_SOURCES = ("CUBLAS", "CUBLAS_LT", "CUDNN", "EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS")

# What releases of TensorRT's Python package have, as far as `Capabilities` asks: stand-ins for machines without them, compared
# with the real modules by test_tensorrt_lab.py. flags: the members of BuilderFlag that matter here. has: attributes by class.
VERSIONS: dict[str, dict] = {
    "8.5.3.1": {
        "flags": ("FP16", "INT8", "TF32"),
        "network": ("EXPLICIT_BATCH", "EXPLICIT_PRECISION"),
        "sources": OLD_SOURCES,
        "has": {"Builder": ("max_batch_size",), "ICudaEngine": ("device_memory_size",)},
    },
    "8.6.1": {
        "flags": ("FP16", "INT8", "TF32", "VERSION_COMPATIBLE"),
        "network": ("EXPLICIT_BATCH", "EXPLICIT_PRECISION"),
        "sources": OLD_SOURCES,
        "has": {
            "Builder": ("max_batch_size",),
            "IBuilderConfig": ("builder_optimization_level",),
            "ICudaEngine": ("device_memory_size",),
        },
    },
    "10.0.1": {
        "flags": ("FP16", "INT8", "TF32", "VERSION_COMPATIBLE"),
        "network": ("EXPLICIT_BATCH", "STRONGLY_TYPED"),
        "sources": OLD_SOURCES,
        "has": {
            "IBuilderConfig": ("builder_optimization_level", "progress_monitor"),
            "ICudaEngine": ("device_memory_size",),
            "ParserError": ("node_name",),
            "IProgressMonitor": (),
        },
    },
    "10.16.1.11": {
        "flags": ("FP16", "INT8", "TF32", "VERSION_COMPATIBLE"),
        "network": ("EXPLICIT_BATCH", "STRONGLY_TYPED", "PREFER_AOT_PYTHON_PLUGINS", "PREFER_JIT_PYTHON_PLUGINS"),
        "sources": OLD_SOURCES,
        "has": {
            "IBuilderConfig": ("builder_optimization_level", "progress_monitor"),
            "ICudaEngine": ("device_memory_size", "device_memory_size_v2"),
            "ParserError": ("node_name",),
            "IProgressMonitor": (),
        },
    },
    "11.4.0.106": {
        "flags": ("TF32", "VERSION_COMPATIBLE"),
        "network": ("STRONGLY_TYPED", "PREFER_AOT_PYTHON_PLUGINS", "PREFER_JIT_PYTHON_PLUGINS"),
        "sources": ("EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS"),
        "has": {
            "IBuilderConfig": ("builder_optimization_level", "progress_monitor"),
            "ICudaEngine": ("device_memory_size_v2",),
            "ParserError": ("node_name",),
            "IProgressMonitor": (),
        },
    },
}
# Attributes that `VERSIONS` tells apart; a class without one of them is listed without it.
ASKED = {
    "Builder": ("max_batch_size",),
    "IBuilderConfig": ("builder_optimization_level", "progress_monitor"),
    "ICudaEngine": ("device_memory_size", "device_memory_size_v2"),
    "ParserError": ("node_name",),
}


def _stand_in(version: str) -> SimpleNamespace:
    """A module with a release's enumerations and classes, as far as the table goes."""
    table = VERSIONS[version]
    module = SimpleNamespace(__version__=version)
    for name, members in (
        ("BuilderFlag", table["flags"]),
        ("NetworkDefinitionCreationFlag", table["network"]),
        ("TacticSource", table["sources"]),
    ):
        setattr(module, name, Enum(name, list(members)))
    for name in ASKED:
        setattr(module, name, type(name, (), dict.fromkeys(table["has"].get(name, ()))))
    if "IProgressMonitor" in table["has"]:
        module.IProgressMonitor = type("IProgressMonitor", (), {})
    return module


# part: name. The forms: precision and flavour of `export_parts`.
PART = "fuser"
FORMS = {
    "fp32": ("fp32", "tensorrt"),
    "int8": ("int8", "tensorrt"),
    "int8-strong": ("int8", "tensorrt-strong"),
    "fp16-strong": ("fp16", "tensorrt-strong"),
    "cpu": ("int8", "onnxruntime"),
}


@pytest.fixture(scope="session")
def forms(tmp_path_factory, fresh_config, make_detector, small_cameras):
    """{form: folder} of exports of `PART` alone; nothing may change them."""
    from qat.export import ExportOptions, export_parts
    from qat.model.quantized import QuantizedModel

    detector = make_detector(fresh_config())
    quantized = QuantizedModel(make_detector(fresh_config()))
    for module in quantized.activation_quantizers().values():
        module.set_range(torch.tensor(4.0))
    root = tmp_path_factory.mktemp("forms")
    for form, (precision, flavour) in FORMS.items():
        source = quantized if precision == "int8" else detector
        export_parts(source, root / form, ExportOptions(precision, flavour=flavour, parts=[PART]))
    return {form: root / form for form in FORMS}


@pytest.fixture(scope="session")
def graphs(forms):
    """{form: ONNX file}."""
    return {form: folder / f"{PART}.onnx" for form, folder in forms.items()}


@pytest.fixture(scope="session")
def stand_in():
    """version → a module as `VERSIONS` has it."""
    return _stand_in


@pytest.fixture(scope="session")
def releases():
    """(VERSIONS, ASKED)"""
    return VERSIONS, ASKED
