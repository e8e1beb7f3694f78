"""The compiled loops of frustum geometry. Imported on first use: importing numba takes half a second."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba.core import types
from numba.extending import intrinsic


def _fused(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """a · b + c, rounded once, on any processor."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fma(*args)

    number = types.float32
    return number(number, number, number), generate


_fma: Any = intrinsic(_fused)


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _dot(matrix, row, x, y, z):
    """Sums in BLAS's order on processors with fused multiply-adds, so that points are bit-identical to its product's."""
    return _fma(matrix[row, 2], z, _fma(matrix[row, 1], y, matrix[row, 0] * x))


@numba.njit(cache=True, nogil=True, error_model="numpy")
def lift_points(
    frustum: np.ndarray, origin: np.ndarray, undo: np.ndarray, combine: np.ndarray, shift: np.ndarray, out: np.ndarray
) -> None:
    """One camera's frustum points [P,3] into out [P,3]: q = undo · (p − origin); combine · (q₀q₂, q₁q₂, q₂) + shift.

    All float32; undo and combine [3,3], origin and shift [3].
    """
    for i in range(len(frustum)):
        u, v, metres = frustum[i, 0] - origin[0], frustum[i, 1] - origin[1], frustum[i, 2] - origin[2]
        x, y, z = _dot(undo, 0, u, v, metres), _dot(undo, 1, u, v, metres), _dot(undo, 2, u, v, metres)
        x *= z
        y *= z
        for k in range(3):
            out[i, k] = _dot(combine, k, x, y, z) + shift[k]


@numba.njit(cache=True, nogil=True, error_model="numpy")
def cells_of_points(
    points: np.ndarray,
    low: np.ndarray,
    step: np.ndarray,
    shape: tuple[int, int, int],
    cells: np.ndarray,
    counts: np.ndarray,
) -> None:
    """Writes each point's cell (z·nx + x)·ny + y to cells int32[P], and the points per cell to counts int32[nz·nx·ny] (zeros).

    points float32[P,3]; shape (nz, nx, ny). The x cell is trunc((x − low[0]) / step[0]); −1 is outside the grid, where numbers
    that no int32 holds are too.
    """
    nz, nx, ny = shape
    for i in range(len(points)):
        x = (points[i, 0] - low[0]) / step[0]
        y = (points[i, 1] - low[1]) / step[1]
        z = (points[i, 2] - low[2]) / step[2]
        cells[i] = -1
        if x > -1 and x < nx and y > -1 and y < ny and z > -1 and z < nz:  # the range that trunc maps to 0 … n − 1
            cell = (np.int32(z) * nx + np.int32(x)) * ny + np.int32(y)
            cells[i] = cell
            counts[cell] += 1


@numba.njit(cache=True, nogil=True, error_model="numpy")
def sort_by_cell(
    cells: np.ndarray,
    row_ptr: np.ndarray,
    sizes: tuple[int, int, int],
    cell: np.ndarray,
    pixel: np.ndarray,
    depth: np.ndarray,
) -> None:
    """A stable counting sort of the points that have a cell, into cell, pixel and depth of a `PoolPattern`.

    cells: int32[cameras · bins · plane], −1 for a point to leave out, of sizes (cameras, bins, plane). row_ptr: int32[cells + 1],
    the start of each cell.
    """
    cameras, bins, plane = sizes
    place = row_ptr[:-1].copy()
    point = 0
    for camera in range(cameras):
        for _ in range(bins):
            for i in range(plane):
                at = cells[point]
                if at >= 0:
                    depth[place[at]] = point
                    pixel[place[at]] = camera * plane + i
                    place[at] += 1
                point += 1
    for at in range(len(place)):
        cell[row_ptr[at] : row_ptr[at + 1]] = at
