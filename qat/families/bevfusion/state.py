"""Loads a float checkpoint's tensors into a config's detector: names, shapes, BEVFusion's grid, the camera branch alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qat.checkpoints.weights import OUTER
from qat.core.console import note
from qat.core.errors import UserError
from qat.families import family_named
from qat.families.bevfusion.detector import UNBUILDABLE, CameraBEVDetector
from qat.model.opening import load_float


def _grouped(names: list[str], words: int = 3) -> str:
    groups = Counter(".".join(name.split(".")[:words]) for name in names)
    return ", ".join(f"{group}.* ({count})" for group, count in sorted(groups.items()))


DERIVED = "relative_position_index"  # Swin's: fixed by the window's size; only mmdet stores it
GEOMETRY = ("dx", "bx", "nx", "frustum")  # the view transform's fixed parameters


STAGES = (
    "stages",
    "layers",
    "blocks",
    "features",
)  # lists of consecutive modules, in Swin and timm's networks


def _beyond(names: Iterable[str], own: Mapping[str, Any]) -> list[str]:
    """Of these names, which the model lacks, returns those in modules of the backbone that this config does not use: a
    classifier, stages after the last output. Extra tensors inside a used module (another ResNet block in layer1), or directly
    in the backbone (a position embedding), are not returned."""
    start = f"{BRANCH}backbone."
    used = {_module(name[len(start) :]) for name in own if name.startswith(start)}
    last: dict[str, int] = {}
    for first, number in used:
        last[first] = max(number, last.get(first, -1))
    # mmdet's Swin merges patches at the end of the previous stage; here this belongs to the next stage.
    merging = f"{start}stages.{last.get('stages')}.downsample."

    def is_beyond(name: str) -> bool:
        if not name.startswith(start) or "." not in name[len(start) :]:
            return False
        first, number = _module(name[len(start) :])
        return name.startswith(merging) or first not in last or number > last[first]

    return [name for name in names if is_beyond(name)]


def _module(name: str) -> tuple[str, int]:
    """The module of a backbone that a tensor belongs to: its first word, and the number of a stage (or −1)."""
    first, _, rest = name.partition(".")
    second = rest.partition(".")[0]
    return first, int(second) if first in STAGES and second.isdigit() else -1


def _counts(nx: torch.Tensor) -> list[int]:
    return [int(n) for n in nx.double().nan_to_num(0, 0, 0).tolist()]


def _agree(found: torch.Tensor, own: torch.Tensor) -> bool:
    """Whether fixed values equal those of the config's bounds, within the precision of the file's number format."""
    eps = torch.finfo(found.dtype).eps if found.is_floating_point() else 0.0
    return torch.allclose(found.double(), own.double(), atol=1e-3, rtol=max(1e-5, eps))


def _short(value: torch.Tensor) -> str:
    numbers = [f"{v:g}" for v in value.flatten()[:3].tolist()]
    return f"[{', '.join(numbers)}{', …' if value.numel() > 3 else ''}]"


BRANCH = "encoders.camera."


def _branch_prefixes(names: Iterable[str]) -> list[str]:
    """The prefixes of camera branches: only these have a view transform (other encoders may have a backbone)."""
    split = [name.split(".") for name in names]
    return list(dict.fromkeys(".".join(w[: w.index("vtransform")]) for w in split if "vtransform" in w[:-1]))


def _before(prefix: str) -> str:
    return f"{prefix.rstrip('.')}." if prefix else ""


def _without_outer(prefix: str) -> str:
    """A branch's prefix without the wrappers' prefixes that `load_checkpoint` has already removed."""
    while outer := next((o for o in OUTER if f"{prefix}.".startswith(o)), ""):
        prefix = f"{prefix}."[len(outer) :].removesuffix(".")
    return prefix


def under_prefix(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The tensors under the prefix of a camera branch (see `take_branch`), by this package's names."""
    inside: dict[str, Any] = {}
    for start in dict.fromkeys((prefix, _without_outer(prefix))):
        before = _before(start)
        inside = {f"{BRANCH}{name[len(before) :]}": v for name, v in values.items() if name.startswith(before)}
        if inside:
            break
    return inside


def take_branch(state: Mapping[str, Any], prefix: str, source: str) -> tuple[dict[str, Any], int]:
    """The camera branch of a state dict, by this package's names, and the number of other names.

    Args:
        prefix: the text before `.backbone`, `.neck` and `.vtransform` in the file: "encoders.camera" in a BEVFusion
            model, "module.encoders.camera" in one saved from DistributedDataParallel, "" in a state dict of the
            branch alone.

    Raises:
        UserError: there is no camera branch under this prefix; the message lists the prefixes that have one.
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
                f"expected finite weights; save an earlier epoch (`bevqat health {source}` shows their effect)"
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

    finite: False accepts them, to examine their effect.
    prefix: loads the camera branch that lies under it (`take_branch`) into a model of that branch alone; what is outside
    is left out.

    Returns:
        the number of names that were left out.
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
            f"({len(wrong)} such tensors); use the config that the checkpoint was trained with"
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
        note(f"{source}: kept its BEV grid of {counts} cells: BEVFusion truncates quotients just below a whole number")
    state = dict(state)
    for name in own:  # a checkpoint's grid decides where features go, and different grids may have the same shape
        if name.rpartition(".")[2] not in GEOMETRY:
            continue
        if _agree(state[name], own[name]):
            state[name] = own[name]  # FP16 and BF16 rounded the exact values of the bounds
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
    except (RuntimeError, *UNBUILDABLE) as error:  # not found by the checks above: Swin's windows in another order
        raise UserError(f"{source}: does not fit the config: {' '.join(str(error).split())}") from None
    return left_out


def load_float_model(
    config: Mapping[str, Any], path: str | Path, finite: bool = True, ema: bool = False
) -> CameraBEVDetector:
    """The detector of `config` with a float checkpoint's weights, in eval mode (`qat.model.opening.load_float`)."""
    found: CameraBEVDetector = load_float(family_named("bevfusion"), config, path, None, ema, finite).network
    return found


def load_float_branch(config: Mapping[str, Any], path: str | Path, prefix: str) -> tuple[CameraBEVDetector, int]:
    """The camera branch of a float checkpoint, in eval mode, and the number of names in the file that were left out.

    Args:
        config: the branch's (`qat.families.bevfusion.config.camera_branch`).
        prefix: its place in the file, as in `take_branch`.
    """
    opened = load_float(family_named("bevfusion"), config, path, prefix)
    return opened.network, opened.left_out
