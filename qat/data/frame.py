"""Reads one keyframe from a folder: its images, a lidar sweep and an info.json, as in mmdetection3d's demo data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qat.boxes.geometry import box_yaw
from qat.core.errors import UserError
from qat.core.files import data_path, read_json
from qat.core.geometry import within
from qat.core.preprocess import load_image
from qat.data.points import read_points
from qat.data.reading import Reading, reading_for
from qat.data.sample import Keyframe, Sample, camera_matrices, prepare


def load_frame(folder: str | Path, config: Mapping[str, Any] | Reading) -> Sample:
    """Reads the keyframe; boxes of classes that the config does not have are left out. There are no earlier sweeps.

    info.json: `sample.images.<camera>` with img_path, cam2img [3,3] and lidar2cam [4,4]; `sample.lidar_points` with
    lidar_path, lidar2ego [4,4]; `sample.ego2global`; `sample.instances` with bbox_3d (x, y, z of the gravity centre,
    length, width, height, yaw anticlockwise from x; with the bottom's z the annotators' point counts would not match) and
    bbox_label_3d into `categories`.

    Raises:
        UserError: a file or a key is missing.
    """
    folder = Path(folder)
    info = read_json(folder / "info.json")
    reading = reading_for(config)
    pipeline = reading.pipeline
    try:
        sample, categories = info["sample"], info["categories"]
        images, intrinsics, camera2lidar = [], [], []
        cameras = reading.cameras
        for name in cameras:
            record = sample["images"][name]
            images.append(load_image(data_path(folder, record["img_path"], "info.json")))
            intrinsics.append(np.asarray(record["cam2img"], np.float64))
            camera2lidar.append(np.linalg.inv(np.asarray(record["lidar2cam"], np.float64)))
        lidar = sample["lidar_points"]
        points = read_points(data_path(folder, lidar["lidar_path"], "info.json"), pipeline.load_dim)
        points[:, 4] = 0
        names = {index: name for name, index in categories.items()}
        classes = reading.classes
        boxes, labels = [], []
        for instance in sample["instances"]:
            category = names.get(instance["bbox_label_3d"])
            if category in classes:
                x, y, z, length, width, height, yaw = instance["bbox_3d"]
                vx, vy = np.nan_to_num(instance.get("velocity") or (0.0, 0.0))
                boxes.append([x, y, z, width, length, height, box_yaw(yaw), vx, vy])
                labels.append(classes.index(category))
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{folder / 'info.json'}: {error} is missing; expected mmdetection3d's info of one sample"
        ) from None
    for step, bounds in pipeline.point_steps:
        if step == "range":
            points = points[within(points, bounds)]
    keyframe = Keyframe(
        token=str(sample.get("token", folder.name)),
        cameras=cameras,
        images=images,
        **camera_matrices(intrinsics, camera2lidar),
        points=points,
        lidar2ego=np.asarray(lidar.get("lidar2ego", np.eye(4)), np.float32),
        ego2global=np.asarray(sample.get("ego2global", np.eye(4)), np.float64),
        gt_boxes=np.asarray(boxes, np.float32).reshape(-1, 9),
        gt_labels=np.asarray(labels, np.int64),
        gt_points=np.full(len(boxes), -1, np.int64),
        scene="",
    )
    return prepare(keyframe, pipeline)
