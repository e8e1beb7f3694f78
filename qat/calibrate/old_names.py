"""Converts PTQ checkpoints of schema 1 and 2: names of quantizers, disabled quantizers, and trained weights.

They were written when torch.fx's tracer traced networks. A quantizer of a module's output was named by the module's path, as
today; a quantizer of a function's output by the number of that function in the graph (`quant_matmul_3`, `quant_iadd`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from qat.lean.background import backgrounds
from qat.lean.layers import ScaleShift
from qat.lean.modes import quantizers
from qat.model.quantized import QuantizedModel
from qat.model.units import UNIT_ROLES

# Buffers among the weights of an old file; `inverse` is the factor of an equalized channel.
TABLES = ("relative_position_index", "attn_mask", "num_batches_tracked", "inverse")


def old_names(model: QuantizedModel, checkpoint: Mapping[str, Any]) -> Callable[[str], str]:
    """Maps a quantizer's name in the file to its name in `model`.

    Names in both stay the same. The others are matched part by part in order, which is that of the graph's rules
    then and now.

    Raises:
        KeyError: a part and the file have different numbers of them.
    """
    own_quantizers = quantizers(model.parts)
    own = [name for name, quantizer in own_quantizers.items() if quantizer.shares is None]
    theirs = list(dict.fromkeys([*checkpoint["amax"], *checkpoint["disabled"]]))
    changed = [name for name in theirs if name not in set(own)]
    found: dict[str, str] = {}
    for part in model.parts:
        before = [name for name in changed if name.startswith(f"{part}.")]
        after = [name for name in own if name.startswith(f"{part}.") and name not in set(theirs)]
        after = [name for name in after if not own_quantizers[name].weights and own_quantizers[name].role in UNIT_ROLES]
        if not before:
            continue
        if len(before) != len(after):
            raise KeyError(
                f"found {len(before)} quantizers that part {part} does not name so ({before[0]}), expected {len(after)}"
            )
        found.update(zip(before, after, strict=True))
    return lambda name: found.get(name, name)


def old_weights(model: QuantizedModel, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Converts trained weights to `model`'s form: an old file also has tables of indices and masks, and batch norms that were
    not completely folded."""
    own, found = set(model.weights()), dict(weights)
    for path, module in model.parts.named_modules():
        norm = [f"{path}.{name}" for name in ("weight", "bias", "running_mean", "running_var")]
        if isinstance(module, ScaleShift) and all(name in found for name in norm):
            weight, bias, mean, variance = (found.pop(name) for name in norm)
            scale = weight * torch.rsqrt(variance + module.eps)
            found |= {f"{path}.scale": scale, f"{path}.shift": bias - mean * scale}

    def table(name: str) -> bool:
        last = name.rpartition(".")[2]
        return last in TABLES or last.startswith("_tensor_constant")

    return {name: tensor for name, tensor in found.items() if name in own or not table(name)}


def really_off(model: QuantizedModel, amax: Collection[str], disabled: Sequence[str]) -> list[str]:
    """The quantizers that are off in every flavour: an old file lists those that are off in its default flavour. Quantizers
    that the file lacks are off too, because old versions did not find their layers."""
    own = quantizers(model.parts)
    known = set(amax) | set(disabled)
    found = [name for name, quantizer in own.items() if name not in known and quantizer.shares is None]
    for name in disabled:
        if name not in own:
            raise KeyError(f"found quantizers that the network lacks: {name}")
        elsewhere = "tensorrt" not in own[name].flavours or name.partition(".")[0] in model.off_in
        if not elsewhere or name not in amax:
            found.append(name)
    return found


def absorbed_layers(model: QuantizedModel, recipe: Mapping[str, Any]) -> frozenset[str]:
    """`part.path` of the layers whose biases hold their corrections."""
    if "absorbed" in recipe:
        return frozenset(recipe["absorbed"])
    found = set()
    for part, graph in model.parts.items():
        assert isinstance(graph, fx.GraphModule)
        found |= {f"{part}.{path}" for path in backgrounds(graph)}
    return frozenset(found)
