"""What INT8 costs in KITTI's AP in each flavour: car, moderate, 3D, AP40 of PyTorch's simulations and of exported files, with intervals.

    bevqat synth --format kitti --out data/held --scenes 150 --seed 8100 --keyframes 4 --azimuths 600 --splits val=150
    python benchmarks/kitti_accuracy.py --ptq runs/pp/ptq.pth --data data/held --rows openvino onnxruntime tensorrt openvino:runs/pp/openvino

A row is a flavour, which PyTorch simulates, or BACKEND:FOLDER, the files of `bevqat export` in that backend. Blocks of --block frames are drawn together: the
keyframes of a generated scene. Boxes are kept by row in --cache, so that a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from kept_boxes import kept_boxes, simulated

from qat.boxes.detections import Detections
from qat.calibrate.checkpoint import load_float_reference
from qat.core.files import sha256
from qat.families.mmdet3d.inputs import read_info_file
from qat.families.mmdet3d.metrics.kitti_annos import detection_anno, kitti_metric, truth_annos
from qat.families.mmdet3d.metrics.kitti_bootstrap import Counted, interval, resample
from qat.model.runners import flow_for, run_frame, to_numpy
from qat.runtime import Pipeline

KEYS = (
    "Car_3D_AP40_moderate",
    "Car_3D_AP11_moderate",
    "Car_BEV_AP40_moderate",
    "Pedestrian_3D_AP40_moderate",
    "Cyclist_3D_AP40_moderate",
)


def detector(name: str, ptq: Path) -> tuple[str, Callable[[np.ndarray], Detections]]:
    """What a row's boxes depend on, and its boxes of a cloud. name: "float", or as --rows has it."""
    backend, _, folder = name.partition(":")
    if folder:
        pipeline = Pipeline.load(folder, backend)
        return f"{sha256(Path(folder) / 'manifest.json')} {backend}", pipeline
    model = simulated(name, ptq)
    flow = flow_for(model)
    return f"{sha256(ptq)} {name}", lambda points: flow.decode(to_numpy(run_frame(model, flow.prepare(points))))


def row_boxes(name: str, ptq: Path, files: list[Path], cache: Path) -> list[Detections]:
    """Boxes of every file."""
    key, detect = detector(name, ptq)

    def boxes(file: Path) -> Detections:
        return detect(np.fromfile(file, np.float32).reshape(-1, 4))

    return list(kept_boxes(name, key, {file.stem: partial(boxes, file) for file in files}, cache).values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ptq", type=Path, default=Path("runs/calibrate/ptq.pth"))
    parser.add_argument("--data", type=Path, required=True, help="a folder in KITTI's form")
    parser.add_argument("--split", default="val")
    parser.add_argument("--frames", type=int, help="the first ones (default all)")
    parser.add_argument("--rows", nargs="+", default=["openvino", "onnxruntime", "tensorrt"])
    parser.add_argument("--block", type=int, default=4, help="frames that are drawn together (default 4)")
    parser.add_argument("--cache", type=Path, default=Path("runs/kitti-accuracy"))
    parser.add_argument("--resamples", type=int, default=1000)
    args = parser.parse_args()
    infos = read_info_file(args.data / f"kitti_infos_{args.split}.pkl")
    infos["data_list"] = infos["data_list"][: args.frames]
    reduced = args.data / "training/velodyne_reduced"
    files = [reduced / record["lidar_points"]["lidar_path"] for record in infos["data_list"]]
    classes = load_float_reference(args.ptq)[1].config["classes"]
    truth = truth_annos(infos)
    rows = {}
    for name in ("float", *args.rows):
        found = row_boxes(name, args.ptq, files, args.cache)
        annos = [detection_anno(own, record, classes) for own, record in zip(found, infos["data_list"], strict=True)]
        rows[name] = Counted(truth, annos, "Car")
        values = kitti_metric(infos, found, classes)[1]
        figures = (f"{key} {values[f'pred_instances_3d/KITTI/{key}_strict']:.2f}" for key in KEYS)
        print(f"{name}: {', '.join(figures)}", flush=True)
    drawn = resample(rows, args.block, args.resamples)
    print(f"{len(files)} frames, {rows['float'].objects.sum()} moderate cars; the change of Car_3D_AP40_moderate:")
    for name in args.rows:
        change, low, high = interval(drawn[name], drawn["float"])
        print(f"{name}: {change:+.2f} [{low:+.2f}, {high:+.2f}]")
    print(json.dumps({"ptq": sha256(args.ptq)[:12]}))


if __name__ == "__main__":
    main()
