"""PTQ checkpoints of schema 1 and 2 in today's terms: names of quantizers, what is off, and trained weights.

They were written when networks were traced by torch.fx's own tracer. A quantizer of a module's output was named by the module's
path, as today; one of a function's by the number of that function in the graph (`quant_matmul_3`, `quant_iadd`).
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

# Buffers that an old file has among its weights; `inverse` is what an equalized channel is multiplied by.
TABLES = ("relative_position_index", "attn_mask", "num_batches_tracked", "inverse")


def old_names(model: QuantizedModel, checkpoint: Mapping[str, Any]) -> Callable[[str], str]:
    """From a quantizer's name in the file to its name in `model`.

    Names that both have are the same. The others are matched part by part in their order, which is that of the graph's rules
    then and now.

    Raises:
        KeyError: a part has another number of them than the file.
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
    """Trained weights as `model` has them: an old file has tables of indices and masks among them, and batch norms that
    were not folded whole."""
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
    """What an old file left float in every flavour, of what it lists as off: its default flavour's. Quantizers that it lacks
    are off too: its layers were not seen then."""
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
