"""bevqat-runtime: what a robot needs of this tree: `Pipeline`, `bevqat build`, `benchmark` and `verify`. No torch, no onnx.

    pip install './runtime[onnxruntime]'      # or openvino, tensorrt, gpu

The code is bevqat's own, all of it; what it lacks here are the packages that calibration and export need, and a verb that needs
one says so. Not to be installed beside bevqat, which has everything already.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parents[1]
VERSION = re.search(r'__version__ = "([^"]+)"', (ROOT / "qat" / "__init__.py").read_text(encoding="utf-8")).group(1)

setup(
    name="bevqat-runtime",
    version=VERSION,
    description="Runs what bevqat exported: images to boxes, without PyTorch",
    license="Apache-2.0",
    python_requires=">=3.10",
    package_dir={"": ".."},
    packages=find_packages("..", include=["qat", "qat.*"], exclude=["qat.data.synth", "qat.doctor"]),
    package_data={"qat": ["py.typed"], "qat.families.bevfusion.pooling": ["pooling.cu"]},
    install_requires=["numpy<2", "numba>=0.60", "filelock>=3.30", "Pillow>=10", "rich>=13"],
    extras_require={
        "onnxruntime": ["onnxruntime>=1.18"],
        "openvino": ["openvino>=2025.0"],
        "tensorrt": ["tensorrt", "cuda-bindings"],
        "gpu": ["onnxruntime-gpu", "cuda-bindings>=12.8,<13", "nvidia-cuda-nvrtc-cu12>=12.8"],
    },
    entry_points={"console_scripts": ["bevqat = qat.cli:main"]},
)
