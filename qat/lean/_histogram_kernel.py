"""The compiled histogram of magnitudes. Imported on first use: importing numba takes half a second."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np

BLOCK = (
    4096  # number of values whose bins are computed before they are counted: the buffer stays in the first-level cache
)
LANES = 8  # number of counters per bin, used in turn, so that equal values in a row (a long tail) do not wait for one
WORTH_A_THREAD = 100_000  # values


@numba.njit(cache=True, nogil=True, error_model="numpy")
def count_bits(bits: np.ndarray, log2_range: int, log2_bins: int) -> tuple[np.ndarray, np.uint32]:
    """Counts float32 values by magnitude.

    Three short loops for each block, the first two of which the compiler turns into vector instructions: bins, largest
    magnitude and zeros, counting. A bin is the magnitude times a power of two, truncated: exact. NaN and infinity are beyond
    the range; their bits, which grow with the magnitude, are the largest.

    Args:
        bits: uint32[n], the values' bits.
        log2_range: the bins divide [0, 2**log2_range) evenly; −24 at least, so that a subnormal is in the first.
        log2_bins: of the number of bins.

    Returns:
        Counts int64[bins], without zeros and values beyond the range; the largest magnitude's bits.
    """
    bins = 1 << log2_bins
    beyond = np.float32(bins)
    scale = np.float32(2.0 ** (log2_bins - log2_range))
    values = bits.view(np.float32)
    counts = np.zeros((bins + 1) * LANES, np.uint32)  # a bin's lanes side by side: its count is in one cache line
    index = np.empty(BLOCK, np.uint32)
    largest = np.uint32(0)
    zeros = 0
    for start in range(0, len(bits), BLOCK):
        value_block = values[start : start + BLOCK]
        for i in range(len(value_block)):
            scaled = abs(value_block[i]) * scale
            index[i] = np.uint32(np.int32(scaled if scaled < beyond else beyond)) * np.uint32(LANES)
        bit_block = bits[start : start + BLOCK]
        zeros_here = np.uint32(0)
        for i in range(len(bit_block)):
            magnitude = np.uint32(bit_block[i] & np.uint32(0x7FFFFFFF))
            largest = max(largest, magnitude)
            zeros_here += np.uint32(magnitude == 0)
        zeros += zeros_here
        whole = len(bit_block) - len(bit_block) % LANES
        for i in range(0, whole, LANES):
            for lane in range(LANES):
                counts[np.uint64(index[i + lane]) + np.uint64(lane)] += np.uint32(1)
        for i in range(whole, len(bit_block)):
            counts[index[i]] += np.uint32(1)
    found = np.zeros(bins, np.int64)
    for i in range(bins):
        for lane in range(LANES):
            found[i] += counts[i * LANES + lane]
    found[0] -= zeros
    return found, largest


def count_magnitudes(values: np.ndarray, log2_range: int, log2_bins: int, threads: int) -> tuple[np.ndarray, float]:
    """`count_bits` of float32[n] in up to `threads` parts at once: counts int64[bins], largest magnitude.

    Counts are integers, so the result does not depend on the parts. (Plain threads, not numba's: those spin while they wait,
    like torch's, and if there are as many of both as cores, each takes the other's time.)
    """
    parts = np.array_split(values.view(np.uint32), max(1, min(threads, len(values) // WORTH_A_THREAD)))
    if len(parts) == 1:
        found = [count_bits(parts[0], log2_range, log2_bins)]
    else:
        with ThreadPoolExecutor(len(parts)) as pool:
            found = list(pool.map(lambda part: count_bits(part, log2_range, log2_bins), parts))
    largest = np.uint32(max(top for _, top in found))
    return np.asarray(sum(counts for counts, _ in found)), float(largest.view(np.float32))
