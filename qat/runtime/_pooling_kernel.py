"""The compiled inner loop of BEV pooling. Imported on first use: importing numba takes half a second."""

from __future__ import annotations

import numba
import numpy as np


def set_threads(count: int) -> None:
    """Threads that `pool_rows` uses when called from this thread; 0, or more than there are, for all cores."""
    most = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]  # set when numba starts
    numba.set_num_threads(min(count, most) if count else most)


@numba.njit(parallel=True, cache=True, nogil=True, error_model="numpy")
def pool_rows(
    row_ptr: np.ndarray,
    pixel: np.ndarray,
    depth: np.ndarray,
    weights: np.ndarray,
    features: np.ndarray,
    out: np.ndarray,
) -> None:
    """out[z, c, x, y] = Σ weights[depth[p]] · features[pixel[p], c] over the entries p of cell (z·nx + x)·ny + y.

    A thread sums one row of cells, channels innermost (features are channels-last, so that this is one vector
    multiply-add), in a buffer that stays in its cache, and writes it out transposed. The entries of a cell are added
    in their order, so the result does not depend on the number of threads.
    """
    nz, channels, nx, ny = out.shape
    for row in numba.prange(nz * nx):
        sums = np.zeros((ny, channels), np.float32)
        for y in range(ny):
            cell = row * ny + y
            for p in range(row_ptr[cell], row_ptr[cell + 1]):
                weight = weights[depth[p]]
                source = pixel[p]
                for c in range(channels):
                    sums[y, c] += weight * features[source, c]
        z = row // nx
        x = row % nx
        for c in range(channels):
            for y in range(ny):
                out[z, c, x, y] = sums[y, c]
