"""The compiled loops of voxelization. Imported on first use: importing numba takes half a second."""

from __future__ import annotations

import numba
import numpy as np

# Fibonacci hashing: 2^64 over the golden ratio spreads neighbouring cells over the table.
SPREAD = np.uint64(0x9E3779B97F4A7C15)


@numba.njit(cache=True, nogil=True, error_model="numpy")
def cells_of(points: np.ndarray, size: np.ndarray, low: np.ndarray, grid: np.ndarray, cells: np.ndarray) -> None:
    """Writes each point's cell (z, y, x) into int32[N,3]; −1 three times for what lies outside or is NaN.

    points [N,≥3], size and low [3] (x, y, z) of the same dtype, in which floor((p − low) / size) is computed, as in mmcv.
    """
    for i in range(len(points)):
        inside = True
        for axis in range(3):
            cell = np.floor((points[i, axis] - low[axis]) / size[axis])
            if cell >= 0 and cell < grid[axis]:  # false for NaN
                cells[i, 2 - axis] = int(cell)
            else:
                inside = False
        if not inside:
            cells[i] = -1


@numba.njit(cache=True, nogil=True, error_model="numpy")
def fill(
    points: np.ndarray,
    cells: np.ndarray,
    grid: np.ndarray,
    voxels: np.ndarray,
    coords: np.ndarray,
    counts: np.ndarray,
) -> int:
    """Puts points into voxels in their order and returns how many voxels there are.

    voxels [V,P,C], coords int32[V,3] and counts int32[V] come zeroed. A voxel keeps its first P points, and the first V cells
    that points fall into become voxels. Cells are looked up in a hash table (open addressing), so a grid of any size costs what
    its points cost.
    """
    most, room = voxels.shape[0], voxels.shape[1]
    bits = 4
    while (1 << bits) < 2 * min(len(points), most):
        bits += 1
    mask = (1 << bits) - 1
    keys = np.full(1 << bits, -1, np.int64)
    slots = np.empty(1 << bits, np.int32)
    total = 0
    for i in range(len(points)):
        if cells[i, 0] < 0:
            continue
        key = (np.int64(cells[i, 0]) * grid[1] + cells[i, 1]) * grid[0] + cells[i, 2]
        at = np.int64((np.uint64(key) * SPREAD) >> np.uint64(64 - bits))
        while keys[at] != key and keys[at] >= 0:
            at = (at + 1) & mask
        if keys[at] < 0:
            if total == most:
                continue
            keys[at] = key
            slots[at] = total
            coords[total] = cells[i]
            total += 1
        voxel = slots[at]
        count = counts[voxel]
        if count < room:
            voxels[voxel, count] = points[i]
            counts[voxel] = count + 1
    return total
