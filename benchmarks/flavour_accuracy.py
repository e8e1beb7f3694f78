"""What INT8 costs in each flavour: mAP and NDS of PyTorch's simulations, with intervals over scenes.

    bevqat synth --out data/goal --scenes 125 --seed 5000 --keyframes 4 --azimuths 180 --sweeps 0 --splits goal=125
    python benchmarks/flavour_accuracy.py --ptq runs/calibrate/ptq.pth --data data/goal --split goal --rows tensorrt openvino+vtransform

`openvino+vtransform` also rounds a part that calibration leaves off in that flavour; of any family, such as `tensorrt+encoder`. Boxes are kept by row and keyframe in --cache,
so that a run that was stopped goes on; flavours whose simulations are the same are run once.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

from kept_boxes import kept_boxes, simulated

from qat.boxes.detections import Detections
from qat.calibrate import load_ptq
from qat.core.files import sha256
from qat.evaluate import evaluate_detections, paired_bootstrap
from qat.model.runners import flow_for, run_frame, to_numpy


def row_boxes(name: str, ptq: Path, dataset: Any, cache: Path) -> dict[str, Detections]:
    """Boxes of every keyframe. name: as `simulated` has it."""
    model = simulated(name, ptq)
    flow = flow_for(model)

    def boxes(token: str) -> Detections:
        found: Detections = flow.decode(to_numpy(run_frame(model, dataset.load(token))))
        return found

    frames = {token: partial(boxes, token) for token in dataset.tokens}
    return kept_boxes(name, f"{sha256(ptq)} {name}", frames, cache)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ptq", type=Path, default=Path("runs/calibrate/ptq.pth"))
    parser.add_argument("--data", type=Path, default=Path("example-data"))
    parser.add_argument("--split", default="eval")
    parser.add_argument("--frames", type=int)
    parser.add_argument("--rows", nargs="+", default=["tensorrt", "onnxruntime", "openvino"])
    parser.add_argument("--cache", type=Path, default=Path("runs/flavour-accuracy"))
    parser.add_argument("--resamples", type=int, default=1000)
    args = parser.parse_args()
    model, _ = load_ptq(args.ptq)
    dataset = model.family.dataset(args.data, args.split, model.config, None, args.frames)
    reference = row_boxes("float", args.ptq, dataset, args.cache)
    others = {name: row_boxes(name, args.ptq, dataset, args.cache) for name in args.rows}
    base = evaluate_detections(dataset, reference)
    print(f"float: mAP {base['map']:.4f}, NDS {base['nds']:.4f}, {len(dataset)} keyframes")
    changes = paired_bootstrap(dataset, reference, others, args.resamples)
    for name in args.rows:
        own = evaluate_detections(dataset, others[name])
        words = []
        for key in ("map", "nds"):
            interval = changes[name][key]
            words.append(f"{key} {own[key] - base[key]:+.4f} [{interval.low:+.4f}, {interval.high:+.4f}]")
        print(f"{name}: {', '.join(words)}")
    print(json.dumps({"ptq": sha256(args.ptq)[:12]}))


if __name__ == "__main__":
    main()
