"""Choosing the range of a tensor from a histogram of its magnitudes.

The histogram's range is a power of two, doubled by merging pairs of bins when a larger value comes. So its bins do
not depend on the order of the frames, histograms of two processes merge exactly, and memory does not grow with the
number of frames. It lives on the tensor's own device.
"""

from __future__ import annotations

import math

import torch

from qat.core.errors import UserError

BINS = 4096
LEVELS = 128  # magnitudes that s8 can tell apart
METHODS = ("max", "percentile", "mse", "entropy")
SMALLEST_LOG2 = -24  # of the range of a tensor that has been zero so far


class HistogramCalibrator:
    """Collects |x| of one tensor over the calibration frames.

    Exact zeros are left out: every scale represents them exactly, and in a sparse tensor (a ReLU's output, a pooled
    BEV grid, a depth map) they would drown the values that the range is for.

    Args:
        name: of the tensor, for messages.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.counts: torch.Tensor | None = None
        self.log2_range = 0
        self.largest = 0.0

    def collect(self, x: torch.Tensor) -> None:
        """Adds a tensor of any shape.

        Raises:
            UserError: it holds NaN or infinity.
        """
        magnitude = x.detach().abs().flatten().float()
        largest = float(magnitude.max())
        if not math.isfinite(largest):
            raise UserError(
                f"calibration: {self.name}: found NaN or infinity in its values; look at the layers before it and at the input frame"
            )
        needed = math.ceil(math.log2(largest)) if largest > 0 else SMALLEST_LOG2
        needed = max(needed, SMALLEST_LOG2)
        if self.counts is None:
            self.counts = torch.zeros(BINS, dtype=torch.float64, device=x.device)
            self.log2_range = needed
        self.largest = max(self.largest, largest)
        self._widen(needed)
        present = magnitude[magnitude > 0]
        self.counts += torch.histc(present, BINS, 0.0, 2.0**self.log2_range).double()

    def _widen(self, log2_range: int) -> None:
        assert self.counts is not None
        while self.log2_range < log2_range:
            merged = self.counts.view(-1, 2).sum(1)
            self.counts = torch.cat([merged, torch.zeros_like(merged)])
            self.log2_range += 1

    def merge(self, other: HistogramCalibrator) -> None:
        """Adds what another process collected for the same tensor."""
        if other.counts is None:
            return
        if self.counts is None:
            self.counts, self.log2_range = other.counts.clone(), other.log2_range
        else:
            other._widen(self.log2_range)
            self._widen(other.log2_range)
            assert other.counts is not None
            self.counts = self.counts + other.counts  # collected in inference mode: not to be changed in place
        self.largest = max(self.largest, other.largest)

    def compute_amax(self, method: str, percentile: float = 99.99) -> float:
        """The magnitude that 127 stands for; 0 for a tensor that was always zero.

        Raises:
            ValueError: nothing was collected, or there is no such method.
        """
        if self.counts is None:
            raise ValueError(f"{self.name}: nothing was collected")
        if method not in METHODS:
            raise ValueError(f"method {method!r}: expected one of {', '.join(METHODS)}")
        if self.largest == 0.0 or method == "max":
            return self.largest
        width = 2.0**self.log2_range / BINS
        if method == "percentile":
            cumulative = self.counts.cumsum(0) / self.counts.sum()
            index = int(torch.searchsorted(cumulative, torch.tensor(percentile / 100.0, dtype=torch.float64)))
            amax = (min(index, BINS - 1) + 1) * width
        else:
            search = best_mse_bin if method == "mse" else best_entropy_bin
            amax = search(self.counts) * width
        return min(amax, self.largest)


def best_mse_bin(counts: torch.Tensor) -> int:
    """The number of bins to keep so that rounding costs the least squared error.

    Σ counts·(v − q(v))² over bin centres v, q rounding to amax/127 and saturating at amax, for every candidate amax
    at once.
    """
    last = int(counts.nonzero().max()) + 1
    centres = torch.arange(BINS, dtype=torch.float64, device=counts.device)[:last] + 0.5
    candidates = _candidates(last).to(counts.device)
    amax = candidates.double()[:, None]
    scale = amax / (LEVELS - 1)
    rounded = (centres / scale).round().clamp(max=LEVELS - 1) * scale
    error = ((rounded - centres) ** 2 * counts[:last]).sum(1)
    return int(candidates[error.argmin()])


def _candidates(last: int) -> torch.Tensor:
    """Numbers of bins to try: up to 256 of them, evenly from a twentieth of the range to all of it."""
    low = max(LEVELS if last > 2 * LEVELS else 1, last // 20)
    return torch.linspace(low, last, min(256, last - low + 1)).round().long().unique()


def best_entropy_bin(counts: torch.Tensor) -> int:
    """The number of bins to keep so that the quantized distribution is nearest the true one.

    Least Kullback-Leibler divergence between the clipped histogram P (what lies beyond is added to its last bin) and
    Q, its 128 levels spread back evenly over the bins that were not empty (Migacz, "8-bit inference with TensorRT",
    GTC 2017), for every candidate at once.
    """
    last = int(counts.nonzero().max()) + 1
    if last <= LEVELS:
        return last
    device = counts.device
    values = counts[:last]
    candidates = _candidates(last).to(device)
    index = torch.arange(last, device=device)
    inside = index < candidates[:, None]
    kept = values * inside
    total = values.sum()
    p = kept.clone()
    p.scatter_add_(1, candidates[:, None] - 1, (total - kept.sum(1))[:, None])
    level = (index * LEVELS // candidates[:, None]).clamp(max=LEVELS - 1)
    filled = ((values > 0) & inside).double()
    sums = torch.zeros(len(candidates), LEVELS, dtype=torch.float64, device=device).scatter_add_(1, level, kept)
    sizes = torch.zeros_like(sums).scatter_add_(1, level, filled)
    q = (sums / sizes.clamp(min=1)).gather(1, level) * filled
    p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
    eps = 1e-12
    divergence = torch.where(p > 0, p * ((p + eps) / (q + eps)).log(), torch.zeros_like(p)).sum(1)
    return int(candidates[divergence.argmin()])
