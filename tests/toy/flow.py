"""The toy without torch. A picture and the lidar points that it looks at; what it saw is remembered from frame to frame.

    img ─► image ─► feat ─► (gather) ─► tokens ─► mixer ─► heat, box, hidden ─► (remember) ─► next_memory
    cells, memory ─────────────┘ └► centres

`tokens` has a row for each cell of the ground with a lidar point in it: N, which differs from frame to frame.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from qat.boxes.detections import Detections
from qat.core.checks import holds, listed, number, section, text
from qat.core.errors import UserError
from qat.core.preprocess import ResizeCrop, normalize
from qat.families.flow import Flow
from qat.plan import BATCH, Axis, Op, Part, Plan, Tensor

SIDE, STEP = 16, 3.2  # cells of the ground, metres each
MOST = SIDE * SIDE
BOXES = 10
_SETTINGS = section(
    classes=listed(text, 1, 100),
    width=number(1, 1024, whole=True),
    image=section(
        size=listed(number(8, 4096, whole=True), 2, 2), mean=listed(number(), 3, 3), std=listed(number(), 3, 3)
    ),
)


def plan_of(settings: Mapping[str, Any]) -> Plan:
    height, width = settings["image"]["size"]
    channels, classes = settings["width"], len(settings["classes"])
    return Plan(
        inputs=("img", "cells", "memory"),
        steps=(
            Part("image", {"img": "img"}, ("feat",), scope="image"),
            Op("gather", ("feat", "memory", "cells"), ("tokens", "centres")),
            Part("mixer", {"tokens": "tokens"}, ("heat", "box", "hidden"), scope="mixer"),
            Op("remember", ("hidden", "cells", "memory"), ("next_memory",)),
        ),
        outputs=("heat", "box", "centres"),
        tensors={
            "img": Tensor((BATCH, 3, height, width)),
            "cells": Tensor(("N", 2), "int64"),
            "memory": Tensor((BATCH, channels)),
            "feat": Tensor((BATCH, channels, height // 8, width // 8)),
            "tokens": Tensor(("N", channels)),
            "centres": Tensor(("N", 2)),
            "heat": Tensor(("N", classes)),
            "box": Tensor(("N", 7)),
            "hidden": Tensor(("N", channels)),
            "next_memory": Tensor((BATCH, channels)),
        },
        reported={"feat": ("feat",), "tokens": ("tokens",), "outputs": ("heat", "box")},
        judged={"tokens": ("tokens",), "outputs": ("heat", "box")},
        axes={"N": Axis(1, 64, MOST)},
        state={"next_memory": "memory"},
    )


def places(cells: np.ndarray, shape: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Of each cell, its sample and the place in a flattened map that it looks at."""
    return cells[:, 0], cells[:, 1] * (shape[2] * shape[3]) // MOST


def centres_of(cells: np.ndarray) -> np.ndarray:
    """float32[N,2], metres."""
    at = np.stack([cells[:, 1] // SIDE, cells[:, 1] % SIDE], 1)
    return ((at + 0.5 - SIDE / 2) * STEP).astype(np.float32)


@dataclass
class Frame:
    token: str
    img: np.ndarray
    points: np.ndarray
    scene: str = ""


@dataclass
class Raw:
    name: str
    image: np.ndarray
    points: np.ndarray
    sample: None = None

    @property
    def raw(self) -> tuple[Any, ...]:
        return self.image, self.points

    def moved(self, place: int) -> Raw:
        return replace(self, points=self.points + np.float32(place * 1e-3))


class Toy(Flow):
    words = {"feat": "picture"}  # noqa: RUF012

    def __init__(self, settings: Mapping[str, Any], threads: int = 0, source: str = "pipeline") -> None:
        super().__init__(settings, threads, source)
        self.plan = plan_of(settings)
        self.classes = list(settings["classes"])

    @classmethod
    def check(cls, path: Any, settings: object, fix: str) -> None:
        holds(path, lambda: _SETTINGS(settings, "pipeline"), fix)

    def ops(self) -> Mapping[str, Any]:
        def gather(given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            feat, cells = given["feat"], given["cells"]
            sample, at = places(cells, feat.shape)
            tokens = feat.reshape(*feat.shape[:2], -1)[sample, :, at] + given["memory"][sample]
            return {"tokens": np.ascontiguousarray(tokens), "centres": centres_of(cells)}

        def remember(given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            memory = 0.5 * given["memory"]
            for sample in range(len(memory)):
                memory[sample] += 0.5 * given["hidden"][given["cells"][:, 0] == sample].mean(0)
            return {"next_memory": memory}

        return {"gather": gather, "remember": remember}

    def feeds(self, frames: Sequence[Any]) -> dict[str, np.ndarray]:
        rows = []
        for n, frame in enumerate(frames):
            at = np.floor(frame.points[:, :2] / STEP + SIDE / 2).astype(np.int64)
            inside = ((at >= 0) & (at < SIDE)).all(1)
            cells = np.unique(at[inside, 0] * SIDE + at[inside, 1])
            cells = cells if len(cells) else np.zeros(1, np.int64)
            rows.append(np.stack([np.full(len(cells), n), cells], 1))
        return {"img": np.stack([frame.img[0] for frame in frames]), "cells": np.concatenate(rows)}

    def initial_state(self) -> dict[str, np.ndarray]:
        return {"memory": np.zeros((1, self.settings["width"]), np.float32)}

    def prepare(self, *raw: Any) -> Frame:
        image, points = raw
        cfg = self.settings["image"]
        crop = ResizeCrop(tuple(cfg["size"]), cfg["resize"], 0.0, None)
        return Frame("picture", normalize(crop.apply(image), cfg["mean"], cfg["std"])[None], points)

    def decode(self, tensors: Mapping[str, np.ndarray]) -> Detections:
        scores = 1 / (1 + np.exp(-tensors["heat"]))
        best = np.argsort(-scores.max(1), kind="stable")[:BOXES]
        box = tensors["box"][best]
        xy = tensors["centres"][best] + box[:, :2]
        parts = [xy, box[:, 2:3], np.exp(np.clip(box[:, 3:6], -5, 3)), box[:, 6:7]]
        boxes = np.concatenate(parts, 1).astype(np.float32)
        return Detections(boxes, scores[best].max(1).astype(np.float32), scores[best].argmax(1), "mmdet3d")

    def objects(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        hot = tensors["heat"].max(1, keepdims=True) >= np.median(tensors["heat"].max(1))
        return {name: np.broadcast_to(hot, tensors[name].shape) for name in ("heat", "box")}

    def check_frame(self, frame: Any, token: str) -> None:
        expected = [1, 3, *self.settings["image"]["size"]]
        if list(frame.img.shape) != expected:
            raise UserError(
                f"frame {token}: img: found {list(frame.img.shape)}, expected {expected}; preprocess it for the toy"
            )

    def made_frame(self, seed: int, noise: bool = False) -> Frame:
        random = np.random.default_rng(seed)
        img = random.normal(size=(1, 3, *self.settings["image"]["size"])).astype(np.float32)
        return Frame(f"made-up:{seed}", img, random.uniform(-25, 25, (90, 3)).astype(np.float32))

    def raw_frames(self, count: int, seed: int = 0) -> list[Any]:
        height, width = self.settings["image"]["size"]
        found = []
        for n in range(count):
            random = np.random.default_rng([seed, n])
            image = random.integers(0, 256, (2 * height, 2 * width, 3), dtype=np.uint8)
            found.append(Raw(f"random:{n}", image, random.uniform(-25, 25, (300, 3)).astype(np.float32)))
        return found


FLOW = Toy
