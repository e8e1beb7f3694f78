"""MMDeploy's own file of a model beside ours: the same boxes both ways, file size, load time, latency from points to boxes.

    pip install --no-deps --target /tmp/mmdeploy mmdeploy==1.3.1 aenum multiprocess dill prettytable terminaltables
    python benchmarks/mmdeploy_peer.py pointpillars_hv_secfpn_8xb6-160e_kitti-3d-3class.py CLOUD.bin --mmdeploy /tmp/mmdeploy

Weights are random. MMDeploy runs in a process of its own, from that folder: its release pins others than ours, and it is no dependency.
It writes its file, and runs both files through its own wrapper and post-processing. Then all files are run through ours, interleaved.
"""

from __future__ import annotations

import argparse
import importlib.abc
import importlib.machinery
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import torch
from command import check_least, one_line_errors
from rich.console import Console
from rich.table import Table

from qat.boxes.detections import Detections
from qat.core.errors import UserError
from qat.core.rounds import no_collection, turned
from qat.deploy.mmdeploy.api import detections
from qat.deploy.mmdeploy.checks import compare_boxes
from qat.deploy.mmdeploy.clouds import read_cloud
from qat.deploy.mmdeploy.config import read
from qat.deploy.mmdeploy.deploy import Request, deploy
from qat.deploy.mmdeploy.detector import engine_detector, pytorch_detector, source_of
from qat.families.mmdet3d.config import find
from qat.families.mmdet3d.library import load
from qat.model.opening import open_float, read_config

VOXEL = "voxel-detection/voxel-detection_{}.py"
OURS = ("onnxruntime_dynamic", "openvino_dynamic-{}", "onnxruntime-int8_dynamic", "openvino-int8_dynamic-{}")
# Imported by mmdet3d's metrics, which MMDeploy imports; not used here.
UNUSED = ("lyft_dataset_sdk", "open3d", "pandas", "plyfile", "trimesh")


class Unused(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports `UNUSED` as empty modules."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name.split(".")[0] not in UNUSED:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: Any) -> Any:
        module = MagicMock(name=spec.name)
        module.__path__, module.__spec__, module.__name__ = [], spec, spec.name
        return module

    def exec_module(self, module: Any) -> None:
        pass


def peer(folder: str, model_cfg: str, cloud: str, checkpoint: str, out: str, ours: str) -> None:
    """In a process of its own: MMDeploy's file and, through its wrapper, the boxes of both files, as {theirs, ours}.pth."""
    sys.meta_path.append(Unused())
    sys.path.append(folder)
    load()
    real = torch.onnx.export

    def export(*args: Any, **more: Any) -> Any:
        return real(*args, **{**more, "dynamo": False})  # the exporter that it was written for

    torch.onnx.export = export  # type: ignore[assignment]
    from mmdeploy.apis import torch2onnx
    from mmdeploy.apis.utils import build_task_processor
    from mmdeploy.utils import load_config

    deploy_cfg = str(Path("configs/mmdet3d") / VOXEL.format("onnxruntime_dynamic"))
    torch2onnx(cloud, out, "theirs.onnx", deploy_cfg, model_cfg, checkpoint, device="cpu")
    processor = build_task_processor(*reversed(load_config(deploy_cfg, model_cfg)), "cpu")
    for name, file in (("theirs", f"{out}/theirs.onnx"), ("ours", ours)):
        model = processor.build_backend_model([file]).eval()
        with torch.no_grad():
            found = detections(model.test_step(processor.create_input(cloud)[0])[0])
        np.savez(f"{out}/{name}.npz", boxes=found.boxes, scores=found.scores, labels=found.labels)


def _boxes(path: Path) -> Detections:
    with np.load(path) as arrays:
        return Detections(arrays["boxes"], arrays["scores"], arrays["labels"], "mmdet3d")


@one_line_errors
def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_cfg", metavar="MODEL_CFG", help="a config that mmdet3d ships")
    parser.add_argument("cloud", type=Path, metavar="CLOUD", help="points (.bin) of its data set")
    parser.add_argument("--mmdeploy", type=Path, required=True, metavar="DIR", help="where MMDeploy was installed to")
    parser.add_argument("--form", default="kitti-32x4", help="of OpenVINO's deploy config (default kitti-32x4)")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="interleaved rounds (default 7)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of each backend (default 1)")
    args = parser.parse_args()
    check_least(args, rounds=1, threads=1)
    return measure(args)


def measure(args: argparse.Namespace) -> int:
    """Writes every file, compares, times."""
    model_cfg = find(args.model_cfg)
    family, described = read_config(model_cfg)
    cloud = read_cloud(args.cloud, dict(described)).points
    with tempfile.TemporaryDirectory() as name:
        out = Path(name)
        checkpoint = out / "weights.pth"
        network = open_float(source_of(model_cfg, "random:1")).network
        torch.save({"state_dict": network.state_dict(), "meta": {"mmengine_version": "0.10.7"}}, checkpoint)
        flow, files = family.flow(described), {}
        for form in OURS:
            config = read(Path("configs/mmdet3d") / VOXEL.format(form.format(args.form)))
            request = Request(
                model_cfg, checkpoint, args.cloud, work_dir=out / form.format(args.form), calib=args.cloud
            )
            done = deploy(config, request)
            if wrong := [check for checks in done.checks.values() for check in checks if not check.passed]:
                raise UserError(
                    f"{config.source}: {wrong[0].name}: found {wrong[0].relative:.2g}, expected PyTorch's result"
                )
            files[f"ours, {config.backend} {config.precision}"] = config, done.files[min(1, len(done.files) - 1)]
        config, ours = files["ours, onnxruntime fp32"]
        words = [str(args.mmdeploy), str(model_cfg), str(args.cloud), str(checkpoint), str(out), str(ours)]
        done_peer = subprocess.run(
            [sys.executable, __file__, "--peer", *words], capture_output=True, text=True, check=False
        )
        if not (out / "ours.npz").is_file():
            raise UserError(f"{args.mmdeploy}: MMDeploy failed: {done_peer.stderr.strip().splitlines()[-1]}")
        wrapped = compare_boxes(_boxes(out / "ours.npz"), _boxes(out / "theirs.npz"))
        files = {"MMDeploy, onnxruntime fp32": (config, out / "theirs.onnx"), **files}
        rows, loads = {}, {}
        for row, (own, file) in files.items():
            begin = time.perf_counter()
            rows[row] = engine_detector(own, flow, file, threads=args.threads)
            loads[row] = time.perf_counter() - begin
        theirs, expected = next(iter(rows.values()))(cloud), pytorch_detector(model_cfg, checkpoint)(cloud)
        print(f"MMDeploy's file, our decoding, beside PyTorch: {compare_boxes(theirs, expected)}")
        print(f"our file beside MMDeploy's, through MMDeploy's wrapper: {wrapped}")
        times: dict[str, list[float]] = {row: [] for row in rows}
        with no_collection():
            for turn in range(args.rounds + 1):
                for row in turned(list(rows), turn):
                    begin = time.perf_counter()
                    rows[row](cloud)
                    if turn:  # the first round warms up
                        times[row].append((time.perf_counter() - begin) * 1e3)
        base = np.median(times["MMDeploy, onnxruntime fp32"])
        shown = Table("file", "MB", "load s", "points to boxes ms", "times as fast", box=None)
        for row, (_, file) in files.items():
            size = sum(path.stat().st_size for path in (file, file.with_suffix(".bin")) if path.is_file())
            milliseconds = float(np.median(times[row]))
            shown.add_row(
                row, f"{size / 1e6:.1f}", f"{loads[row]:.2f}", f"{milliseconds:.0f}", f"{base / milliseconds:.2f}"
            )
        Console(width=120).print(shown)
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peer"]:
        peer(*sys.argv[2:])
    else:
        sys.exit(main())
