"""VoteNet without torch: the sampled cloud, every index, boxes.

    points ─► (sample) ─► cloud ─► (group) ─► indices ─┐
                            └──────────────────────────┴─► backbone ─► vote_points, vote_features
    vote_points ─► (aggregate) ─► vote_groups, aggregated_points ─┐
    vote_points, vote_features ───────────────────────────────────┴─► head ─► cls_preds, reg_preds

`group` depends only on the points' coordinates, `aggregate` on the votes' (`qat.families.votenet.indices`): the two graphs are
static and gather by given indices.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qat.boxes.detections import Detections
from qat.core.checks import Check, fail, flag, listed, number, section, text
from qat.families.mmdet3d.lidar import LidarFrame, PointsFlow
from qat.families.votenet.decode import detections
from qat.families.votenet.indices import backbone_indices, batch_of_clouds, index_names, proposals, taken, vote_groups
from qat.plan import BATCH, Axis, Op, Part, Plan, Tensor

USUAL = 50_000  # points of an indoor depth picture
HOT = 0.5  # objectness above which a proposal belongs to an object
MODES = ("seed", "vote")  # what proposals are spread over
_CODER = section(
    bins=number(1, 360, whole=True), mean_sizes=listed(listed(number(0, 1e3), 3, 3), 1, 1000), rotated=flag
)
_HEAD = section(coder=_CODER, nms_thr=number(0, 1), score_thr=number(0, 1), per_class=flag)


def _groups(**more: Check) -> Check:
    count, samples = number(1, 1 << 20, whole=True), number(1, 4096, whole=True)
    return section(None, points=count, radius=number(1e-3, 100), samples=samples, **more)


def _mode(value: Any, where: str) -> None:
    if value not in MODES:
        fail(where, value, " or ".join(MODES))


_SETTINGS = section(
    family=text,
    classes=listed(text, 1, 1000),
    load_dim=number(3, 32, whole=True),
    columns=number(3, 32, whole=True),
    height=flag,
    points=number(1, 1 << 24, whole=True),
    sa=listed(_groups(), 1, 16),
    fp=number(0, 15, whole=True),
    channels=number(1, 65536, whole=True),
    votes=number(1, 64, whole=True),
    aggregation=_groups(mode=_mode),
    head=_HEAD,
)


def _check(settings: Any, where: str) -> None:
    _SETTINGS(settings, where)
    if settings["fp"] >= len(settings["sa"]):
        fail(f"{where}: fp", settings["fp"], f"less than {len(settings['sa'])}")


def plan_of(settings: Mapping[str, Any]) -> Plan:
    """The plan of a manifest's `pipeline` section."""
    sa, fp, vote = settings["sa"], settings["fp"], settings["aggregation"]
    coder = settings["head"]["coder"]
    columns = settings["columns"] + settings["height"]
    counts = [settings["points"], *(one["points"] for one in sa)]
    seeds = counts[len(sa) - fp]
    votes = seeds * settings["votes"]
    names = index_names(len(sa), fp)
    sizes: dict[str, Tensor] = {}
    for n, one in enumerate(sa, 1):
        sizes[f"sa{n}_centres"] = Tensor((BATCH, one["points"]), "int32")
        sizes[f"sa{n}_groups"] = Tensor((BATCH, one["points"], one["samples"]), "int32")
    for n in range(1, fp + 1):
        sizes[f"fp{n}_nearest"] = Tensor((BATCH, counts[-n - 1], 3), "int32")
        sizes[f"fp{n}_weights"] = Tensor((BATCH, counts[-n - 1], 3))
    spread = ("seed_points",) if vote["mode"] == "seed" else ()
    outputs = ("cls_preds", "reg_preds")
    return Plan(
        inputs=("points",),
        steps=(
            Op("sample", ("points",), ("cloud",)),
            Op("group", ("cloud",), (*names, "seed_points")),
            Part(
                "backbone",
                {name: name for name in ("cloud", *names)},
                ("vote_points", "vote_features"),
                scope="backbone",
            ),
            Op("aggregate", ("vote_points", *spread), ("aggregated_points", "vote_groups")),
            Part(
                "head",
                {name: name for name in ("vote_points", "vote_features", "aggregated_points", "vote_groups")},
                outputs,
                scope="head",
            ),
        ),
        outputs=(*outputs, "aggregated_points", "cloud"),
        tensors={
            "points": Tensor(("points", 1 + settings["columns"])),
            "cloud": Tensor((BATCH, settings["points"], columns), exact=True),
            **sizes,
            "seed_points": Tensor((BATCH, seeds, 3)),
            "vote_points": Tensor((BATCH, votes, 3), exact=True),
            "vote_features": Tensor((BATCH, settings["channels"], votes)),
            "aggregated_points": Tensor((BATCH, vote["points"], 3), exact=True),
            "vote_groups": Tensor((BATCH, vote["points"], vote["samples"]), "int32"),
            "cls_preds": Tensor((BATCH, 2 + len(settings["classes"]), vote["points"])),
            "reg_preds": Tensor((BATCH, 3 + 2 * coder["bins"] + 4 * len(coder["mean_sizes"]), vote["points"])),
        },
        reported={"vote_points": ("vote_points",), "vote_features": ("vote_features",), "heads": outputs},
        judged={"votes": ("vote_points", "vote_features"), "heads": outputs},
        axes={"points": Axis(1, USUAL)},
    )


class VoteNet(PointsFlow):
    """The host's side of VoteNet. Points: x (right), y (forwards), z (up) in metres, gravity along −z. (mmdet3d first rotates
    ScanNet's clouds by their `axis_align_matrix`.)"""

    section = staticmethod(_check)
    fewest = 1
    state_names = ("backbone.SA_modules.", "bbox_head.vote_module.")
    words = {"vote_points": "votes", "vote_features": "votes' features"}  # noqa: RUF012

    @classmethod
    def plan_of(cls, settings: Mapping[str, Any]) -> Plan:
        """As `PointsFlow.plan_of`."""
        return plan_of(settings)

    def clouds(self, root: Path, split: str, version: str | None, count: int | None) -> Any:
        """As `PointsFlow.clouds`: .bin files."""
        from qat.families.mmdet3d.frames import PointFiles

        return PointFiles(root, range(self.columns), self.settings["load_dim"], count)

    def ops(self) -> Mapping[str, Any]:
        """The sampled cloud; the backbone's indices; the proposals'."""

        def sample(given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            return {"cloud": batch_of_clouds(given["points"], self.settings)}

        def group(given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            return backbone_indices(given["cloud"], self.settings)

        def aggregate(given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            how, votes = self.settings["aggregation"], given["vote_points"]
            picked = proposals(given.get("seed_points", votes), how["points"])
            centres = taken(votes, picked)
            return {"aggregated_points": centres, "vote_groups": vote_groups(votes, centres, how)}

        return {"sample": sample, "group": group, "aggregate": aggregate}

    def decode(self, tensors: Mapping[str, np.ndarray]) -> Detections:
        """Boxes from the head's predictions; boxes without points of the cloud are dropped."""
        return detections(
            tensors["cls_preds"],
            tensors["reg_preds"],
            tensors["aggregated_points"],
            tensors["cloud"],
            self.settings["head"],
        )

    def objects(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Which values belong to a proposal whose objectness is over HOT."""
        scores = tensors["cls_preds"]
        there = scores[:, 1:2] - scores[:, 0:1] > np.log(HOT / (1 - HOT))
        return {name: np.broadcast_to(there, tensors[name].shape) for name in ("cls_preds", "reg_preds")}

    def made_frame(self, seed: int, noise: bool = False) -> LidarFrame:
        """As `Flow.made_frame`: a room with boxes in it, or points anywhere in the room."""
        random = np.random.default_rng(seed)
        points = np.zeros((self.settings["points"] * 5 // 4, self.columns), np.float32)
        points[:, :3] = ROOM * random.random((len(points), 3)) + CORNER if noise else _room(random, len(points))
        points[:, 3:] = random.random((len(points), self.columns - 3))
        return LidarFrame(f"made-up:{seed}", points)


ROOM = np.array([5.0, 5.0, 2.5])  # metres: right, forwards, up
CORNER = np.array([-2.5, 0.5, -1.2])  # of the room, from the sensor
BOXES = 8


def _room(random: np.random.Generator, count: int) -> np.ndarray:
    """float64[count,3]: points of a floor, two walls and upright boxes on the floor, with a noise of millimetres."""
    half = count // 2
    flat = random.random((half, 3))
    plane = random.integers(0, 4, half)  # the floor gets as many points as both walls
    flat[plane < 2, 2] = 0
    flat[plane == 2, 0] = 0
    flat[plane == 3, 1] = 1
    points = [flat * ROOM]
    owner = random.integers(0, BOXES, count - half)
    size = 0.4 + random.random((BOXES, 3)) * [1.4, 1.4, 0.9]
    place = random.random((BOXES, 2)) * (ROOM[:2] - 1) + 0.5
    turn = random.random(BOXES) * 2 * np.pi
    on = random.random((len(owner), 3)) - [0.5, 0.5, 0]
    face, side = random.integers(0, 3, len(owner)), random.integers(0, 2, len(owner))
    for axis, (low, high) in enumerate(((-0.5, 0.5), (-0.5, 0.5), (1, 1))):
        on[face == axis, axis] = np.where(side[face == axis], low, high)
    on = on * size[owner]
    cos, sin = np.cos(turn)[owner], np.sin(turn)[owner]
    turned = np.stack([on[:, 0] * cos - on[:, 1] * sin, on[:, 0] * sin + on[:, 1] * cos, on[:, 2]], 1)
    turned[:, :2] += place[owner]
    points.append(turned)
    return np.concatenate(points) + CORNER + (random.random((count, 3)) - 0.5) * 0.01


FLOW = VoteNet
