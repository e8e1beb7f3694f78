"""Reading checkpoints: tensors and plain containers; whatever else a file holds is never executed."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from qat.core.console import note
from qat.core.errors import UserError
from qat.core.kinds import kind_of_file
from qat.models.detector import UNBUILDABLE, CameraBEVDetector, build_model
from qat.models.pickled import is_module, is_plainly_saved, module_state, quantizer_settings, read_pickled
from qat.models.unpickle import Record
from qat.models.weights import BESIDE, OUTER, choose_weights, has_tensors, without_wrappers

STATE_KEYS = ("state_dict", "model_state_dict", "model", "module", "net")  # where others keep what we call state_dict
# What belongs to a TensorQuantizer in a state dict: pytorch-quantization's `…_input_quantizer._amax`, ModelOpt's
# `….input_quantizer._amax`; a network's own "quantizer" (a codebook, say) has other names under it.
QUANTIZER_STATE = (
    "_amax",
    "_scale",
    "_zero_point",
    "_pre_quant_scale",
    "_bias_value",
    "_amax_for_smoothing",
    "clip.clip_value_min",
    "clip.clip_value_max",
)


def _quantizer_part(name: object) -> tuple[str, str] | None:
    """A quantizer's path and what of it this name in a state dict is; None where it is no quantizer's."""
    suffix = next((s for s in QUANTIZER_STATE if isinstance(name, str) and name.endswith("." + s)), None)
    if suffix is None:
        return None
    path = str(name)[: -len(suffix) - 1]
    parts = path.split(".")
    last = parts[-2] if parts[-1].isdigit() and len(parts) > 1 else parts[-1]  # one of a SequentialQuantizer's
    return (path, suffix) if "quantizer" in last else None


def split_quantizers(
    state: Mapping[str, Any], described: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """A state dict without what its TensorQuantizers keep in it, and those, as `load_checkpoint` gives them.

    described: their attributes by path, where the file says more than their ranges (ModelOpt's `quantizer_state`).
    """
    weights: dict[str, Any] = {}
    found: dict[str, dict[str, Any]] = {
        path: {key: value for key, value in settings.items() if key != "_amax"}
        for path, settings in described.items()
        if isinstance(path, str) and isinstance(settings, Mapping)
    }
    for name, value in state.items():
        part = _quantizer_part(name)
        if part is None:
            weights[name] = value
        else:
            found.setdefault(part[0], {})[part[1]] = value
    return weights, {path: quantizer_settings(settings) for path, settings in found.items()}


def _modelopt_settings(value: Mapping[str, Any]) -> dict[str, Any]:
    """What `modelopt_state` says of each quantizer: {"modelopt_state_dict": [(mode, {"metadata": {"quantizer_state": {path:
    attributes}}}), …]}, of which the last mode's counts."""
    found: dict[str, Any] = {}
    state = value.get("modelopt_state")
    modes = state.get("modelopt_state_dict") if isinstance(state, Mapping) else None
    for mode in modes if isinstance(modes, list | tuple) else ():
        metadata = mode[1].get("metadata") if len(mode) == 2 and isinstance(mode[1], Mapping) else None
        described = metadata.get("quantizer_state") if isinstance(metadata, Mapping) else None
        found.update(described if isinstance(described, Mapping) else {})
    return found


def _plain_entries(entries: Mapping[Any, Any], limit: int = 1_000_000) -> dict[Any, Any]:
    """Those that hold no `Record`, however deep."""
    plain = {}
    for key, value in entries.items():
        waiting, seen = [value], set()
        while waiting and limit > 0:
            one = waiting.pop()
            limit -= 1
            if isinstance(one, Record):
                break
            if isinstance(one, dict | list | tuple | set | frozenset) and id(one) not in seen:
                seen.add(id(one))
                limit -= len(one)
                waiting.extend([*one, *one.values()] if isinstance(one, dict) else one)
        else:
            if not waiting and not isinstance(key, Record):
                plain[key] = value
    return plain


def _from_pickled(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """A checkpoint that holds objects, by the reader that runs none of them; and the quantizers of a pickled network."""
    value = read_pickled(path)
    if is_module(value):
        value = {"model": value}
    if isinstance(value, dict):
        for key in STATE_KEYS:
            if is_module(value.get(key)):
                state, quantizers = module_state(value[key], str(path))
                rest = _plain_entries({k: v for k, v in value.items() if k not in (key, "quantizers")})
                for other in BESIDE:
                    if is_module(value.get(other)):
                        rest[other] = module_state(value[other], str(path))[0]
                return {**rest, "state_dict": state}, quantizers
            if has_tensors(value.get(key)):
                break
        # The objects are beside the state dict: a config, a training log.
        value = _plain_entries(value)
        if value:
            return value, {}
    what = f"a {value.module}.{value.name}" if isinstance(value, Record) else f"a {type(value).__name__}"
    raise UserError(
        f"{path}: holds {what}, and pickled objects are not run here: expected a network, a state dict or "
        "{'state_dict': …}; save model.state_dict() instead"
    )


def load_checkpoint(path: str | Path, ema: bool = False) -> dict[str, Any]:
    """Reads a checkpoint: `{"state_dict": …}`, possibly with `config` and `meta`; a bare state dict; a whole network that
    was pickled (`torch.save(model)`), by itself or under "model"; what NVIDIA ModelOpt saves.

    Nothing in the file is executed, and the packages whose classes it holds need not be there (`qat.models.pickled`).

    ema: take the averaged weights that the file keeps beside the others (`qat.models.weights`).

    Returns:
        the file's dict, with "state_dict": the tensors by their names in `nn.Module.state_dict`, without wrappers' prefixes;
        where the file has averaged weights too, "averaged": whether those were taken, and "note": a line for the user. Where the
        network was
        quantized by pytorch-quantization or ModelOpt, also "quantizers": {path of a TensorQuantizer: {"amax": tensor or None,
        "disabled": bool, "num_bits": int, "axis": tuple or None, "unsigned": bool, "special": str or None}}, whose tensors
        "state_dict" then does not hold (see `qat.calibrate.foreign`).

    Raises:
        UserError: no such file, damaged, or no tensors in it; `ema`, and no averaged weights in it.
    """
    path = Path(path)
    if not path.is_file():
        there = "found a folder, " if path.is_dir() else "no such file; "
        raise UserError(f"{path}: {there}expected a checkpoint written by torch.save; name its file")
    quantizers: dict[str, dict[str, Any]] = {}
    value: Any = None
    if is_plainly_saved(path):
        # It holds objects, which this loader refuses; or it is damaged, over which it stumbles in any way.
        with suppress(Exception), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle protocol: nothing to act on
            value = torch.load(path, map_location="cpu", weights_only=True)
    if value is None:
        try:
            value, quantizers = _from_pickled(path)
        except UserError:
            if (kind := kind_of_file(path)) is None:
                raise
            expected = "expected a checkpoint written by torch.save; name the network's .pth, or fetch it again"
            raise UserError(f"{path}: found {kind}, {expected}") from None
    if not isinstance(value, Mapping):
        raise UserError(
            f"{path}: found a {type(value).__name__}, expected a state dict or {{'state_dict': …}}; save "
            "model.state_dict() instead"
        )
    checkpoint = dict(value)
    if "state_dict" not in value and "format" not in value:
        key = next((key for key in STATE_KEYS if has_tensors(value.get(key))), None)
        if key is not None:
            checkpoint["state_dict"] = checkpoint.pop(key)
        elif not any(isinstance(value.get(other), Mapping) for other in BESIDE):
            checkpoint = {"state_dict": checkpoint}
    if "format" not in checkpoint:
        chosen = choose_weights(checkpoint, str(path), ema)
        checkpoint = {key: value for key, value in checkpoint.items() if key not in ("averaged", "note")}
        checkpoint["state_dict"] = chosen.state
        if chosen.note:
            checkpoint.update(averaged=chosen.averaged, note=chosen.note)
    elif ema:
        raise UserError(f"--ema: found {path}, a checkpoint of bevqat's with one set of weights; leave --ema out")
    state = checkpoint.get("state_dict")
    if not isinstance(state, Mapping) or not has_tensors(state):
        raise UserError(
            f"{path}: found no tensors under 'state_dict', expected a trained model's; save model.state_dict() there"
        )
    if "format" not in checkpoint:
        described = without_wrappers(_modelopt_settings(value), str(path))
        state, found = split_quantizers(state, described)
        quantizers = {**without_wrappers(quantizers, str(path)), **found}
        checkpoint.pop("quantizers", None)
        if quantizers:
            checkpoint.update(state_dict=state, quantizers=quantizers)
    return checkpoint


def _grouped(names: list[str], words: int = 3) -> str:
    groups = Counter(".".join(name.split(".")[:words]) for name in names)
    return ", ".join(f"{group}.* ({count})" for group, count in sorted(groups.items()))


DERIVED = "relative_position_index"  # Swin's: fixed by the window's size, in the state dict by mmdet's habit alone
GEOMETRY = ("dx", "bx", "nx", "frustum")  # the view transform's fixed parameters


STAGES = (
    "stages",
    "layers",
    "blocks",
    "features",
)  # lists of what runs one after the other, in Swin and timm's networks


def _beyond(names: Iterable[str], own: Mapping[str, Any]) -> list[str]:
    """Those of the names, which the model does not have, that belong to modules of the backbone that this config does not use: a
    classifier, stages after the last output. Inside a module that is used every tensor counts (another ResNet block in layer1),
    and so do those of the backbone itself (a position embedding)."""
    start = f"{BRANCH}backbone."
    used = {_module(name[len(start) :]) for name in own if name.startswith(start)}
    last: dict[str, int] = {}
    for first, number in used:
        last[first] = max(number, last.get(first, -1))
    # mmdet's Swin has the merging of patches at the end of the stage before; here it belongs to the stage after.
    merging = f"{start}stages.{last.get('stages')}.downsample."

    def is_beyond(name: str) -> bool:
        if not name.startswith(start) or "." not in name[len(start) :]:
            return False
        first, number = _module(name[len(start) :])
        return name.startswith(merging) or first not in last or number > last[first]

    return [name for name in names if is_beyond(name)]


def _module(name: str) -> tuple[str, int]:
    """The module of a backbone that a tensor belongs to: its first word, and the number of a stage (else −1)."""
    first, _, rest = name.partition(".")
    second = rest.partition(".")[0]
    return first, int(second) if first in STAGES and second.isdigit() else -1


def _counts(nx: torch.Tensor) -> list[int]:
    return [int(n) for n in nx.double().nan_to_num(0, 0, 0).tolist()]


def _agree(found: torch.Tensor, own: torch.Tensor) -> bool:
    """Whether fixed values are those of the config's bounds, as far as the number format of the file tells."""
    eps = torch.finfo(found.dtype).eps if found.is_floating_point() else 0.0
    return torch.allclose(found.double(), own.double(), atol=1e-3, rtol=max(1e-5, eps))


def _short(value: torch.Tensor) -> str:
    numbers = [f"{v:g}" for v in value.flatten()[:3].tolist()]
    return f"[{', '.join(numbers)}{', …' if value.numel() > 3 else ''}]"


@contextmanager
def saving(path: str | Path) -> Iterator[IO[bytes]]:
    """A file of Python's for torch to write to: what the system refuses is then an OSError, which torch makes a RuntimeError
    of its own and, where it opens the file itself, says nothing of.

    Raises:
        OSError: the disk is full, a quota or a limit is reached, or another refusal of the system.
    """
    with open(path, "wb") as stream:
        try:
            yield stream
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def save_plain(value: Any, path: str | Path) -> None:
    """`torch.save`, with errors as of `saving`."""
    with saving(path) as stream:
        torch.save(value, stream)


BRANCH = "encoders.camera."


def _branch_prefixes(names: Iterable[str]) -> list[str]:
    """The prefixes under which a camera branch lies: only that has a view transform (others too have a backbone)."""
    split = [name.split(".") for name in names]
    return list(dict.fromkeys(".".join(w[: w.index("vtransform")]) for w in split if "vtransform" in w[:-1]))


def _before(prefix: str) -> str:
    return f"{prefix.rstrip('.')}." if prefix else ""


def _without_outer(prefix: str) -> str:
    """A branch's prefix without the wrappers' that `load_checkpoint` has taken off the names already."""
    while outer := next((o for o in OUTER if f"{prefix}.".startswith(o)), ""):
        prefix = f"{prefix}."[len(outer) :].removesuffix(".")
    return prefix


def under_prefix(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """What lies under the prefix of a camera branch (as for `take_branch`), by this package's names."""
    inside: dict[str, Any] = {}
    for start in dict.fromkeys((prefix, _without_outer(prefix))):
        before = _before(start)
        inside = {f"{BRANCH}{name[len(before) :]}": v for name, v in values.items() if name.startswith(before)}
        if inside:
            break
    return inside


def take_branch(state: Mapping[str, Any], prefix: str, source: str) -> tuple[dict[str, Any], int]:
    """The camera branch out of a state dict, by this package's names, and how many of its names were left out.

    Args:
        prefix: what stands before `.backbone`, `.neck` and `.vtransform` in the file: "encoders.camera" in a BEVFusion
            model, "module.encoders.camera" in one saved out of DistributedDataParallel, "" in a state dict of the
            branch alone.

    Raises:
        UserError: nothing of a camera branch lies there; the prefixes under which one does are named.
    """
    inside = under_prefix(state, prefix)
    if not any(name.startswith(f"{BRANCH}vtransform.") for name in inside):
        expected = " or ".join(map(repr, _branch_prefixes(state)))
        if not expected:
            expected = f"backbone, neck and vtransform under it; its names are {_grouped(list(state), 2)}"
        raise UserError(f"--prefix: found {prefix!r}, under which {source} has no camera branch, expected {expected}")
    return inside, len(state) - len(inside)


def _check_finite(
    state: Mapping[str, torch.Tensor], own: Iterable[str], source: str, in_file: Callable[[str], str]
) -> None:
    for name in own:
        tensor = state.get(name)
        if tensor is not None and tensor.is_floating_point() and not bool((finite := tensor.isfinite()).all()):
            raise UserError(
                f"{source}: {in_file(name)}: found NaN or infinity in {int((~finite).sum())} of {tensor.numel()} values, "
                f"expected finite weights; save an earlier epoch (`bevqat health {source}` shows what they do)"
            )


def load_state(
    model: nn.Module,
    state: Mapping[str, torch.Tensor],
    source: str,
    prefix: str | None = None,
    finite: bool = True,
) -> int:
    """Loads a state dict by name; anything missing, unexpected or of another shape is a `UserError` that lists it, and so
    is NaN or infinity.

    finite: False takes them, to look at what they do.
    prefix: loads the camera branch that lies under it (`take_branch`) into a model of that branch alone; what is outside
    is left out.

    Returns:
        how many names were left out.
    """
    left_out = 0
    if prefix is not None:
        state, left_out = take_branch(state, prefix, source)

    def in_file(name: str) -> str:
        return name if prefix is None else f"{_before(prefix)}{name.removeprefix(BRANCH)}"

    own = model.state_dict()
    for name in own:
        if name not in state:
            continue
        if not isinstance(state[name], torch.Tensor):
            raise UserError(
                f"{source}: {in_file(name)}: found a {type(state[name]).__name__}, expected a tensor; save "
                "model.state_dict() again"
            )
        if state[name].layout is not torch.strided or state[name].is_meta:
            what = "a tensor without values" if state[name].is_meta else f"a {state[name].layout} tensor"
            raise UserError(
                f"{source}: {in_file(name)}: found {what.replace('torch.', '')}, expected a dense one; save model.state_dict() again"
            )
        if own[name].is_floating_point() and not state[name].is_floating_point():
            raise UserError(
                f"{source}: {in_file(name)}: found {str(state[name].dtype).removeprefix('torch.')}, expected floating-point weights; "
                "save the network before it is converted to integers"
            )
    unknown = [name for name in state if name not in own]
    beyond = _beyond(unknown, own)
    extra = [name for name in unknown if name not in beyond]
    missing = [name for name in own if name not in state and not name.endswith(DERIVED)]
    wrong = [name for name in own if name in state and own[name].shape != state[name].shape]
    if wrong:
        name = wrong[0]
        raise UserError(
            f"{source}: {in_file(name)}: found shape {list(state[name].shape)}, the config makes {list(own[name].shape)} "
            f"({len(wrong)} such tensors); give the config that the checkpoint was trained with"
        )
    if missing or extra:
        parts = [f"missing {_grouped([*map(in_file, missing)])}"] if missing else []
        parts += [f"unexpected {_grouped([*map(in_file, extra)])}"] if extra else []
        whole = prefix is None and any(name.startswith(BRANCH) for name in state)
        if whole and not any(name.startswith(BRANCH) for name in (*missing, *extra)):
            parts += [
                "its camera branch fits: calibrate and export-camera take that alone with --prefix encoders.camera"
            ]
        raise UserError(f"{source}: does not fit the config: {'; '.join(parts)}")
    if finite:
        _check_finite(state, own, source, in_file)
    if isinstance(model, CameraBEVDetector) and model.keep_cells(_counts(state[f"{BRANCH}vtransform.nx"])):
        own = model.state_dict()
        counts = "×".join(map(str, own[f"{BRANCH}vtransform.nx"].tolist()))
        note(
            f"{source}: kept its BEV grid of {counts} cells: BEVFusion cuts the quotient of a bound off where it lies just below "
            "a whole number"
        )
    state = dict(state)
    for name in own:  # a checkpoint's grid decides where features go: another one's shape may be the same
        if name.rpartition(".")[2] not in GEOMETRY:
            continue
        if _agree(state[name], own[name]):
            state[name] = own[name]  # FP16 and BF16 have rounded what the bounds give exactly
        else:
            raise UserError(
                f"{source}: {in_file(name)}: found {_short(state[name])}, the config's bounds make {_short(own[name])}; give the "
                "config that the checkpoint was trained with"
            )
    if beyond:
        note(
            f"{source}: left out {_grouped([*map(in_file, beyond)], 4 if prefix is None else 3)}: modules of the backbone that this "
            "config does not use"
        )
    try:
        model.load_state_dict({name: state[name].to(own[name].dtype) for name in own if name in state})
    except (RuntimeError, *UNBUILDABLE) as error:  # what the checks above cannot see: Swin's windows in another order
        raise UserError(f"{source}: does not fit the config: {' '.join(str(error).split())}") from None
    return left_out


def load_float_model(
    config: Mapping[str, Any], path: str | Path, finite: bool = True, ema: bool = False
) -> CameraBEVDetector:
    """The detector of `config` with a float checkpoint's weights, in eval mode. finite: as for `load_state`; ema: as for
    `load_checkpoint`."""
    return _load_float(config, path, None, finite, ema)[0]


def load_float_branch(
    config: Mapping[str, Any], path: str | Path, prefix: str, finite: bool = True, ema: bool = False
) -> tuple[CameraBEVDetector, int]:
    """The camera branch alone out of a float checkpoint, in eval mode, and how many names of the file were left out.

    Args:
        config: the branch's (`qat.core.config.camera_branch`).
        prefix: where it lies in the file, as for `take_branch`.
        finite: as for `load_state`.
        ema: as for `load_checkpoint`.
    """
    return _load_float(config, path, prefix, finite, ema)


def float_weights(checkpoint: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    """The weights to load of a float checkpoint, after telling which they are where the file has others too.

    Args:
        checkpoint: `load_checkpoint`'s.

    Raises:
        UserError: another tool has quantized the network, and its weights are not the float network's.
    """
    quantizers = checkpoint.get("quantizers") or {}
    if smoothed := [name for name, q in quantizers.items() if q["special"] and "SmoothQuant" in q["special"]]:
        raise UserError(
            f"{path}: found {len(smoothed)} layers whose weights another tool has scaled for quantization ({smoothed[0]}: "
            "SmoothQuant), expected the float network's; give the checkpoint from before"
        )
    if quantizers:
        note(f"{path}: left out the ranges of {len(quantizers)} quantizers of another tool; import-ptq takes them")
    if checkpoint.get("note"):
        note(checkpoint["note"])
    found: dict[str, Any] = checkpoint["state_dict"]
    return found


def _load_float(
    config: Mapping[str, Any], path: str | Path, prefix: str | None, finite: bool, ema: bool
) -> tuple[CameraBEVDetector, int]:
    checkpoint = load_checkpoint(path, ema)
    if checkpoint.get("format") == "bevqat-ptq":
        raise UserError(
            f"{path}: found a quantized checkpoint, expected the float one that it was calibrated from; name that"
        )
    model = build_model(config)
    left_out = load_state(model, float_weights(checkpoint, path), str(path), prefix, finite)
    return model.eval(), left_out
