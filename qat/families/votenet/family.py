"""VoteNet for the stages that run PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qat.core.errors import UserError
from qat.families.family import PartModule, Recipe, relative_error
from qat.families.mmdet3d.shared_family import Mmdet3dFamily
from qat.families.votenet.flow import MODES
from qat.families.votenet.indices import backbone_indices, batch_of_clouds, index_names, proposals, vote_groups
from qat.families.votenet.network import VoteNetNet, rows

WHOLE = "export it whole, with export-mmdet3d"


def _only(found: Any, expected: tuple[Any, ...], where: str) -> None:
    """Raises `UserError` for a value that the split form does not support."""
    if found not in expected:
        raise UserError(f"{where}: found {found!r}, expected {' or '.join(map(repr, expected))}; {WHOLE}")


def _sampling(steps: Mapping[str, Any], source: str) -> dict[str, Any]:
    """ "height" and "points" of a test pipeline's steps."""
    loads, sample = steps.get("LoadPointsFromFile", {}), steps.get("PointSample")
    if sample is None:
        raise UserError(
            f"{source}: test pipeline: found no PointSample, expected one: the graphs take a fixed number of points"
        )
    for step, name in (
        (sample, "sample_range"),
        (sample, "replace"),
        (loads, "norm_intensity"),
        (loads, "norm_elongation"),
    ):
        if step.get(name):
            raise UserError(f"{source}: test pipeline: {name}: found {step[name]!r}, expected none; {WHOLE}")
    return {"height": bool(loads.get("shift_height", False)), "points": int(sample["num_points"])}


class VoteNetFamily(Mmdet3dFamily):
    """mmdet3d's VoteNet with `PointNet2SASSG` and `VoteHead`."""

    name = "votenet"
    own_keys = frozenset({"height", "points"})
    loss_weights = {"votes": 1.0, "heads": 1.0}  # noqa: RUF012

    def own_description(self, steps: Mapping[str, Any], source: str) -> dict[str, Any]:
        """As `Mmdet3dFamily.own_description`: how clouds are sampled."""
        return _sampling(steps, source)

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """As `Family.settings`."""
        model = config["model"]
        where = f"{config['source']}: model"
        backbone, head, test = (model.get(name) or {} for name in ("backbone", "bbox_head", "test_cfg"))
        _only(backbone.get("type"), ("PointNet2SASSG",), f"{where}: backbone")
        _only(head.get("type"), ("VoteHead",), f"{where}: bbox_head")
        sa, gather, vote = backbone.get("sa_cfg", {}), head["vote_aggregation_cfg"], head["vote_module_cfg"]
        for name, module in (("backbone: sa_cfg", sa), ("bbox_head: vote_aggregation_cfg", gather)):
            _only(module.get("type", "PointSAModule"), ("PointSAModule",), f"{where}: {name}: type")
            _only(list(module.get("fps_mod", ["D-FPS"])), (["D-FPS"],), f"{where}: {name}: fps_mod")
            _only(list(module.get("fps_sample_range_list", [-1])), ([-1],), f"{where}: {name}: fps_sample_range_list")
        _only(vote.get("num_points", -1), (-1,), f"{where}: bbox_head: vote_module_cfg: num_points")
        _only(test.get("sample_mode"), MODES, f"{where}: test_cfg: sample_mode")
        coder = head["bbox_coder"]
        _only(coder.get("type"), ("PartialBinBasedBBoxCoder",), f"{where}: bbox_head: bbox_coder")
        used = list(config["columns"])
        _only(used, (list(range(len(used))),), f"{where}: use_dim")
        columns = len(used) + bool(config["height"])
        _only(
            int(backbone["in_channels"]), (columns,), f"{where}: backbone: in_channels of points with {columns} columns"
        )
        _only(
            int(head["num_classes"]),
            (len(config["classes"]),),
            f"{where}: bbox_head: num_classes of {len(config['classes'])} names",
        )
        levels = zip(backbone["num_points"], backbone["radius"], backbone["num_samples"], strict=True)
        return {
            "family": self.name,
            "classes": list(config["classes"]),
            "load_dim": int(config["load_dim"]),
            "columns": len(used),
            "height": bool(config["height"]),
            "points": int(config["points"]),
            "sa": [{"points": int(n), "radius": float(r), "samples": int(s)} for n, r, s in levels],
            "fp": len(backbone["fp_channels"]),
            "channels": int(vote["in_channels"]),
            "votes": int(vote.get("vote_per_seed", 1)),
            "aggregation": {
                "mode": test["sample_mode"],
                "points": int(gather["num_point"]),
                "radius": float(gather["radius"]),
                "samples": int(gather["num_sample"]),
            },
            "head": {
                "coder": {
                    "bins": int(coder["num_dir_bins"]),
                    "mean_sizes": [[float(v) for v in each] for each in coder["mean_sizes"]],
                    "rotated": bool(coder.get("with_rot", True)),
                },
                "nms_thr": float(test["nms_thr"]),
                "score_thr": float(test["score_thr"]),
                "per_class": bool(test["per_class_proposal"]),
            },
        }

    def build(self, config: Mapping[str, Any]) -> VoteNetNet:
        """As `Family.build`."""
        return VoteNetNet(config, self.name)

    def pass_through(self, network: Any, flow: Any, frames: list[Any]) -> None:
        """As `Mmdet3dFamily.pass_through`."""
        plan, ops = flow.plan, self.ops(network)
        found = ops["sample"](flow.feeds(frames))
        found |= ops["group"](found)
        given = [found[name] for name in plan.parts["backbone"].inputs.values()]
        found |= dict(zip(plan.parts["backbone"].outputs, network.vote(*given), strict=True))
        found |= ops["aggregate"](found)
        network.propose(*(found[name] for name in plan.parts["head"].inputs.values()))

    def traced(self, network: Any) -> dict[str, str]:
        """As `Family.traced`."""
        return {"backbone": "vote", "head": "propose"}

    def parts(self, network: Any, cores: Mapping[str, Any]) -> dict[str, PartModule]:
        """As `Family.parts`."""
        model = network.config["model"]["backbone"]
        names = {
            "backbone": (
                ("cloud", *index_names(len(model["num_points"]), len(model["fp_channels"]))),
                ("vote_points", "vote_features"),
            ),
            "head": (("vote_points", "vote_features", "aggregated_points", "vote_groups"), ("cls_preds", "reg_preds")),
        }
        return {name: PartModule(core, *names[name]) for name, core in cores.items()}

    def ops(self, network: Any) -> Mapping[str, Any]:
        """As `Family.ops`: numba computes indices, without gradients; proposals are at votes' coordinates."""
        settings = self.settings(network.config)
        how = settings["aggregation"]

        def tensors(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
            device = next(network.parameters()).device
            return {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}

        def sample(given: Mapping[str, Any]) -> dict[str, Any]:
            return tensors({"cloud": batch_of_clouds(given["points"], settings)})

        def group(given: Mapping[str, Any]) -> dict[str, Any]:
            return tensors(backbone_indices(_array(given["cloud"]), settings))

        def aggregate(given: Mapping[str, Any]) -> dict[str, Any]:
            votes = given["vote_points"]
            picked = proposals(_array(given.get("seed_points", votes)), how["points"])
            centres = rows(votes, torch.from_numpy(picked).to(votes.device))
            return {
                "aggregated_points": centres,
                **tensors({"vote_groups": vote_groups(_array(votes), _array(centres), how)}),
            }

        return {"sample": sample, "group": group, "aggregate": aggregate}

    def recipe(self, config: Mapping[str, Any]) -> Recipe:
        """As `Family.recipe`."""
        return Recipe(method="mse")

    def dataset(
        self, root: Path, split: str, config: Mapping[str, Any], version: str | None = None, frames: int | None = None
    ) -> Any:
        """As `Family.dataset`: .bin files."""
        from qat.families.mmdet3d.frames import PointFiles

        return PointFiles(root, config["columns"], int(config["load_dim"]), frames)

    def losses(
        self, student: Mapping[str, torch.Tensor], teacher: Mapping[str, torch.Tensor], frames: int
    ) -> dict[str, torch.Tensor]:
        """The relative squared errors of the votes and of the head's predictions."""
        votes, heads = ("vote_points", "vote_features"), ("cls_preds", "reg_preds")
        return {
            "votes": relative_error(student, teacher, votes),
            "heads": relative_error(student, teacher, heads),
        }


def _array(value: Any) -> np.ndarray:
    """A tensor, or an array, as a float32 array."""
    found = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else value
    return np.ascontiguousarray(found, np.float32)


FAMILY = VoteNetFamily()
