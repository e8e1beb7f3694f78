"""Random numbers whose stream numpy guarantees: PCG64's raw words. (Its distributions may change from one version to the next.)"""

from __future__ import annotations

import numpy as np


def words(stream: int, count: int, seed: int = 0) -> np.ndarray:
    """uint64[count] of a stream, the same on every machine."""
    return np.random.PCG64([seed, stream]).random_raw(count).astype("<u8")
