"""BEVFusion's camera detector without torch: the plan, depth maps and BEV pooling, boxes.

    img, depth ─► camera.backbone ─► camera_feature, camera_depth_weights ─┐
    camera and augmentation matrices ─► (pattern) ─► pattern ──────────────┴► (pooling) ─► feat_in
    feat_in ─► camera.vtransform ─► feat_out ─► fuser ─► middle ─► head.bbox ─► {map}_{task}

camera.vtransform is left out if the view transform does not downsample; for a camera branch, the plan ends before fuser.
The names are those that CUDA-BEVFusion's runtime loads.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qat.boxes.centerhead import decode, maps_from_tensors
from qat.boxes.detections import Detections
from qat.core.errors import PictureSizeError, UserError
from qat.core.frame import Calibration, FrameArrays
from qat.core.geometry import rasterize_depth, within
from qat.core.preprocess import ResizeCrop, normalize
from qat.families.bevfusion.frames import check_frame, made_frame, random_frame
from qat.families.bevfusion.grid import cells, depth_count
from qat.families.bevfusion.manifest import check_pipeline
from qat.families.bevfusion.pooling.cpu import PatternCache, pool
from qat.families.flow import Flow
from qat.plan import BATCH, Op, Part, Plan, Runner, Step, Tensor

MATRICES = ("camera_intrinsics", "camera2lidar", "img_aug_matrix", "lidar_aug_matrix")
GEOMETRY = ("image_size", "feature_size", "xbound", "ybound", "zbound", "dbound")
HOT = 0.1  # heat above which a cell belongs to an object


def plan_of(settings: Mapping[str, Any]) -> Plan:
    """The plan of a manifest's `pipeline` section."""
    cameras, (height, width) = len(settings["cameras"]), settings["image"]["size"]
    view = settings["vtransform"]
    rows, columns = view["feature_size"]
    nx, ny, nz = (cells(view[name]) for name in ("xbound", "ybound", "zbound"))
    images = ("img", "depth") if settings["depth_input"] else ("img",)
    grid = (BATCH, view["out_channels"] * nz, nx, ny)
    tensors = {
        "img": Tensor((BATCH, cameras, 3, height, width)),
        "depth": Tensor((BATCH, cameras, 1, height, width)),
        **{name: Tensor((BATCH, cameras, 4, 4)) for name in MATRICES[:3]},
        MATRICES[3]: Tensor((BATCH, 4, 4)),
        "camera_feature": Tensor((None, rows, columns, view["out_channels"])),
        "camera_depth_weights": Tensor((None, depth_count(view["dbound"]), rows, columns)),
        "pattern": Tensor((), "object"),
        "feat_in": Tensor(grid),
    }
    steps: list[Step] = [
        Part(
            "camera.backbone",
            {name: name for name in images},
            ("camera_feature", "camera_depth_weights"),
            scope="camera",
        ),
        Op("pattern", MATRICES, ("pattern",)),
        Op("pooling", ("camera_feature", "camera_depth_weights", "pattern"), ("feat_in",)),
    ]
    last = "feat_in"
    reported = {name: (name,) for name in ("camera_feature", "camera_depth_weights", "feat_in")}
    if view["downsample"] > 1:
        last = "feat_out"
        steps.append(Part("camera.vtransform", {"feat_in": "feat_in"}, ("feat_out",), scope="vtransform"))
        tensors["feat_out"] = Tensor((BATCH, grid[1], None, None))
        reported["feat_out"] = ("feat_out",)
    inputs = (*images, *MATRICES)
    if settings.get("branch") is not None:  # older manifests lack it
        return Plan(inputs, tuple(steps), (last,), tensors, reported, {"bev": (last,)}, boxes=False)
    maps = tuple(settings["head_maps"])
    steps.append(Part("fuser", {"camera": last}, ("middle",), scope="decoder"))
    steps.append(Part("head.bbox", {"middle": "middle"}, maps, scope="head"))
    tensors |= {name: Tensor((BATCH, None, None, None)) for name in ("middle", *maps)}
    return Plan(
        inputs,
        tuple(steps),
        maps,
        tensors,
        {**reported, "middle": ("middle",), "heads": maps},
        {"bev": ("middle",), "heads": maps},
    )


class BEVFusion(Flow):
    """The host's side of a camera detector."""

    words = {  # noqa: RUF012
        "camera_depth_weights": "depth weights",
        "feat_in": "BEV, pooled",
        "feat_out": "BEV, downsampled",
        "middle": "decoder",
    }
    state_names = ("encoders.", "decoder.", "heads.", "backbone.", "neck.", "vtransform.")
    geometry_step = "pattern"
    without_boxes = "a camera branch, which computes BEV features but no boxes"

    def __init__(self, settings: Mapping[str, Any], threads: int = 0, source: str = "pipeline") -> None:
        super().__init__(settings, threads, source)
        self.plan = plan_of(settings)
        self.cameras: list[str] = list(settings["cameras"])
        self.classes = list(settings["classes"])
        image = self._image = self.image = settings["image"]
        native = tuple(image["native"]) if image.get("native") is not None else None
        self._resize_crop = ResizeCrop(tuple(image["size"]), image["resize"], image["bottom"], native)
        self.patterns = PatternCache(*(settings["vtransform"][name] for name in GEOMETRY))
        self._grid: np.ndarray | None = None  # the latest pooled grid, if no caller holds it

    @classmethod
    def check(cls, path: str | Path, settings: object, fix: str) -> None:
        """As `Flow.check`."""
        check_pipeline(path, settings, fix)

    def share(self, other: Any) -> None:
        """Takes the other's cache of pooling patterns."""
        self.patterns = other.patterns

    @property
    def rebuilds(self) -> int:  # type: ignore[override]
        """The number of pooling patterns computed."""
        return self.patterns.rebuilds

    def ops(self) -> Mapping[str, Runner]:
        """The pooling pattern of the cameras, and the pooling itself."""
        return {"pattern": self._pattern, "pooling": self._pooling}

    def _pattern(self, given: Mapping[str, np.ndarray]) -> dict[str, Any]:
        return {"pattern": self.patterns.get(*(given[name][0] for name in MATRICES))}

    def _pooling(self, given: Mapping[str, Any]) -> dict[str, np.ndarray]:
        out = self._grid if self.keep_buffers else None
        tensors = given["camera_depth_weights"], given["camera_feature"]
        grid = pool(given["pattern"], *tensors, self.threads, out)
        if self.keep_buffers:
            self._grid = grid
        return {"feat_in": grid}

    def feeds(self, frames: Sequence[Any]) -> dict[str, np.ndarray]:
        """As `Flow.feeds`, of `qat.core.frame.SampleTensors`."""
        if len(frames) == 1:  # no copy
            return {name: getattr(frames[0], name)[None] for name in self.plan.inputs}
        return {name: np.stack([getattr(frame, name) for frame in frames]) for name in self.plan.inputs}

    def prepare(self, *raw: Any) -> FrameArrays:
        """One set of pictures.

        Args:
            raw: images: uint8[h,w,3] RGB, native size, one for each of `cameras` in their order. Where the manifest knows the
                native size, pictures with another size and the same aspect ratio are resized to the same place. points:
                float32[M,≥3] of x, y, z in the lidar frame in metres: the keyframe's and, if the model was trained so, earlier
                sweeps' moved into it; not used by a model without depth input. calibration: a `Calibration` of the same cameras.

        Raises:
            UserError: not as many images or matrices as cameras, or images of another dtype, shape or native size.
        """
        images, points, calibration = raw
        self._check_raw(images, calibration)
        count, cfg = len(self.cameras), self._image
        img = np.stack([normalize(self._resize_crop.apply(image), cfg["mean"], cfg["std"]) for image in images])
        matrices = np.stack([self._resize_crop.matrix(image.shape[1], image.shape[0]) for image in images])
        no_augmentation = np.eye(4, dtype=np.float32)
        depth = np.zeros((count, 1, *cfg["size"]), np.float32)
        self.prepare_ms = {}
        if self.settings["depth_input"]:
            begin = time.perf_counter()
            if limits := self.settings["points"]["range"]:
                points = points[within(points, limits)]
            depth = rasterize_depth(points, calibration.lidar2image, matrices, no_augmentation, cfg["size"])
            self.prepare_ms["depth"] = (time.perf_counter() - begin) * 1e3
        return FrameArrays(
            "pictures",
            img,
            depth,
            calibration.camera_intrinsics.astype(np.float32),
            calibration.camera2lidar.astype(np.float32),
            matrices,
            no_augmentation,
        )

    def _check_raw(self, images: Sequence[np.ndarray], calibration: Calibration) -> None:
        for what, found in (
            ("images", len(images)),
            ("camera_intrinsics", len(calibration.camera_intrinsics)),
            ("camera2lidar", len(calibration.camera2lidar)),
        ):
            if found != len(self.cameras):
                raise UserError(
                    f"pipeline: {what}: found {found}, expected {len(self.cameras)}: {', '.join(self.cameras)}"
                )
        for name, image in zip(self.cameras, images, strict=True):
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                shape = ",".join(map(str, image.shape))
                raise UserError(f"pipeline: {name}: found {image.dtype}[{shape}], expected uint8[h,w,3] in RGB")
            try:
                self._resize_crop.factor(image.shape[1], image.shape[0])
            except PictureSizeError as error:
                raise PictureSizeError(f"pipeline: {name}: {error}") from None

    def decode(self, tensors: Mapping[str, np.ndarray]) -> Detections:
        """Boxes from the head's maps."""
        return decode(maps_from_tensors({name: tensors[name] for name in self.plan.outputs}), self.settings["head"])

    def objects(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray] | None:
        """Which values of the head's maps are in a cell where the heat of any class of the task is over HOT."""
        if not self.plan.boxes:
            return None
        found = {}
        for name in self.plan.outputs:
            heat = tensors[f"heatmap_{name.rpartition('_')[2]}"]
            cells_of = heat.max(axis=1, keepdims=True) > np.log(HOT / (1 - HOT))
            found[name] = np.broadcast_to(cells_of, tensors[name].shape)
        return found

    def check_frame(self, frame: Any, token: str) -> None:
        """As `Flow.check_frame`."""
        check_frame(self.settings, frame, token)

    def made_frame(self, seed: int, noise: bool = False) -> FrameArrays:
        """As `Flow.made_frame`."""
        return (random_frame if noise else made_frame)(self.settings, seed)

    def raw_frames(self, count: int, seed: int = 0) -> list[Any]:
        """As `Flow.raw_frames`."""
        from qat.families.bevfusion.inputs import made_up

        return list(made_up(self.settings, count, seed))

    def recorded(self, root: Path, split: str, version: str | None, count: int | None) -> list[Any]:
        """Keyframes of a nuScenes-format data set."""
        from qat.families.bevfusion.inputs import recorded

        return list(recorded(self.settings, root, split, version, count))


FLOW = BEVFusion
