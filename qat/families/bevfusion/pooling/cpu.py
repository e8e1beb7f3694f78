"""BEV pooling on the CPU: a sparse·dense product whose pattern the camera geometry fixes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from qat.core.errors import UserError
from qat.families.bevfusion.pooling.geometry import (
    PoolPattern,
    create_frustum,
    frustum_to_lidar,
    geometry_hash,
    pooling_pattern,
)


def pool(
    pattern: PoolPattern,
    depth_weights: np.ndarray,
    features: np.ndarray,
    threads: int = 0,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Sums each BEV cell's depth-weighted features.

    Args:
        pattern: where each (pixel, depth bin) goes.
        depth_weights: float32[N,D,fH,fW].
        features: float32[N,fH,fW,C], channels-last.
        threads: 0 for all cores; the result does not depend on it.
        out: float32[1, C·nz, nx, ny], contiguous, to write into; an earlier call's result has a suitable address. New memory,
            which the system must clear first, costs about half as much as the sums.

    Returns:
        float32[1, C·nz, nx, ny], x first; `out` if given.

    Raises:
        UserError: the tensors' sizes differ from the pattern's, or `out` is not as described.
    """
    n, fh, fw, channels = features.shape
    if n * fh * fw != pattern.pixels or depth_weights.shape != (n, pattern.bins, fh, fw):
        raise UserError(
            f"BEV pooling: found depth weights {list(depth_weights.shape)} and features {list(features.shape)}, "
            f"expected [N,D,fH,fW] and [N,fH,fW,C] with N·fH·fW = {pattern.pixels} and D = {pattern.bins} as in the pattern"
        )
    # Imported here: reading a manifest should not load the compiled kernel.
    from qat.families.bevfusion.pooling._kernel import empty_grid, pool_cells

    nz, nx, ny = pattern.shape
    shape = (1, nz * channels, nx, ny)
    if out is None:
        out = empty_grid(shape)
    elif out.shape != shape or out.dtype != np.float32 or not out.flags.c_contiguous or not out.flags.writeable:
        raise UserError(
            f"BEV pooling: out: found {out.dtype}{list(out.shape)}{'' if out.flags.c_contiguous else ', strided'}"
            f"{'' if out.flags.writeable else ', read-only'}, expected writable contiguous float32{list(shape)}"
        )
    pool_cells(
        pattern.row_ptr,
        pattern.pixel,
        pattern.depth,
        np.ascontiguousarray(depth_weights, np.float32).reshape(-1),
        np.ascontiguousarray(features, np.float32).reshape(-1, channels),
        out.reshape(nz, channels, nx, ny),
        threads,
    )
    return out


class PatternCache:
    """Pooling patterns by camera geometry, the `size` most recently used ones."""

    def __init__(
        self,
        image_size: Sequence[int],
        feature_size: Sequence[int],
        xbound: Sequence[float],
        ybound: Sequence[float],
        zbound: Sequence[float],
        dbound: Sequence[float],
        size: int = 4,
    ) -> None:
        self._frustum = create_frustum(image_size, feature_size, dbound)
        self._bounds = (xbound, ybound, zbound)
        self._size = size
        self._patterns: OrderedDict[str, PoolPattern] = OrderedDict()
        self.rebuilds = 0

    def get(
        self,
        camera_intrinsics: np.ndarray,
        camera2lidar: np.ndarray,
        img_aug_matrix: np.ndarray,
        lidar_aug_matrix: np.ndarray,
    ) -> PoolPattern:
        """The pattern of these cameras; matrices float32[N,4,4] and [4,4]. `rebuilds` counts those computed."""
        matrices = (camera_intrinsics, camera2lidar, img_aug_matrix, lidar_aug_matrix)
        key = geometry_hash(*matrices)
        if key in self._patterns:
            self._patterns.move_to_end(key)
            return self._patterns[key]
        pattern = pooling_pattern(frustum_to_lidar(self._frustum, *matrices), *self._bounds)
        self.rebuilds += 1
        self._patterns[key] = pattern
        if len(self._patterns) > self._size:
            self._patterns.popitem(last=False)
        return pattern
