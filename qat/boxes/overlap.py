"""Intersection over union and greedy suppression of rotated and upright boxes seen from above, in numpy.

A turned box is (x, y, width, height, angle): its middle, its sizes along its own axes, and the angle in radians by which its own
x axis is turned from x towards y. (In a picture, where y points down, that is clockwise.) Areas are computed in float64.
"""

from __future__ import annotations

import numpy as np

# Boxes with a smaller area overlap nothing, as in mmcv and detectron2.
LEAST_AREA = 1e-14


def rotated_corners(boxes: np.ndarray) -> np.ndarray:
    """Corners in order around each box: float64[K,4,2]. boxes: float[K,≥5]."""
    x, y, width, height, angle = boxes[:, :5].astype(np.float64).T
    along = np.stack([np.cos(angle), np.sin(angle)], -1) * (width / 2)[:, None]
    across = np.stack([-np.sin(angle), np.cos(angle)], -1) * (height / 2)[:, None]
    middle = np.stack([x, y], -1)
    return np.stack(
        [middle - along - across, middle + along - across, middle + along + across, middle - along + across], 1
    )


def box_iou_rotated(a: np.ndarray, b: np.ndarray, of_first: bool = False, aligned: bool = False) -> np.ndarray:
    """Intersection over union of every box of `a` with every box of `b`: float64[N,M]; `aligned`: of pairs in order, float64[N].

    a: float[N,≥5], b: float[M,≥5]. of_first: the intersection over the area of a's box ("iof").
    """
    from qat.boxes._nms_kernel import intersection_areas

    area_a, area_b = _areas(a), _areas(b)
    if aligned:
        common = intersection_areas(rotated_corners(a), rotated_corners(b), True)[:, 0]
    else:
        common = intersection_areas(rotated_corners(a), rotated_corners(b), False)
        area_a, area_b = area_a[:, None], area_b[None]
    whole = area_a + 0 * area_b if of_first else area_a + area_b - common
    real = (area_a >= LEAST_AREA) & (area_b >= LEAST_AREA)
    return np.divide(common, whole, out=np.zeros_like(common), where=real)


def common_areas(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The area that every box of `a` shares with every box of `b`: float64[N,M]. a: float[N,≥5], b: float[M,≥5]."""
    iou = box_iou_rotated(a, b)
    return iou * (_areas(a)[:, None] + _areas(b)[None]) / (1 + iou)


def nms_rotated(boxes: np.ndarray, scores: np.ndarray, threshold: float) -> np.ndarray:
    """Greedy suppression of boxes whose intersection over union with a better kept box is above `threshold`.

    boxes: float[K,≥5], scores: float[K]; equal scores in order of index. Returns the kept indices, best first: int64.
    """
    from qat.boxes._nms_kernel import suppress

    order = np.argsort(-scores, kind="stable")
    areas = _areas(boxes)[order]
    # Empty boxes and boxes with NaN overlap nothing: an area of NaN never exceeds a threshold.
    return order[
        suppress(rotated_corners(boxes[order]), np.where(areas < LEAST_AREA, np.nan, areas), threshold, len(boxes))
    ]


def nms_upright(boxes: np.ndarray, scores: np.ndarray, threshold: float, offset: float = 0.0) -> np.ndarray:
    """`nms_rotated` for upright boxes float[K,≥4] of x1, y1, x2, y2. `offset` is added to each width and height (1 where corners
    are pixels). Computed in the boxes' own dtype."""
    from qat.boxes._nms_kernel import suppress_upright

    order = np.argsort(-scores, kind="stable")
    corners = np.ascontiguousarray(boxes[order, :4])
    return order[suppress_upright(corners, corners.dtype.type(threshold), corners.dtype.type(offset))]


def _areas(boxes: np.ndarray) -> np.ndarray:
    return boxes[:, 2].astype(np.float64) * boxes[:, 3]
