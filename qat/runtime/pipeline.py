"""The detector as one object: parts, BEV pooling and decode in their order."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from qat.boxes.centerhead import decode, maps_from_tensors
from qat.boxes.detections import Detections
from qat.core.errors import PictureSizeError, UserError
from qat.core.frame import FrameArrays, SampleTensors
from qat.core.geometry import rasterize_depth, within
from qat.core.manifest import load_manifest, pipeline_of
from qat.core.preprocess import ResizeCrop, normalize
from qat.engine import BACKENDS, Options, build
from qat.families.bevfusion.pooling.cpu import PatternCache, pool
from qat.runtime.engines import check_tensors, is_engines, load_engines, part_precisions


class PartRunner(Protocol):
    """Whatever computes one part: an `Engine`, or the PyTorch module that it came from."""

    def run(self, feeds: Mapping[str, np.ndarray], /) -> dict[str, np.ndarray]:
        """Input arrays by tensor name to output arrays by tensor name."""


@dataclass(frozen=True)
class Calibration:
    """Where the cameras are: float[N,4,4] each, in the order of the manifest's cameras.

    camera_intrinsics: camera frame to native pixels. camera2lidar: camera frame to the lidar frame at the moment of
    the points, in metres (on nuScenes: through both ego poses).
    """

    camera_intrinsics: np.ndarray
    camera2lidar: np.ndarray

    @property
    def lidar2image(self) -> np.ndarray:
        """Lidar frame to native pixels, float32[N,4,4]."""
        inverse = np.linalg.inv(self.camera2lidar.astype(np.float64))
        return (self.camera_intrinsics.astype(np.float64) @ inverse).astype(np.float32)


class Pipeline:
    """A camera BEV detector made of parts.

    timing_ms: milliseconds of each stage in the latest call: preprocess, depth, camera.backbone, pattern (near zero
        when the camera geometry is one of the latest few), pooling, camera.vtransform, fuser, head.bbox, decode.
    cameras, classes: their names, in the order of the inputs and of `Detections.labels`.
    """

    def __init__(
        self, parts: Mapping[str, PartRunner], settings: Mapping[str, Any], threads: int = 0, source: str = "pipeline"
    ) -> None:
        """Puts a detector together from runners.

        Args:
            parts: a runner for each of `qat.core.manifest.PARTS`; camera.vtransform may be left out. Of a camera branch
                alone, by its settings, there are no fuser and head.bbox: `forward` works, boxes are refused.
            settings: a manifest's `pipeline` section.
            threads: for BEV pooling, 0 for one on each core.
            source: where the parts came from, for messages.
        """
        self.parts = dict(parts)
        self._source = source
        self.settings = dict(settings)
        self.cameras: list[str] = list(settings["cameras"])
        self.classes: list[str] = list(settings["classes"])
        self.timing_ms: dict[str, float] = {}
        self._threads = threads
        self._grid: np.ndarray | None = None  # the latest pooled grid that nobody else has
        image, transform = settings["image"], settings["vtransform"]
        native = tuple(image["native"]) if image.get("native") is not None else None
        self._resize_crop = ResizeCrop(tuple(image["size"]), image["resize"], image["bottom"], native)
        names = ("image_size", "feature_size", "xbound", "ybound", "zbound", "dbound")
        self.patterns = PatternCache(*(transform[name] for name in names))

    @classmethod
    def load(
        cls,
        folder: str | Path,
        backend: str | None = None,
        precision: str | None = None,
        options: Options | None = None,
    ) -> Pipeline:
        """Loads a folder of built engines, or builds every part of an exported one; both are checked against their manifest.

        Args:
            folder: where `bevqat build` wrote engines, or export-camera the ONNX parts.
            backend: a backend of `qat.engine`. Of engines it is known: None, or the same.
            precision: None for the manifest's. An fp16 folder's graphs are FP32-typed, so "fp32" is right for it too.
            options: threads, engine cache and the like. Built engines run with what was noted when they were built, but for
                fields that differ from the default ones (`qat.runtime.engines.run_options`).

        Raises:
            UserError: the folder is incomplete or was changed, or its graphs are not of this precision; engines are
                another backend's or precision's, or were built by another version of it or for another device.
        """
        folder = Path(folder)
        if is_engines(folder):
            engines, manifest, options = load_engines(folder, backend, precision, options)
            return cls(engines, pipeline_of(folder, manifest), options.threads, str(folder))
        manifest = load_manifest(folder)
        if backend is None:
            raise UserError(
                f"{folder}: found ONNX parts, expected a backend for them too: one of {', '.join(BACKENDS)}"
            )
        parts = {}
        for name, wanted in part_precisions(folder, manifest, precision, backend).items():
            part = manifest["parts"][name]
            parts[name] = build(folder / part["file"], backend, wanted, options)
            check_tensors(part, parts[name], folder / part["file"])
        return cls(parts, manifest["pipeline"], options.threads if options else 0, str(folder))

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.timing_ms[stage] = (time.perf_counter() - begin) * 1e3

    def __call__(self, images: Sequence[np.ndarray], points: np.ndarray, calibration: Calibration) -> Detections:
        """Detects objects in one set of pictures.

        Args:
            images: uint8[h,w,3] RGB, native size, one for each of `cameras` in their order. Where the manifest knows the native
                size, pictures of another size and the same shape are resized to take the same place.
            points: float32[M,≥3] of x, y, z in the lidar frame in metres: the keyframe's and, if the model was
                trained so, earlier sweeps' moved into it. Not used by a model without depth input.
            calibration: of the same cameras.

        Raises:
            UserError: not as many images or matrices as cameras, or images of another dtype, shape or native size; or the parts are
                a camera branch alone, which gives no boxes.
        """
        self._need_boxes()
        self.timing_ms = {}
        with self._timed("preprocess"):
            frame = self._preprocess(images, points, calibration)
        return self._detect(frame)

    def detect_sample(self, sample: SampleTensors) -> Detections:
        """Detects objects in one preprocessed keyframe; raises as a call does."""
        self._need_boxes()
        self.timing_ms = {}
        return self._detect(sample)

    def forward(self, sample: SampleTensors) -> dict[str, np.ndarray]:
        """Every tensor between the parts for one preprocessed keyframe, by its name in the parts.

        camera_feature, camera_depth_weights, feat_in (the pooled BEV grid), feat_out, middle and the head's maps; of a
        camera branch alone, those up to feat_out.
        """
        self.timing_ms = {}
        return self._forward(sample)

    def decode(self, tensors: Mapping[str, np.ndarray]) -> Detections:
        """Boxes from the head's maps among `forward`'s tensors; raises as a call does."""
        self._need_boxes()
        with self._timed("decode"):
            maps = {name: tensors[name] for name in self.settings["head_maps"]}
            with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is told below, in one line
                # A sum is finite where all its terms are, but for terms whose sum is beyond float32.
                finite = all(np.isfinite(values.sum()) or np.isfinite(values).all() for values in maps.values())
            if not finite:
                first = next(name for name, values in tensors.items() if not np.isfinite(values).all())
                raise UserError(
                    f"{self._source}: {first}: found NaN or infinity, expected finite values; run `bevqat health` on the "
                    "checkpoint, and look at the images, points and calibration"
                )
            return decode(maps_from_tensors(maps), self.settings["head"])

    def _detect(self, sample: SampleTensors) -> Detections:
        tensors = self._forward(sample, self._grid)
        self._grid = tensors["feat_in"]
        return self.decode(tensors)

    @property
    def _branch_alone(self) -> bool:
        return self.settings.get("branch") is not None  # manifests of before the branch could be exported lack it

    def _need_boxes(self) -> None:
        if self._branch_alone:
            raise UserError(
                f"{self._source}: found the camera branch alone, which gives no boxes, expected a fuser and a head too; "
                "`Pipeline.forward` gives its tensors up to feat_out"
            )

    def _preprocess(self, images: Sequence[np.ndarray], points: np.ndarray, calibration: Calibration) -> FrameArrays:
        count = len(self.cameras)
        for what, found in (
            ("images", len(images)),
            ("camera_intrinsics", len(calibration.camera_intrinsics)),
            ("camera2lidar", len(calibration.camera2lidar)),
        ):
            if found != count:
                raise UserError(f"pipeline: {what}: found {found}, expected {count}: {', '.join(self.cameras)}")
        for name, image in zip(self.cameras, images, strict=True):
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                shape = ",".join(map(str, image.shape))
                raise UserError(f"pipeline: {name}: found {image.dtype}[{shape}], expected uint8[h,w,3] in RGB")
            try:
                self._resize_crop.factor(image.shape[1], image.shape[0])
            except PictureSizeError as error:
                raise PictureSizeError(f"pipeline: {name}: {error}") from None
        cfg = self.settings["image"]
        img = np.stack([normalize(self._resize_crop.apply(image), cfg["mean"], cfg["std"]) for image in images])
        matrices = np.stack([self._resize_crop.matrix(image.shape[1], image.shape[0]) for image in images])
        no_augmentation = np.eye(4, dtype=np.float32)
        depth = np.zeros((count, 1, *cfg["size"]), np.float32)
        if self.settings["depth_input"]:
            with self._timed("depth"):
                if limits := self.settings["points"]["range"]:
                    points = points[within(points, limits)]
                depth = rasterize_depth(points, calibration.lidar2image, matrices, no_augmentation, cfg["size"])
        return FrameArrays(
            "pictures",
            img,
            depth,
            calibration.camera_intrinsics.astype(np.float32),
            calibration.camera2lidar.astype(np.float32),
            matrices,
            no_augmentation,
        )

    def _run(self, part: str, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        with self._timed(part):
            return self.parts[part].run(feeds)

    def _forward(self, sample: SampleTensors, grid: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """grid: an earlier pooled grid to write into; None for a new one, which the caller may keep."""
        feeds = {"img": sample.img[None]}
        if self.settings["depth_input"]:
            feeds["depth"] = sample.depth[None]
        tensors = self._run("camera.backbone", feeds)
        with self._timed("pattern"):
            pattern = self.patterns.get(
                sample.camera_intrinsics, sample.camera2lidar, sample.img_aug_matrix, sample.lidar_aug_matrix
            )
        with self._timed("pooling"):
            weights, features = tensors["camera_depth_weights"], tensors["camera_feature"]
            tensors["feat_in"] = pool(pattern, weights, features, self._threads, grid)
        camera = tensors["feat_in"]
        if "camera.vtransform" in self.parts:
            tensors |= self._run("camera.vtransform", {"feat_in": camera})
            camera = tensors["feat_out"]
        if self._branch_alone:
            return tensors
        tensors |= self._run("fuser", {"camera": camera})
        return tensors | self._run("head.bbox", {"middle": tensors["middle"]})
