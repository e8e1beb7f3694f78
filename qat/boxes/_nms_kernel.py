"""The compiled inner loops of NMS and of areas that rotated boxes share. Imported on first use: importing numba takes half a second."""

from __future__ import annotations

import numba
import numpy as np


@numba.njit(cache=True, nogil=True, error_model="numpy")
def intersection_area(a: np.ndarray, b: np.ndarray) -> float:
    """Area of the intersection of two rectangles, each float64[4,2] of corners in order: b's four sides cut a in turn.

    (Sutherland-Hodgman. A cut leaves at most 1.5 times the corners, whatever rounding does to the signs: 4, 6, 9, 13, 19.)
    """
    polygon = np.empty((20, 2))
    cut = np.empty((20, 2))
    polygon[:4] = a
    count = 4
    turn = (b[1, 0] - b[0, 0]) * (b[2, 1] - b[1, 1]) - (b[1, 1] - b[0, 1]) * (b[2, 0] - b[1, 0])
    sign = 1.0 if turn >= 0 else -1.0
    for k in range(4):
        x, y = b[k]
        dx, dy = b[(k + 1) % 4] - b[k]
        kept = 0
        for i in range(count):
            j = (i + 1) % count
            side_i = sign * (dx * (polygon[i, 1] - y) - dy * (polygon[i, 0] - x))
            side_j = sign * (dx * (polygon[j, 1] - y) - dy * (polygon[j, 0] - x))
            if side_i >= 0:
                cut[kept] = polygon[i]
                kept += 1
            if (side_i >= 0) != (side_j >= 0):
                cut[kept] = polygon[i] + (polygon[j] - polygon[i]) * (side_i / (side_i - side_j))
                kept += 1
        polygon, cut = cut, polygon
        count = kept
        if count < 3:
            return 0.0
    area = 0.0
    for i in range(count):
        j = (i + 1) % count
        area += polygon[i, 0] * polygon[j, 1] - polygon[i, 1] * polygon[j, 0]
    return abs(area) / 2


@numba.njit(cache=True, nogil=True, error_model="numpy")
def suppress(corners: np.ndarray, areas: np.ndarray, threshold: float, most: int) -> np.ndarray:
    """Indices, best first, of the rectangles float64[K,4,2] that no better kept one overlaps by more than `threshold`.

    Rectangles and their areas float64[K] are sorted best first; at most `most` are kept.
    """
    total = len(corners)
    alive = np.ones(total, np.bool_)
    radius = np.empty(total)
    centre = np.empty((total, 2))
    for i in range(total):
        centre[i] = (corners[i, 0] + corners[i, 2]) / 2
        radius[i] = np.hypot(corners[i, 0, 0] - centre[i, 0], corners[i, 0, 1] - centre[i, 1])
    keep = np.empty(min(total, most), np.int64)
    kept = 0
    for i in range(total):
        if not alive[i]:
            continue
        if kept == most:
            break
        keep[kept] = i
        kept += 1
        for j in range(i + 1, total):
            if not alive[j]:
                continue
            reach = radius[i] + radius[j]
            if (centre[i, 0] - centre[j, 0]) ** 2 + (centre[i, 1] - centre[j, 1]) ** 2 >= reach * reach:
                continue
            common = intersection_area(corners[i], corners[j])
            union = areas[i] + areas[j] - common
            if union > 0 and common / union > threshold:
                alive[j] = False
    return keep[:kept]


@numba.njit(cache=True, nogil=True, error_model="numpy")
def intersection_areas(a: np.ndarray, b: np.ndarray, aligned: bool) -> np.ndarray:
    """Areas that rectangles float64[N,4,2] and float64[M,4,2] share: float64[N,M], or of pairs in order, float64[N,1]."""
    out = np.zeros((len(a), 1 if aligned else len(b)))
    for i in range(len(a)):
        for j in range(out.shape[1]):
            other = b[i] if aligned else b[j]
            # Compares twice the distance of the centres with the sum of the diagonals, because most pairs are far apart.
            dx = a[i, 0, 0] + a[i, 2, 0] - other[0, 0] - other[2, 0]
            dy = a[i, 0, 1] + a[i, 2, 1] - other[0, 1] - other[2, 1]
            reach = np.hypot(a[i, 0, 0] - a[i, 2, 0], a[i, 0, 1] - a[i, 2, 1])
            reach += np.hypot(other[0, 0] - other[2, 0], other[0, 1] - other[2, 1])
            if dx * dx + dy * dy < reach * reach:
                out[i, j] = intersection_area(a[i], other)
    return out


@numba.njit(cache=True, nogil=True, error_model="numpy")
def suppress_upright(boxes: np.ndarray, threshold: float, offset: float) -> np.ndarray:
    """`suppress` for upright boxes [K,4] of x1, y1, x2, y2, best first; `offset` is added to each width and height."""
    total = len(boxes)
    alive = np.ones(total, np.bool_)
    keep = np.empty(total, np.int64)
    kept = 0
    for i in range(total):
        if not alive[i]:
            continue
        keep[kept] = i
        kept += 1
        area = (boxes[i, 2] - boxes[i, 0] + offset) * (boxes[i, 3] - boxes[i, 1] + offset)
        for j in range(i + 1, total):
            if not alive[j]:
                continue
            width = min(boxes[i, 2], boxes[j, 2]) - max(boxes[i, 0], boxes[j, 0]) + offset
            height = min(boxes[i, 3], boxes[j, 3]) - max(boxes[i, 1], boxes[j, 1]) + offset
            common = width * height if width > 0 and height > 0 else width * 0
            other = (boxes[j, 2] - boxes[j, 0] + offset) * (boxes[j, 3] - boxes[j, 1] + offset)
            if common / (area + other - common) > threshold:
                alive[j] = False
    return keep[:kept]
