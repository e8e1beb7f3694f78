"""What calibration costs: plain forward passes, ours, and pytorch-quantization's own, side by side in one run.

example:
  python benchmarks/calibration.py                        # the full-size ResNet-50 camera part, 8 frames
  python benchmarks/calibration.py --config model/camera-tiny/config.yaml --ckpt model/camera-tiny/camera-tiny.pth

All three run the same traced camera part with batch norm folded, in float, over the same frames. Plain: every quantizer
off. Ours: a histogram at every activation quantizer, then the mse search for every range. Theirs: TensorQuantizer's own
HistogramCalibrator with its defaults (2048 bins) at the same places, then `load_calib_amax(method="mse")`, as NVIDIA's
CUDA-BEVFusion calibrates. A last, untimed pass measures what each range costs: the squared error of rounding the frames'
real tensors to s8 with scale amax/127.

Without --ckpt the weights are random (seed 0) and batch norm is set from two frames (`qat.families.bevfusion.random_init.random_model`). Pictures
narrower than the config's pipeline expects are enlarged.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from absl import logging
from command import check_least, one_line_errors
from pytorch_quantization.nn import TensorQuantizer
from pytorch_quantization.tensor_quant import QuantDescriptor

from qat.core.errors import UserError
from qat.data import NuScenesDataset, Sample
from qat.families.bevfusion.config import load_config
from qat.families.bevfusion.random_init import random_model
from qat.families.bevfusion.state import load_float_model
from qat.lean.calibrators import HistogramCalibrator
from qat.lean.modes import quantizers, quantizers_off
from qat.model.quantized import QuantizedModel

MODES = ("plain", "ours", "theirs")
EQUAL = 1e-3  # two ranges whose errors differ by less than this share are called equal
GOAL_FORWARD, GOAL_THEIRS = 1.25, 4.0
Inputs = tuple[torch.Tensor, torch.Tensor | None]


class Collector(Protocol):
    """What a TensorQuantizer hands its input to while it calibrates."""

    def collect(self, x: torch.Tensor) -> None: ...


@dataclass
class ErrorMeter:
    """Σ (q(x) − x)² over all values of one tensor, for each of several ranges. float64."""

    ranges: Sequence[float]
    errors: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.errors = np.zeros(len(self.ranges))

    def collect(self, x: torch.Tensor) -> None:
        """Adds a tensor of any shape."""
        for i, amax in enumerate(self.ranges):
            rounded = torch.fake_quantize_per_tensor_affine(x, amax / 127, 0, -128, 127)
            self.errors[i] += float(torch.linalg.vector_norm(rounded.sub_(x), dtype=torch.float64)) ** 2


def add_source_flags(parser: argparse.ArgumentParser) -> None:
    """--config, --ckpt and where the frames are, as `load_samples` reads them."""
    parser.add_argument("--config", type=Path, default=Path("model/resnet50/config.yaml"), metavar="YAML")
    parser.add_argument("--ckpt", type=Path, metavar="CKPT", help="float checkpoint (default: random weights)")
    parser.add_argument("--data", type=Path, default=Path("example-data"), metavar="ROOT", help="nuScenes-format data")
    parser.add_argument("--version", metavar="NAME", help="needed where ROOT holds several, such as v1.0-mini")
    parser.add_argument("--split", default="calib", help="default calib")


@one_line_errors
def main() -> int:
    """Runs the benchmark and returns the exit status: 0 measured, 2 bad use."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_source_flags(parser)
    parser.add_argument("--frames", type=int, default=8, metavar="N", help="default 8")
    parser.add_argument("--rounds", type=int, default=1, metavar="N", help="times that all is measured (default 1)")
    parser.add_argument(
        "--peer-search",
        default="all",
        metavar="all|N",
        help="ranges that pytorch-quantization searches: all (the default), or N of them, its time scaled up",
    )
    args = parser.parse_args()
    benchmark(args)
    return 0


def benchmark(args: argparse.Namespace) -> None:
    """Measures and prints.

    Raises:
        UserError: bad flags, config, checkpoint or data.
    """
    if args.peer_search != "all" and not (args.peer_search.isdigit() and int(args.peer_search) > 0):
        raise UserError(f"--peer-search: found {args.peer_search!r}, expected all or a number above 0")
    check_least(args, rounds=1)
    logging.set_verbosity(logging.ERROR)
    config = load_config(args.config)
    samples = load_samples(config, args)
    model = load_float_model(config, args.ckpt) if args.ckpt else random_model(config, seed=0, frames=samples[:2])
    frames = camera_inputs(config, samples)
    network = QuantizedModel(model)
    own = quantizers(network.parts)
    names = [n for n in network.activation_quantizers() if n.startswith("camera.") and own[n].shares is None]
    print(
        f"{args.config}, {'weights of ' + str(args.ckpt) if args.ckpt else 'random weights'}; {len(frames)} frames of "
        f"{list(frames[0][0].shape)}; {len(names)} tensors; torch {torch.__version__}, {torch.get_num_threads()} threads"
    )
    with torch.inference_mode(), quantizers_off(network):
        sizes = warm_up(network, names, frames[0])
        print(f"values in them: {sum(sizes.values()) / 1e6:.0f} million a frame")
        measured = measure(network, names, frames, args.rounds, args.peer_search)
        print_times(measured, len(names))
        print_errors(measured, rounding_errors(network, frames, measured.ours, measured.theirs))


def load_samples(config: dict[str, Any], args: argparse.Namespace) -> list[Sample]:
    """Keyframes by the data set's own pipeline; pictures narrower than it expects are enlarged."""
    dataset = NuScenesDataset(args.data, args.split, config, args.version, args.frames)
    crop = dataset.pipeline.resize_crop
    image = dataset.read(dataset.tokens[0]).images[0]
    covers = crop.final_dim[1] / image.shape[1]
    if crop.resize < covers:
        print(
            f"pictures of {image.shape[1]}×{image.shape[0]} are resized by {covers:g}, not by the config's {crop.resize:g}"
        )
        dataset.pipeline = replace(dataset.pipeline, resize_crop=replace(crop, resize=covers, native=None))
    return list(dataset)


def camera_inputs(config: dict[str, Any], samples: Sequence[Sample]) -> list[Inputs]:
    """Each keyframe as img float32[N,3,H,W] and depth float32[N,1,H,W] (None for a network without)."""
    wants_depth = config["model"]["encoders"]["camera"]["vtransform"]["type"] == "DepthLSSTransform"
    return [(torch.from_numpy(s.img), torch.from_numpy(s.depth) if wants_depth else None) for s in samples]


@contextmanager
def collecting(network: QuantizedModel, collectors: dict[str, Any]) -> Iterator[None]:
    """Inside the block these quantizers hand their inputs over and pass them on unrounded."""
    own = quantizers(network.parts)
    for name, collector in collectors.items():
        quantizer = own[name]
        quantizer._disabled, quantizer._if_quant, quantizer._if_calib = False, False, True
        quantizer._calibrator = collector
    try:
        yield
    finally:
        for name in collectors:
            quantizer = own[name]
            quantizer._disabled, quantizer._if_quant, quantizer._if_calib = True, True, False
            quantizer._calibrator = None


def warm_up(network: QuantizedModel, names: Sequence[str], frame: Inputs) -> dict[str, int]:
    """Runs one frame each way, untimed (what is compiled or allocated once); the number of values of each tensor."""
    sizes: dict[str, int] = {}

    class Size:
        def __init__(self, name: str) -> None:
            self.name = name

        def collect(self, x: torch.Tensor) -> None:
            sizes[self.name] = x.numel()

    for make in (Size, HistogramCalibrator):
        with collecting(network, {name: make(name) for name in names}):
            network.parts["camera"](*frame)
    return sizes


@dataclass
class Measured:
    """Seconds, and the ranges found. passes: for each mode, float64[rounds, frames]; searches: seconds of a search of
    all ranges, for theirs scaled up from `searched` of them; failed: tensors on which its search fails."""

    passes: dict[str, np.ndarray]
    our_search: float
    their_search: float
    searched: int
    failed: int
    shimmed: bool
    ours: dict[str, float]
    theirs: dict[str, float]

    def total(self, mode: str) -> float:
        """Median seconds of each frame, summed."""
        return float(np.median(self.passes[mode], axis=0).sum())


def measure(
    network: QuantizedModel, names: Sequence[str], frames: Sequence[Inputs], rounds: int, peer_search: str
) -> Measured:
    """Times all three: each frame goes through one after the other, in an order that turns with every frame."""
    passes = {mode: np.zeros((rounds, len(frames))) for mode in MODES}
    our_searches = []
    for r in range(rounds):
        ours = {name: HistogramCalibrator(name) for name in names}
        theirs = {name: TensorQuantizer(QuantDescriptor(num_bits=8, calib_method="histogram")) for name in names}
        collectors: dict[str, dict[str, Collector]] = {
            "plain": {},
            "ours": dict(ours),
            "theirs": {name: quantizer._calibrator for name, quantizer in theirs.items()},
        }
        for f, frame in enumerate(frames):
            for turn in range(len(MODES)):
                mode = MODES[(turn + r + f) % len(MODES)]
                with collecting(network, collectors[mode]):
                    passes[mode][r, f] = seconds(lambda frame=frame: network.parts["camera"](*frame))  # type: ignore[misc]
            if sys.stderr.isatty():
                print(
                    f"\rround {r + 1} of {rounds}, frame {f + 1} of {len(frames)}", end="", file=sys.stderr, flush=True
                )
        amax: dict[str, float] = {}
        our_searches.append(seconds(lambda o=ours, a=amax: a.update({n: c.compute_amax("mse") for n, c in o.items()})))  # type: ignore[misc]
    chosen = list(names)
    if peer_search != "all" and int(peer_search) < len(names):
        chosen = [names[i] for i in np.linspace(0, len(names) - 1, int(peer_search)).round().astype(int)]

    found: dict[str, float] = {}

    def search() -> None:
        for name in chosen:
            # Its histogram of a tensor whose range grew may end with more edges than counts, and its search then fails.
            with suppress(RuntimeError):
                theirs[name].load_calib_amax(method="mse")
                found[name] = float(theirs[name].amax)

    with cuda_is_this_device() as shimmed:
        spent = seconds(search)
    return Measured(
        passes,
        float(np.median(our_searches)),
        spent * len(names) / max(1, len(found)),
        len(found),
        len(chosen) - len(found),
        shimmed,
        amax,
        found,
    )


def seconds(work: Callable[[], object]) -> float:
    """Wall time of a call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@contextmanager
def cuda_is_this_device() -> Iterator[bool]:
    """pytorch-quantization's mse search calls `Tensor.cuda()`. Where there is no GPU, inside the block that returns the
    tensor as it is; all else is theirs. Yields whether it was needed."""
    if torch.cuda.is_available():
        yield False
        return
    before = torch.Tensor.cuda
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    try:
        yield True
    finally:
        torch.Tensor.cuda = before  # type: ignore[method-assign]


def rounding_errors(
    network: QuantizedModel, frames: Sequence[Inputs], ours: dict[str, float], theirs: dict[str, float]
) -> dict[str, np.ndarray]:
    """Σ (q(x) − x)² of each tensor with our range and with theirs, for tensors that both searched."""
    meters = {name: ErrorMeter((ours[name], amax)) for name, amax in theirs.items() if ours[name] > 0}
    with collecting(network, meters):
        for frame in frames:
            network.parts["camera"](*frame)
    return {name: meter.errors for name, meter in meters.items()}


def print_times(measured: Measured, tensors: int) -> None:
    """The table of seconds, each beside the plain passes."""
    plain = measured.total("plain")
    rows = {
        "plain forward passes": (plain, 0.0),
        "ours": (measured.total("ours"), measured.our_search),
        "pytorch-quantization": (measured.total("theirs"), measured.their_search),
    }
    print(f"\n{'seconds':24}{'passes':>9}{'search':>9}{'all':>9}{'/ plain':>9}")
    for what, (passes, search) in rows.items():
        print(f"{what:24}{passes:9.2f}{search:9.2f}{passes + search:9.2f}{(passes + search) / plain:9.2f}")
    ours, theirs = sum(rows["ours"]), sum(rows["pytorch-quantization"])
    print(f"ours / plain: {ours / plain:.2f} (goal: at most {GOAL_FORWARD})")
    print(f"pytorch-quantization / ours: {theirs / ours:.1f} (goal: at least {GOAL_THEIRS:g})")
    if measured.searched < tensors:
        print(f"pytorch-quantization searched {measured.searched} of {tensors} ranges; its search time is scaled up")
    if measured.failed:
        print(
            f"pytorch-quantization's search fails on {measured.failed} tensors: its edges and counts differ in number"
        )
    if measured.shimmed:
        print("pytorch-quantization's search calls Tensor.cuda(), which was made to return the tensor: there is no GPU")


def print_errors(measured: Measured, errors: dict[str, np.ndarray]) -> None:
    """Which of the two ranges rounds each tensor better."""
    ratios = {name: float(ours / theirs) for name, (ours, theirs) in errors.items()}
    values = np.asarray(list(ratios.values()))
    equal = np.abs(values - 1) <= EQUAL
    print(
        f"\nsquared rounding error, ours / pytorch-quantization's, {len(ratios)} tensors: {int((values < 1 - EQUAL).sum())} "
        f"better, {int(equal.sum())} equal (within {EQUAL:.1%}), {int((values > 1 + EQUAL).sum())} worse"
    )
    print(f"geometric mean {np.exp(np.log(values).mean()):.5f}, worst {values.max():.5f}, best {values.min():.5f}")
    for name in sorted(ratios, key=ratios.__getitem__, reverse=True)[:3]:
        print(f"  {ratios[name]:.5f} {name}: amax {measured.ours[name]:.5g}, theirs {measured.theirs[name]:.5g}")


if __name__ == "__main__":
    sys.exit(main())
