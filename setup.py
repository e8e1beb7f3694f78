"""Packaging of bevqat; the tools' settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "([^"]+)"', (HERE / "qat" / "__init__.py").read_text(encoding="utf-8")).group(1)

setup(
    name="bevqat",
    version=VERSION,
    description="Quantization-aware export workbench for camera bird's-eye-view detectors",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["qat", "qat.*"]),
    package_data={
        "qat": ["py.typed"],
        "qat.report": ["page.css", "page.js", "templates/*.html"],
        "qat.families.bevfusion.pooling": ["pooling.cu"],
        "qat.families.mmdet3d": ["templates/*.html"],
    },
    install_requires=[
        "torch>=2.4",
        "timm>=1.0",
        "pytorch-quantization==2.1.3",
        "onnx>=1.16",
        "onnxsim>=0.4.36",
        "onnxruntime>=1.18",
        "openvino>=2025.0",
        "nuscenes-devkit>=1.2",
        "numpy<2",
        "numba>=0.60",
        "jinja2>=3.1",
        "filelock>=3.30",
        "pydantic>=2.10",
        "rich>=13",
        "PyYAML>=6",
        "shtab>=1.13",
    ],
    extras_require={
        "tensorrt": ["tensorrt", "cuda-bindings"],
        # CUDA 12's, which a CUDA 13 driver runs too, and the last that compiles for Volta (Jetson Xavier).
        "gpu": ["onnxruntime-gpu", "cuda-bindings>=12.8,<13", "nvidia-cuda-nvrtc-cu12>=12.8"],
        # And `pip install --no-deps mmdet3d==1.4.0`, which would bring a gigabyte of what nothing here needs (open3d). A compiled mmcv
        # in the place of mmcv-lite is used where it is there.
        "mmdet3d": ["mmengine>=0.10.7", "mmcv-lite>=2.1.0,<2.2.0", "mmdet>=3.2.0", "onnxscript>=0.7"],
        "bevfusion": ["torchpack"],
        # For benchmarks/peers_accuracy.py. modelopt's own [onnx] extra pins an older onnx and ONNX Runtime's CUDA build, neither
        # of which goes with ours; these are the rest of it, and requests, which modelopt imports and does not declare.
        "peers": [
            "nncf>=3.4",
            "nvidia-modelopt>=0.47",
            "requests",
            "cppimport",
            "lief",
            "onnx-graphsurgeon>=0.6.1",
            "onnxconverter-common>=1.16",
            "onnxscript",
            "onnxslim>=0.1.76",
            "polygraphy>=0.53.4",
        ],
        "synth": ["embreex>=4.4"],  # `bevqat synth` casts rays
        "dev": ["embreex>=4.4", "hypothesis", "mypy", "pytest", "pytest-xdist", "ruff", "types-PyYAML"],
    },
    entry_points={"console_scripts": ["bevqat = qat.cli:main"]},
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
