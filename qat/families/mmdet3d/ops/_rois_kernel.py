"""The compiled loops of RoI-aware pooling. Imported on first use: importing numba takes half a second."""

from __future__ import annotations

import numba
import numpy as np


@numba.njit(cache=True, nogil=True, error_model="numpy")
def collect(points: np.ndarray, rois: np.ndarray, inside: np.ndarray, held: np.ndarray) -> None:
    """Writes which points each cell of each box holds: int32[R,X,Y,Z,1+P], how many, then the first P.

    points float32[N,3]; rois float32[R,7] of x, y, z of the bottom's middle, sizes, yaw; inside bool[N,R]; held comes zeroed.
    """
    _, cells_x, cells_y, cells_z, room = held.shape
    for r in range(len(rois)):
        cos, sin = np.cos(rois[r, 6]), np.sin(rois[r, 6])
        half = np.float32(0.5)
        for i in range(len(points)):
            if not inside[i, r]:
                continue
            dx, dy, dz = points[i, 0] - rois[r, 0], points[i, 1] - rois[r, 1], points[i, 2] - rois[r, 2]
            along, across = dx * cos + dy * sin, dy * cos - dx * sin
            x = cell((along + rois[r, 3] * half) / (rois[r, 3] / np.float32(cells_x)), cells_x)
            y = cell((across + rois[r, 4] * half) / (rois[r, 4] / np.float32(cells_y)), cells_y)
            z = cell(dz / (rois[r, 5] / np.float32(cells_z)), cells_z)
            count = held[r, x, y, z, 0]
            if count < room - 1:
                held[r, x, y, z, count + 1] = i
                held[r, x, y, z, 0] = count + 1


@numba.njit(cache=True, nogil=True, error_model="numpy")
def cell(position: float, cells: int) -> int:
    return min(max(int(position), 0), cells - 1)


@numba.njit(cache=True, nogil=True, error_model="numpy")
def pool(features: np.ndarray, held: np.ndarray, mean: bool, pooled: np.ndarray, argmax: np.ndarray) -> None:
    """Writes each cell's greatest features (and whose they are, int32, −1 for nobody) or their mean into [R,X,Y,Z,C].

    features [N,C]; a cell without points stays as it is.
    """
    cells, room = held.size // held.shape[-1], held.shape[-1]
    channels = features.shape[1]
    held, pooled, argmax = held.reshape(cells, room), pooled.reshape(cells, channels), argmax.reshape(cells, channels)
    for v in range(cells):
        count = held[v, 0]
        for c in range(channels):
            argmax[v, c] = -1
            if mean:
                total = np.float32(0)
                for k in range(1, count + 1):
                    total += features[held[v, k], c]
                if count > 0:
                    pooled[v, c] = total / np.float32(count)
                continue
            best = np.float32(-np.inf)
            for k in range(1, count + 1):
                value = features[held[v, k], c]
                if value > best:
                    best = value
                    argmax[v, c] = held[v, k]
            if argmax[v, c] >= 0:
                pooled[v, c] = best
