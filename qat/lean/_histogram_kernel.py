"""The compiled histogram of magnitudes. Imported on first use: importing numba takes half a second."""

from __future__ import annotations

import numba
import numpy as np

BLOCK = 4096  # values whose bins are computed before they are counted: the buffer stays in the first-level cache
LANES = 4  # histograms that take turns, so that equal values in a row do not wait for one counter


@numba.njit(parallel=True, cache=True, nogil=True, error_model="numpy")
def count_bits(bits: np.ndarray, log2_range: int, log2_bins: int, threads: int) -> tuple[np.ndarray, int]:
    """Counts float32 values by magnitude, from their bits alone.

    A float's bits without the sign, read as an integer, grow with its magnitude; mantissa (with its leading one) and
    exponent give the bin by a shift. So NaN and infinity are large magnitudes like others, nothing is rounded, and the
    counts, whole numbers, do not depend on the number of threads.

    Args:
        bits: uint32[n], the values' bits.
        log2_range: the bins divide [0, 2**log2_range) evenly; −24 at least, so that a subnormal is in the first.
        log2_bins: of the number of bins.
        threads: parts that the values are counted in.

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
    counts = np.zeros((threads, LANES, bins + 1), np.int64)
    largest = np.zeros(threads, np.uint32)
    for part in numba.prange(threads):
        index = np.empty(BLOCK, np.uint32)
        own = counts[part]
        top = np.uint32(0)
        stop = len(bits) * (part + 1) // threads
        for start in range(len(bits) * part // threads, stop, BLOCK):
            size = min(BLOCK, stop - start)
            for i in range(size):
                magnitude = bits[start + i] & np.uint32(0x7FFFFFFF)
                top = max(top, magnitude)
                mantissa = (magnitude & np.uint32(0x7FFFFF)) | np.uint32(0x800000)
                shift = full_shift - np.int32(magnitude >> np.uint32(23))
                shift = min(max(shift, least_shift), np.int32(31))
                index[i] = min(mantissa >> np.uint32(shift), left_out) if magnitude else left_out
            for i in range(0, size - LANES + 1, LANES):
                for lane in range(LANES):
                    own[lane, index[i + lane]] += 1
            for i in range(size - size % LANES, size):
                own[0, index[i]] += 1
        largest[part] = top
    return counts.sum(0).sum(0)[:bins], largest.max()


def count_magnitudes(values: np.ndarray, log2_range: int, log2_bins: int, threads: int) -> tuple[np.ndarray, float]:
    """`count_bits` of float32[n] on `threads` threads, or on as many as there are: (counts, largest magnitude)."""
    most = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]  # set when numba starts
    threads = min(threads, most)
    numba.set_num_threads(threads)
    counts, largest = count_bits(values.view(np.uint32), log2_range, log2_bins, threads)
    return counts, float(np.uint32(largest).view(np.float32))
