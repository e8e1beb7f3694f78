"""What corrections of a PTQ network gain: how far its head maps are from the float network's where objects are.

example:
  python benchmarks/corrections.py --data example-data --split eval --frames 24

Heat: root mean square difference of the logits in the cells and classes whose heat is over 0.1 in the float network. Boxes:
of offset, height and size in the cells where any class is. Both over all frames; SQNR over whole maps does not rank
networks as mAP does, for empty cells dominate it.

- equalized inputs: what `calibrate` does (qat/lean/equalize.py).
- bias correction: the mean that rounding adds to each layer's outputs, on float inputs, is taken off its bias (as NNCF's
  fast bias correction; Nagel et al., ICCV 2019, section 4.2).
- cross-layer equalization: between two convolutions with only a ReLU between them, the first one's output channels are
  scaled to one range and the second one's weights take it back (same paper, section 4.1, with ranges of activations).
- weights left float: what the best rounding of weights (AdaRound, Nagel et al., ICML 2020) could gain at most.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from command import one_line_errors
from rich.console import Console
from rich.table import Table
from torch import fx, nn

from qat.calibrate.ptq import calibrate
from qat.data import NuScenesDataset
from qat.families.bevfusion.config import load_config
from qat.families.bevfusion.recipe import BY_LAYER
from qat.families.bevfusion.state import load_float_model
from qat.lean.equalize import INPUTS
from qat.lean.modes import quantizers, quantizers_off
from qat.lean.quantizer import QuantizedConv2d, weight_range
from qat.model.quantized import QuantizedModel
from qat.model.runners import run_frame
from qat.model.units import units

HOT = 0.1  # heat above which a cell is an object's
BOX_MAPS = ("reg", "height", "dim")


def channel_maxima(model: QuantizedModel, frames: Sequence, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Largest magnitude of each channel of what these quantizers take, in float."""
    own, found = quantizers(model.parts), {}

    def note(name: str) -> Callable:
        def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            top = inputs[0].detach().abs().amax((0, 2, 3))
            found[name] = torch.maximum(found.get(name, top), top)

        return hook

    handles = [own[name].register_forward_pre_hook(note(name)) for name in names]
    with torch.inference_mode(), quantizers_off(model):
        for frame in frames:
            run_frame(model, frame)
    for handle in handles:
        handle.remove()
    return found


def correct_biases(model: QuantizedModel, frames: Sequence) -> str:
    """Takes off each layer's bias what rounding its inputs and weights adds to its mean output."""
    own = quantizers(model.parts)
    layers = {layer: own[unit.name] for unit in units(model) for layer in unit.layers}
    modules = dict(model.parts.named_modules())
    shifts: dict[str, torch.Tensor] = {}

    def note(name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            module.weight_quantizer._disabled = False
            rounded = module.forward(layers[name]._quant_forward(inputs[0]))
            module.weight_quantizer._disabled = True
            shift = (rounded - output).mean((0, 2, 3)) / len(frames)
            shifts[name] = shifts[name] + shift if name in shifts else shift

        return hook

    handles = [modules[name].register_forward_hook(note(name)) for name in layers]
    with torch.inference_mode(), quantizers_off(model):
        for frame in frames:
            run_frame(model, frame)
    for handle in handles:
        handle.remove()
    for name, shift in shifts.items():
        bias = modules[name].bias
        modules[name].bias = nn.Parameter((-shift if bias is None else bias.detach() - shift).clone())
    return f"{len(shifts)} layers"


def pairs(model: QuantizedModel) -> dict[str, tuple[str, list[str]]]:
    """Quantizers between two convolutions: name → the one before and those after, where nothing but a ReLU is between."""
    found = {}
    for unit in units(model):
        graph = model.parts[unit.part]
        assert isinstance(graph, fx.GraphModule)
        name = unit.name.removeprefix(f"{unit.part}.")
        call = next(node for node in graph.graph.nodes if node.target == name)
        relu = call.args[0]
        before = relu.args[0] if isinstance(relu, fx.Node) and relu.args else None
        if not (isinstance(before, fx.Node) and before.op == "call_module" and len(before.users) == 1):
            continue
        is_relu = relu.op == "call_module" and isinstance(graph.get_submodule(relu.target), nn.ReLU)
        after = [node for node in call.users if node.op == "call_module"]
        convolutions = [graph.get_submodule(str(node.target)) for node in [before, *after]]
        plain = all(isinstance(layer, QuantizedConv2d) and layer.groups == 1 for layer in convolutions)
        if is_relu and len(relu.users) == 1 and len(after) == len(call.users) and plain:
            paths = [f"{unit.part}.{node.target}" for node in [before, *after]]
            found[unit.name] = (paths[0], paths[1:])
    return found


def equalize_pairs(model: QuantizedModel, frames: Sequence) -> str:
    """Gives all channels between two convolutions the range of the largest."""
    own, modules, chosen = quantizers(model.parts), dict(model.parts.named_modules()), pairs(model)
    maxima = channel_maxima(model, frames, list(chosen))
    for name, (before, after) in chosen.items():
        scales = (maxima[name] / maxima[name].max()).clamp(min=2.0**-4).clone()
        first = modules[before]
        first.weight = nn.Parameter(first.weight.detach() / scales.reshape(-1, 1, 1, 1))
        if first.bias is not None:
            first.bias = nn.Parameter(first.bias.detach() / scales)
        first.weight_quantizer.set_range(weight_range(first))
        for path in after:
            second = modules[path]
            second.weight = nn.Parameter(second.weight.detach() * scales.reshape(1, -1, 1, 1))
            second.weight_quantizer.set_range(weight_range(second))
        own[name].set_range(maxima[name].max())
    model.keep_background()  # for the weights as they are now
    return f"{len(chosen)} tensors"


def weights_off(model: QuantizedModel, frames: Sequence) -> str:
    """Leaves all weights float; activations stay rounded."""
    own = quantizers(model.parts)
    count = 0
    for name, quantizer in own.items():
        if name.endswith("weight_quantizer") and not quantizer._disabled:
            quantizer.disable()
            count += 1
    return f"{count} layers"


def only_weights(model: QuantizedModel, frames: Sequence) -> str:
    """Leaves all activations float; weights stay rounded."""
    for name in model.activation_quantizers():
        quantizers(model.parts)[name].disable()
    return "all activations"


VARIANTS: tuple[tuple[str, bool, tuple[Callable[..., str], ...]], ...] = (
    ("ranges alone", None, ()),
    ("equalized inputs (calibrate)", INPUTS, ()),
    ("  + bias correction", INPUTS, (correct_biases,)),
    ("  + cross-layer equalization", INPUTS, (equalize_pairs,)),
    ("  + both", INPUTS, (equalize_pairs, correct_biases)),
    ("  weights left float (AdaRound's bound)", INPUTS, (weights_off,)),
    ("  activations left float", INPUTS, (only_weights,)),
)


def run(args: argparse.Namespace) -> int:
    """Calibrates every variant, runs all of them frame by frame, prints the table."""
    config = load_config(args.ckpt.parent / "config.yaml")
    calibration = list(NuScenesDataset(args.calib_data, "calib", config))
    frames = NuScenesDataset(args.data, args.split, config, None, args.frames)
    reference = load_float_model(config, args.ckpt).to(memory_format=torch.channels_last)
    models, notes = [], []
    for name, equalize, steps in VARIANTS:
        model, _ = calibrate(
            load_float_model(config, args.ckpt), calibration, "mse", by_layer=BY_LAYER, equalize=equalize
        )
        notes.append(", ".join(step(model, calibration[:: max(1, len(calibration) // 8)]) for step in steps))
        models.append(model.to(memory_format=torch.channels_last))
        print(f"made: {name.strip()}", file=sys.stderr)
    energies = np.zeros((len(models), 4))  # heat: noise, values; boxes: noise, values
    with torch.inference_mode():
        for frame in frames:
            expected = run_frame(reference, frame)
            for n, model in enumerate(models):
                found = run_frame(model, frame)
                for heat in (name for name in found if name.startswith("heatmap_")):
                    hot = expected[heat].sigmoid() > HOT
                    energies[n, 0] += float((found[heat] - expected[heat])[hot].square().sum())
                    energies[n, 1] += int(hot.sum())
                    cells = hot.any(1, keepdim=True)
                    for key in BOX_MAPS:
                        box = heat.replace("heatmap", key)
                        difference = (found[box] - expected[box]) * cells
                        energies[n, 2] += float(difference.square().sum())
                        energies[n, 3] += int(cells.sum()) * difference.shape[1]
    table = Table(title=f"{len(frames)} keyframes of {args.data.name}:{args.split}; {args.ckpt.name}")
    for heading in ("", "heat, logits", "boxes", "of"):
        table.add_column(heading, justify="left" if heading in ("", "of") else "right")
    for (name, _, _), note, (noise, values, box_noise, box_values) in zip(VARIANTS, notes, energies, strict=True):
        table.add_row(name, f"{(noise / values) ** 0.5:.4f}", f"{(box_noise / box_values) ** 0.5:.4f}", note)
    console = Console()
    (console if console.is_terminal else Console(width=110)).print(table)
    return 0


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Parses the flags; bad use ends with one line and status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", type=Path, default=Path("model/camera-tiny/camera-tiny.pth"), help="float checkpoint")
    parser.add_argument("--calib-data", type=Path, default=Path("example-data"), metavar="ROOT", help="its split calib")
    parser.add_argument("--data", type=Path, default=Path("example-data"), metavar="ROOT")
    parser.add_argument("--split", default="eval")
    parser.add_argument("--frames", type=int, default=24, metavar="N", help="spread over the split (default 24)")
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    raise SystemExit(main())
