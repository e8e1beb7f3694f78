"""The compiled histogram of magnitudes. Imported on first use: importing numba takes half a second."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np

BLOCK = 4096  # values whose bins are computed before they are counted: the buffer stays in the first-level cache
LANES = 16  # histograms that take turns, so that like values in a row (a tensor with a long tail) do not wait for one counter
WORTH_A_THREAD = 100_000  # values


@numba.njit(cache=True, nogil=True, error_model="numpy")
def count_bits(bits: np.ndarray, log2_range: int, log2_bins: int) -> tuple[np.ndarray, np.uint32]:
    """Counts float32 values by magnitude, from their bits alone.

    A float's bits without the sign, read as an integer, grow with its magnitude; mantissa (with its leading one) and
    exponent give the bin by a shift. So NaN and infinity are large magnitudes like others, and nothing is rounded.

    Args:
        bits: uint32[n], the values' bits.
        log2_range: the bins divide [0, 2**log2_range) evenly; −24 at least, so that a subnormal is in the first.
        log2_bins: of the number of bins.

    Returns:
        Counts int64[bins], without zeros and without what lies beyond the range; the largest magnitude's bits.
    """
    bins = 1 << log2_bins
    left_out = np.uint32(bins)
    # value = mantissa · 2^(exponent − 150), a bin is 2^(log2_range − log2_bins) wide
    full_shift = np.int32(150 + log2_range - log2_bins)
    least_shift = np.int32(
        23 - log2_bins
    )  # of the octave beyond the range: it, and those after it, give `bins` or more
    counts = np.zeros((LANES, bins + 1), np.int64)
    index = np.empty(BLOCK, np.uint32)
    largest = np.uint32(0)
    for start in range(0, len(bits), BLOCK):
        size = min(BLOCK, len(bits) - start)
        for i in range(size):
            magnitude = bits[start + i] & np.uint32(0x7FFFFFFF)
            largest = max(largest, magnitude)
            mantissa = (magnitude & np.uint32(0x7FFFFF)) | np.uint32(0x800000)
            shift = full_shift - np.int32(magnitude >> np.uint32(23))
            shift = min(max(shift, least_shift), np.int32(31))
            index[i] = min(mantissa >> np.uint32(shift), left_out) if magnitude else left_out
        for i in range(0, size - LANES + 1, LANES):
            for lane in range(LANES):
                counts[lane, index[i + lane]] += 1
        for i in range(size - size % LANES, size):
            counts[0, index[i]] += 1
    return counts.sum(0)[:bins], largest


def count_magnitudes(values: np.ndarray, log2_range: int, log2_bins: int, threads: int) -> tuple[np.ndarray, float]:
    """`count_bits` of float32[n] in up to `threads` parts at once: counts int64[bins], largest magnitude.

    Counts are whole numbers, so the result does not depend on the parts. (Plain threads, not numba's own: those wait
    for work by spinning, as torch's do, and where there are as many of both as cores each takes the other's time.)
    """
    parts = np.array_split(values.view(np.uint32), max(1, min(threads, len(values) // WORTH_A_THREAD)))
    if len(parts) == 1:
        found = [count_bits(parts[0], log2_range, log2_bins)]
    else:
        with ThreadPoolExecutor(len(parts)) as pool:
            found = list(pool.map(lambda part: count_bits(part, log2_range, log2_bins), parts))
    largest = np.uint32(max(top for _, top in found))
    return np.asarray(sum(counts for counts, _ in found)), float(largest.view(np.float32))
