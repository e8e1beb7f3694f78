"""The operators that mmdet3d's models call: `mmcv._ext` where mmcv was not compiled, and the same as plain numpy functions.

`install()` before mmdet or mmdet3d is imported. Numpy, without torch: `voxels.voxelize`, `points.furthest_point_sample`,
`points.ball_query`, `points.nearest_points`, `points.points_in_boxes`, and `qat.boxes.overlap`'s `nms_rotated` and `box_iou_rotated`.
"""

from __future__ import annotations

from qat.families.mmdet3d.ops.stand_in import MissingOperatorError, install, which

__all__ = ["MissingOperatorError", "install", "which"]
