"""What stands under `mmcv._ext`: a compiled one where there is one, ours where not, each in a process of its own."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
needs_mmdet3d = pytest.mark.skipif(
    importlib.util.find_spec("mmdet3d") is None, reason="mmdet3d is not installed: pip install 'bevqat[mmdet3d]'"
)
# mmcv with a compiled extension: the installed package's folder and one more, with a module `_ext` of that name.
COMPILED = """
import sys, mmcv
mmcv.__path__.append(sys.argv[1])
from qat.families.mmdet3d.ops import stand_in
class Spec:  # what importlib finds for mmcv, without importing it: both folders
    submodule_search_locations = list(mmcv.__path__)
stand_in.importlib.util.find_spec = lambda name: Spec if name == "mmcv" else None
"""
EXTENSION = """
import torch
CALLS = []
def nms(boxes, scores, iou_threshold, offset):
    CALLS.append("nms")
    return torch.tensor([7])
def furthest_point_sampling_forward(points, temp, output, b, n, m):
    raise RuntimeError("no kernel for cpu")
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    def other(*args, **kwargs):
        CALLS.append(name)
    globals()[name] = other
    return other
"""


def _python(code: str, *arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_the_numpy_functions_and_which_need_no_torch_and_no_mmcv() -> None:
    code = """
import sys
blocked = "torch", "mmcv", "mmdet", "mmdet3d", "mmengine"
sys.modules.update(dict.fromkeys(blocked))
import numpy as np
from qat.boxes import overlap
from qat.families.mmdet3d import ops
from qat.families.mmdet3d.ops import points, rois, voxels
cloud = np.random.default_rng(0).random((50, 4)).astype(np.float32)
voxels.voxelize(cloud, (.1, .1, 1), (0, 0, 0, 1, 1, 1), 5, 50)
points.ball_query(cloud, cloud[points.furthest_point_sample(cloud, 9)], .2, 4)
overlap.nms_rotated(np.ones((2, 5)), np.ones(2), .5)
print(ops.__name__)
"""
    assert _python(code) == "qat.families.mmdet3d.ops"


def test_without_mmcv_install_says_what_to_install() -> None:
    code = """
import importlib.util
importlib.util.find_spec = lambda name: None
from qat.core.errors import UserError
from qat.families.mmdet3d import ops
print(ops.which())
try:
    ops.install()
except UserError as error:
    print(error)
"""
    which, message = _python(code).splitlines()
    assert which == "none"
    assert message.startswith("mmcv is not installed: pip install")


@needs_mmdet3d
def test_ours_stand_at_the_end_of_the_path_once_and_name_what_is_not_there() -> None:
    code = """
import sys
from qat.families.mmdet3d import ops
assert ops.which() == "bevqat" and "torch" not in sys.modules and "mmcv" not in sys.modules
before = list(sys.meta_path)
print(ops.install(), ops.install(), [f in before for f in sys.meta_path].count(False), sys.meta_path[-1] not in before)
import importlib.util
print(importlib.util.find_spec("mmcv._ext").origin, importlib.util.find_spec("mmcv._other"), importlib.util.find_spec("_ext"))
import mmcv.ops, mmcv._ext
print(hasattr(mmcv._ext, "anything"), hasattr(mmcv._ext, "__wrapped__"))
for operator in ("get_indice_pairs_3d_forward", "roi_pool_forward"):
    try:
        getattr(mmcv._ext, operator)(1, 2, three=3)
    except ops.MissingOperatorError as error:
        print(error)
"""
    lines = _python(code).splitlines()
    assert lines[0] == "bevqat bevqat 1 True"
    assert lines[1] == "bevqat None None"
    assert lines[2] == "True False"
    assert lines[3].startswith(
        "sparse convolution, mmcv's operator get_indice_pairs_3d_forward: it is not compiled here"
    )
    assert lines[4].startswith("mmcv's operator roi_pool_forward: it is not compiled here")
    assert all("Install mmcv with its compiled operators" in line for line in lines[3:5])


@needs_mmdet3d
def test_a_compiled_extension_wins_and_ours_answer_where_it_has_no_kernel(tmp_path: Path) -> None:
    (tmp_path / "_ext.py").write_text(EXTENSION)
    code = f"""{COMPILED}
from qat.families.mmdet3d import ops
print(ops.which(), ops.install(), ops.install(), len([f for f in sys.meta_path if "qat" in type(f).__module__]))
import torch, mmcv._ext, mmcv.ops
print(mmcv._ext.__file__ == sys.argv[1] + "/_ext.py")
boxes, scores = torch.rand(3, 4), torch.rand(3)
print(mmcv._ext.nms(boxes, scores, iou_threshold=0.5, offset=0).tolist(), mmcv._ext.CALLS)
xyz = torch.rand(1, 30, 3)
from qat.families.mmdet3d.ops.points import furthest_point_sample
print(mmcv.ops.furthest_point_sample(xyz, 5)[0].tolist() == furthest_point_sample(xyz[0].numpy(), 5).tolist())
mmcv._ext.roi_pool_forward()
mmcv._ext.hard_voxelize_forward(torch.rand(3, 4))
print(mmcv._ext.CALLS)
class Net(torch.nn.Module):
    def forward(self, x, offset, weight):
        return mmcv.ops.deform_conv2d(x, offset, weight, 1, 1)
shapes = (1, 2, 4, 4), (1, 18, 4, 4), (2, 2, 3, 3)
torch.export.export(Net(), tuple(torch.rand(*s) for s in shapes))  # ours: a traced tensor is in no memory
print(mmcv._ext.CALLS)
"""
    lines = _python(code, str(tmp_path)).splitlines()
    assert lines[0] == "compiled compiled compiled 0"
    assert lines[1] == "True"
    assert lines[2] == "[7] ['nms']"
    assert lines[3] == "True"
    assert lines[4] == lines[5] == "['nms', 'roi_pool_forward', 'hard_voxelize_forward']"


@needs_mmdet3d
def test_a_compiled_extension_that_does_not_load_is_explained(tmp_path: Path) -> None:
    (tmp_path / "_ext.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    code = f"""{COMPILED}
from qat.core.errors import UserError
from qat.families.mmdet3d import ops
try:
    ops.install()
except UserError as error:
    print(error)
"""
    assert _python(code, str(tmp_path)).startswith("mmcv's compiled operators do not load (undefined symbol: _ZN3c10)")
