"""The compiled loops over points. Imported on first use: importing numba takes half a second.

Coordinates come as three arrays, so that LLVM computes eight or sixteen distances at once. A squared distance is
(dx² + dy²) + dz² in float32 everywhere, traced graphs included: indices do not depend on which form computed them.
"""

from __future__ import annotations

import numba
import numpy as np

BLOCK = 256  # points whose distances are computed before one asks which are near


@numba.njit(cache=True, nogil=True, error_model="numpy")
def furthest(x: np.ndarray, y: np.ndarray, z: np.ndarray, picked: np.ndarray) -> None:
    """Writes indices into int32[M]: point 0, then each time the point furthest from those picked, of equals the first."""
    total = len(x)
    nearest = np.full(total, 1e10, np.float32)
    # Squared distances are not negative, and such floats sort as their bits do; LLVM has a vector maximum of integers alone.
    bits = nearest.view(np.int32)
    last = 0
    for i in range(len(picked)):
        picked[i] = last
        at_x, at_y, at_z = x[last], y[last], z[last]
        for k in range(total):
            dx, dy, dz = x[k] - at_x, y[k] - at_y, z[k] - at_z
            distance = dx * dx + dy * dy + dz * dz
            nearest[k] = distance if distance < nearest[k] else nearest[k]
        last = first_greatest(bits)


@numba.njit(cache=True, nogil=True, error_model="numpy")
def furthest_of_distances(distances: np.ndarray, picked: np.ndarray) -> None:
    """`furthest` by a table of distances float32[N,N]."""
    nearest = np.full(len(distances), 1e10, np.float32)
    last = 0
    for i in range(len(picked)):
        picked[i] = last
        row = distances[last]
        best = np.float32(-1)
        for k in range(len(nearest)):
            nearest[k] = row[k] if row[k] < nearest[k] else nearest[k]
            if nearest[k] > best:
                best = nearest[k]
                last = k


@numba.njit(cache=True, nogil=True, error_model="numpy")
def first_greatest(bits: np.ndarray) -> int:
    best = bits[0]
    for k in range(len(bits)):
        best = max(best, bits[k])
    for k in range(len(bits)):
        if bits[k] == best:
            return k
    return 0


@numba.njit(cache=True, nogil=True, error_model="numpy")
def balls(
    centres: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    z: np.ndarray,
    low: np.float32,
    high: np.float32,
    near: np.ndarray,
) -> None:
    """Writes into int32[M,S] the first S points whose squared distance d from each centre is 0 or has low ≤ d < high.

    Where there are fewer, the first is repeated; where there is none, 0 stands.
    """
    above = max(np.int32(1), np.float32(high).view(np.int32))
    total, most = len(x), near.shape[1]
    distances = np.empty(BLOCK, np.float32)
    bits = distances.view(np.int32)
    for i in range(len(centres)):
        at_x, at_y, at_z = centres[i]
        count = 0
        for start in range(0, total, BLOCK):
            xs, ys, zs = x[start : start + BLOCK], y[start : start + BLOCK], z[start : start + BLOCK]
            size = len(xs)
            for k in range(size):
                dx, dy, dz = at_x - xs[k], at_y - ys[k], at_z - zs[k]
                distances[k] = dx * dx + dy * dy + dz * dz
            least = bits[0]
            for k in range(size):
                least = min(least, bits[k])
            if least >= above:
                continue
            for k in range(size):
                if distances[k] == 0 or (distances[k] >= low and distances[k] < high):
                    near[i, count] = start + k
                    count += 1
                    if count == most:
                        break
            if count == most:
                break
        near[i, count:] = near[i, 0] if count else 0


@numba.njit(cache=True, nogil=True, error_model="numpy")
def nearest(centres: np.ndarray, points: np.ndarray, distances: np.ndarray, indices: np.ndarray) -> None:
    """Writes squared distances float32[M,K] and indices int32[M,K] of the K points nearest to each centre, nearest first.

    centres float32[M,3], points float32[N,3]; of equals the first. Where N < K the rest is 1e10 and 0.
    """
    most = indices.shape[1]
    for i in range(len(centres)):
        best, at = distances[i], indices[i]
        best[:] = 1e10
        at[:] = 0
        for k in range(len(points)):
            dx, dy, dz = centres[i, 0] - points[k, 0], centres[i, 1] - points[k, 1], centres[i, 2] - points[k, 2]
            distance = dx * dx + dy * dy + dz * dz
            if not distance < best[most - 1]:
                continue
            slot = most - 1
            while slot > 0 and distance < best[slot - 1]:
                best[slot], at[slot] = best[slot - 1], at[slot - 1]
                slot -= 1
            best[slot], at[slot] = distance, k


@numba.njit(cache=True, nogil=True, error_model="numpy")
def inside(points: np.ndarray, boxes: np.ndarray, out: np.ndarray) -> None:
    """Writes into bool[M,T] which points float32[M,3] lie in which boxes float32[T,7] of x, y, z of the bottom's middle, sizes
    along the box's own x, y, z, and yaw. A side face is outside, the bottom and the top are inside, as in mmcv."""
    half = np.float32(0.5)
    for t in range(len(boxes)):
        x, y = boxes[t, 0], boxes[t, 1]
        half_x, half_y, half_z = boxes[t, 3] * half, boxes[t, 4] * half, boxes[t, 5] * half
        z = boxes[t, 2] + half_z
        cos, sin = np.cos(boxes[t, 6]), np.sin(boxes[t, 6])
        for i in range(len(points)):
            dx, dy = points[i, 0] - x, points[i, 1] - y
            along, across = dx * cos + dy * sin, dy * cos - dx * sin
            out[i, t] = (abs(points[i, 2] - z) <= half_z) & (abs(along) < half_x) & (abs(across) < half_y)
