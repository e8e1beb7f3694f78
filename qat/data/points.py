"""Lidar files: raw float32 values, `load_dim` per point. The file does not record that number, so the values are checked."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from qat.core.errors import UserError
from qat.core.kinds import signature_of

FARTHEST, NEAREST = 2_000.0, 1e-30  # metres; other values, except zero, are not coordinates in a sensor's frame
WRONG_SHARE = 0.01
WIDTHS = range(3, 11)  # values per point in lidar files
FEWEST, LOOKED_AT = 1_000, 1 << 15  # number of points used to judge columns, and of values checked
DIFFERENT, ALIKE, CLEARLY_LESS = 0.1, 0.98, 0.75
ZIP = b"PK\x03\x04"


def _columns_differ(values: np.ndarray, width: int) -> float:
    """How much the columns of values, `width` in a row, differ in mean and spread, in units of the total variance. The right
    width has the largest difference; for others it is near 0, because each column is a mixture of all."""
    columns = values[: len(values) // width * width].reshape(-1, width)
    spread = columns.std(0)
    return float((columns.mean(0).var() + spread.var()) / max(float(values.var()), 1e-12))


def likelier_width(values: np.ndarray, width: int) -> int | None:
    """The number of values per point according to the columns, if it is not `width`."""
    if len(values) < FEWEST * width:
        return None
    some = values[:LOOKED_AT].astype(np.float64)
    some = np.nan_to_num(some, nan=0.0, posinf=0.0, neginf=0.0).clip(-FARTHEST, FARTHEST)
    own = _columns_differ(some, width)
    found = {w: _columns_differ(some, w) for w in WIDTHS if w != width}
    most = max(found.values())
    # Mixed columns cannot differ more than their sources, so no other width exceeds the right one.
    if most > DIFFERENT and own < CLEARLY_LESS * most:
        return next(w for w in found if found[w] > ALIKE * most)
    # Two points at a time, or three: the columns repeat themselves.
    parts = (w for w in found if w < width and width % w == 0)
    return next((w for w in parts if own > DIFFERENT and found[w] > ALIKE * own), None)


def read_points(path: Path, load_dim: int) -> np.ndarray:
    """A lidar file, float32[M,5].

    Raises:
        UserError: no such file; another format, by its first bytes; not a whole number of points; values that are not
            coordinates (another type, or another number per point); mostly NaN or infinity. (Single points with NaN, which
            lidars return without an echo, are left out.)
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; the data set is incomplete, fetch the rest of it") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}; fetch it again") from None
    expected = f"expected points of load_dim {load_dim} float32 values each"
    kind = "a zip archive, such as NumPy's .npz" if content.startswith(ZIP) else signature_of(content[:512])
    if kind is not None:
        raise UserError(f"{path}: found {kind}, {expected}, as raw bytes; write its points so, or fetch the file again")
    fix = "fetch it again, or fix load_dim in the config"
    if not content or len(content) % (4 * load_dim):
        raise UserError(f"{path}: found {len(content):,} bytes, {expected}; {fix}")
    values = np.frombuffer(content, "<f4").astype(np.float32, copy=False)
    points = values.reshape(-1, load_dim)[:, :5]
    finite = np.isfinite(points).all(1)
    if 2 * finite.sum() < len(points):
        raise UserError(
            f"{path}: found NaN or infinity in {len(points) - finite.sum():,} of {len(points):,} points, expected float32 points "
            f"of load_dim {load_dim}; {fix}"
        )
    points = points[finite]
    size = np.abs(points[:, :3])
    wrong = (size > FARTHEST) | ((size < NEAREST) & (size > 0))
    if wrong.mean() > WRONG_SHARE:
        some = points[:, :3][wrong][0]
        raise UserError(
            f"{path}: found {wrong.mean():.0%} of x, y, z beyond {FARTHEST:,.0f} m or next to nothing, such as {some:.3g}, {expected} in "
            "the sensor's frame; write float32 in metres (not float64 or integers), or fix load_dim in the config"
        )
    if (other := likelier_width(values, load_dim)) is not None:
        raise UserError(
            f"{path}: found points of {other} values each, as its columns say, {expected}; fix load_dim in the config, or write "
            "x, y, z, intensity and ring"
        )
    return points
