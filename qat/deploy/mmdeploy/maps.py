"""The outputs of MMDeploy's `end2end.onnx` beside the maps of this project's flows. No torch.

    release      classes        boxes         directions      of a level
    0.4 to 0.10  scores         bbox_preds    dir_scores      the only one
    1.0, 1.1     cls_score      bbox_pred     dir_cls_pred    the only one
    from 1.2     cls_score0     bbox_pred0    dir_cls_pred0   0; then 1, 2, …

An anchor head's maps are the same maps. Of a CenterHead the tasks stand one after another: heat maps; reg, height, dim and vel of each
task; rot.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from qat.core.errors import UserError
from qat.families.flow import Flow

INPUTS = ("voxels", "num_points", "coors")
RELEASES = {
    "0.4": ("scores", "bbox_preds", "dir_scores"),
    "1.0": ("cls_score", "bbox_pred", "dir_cls_pred"),
    "1.2": ("cls_score{}", "bbox_pred{}", "dir_cls_pred{}"),
}
LATEST = "1.2"
DECODED = {"bboxes", "scores", "labels"}  # 0.11 to 0.14: boxes, by operators of MMDeploy's own
_GROUPS = (("heatmap",), ("reg", "height", "dim", "vel"), ("rot",))


def release_of(names: Sequence[str], source: str) -> str:
    """The release whose names these outputs have.

    Raises:
        UserError: none has them.
    """
    for release, own in RELEASES.items():
        if set(names) & {name.format(0) for name in own}:
            if set(names) >= DECODED:
                break
            return release
    raise UserError(
        f"{source}: output_names: found {', '.join(names)}, expected cls_score0, bbox_pred0, dir_cls_pred0, or the names of "
        f"{' or '.join(r for r in RELEASES if r != LATEST)} (0.11 to 0.14 decode boxes by operators of MMDeploy's own); "
        "export again, with --names 1.2"
    )


def names_in(flow: Flow, release: str) -> list[str]:
    """The outputs of a model's file in a release's names.

    Raises:
        UserError: the release has no names for a second level.
    """
    own = RELEASES[release]
    levels = len(_levels(flow))
    if levels > 1 and own[0] == own[0].format(0):
        raise UserError(f"--names {release}: found {levels} levels of maps, expected one; take --names {LATEST}")
    return [own[kind].format(level) for level, kinds in enumerate(_levels(flow)) for kind in range(len(kinds))]


def _levels(flow: Flow) -> list[list[list[str]]]:
    """By level and by kind (classes, boxes, directions): the flow's maps that are concatenated into one output."""
    head: Mapping[str, Any] = flow.settings["head"]
    if "tasks" not in head:
        kinds = 2 + bool(head["directions"])
        found = [[name] for name in flow.plan.outputs]
        return [found[n : n + kinds] for n in range(0, len(found), kinds)]
    suffixes = [""] if len(head["tasks"]) == 1 else [f"_{task}" for task in range(len(head["tasks"]))]
    return [
        [[f"{name}{end}" for end in suffixes for name in group if name in head["maps"]] for group in _GROUPS],
    ]


def groups(flow: Flow) -> Iterator[list[str]]:
    """For each output of the file, in its order, the flow's maps that are concatenated in it."""
    for level in _levels(flow):
        yield from level


def channels_of(flow: Flow, name: str) -> int:
    """Channels of one of the flow's maps."""
    found = flow.plan.tensors[name].shape[1]
    assert isinstance(found, int)
    return found


def split(flow: Flow, outputs: Mapping[str, np.ndarray], source: str) -> dict[str, np.ndarray]:
    """The flow's maps of a file's outputs.

    Raises:
        UserError: outputs have other names or shapes than the model's.
    """
    names = names_in(flow, release_of(list(outputs), source))
    found: dict[str, np.ndarray] = {}
    for name, maps in zip(names, groups(flow), strict=True):
        sizes = [channels_of(flow, own) for own in maps]
        rows = flow.plan.tensors[maps[0]].shape[2:]
        if name not in outputs or outputs[name].shape != (1, sum(sizes), *rows):
            there = list(outputs[name].shape) if name in outputs else "none"
            raise UserError(
                f"{source}: {name}: found {there}, expected {[1, sum(sizes), *rows]}, as the model config has it; give the config of "
                "this file's model"
            )
        parts = np.split(outputs[name], np.cumsum(sizes)[:-1], axis=1)
        found.update(zip(maps, parts, strict=True))
    return {name: np.ascontiguousarray(found[name]) for name in flow.plan.outputs}


def joined(flow: Flow, maps: Mapping[str, Any], release: str = LATEST) -> dict[str, np.ndarray]:
    """The file's outputs of the flow's maps."""
    return {
        name: np.concatenate([maps[own] for own in group], axis=1)
        for name, group in zip(names_in(flow, release), groups(flow), strict=True)
    }
