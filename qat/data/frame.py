"""One keyframe from a folder: six images, a lidar sweep and an info.json, as mmdetection3d's demo data has them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qat.core.errors import UserError
from qat.core.files import read_json
from qat.core.geometry import rasterize_depth
from qat.core.preprocess import load_image, normalize
from qat.data.dataset import CAMERAS, Sample
from qat.data.pipeline import read_pipeline


def load_frame(folder: str | Path, config: Mapping[str, Any]) -> Sample:
    """Reads the keyframe; boxes of classes that the config does not have are left out.

    info.json: `sample.images.<camera>` with img_path, cam2img [3,3] and lidar2cam [4,4]; `sample.lidar_points` with
    lidar_path, lidar2ego [4,4]; `sample.ego2global`; `sample.instances` with bbox_3d (x, y, z of the gravity centre,
    length, width, height, yaw anticlockwise from x: with the bottom's z the annotators' point counts do not come out) and bbox_label_3d into `categories`.

    Raises:
        UserError: a file or a key is missing.
    """
    folder = Path(folder)
    info = read_json(folder / "info.json")
    pipeline = read_pipeline(config)
    try:
        sample, categories = info["sample"], info["categories"]
        images, matrices = [], {"intrinsic": [], "camera2lidar": [], "lidar2image": [], "aug": []}  # type: ignore[var-annotated]
        for name in CAMERAS:
            record = sample["images"][name]
            image = load_image(folder / record["img_path"])
            intrinsic = np.eye(4)
            intrinsic[:3, :3] = record["cam2img"]
            lidar2camera = np.asarray(record["lidar2cam"], np.float64)
            images.append(pipeline.resize_crop.apply(image))
            matrices["intrinsic"].append(intrinsic)
            matrices["camera2lidar"].append(np.linalg.inv(lidar2camera))
            matrices["lidar2image"].append(intrinsic @ lidar2camera)
            matrices["aug"].append(pipeline.resize_crop.matrix(image.shape[1], image.shape[0]))
        lidar = sample["lidar_points"]
        points = np.fromfile(folder / lidar["lidar_path"], np.float32).reshape(-1, pipeline.load_dim)[:, :5].copy()
        points[:, 4] = 0
        names = {index: name for name, index in categories.items()}
        classes = list(config["object_classes"])
        boxes, labels = [], []
        for instance in sample["instances"]:
            category = names.get(instance["bbox_label_3d"])
            if category in classes:
                x, y, z, length, width, height, yaw = instance["bbox_3d"]
                vx, vy = np.nan_to_num(instance.get("velocity") or (0.0, 0.0))
                boxes.append([x, y, z, width, length, height, -yaw - np.pi / 2, vx, vy])
                labels.append(classes.index(category))
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{folder / 'info.json'}: {error} is missing; expected mmdetection3d's info of one sample"
        ) from None
    low_high = [argument for step, argument in pipeline.point_steps if step == "range"]
    for bounds in low_high:
        points = points[((points[:, :3] > bounds[:3]) & (points[:, :3] < bounds[3:])).all(1)]
    stacked = {name: np.stack(value).astype(np.float32) for name, value in matrices.items()}
    eye = np.eye(4, dtype=np.float32)
    return Sample(
        token=str(sample.get("token", folder.name)),
        img=np.stack([normalize(image, pipeline.mean, pipeline.std) for image in images]),
        depth=rasterize_depth(points, stacked["lidar2image"], stacked["aug"], eye, pipeline.resize_crop.final_dim),
        images=np.stack(images),
        camera_intrinsics=stacked["intrinsic"],
        camera2lidar=stacked["camera2lidar"],
        lidar2image=stacked["lidar2image"],
        img_aug_matrix=stacked["aug"],
        lidar_aug_matrix=eye,
        lidar2ego=np.asarray(lidar.get("lidar2ego", np.eye(4)), np.float32),
        ego2global=np.asarray(sample.get("ego2global", np.eye(4)), np.float64),
        points=points,
        gt_boxes=np.asarray(boxes, np.float32).reshape(-1, 9),
        gt_labels=np.asarray(labels, np.int64),
        gt_points=np.full(len(boxes), -1, np.int64),
        cameras=CAMERAS,
    )
