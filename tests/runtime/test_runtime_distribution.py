"""`Pipeline` in a virtual environment that has the second distribution alone: no torch, onnx or pydantic."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qat.engine import CPU_BACKENDS
from qat.runtime import Pipeline

ROOT = Path(__file__).resolve().parents[2]
CODE = """
import json, sys
import numpy as np
from qat.runtime import Pipeline
pipeline = Pipeline.load(sys.argv[1], "onnxruntime")
raw = pipeline.flow.raw_frames(1)[0].raw
found = pipeline(*raw)
absent = [name for name in ("torch", "onnx", "pydantic", "nuscenes") if name not in sys.modules]
print(json.dumps({"scores": found.scores.tolist(), "absent": absent}))
"""

WITHOUT = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "onnx", "pydantic", "nuscenes"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
from qat.cli import main
from qat.runtime import Pipeline
parts, built, backend = sys.argv[1:]
assert main(["build", "--onnx", parts, "--backend", backend, "--out", built]) == 0
assert main(["verify", parts]) == 0 and main(["verify", parts, "--backend", backend]) == 0
for pipeline in (Pipeline.load(built), Pipeline.load(parts, backend)):
    pipeline(*pipeline.flow.raw_frames(1)[0].raw)
"""


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_what_a_robot_runs_imports_neither_torch_nor_onnx(exported_fp32, tmp_path, backend):
    command = [sys.executable, "-c", WITHOUT, exported_fp32, tmp_path / "built", backend]
    environment = {**os.environ, "BEVQAT_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.nightly
def test_a_robot_gives_the_boxes_that_this_machine_does(exported_fp32, tmp_path):
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    python = venv / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", ROOT / "constraints.txt"]
    subprocess.run([*pip, f"{ROOT / 'runtime'}[onnxruntime]"], check=True)
    listed = subprocess.run(
        [python, "-m", "pip", "list", "--format", "json"], capture_output=True, text=True, check=True
    )
    names = {row["name"].lower() for row in json.loads(listed.stdout)}
    assert "bevqat-runtime" in names and not names & {"torch", "onnx", "pydantic", "bevqat"}
    done = subprocess.run(
        [python, "-c", CODE, exported_fp32], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["absent"] == ["torch", "onnx", "pydantic", "nuscenes"]
    pipeline = Pipeline.load(exported_fp32, "onnxruntime")
    expected = pipeline(*pipeline.flow.raw_frames(1)[0].raw)
    np.testing.assert_allclose(found["scores"], expected.scores, atol=1e-6)
