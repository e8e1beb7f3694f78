"""Latency of our INT8 graphs of timm networks beside FP32 and the backend's own tool, interleaved, with intervals of paired ratios.

    pip install -e '.[peers]'
    python benchmarks/peers_networks.py --rounds 40

Each network (224×224, one image, seeded random weights) is quantized by `qat.lean.quantize`, by ONNX Runtime's `quantize_static` (QDQ,
one scale a channel) and by NNCF, from the same four images, and runs on ONNX Runtime and OpenVINO, on one thread, in
processor time. In a round every graph runs once, in a turned order. Ratios are the other's time over ours, so above 1 ours is faster; the
interval is of the median, from 2000 resamples of the rounds. SQNR is against FP32, of the worse output on two other images; on
random weights it says little.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import qat.families.bevfusion.networks  # noqa: F401  # before timm: it prepares torchvision
from qat.core.rounds import no_collection, turned

NETWORKS = (
    "resnet18",
    "resnet50",
    "mobilenetv2_100",
    "mobilenetv3_large_100",
    "efficientnet_b0",
    "regnety_016",
    "darknet53",
    "densenet121",
    "repvgg_b0",
    "mobilevitv2_100",
    "convnext_tiny",
    "swin_tiny_patch4_window7_224",
)
Run = Callable[[np.ndarray], list[np.ndarray]]


def onnxruntime_run(model: bytes) -> Run:
    """One thread, as users run it."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: list(session.run(None, {name: x}))


def openvino_run(model: Any) -> Run:
    """One thread, FP32 where the graph is not INT8."""
    import openvino as ov

    core = ov.Core()
    opened = core.read_model(io.BytesIO(model)) if isinstance(model, bytes) else model
    compiled = core.compile_model(opened, "CPU", {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"})
    request = compiled.create_infer_request()

    def run(x: np.ndarray) -> list[np.ndarray]:
        found = request.infer({0: x})
        return [np.array(found[output]) for output in compiled.outputs]

    return run


def static(model: bytes, images: list[np.ndarray]) -> bytes:
    """`quantize_static`'s graph."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter(images)

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self.left, None)
            return None if image is None else {"x": image}

    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("float.onnx", "prepared.onnx", "int8.onnx")]
        paths[0].write_bytes(model)
        quant_pre_process(paths[0], paths[1], skip_symbolic_shape=True)
        options = {"per_channel": True, "activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
        quantize_static(paths[1], paths[2], Reader(), quant_format=QuantFormat.QDQ, **options)
        return bytes(onnx.load(paths[2]).SerializeToString())


def nncf_graph(model: bytes, images: list[np.ndarray]) -> Any:
    """NNCF's OpenVINO model."""
    import nncf
    import openvino as ov

    logging.getLogger("nncf").setLevel(logging.ERROR)
    opened = ov.Core().read_model(io.BytesIO(model))
    return nncf.quantize(opened, nncf.Dataset([{"x": image} for image in images]), subset_size=len(images))


def sqnr(reference: list[np.ndarray], found: list[np.ndarray]) -> float:
    """Of the worse output, dB."""
    values = []
    for a, b in zip(reference, found, strict=True):
        exact = a.astype(np.float64)
        values.append(10 * np.log10((exact**2).sum() / max(((exact - b) ** 2).sum(), 1e-30)))
    return float(min(values))


def interval(ratios: np.ndarray) -> list[float]:
    """Median, and the 95 % interval of the median."""
    drawn = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    return [float(np.median(ratios)), float(low), float(high)]


def graphs(name: str) -> tuple[bytes, dict[str, bytes], list[np.ndarray], bytes | None, Any]:
    """FP32, ours by flavour, all images, quantize_static's and NNCF's."""
    import timm
    import torch
    from torch import nn

    from qat.export import export_module
    from qat.export.graph import simplify, trace
    from qat.export.module import _Flat
    from qat.lean import quantize
    from qat.lean.modes import quantizers_off

    torch.manual_seed(0)
    network = timm.create_model(name, pretrained=False, features_only=True, out_indices=(2, 3)).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
    coarse = torch.randn(6, 1, 3, 28, 28)
    images = [nn.functional.interpolate(c, size=(224, 224), mode="bilinear") for c in coarse]
    quantized = quantize(network, (torch.cat(images[:2]),), data=images[:4], round_outputs=True)  # as the peers do
    quantized.example_inputs = (images[0],)
    arrays = [image.numpy() for image in images]
    with quantizers_off(quantized), tempfile.TemporaryDirectory() as folder:
        flat = _Flat(quantized).eval()
        count = len(network(images[0]))
        names = [f"output_{n}" for n in range(count)]
        exact = simplify(trace(flat, [images[0]], ["x"], names, 13), name).SerializeToString()
    ours = {}
    with tempfile.TemporaryDirectory() as folder:
        for flavour in ("onnxruntime", "openvino"):
            file = Path(folder) / "ours.onnx"
            export_module(quantized.use(flavour), file, ["x"])
            ours[flavour] = file.read_bytes()
    peers: list[Any] = []
    for make in (static, nncf_graph):
        try:
            peers.append(make(exact, arrays[:4]))
        except Exception as error:  # a peer that fails on a network has no row
            print(f"{name}: {make.__name__} fails: {str(error).splitlines()[0][:150]}", file=sys.stderr)
            peers.append(None)
    return exact, ours, arrays, peers[0], peers[1]


def measure(name: str, rounds: int) -> dict[str, Any]:
    """A network's rows."""
    exact, ours, images, theirs, nncf = graphs(name)
    backends: dict[str, dict[str, Run]] = {
        "onnxruntime": {"fp32": onnxruntime_run(exact), "ours": onnxruntime_run(ours["onnxruntime"])},
        "openvino": {"fp32": openvino_run(exact), "ours": openvino_run(ours["openvino"])},
    }
    if theirs is not None:
        backends["onnxruntime"]["peer"] = onnxruntime_run(theirs)
    if nncf is not None:
        backends["openvino"]["peer"] = openvino_run(nncf)
    found: dict[str, Any] = {"name": name}
    for backend, runs in backends.items():
        exact_outputs = [runs["fp32"](image) for image in images[4:]]
        seconds: dict[str, list[float]] = {label: [] for label in runs}
        with no_collection():
            for turn in range(-2, rounds):
                for label in turned(list(runs), turn):
                    runs[label](images[0])  # its own caches
                    begun = time.process_time()
                    runs[label](images[0])
                    if turn >= 0:
                        seconds[label].append(time.process_time() - begun)
        times = {label: np.array(values) for label, values in seconds.items()}
        row: dict[str, Any] = {
            label: {
                "ms": float(np.median(times[label])) * 1e3,
                "sqnr_db": None
                if label == "fp32"
                else float(np.mean([sqnr(e, runs[label](x)) for e, x in zip(exact_outputs, images[4:], strict=True)])),
            }
            for label in runs
        }
        row["fp32_over_ours"] = interval(times["fp32"] / times["ours"])
        if "peer" in times:
            row["peer_over_ours"] = interval(times["peer"] / times["ours"])
        found[backend] = row
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("runs/peers-networks.json"))
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = []
    print("| network | backend | FP32 / ours | peer / ours | SQNR ours, peer (dB) |\n|---|---|---|---|---|")
    for name in args.networks:
        row = measure(name, args.rounds)
        rows.append(row)
        for backend in ("onnxruntime", "openvino"):
            own = row[backend]
            words = [
                "–" if own.get(key) is None else "{:.2f} [{:.2f}, {:.2f}]".format(*own[key])
                for key in ("fp32_over_ours", "peer_over_ours")
            ]
            peer = own.get("peer", {}).get("sqnr_db")
            both = f"{own['ours']['sqnr_db']:.1f}, " + ("–" if peer is None else f"{peer:.1f}")
            print(f"| {name} | {backend} | {words[0]} | {words[1]} | {both} |", flush=True)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
