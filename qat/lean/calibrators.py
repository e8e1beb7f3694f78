"""Chooses the range of a tensor from a histogram of its magnitudes.

The histogram's range is a power of two, doubled by merging pairs of bins if a larger value occurs. So its bins do not
depend on the order of the frames, histograms of two processes merge exactly, and memory does not grow with the number of
frames. It is on the tensor's device. On the CPU a compiled kernel counts (`_histogram_kernel`), elsewhere torch; both
return the same counts, on any number of threads.
"""

from __future__ import annotations

import math

import torch

from qat.core.errors import NotFiniteError

LOG2_BINS = 12
BINS = 2**LOG2_BINS
LEVELS = 128  # distinct magnitudes of s8
METHODS = ("max", "percentile", "mse", "entropy")
SMALLEST_LOG2 = -24  # log2 of a histogram's first range


class HistogramCalibrator:
    """Collects |x| of one tensor over the calibration frames.

    Exact zeros are left out: every scale represents them exactly, and in a sparse tensor (a ReLU's output, a pooled BEV
    grid, a depth map) they would outnumber the values that matter for the range.

    Args:
        name: of the tensor, for messages.
        by_channel: also record each channel's largest magnitude and its energy (dimension 1).
    """

    def __init__(self, name: str, by_channel: bool = False) -> None:
        self.name = name
        self.by_channel = by_channel
        self.channels: torch.Tensor | None = None  # [C], largest magnitudes
        self.squares: torch.Tensor | None = None  # float64[C], Σ x²
        self.values = 0  # of each channel
        self.counts: torch.Tensor | None = None  # float64[BINS], integers
        self.log2_range = SMALLEST_LOG2  # log2 of a power of two above every observed magnitude
        self.largest = 0.0
        self.least, self.most = 0.0, 0.0  # the smallest and the largest value, including zero

    def collect(self, x: torch.Tensor) -> None:
        """Adds a tensor of any shape, layout and floating type.

        Raises:
            NotFiniteError: it holds NaN or infinity.
        """
        values = _flat(x.detach().float())
        if self.counts is None and len(values):
            low, high = (float(end) for end in torch.aminmax(values))
            if math.isfinite(low) and math.isfinite(
                high
            ):  # a first guess, so that the first frame need not be counted twice
                self.log2_range = max(SMALLEST_LOG2, math.frexp(max(-low, high))[1])
        count = count_on_cpu if x.device.type == "cpu" else count_with_torch
        counts, largest = count(values, self.log2_range)
        if not math.isfinite(largest):
            bad = len(values) - int(values.isfinite().sum())
            raise NotFiniteError(
                f"calibration: {self.name}: found NaN or infinity in {bad} of {len(values)} values, expected finite ones"
            )
        if self.counts is None:
            self.counts = torch.zeros(BINS, dtype=torch.float64, device=x.device)
        if largest >= 2.0**self.log2_range:  # rare after the first frame: not worth a pass over every tensor
            self._widen(math.frexp(largest)[1])
            counts, _ = count(values, self.log2_range)
        self.largest = max(self.largest, largest)
        if len(values):
            low, high = (float(end) for end in torch.aminmax(values))
            self.least, self.most = min(self.least, low), max(self.most, high)
        self.counts = self.counts + counts
        if self.by_channel:
            apart = x.detach().float().transpose(0, 1).flatten(1)
            self._add_channels(apart.abs().amax(1), apart.square().sum(1, dtype=torch.float64), apart.shape[1])

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
            self.counts = self.counts + other.counts  # collected in inference mode: cannot be changed in place
        self.largest = max(self.largest, other.largest)
        self.least, self.most = min(self.least, other.least), max(self.most, other.most)
        if other.channels is not None and other.squares is not None:
            self._add_channels(other.channels, other.squares, other.values)

    def _add_channels(self, channels: torch.Tensor, squares: torch.Tensor, values: int) -> None:
        self.values += values
        if self.channels is None or self.squares is None:
            self.channels, self.squares = channels, squares
        else:
            self.channels = torch.maximum(self.channels, channels.to(self.channels.device))
            self.squares = self.squares + squares.to(self.squares.device)

    def compute_amax(self, method: str, percentile: float = 99.99) -> float:
        """The magnitude of code 127; 0 for a tensor that was always zero.

        Raises:
            ValueError: nothing was collected, or the method does not exist.
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


def _flat(x: torch.Tensor) -> torch.Tensor:
    """All values of a tensor as one dimension, in the order of memory: a channels-last tensor is not copied."""
    order = sorted(range(x.ndim), key=lambda d: x.stride()[d], reverse=True)
    return x.permute(order).reshape(-1)


def count_on_cpu(values: torch.Tensor, log2_range: int) -> tuple[torch.Tensor, float]:
    """Counts of the magnitudes of float32[n] in bins that divide [0, 2**log2_range) evenly, zeros left out, int64[BINS];
    and the largest magnitude, NaN or infinity if there is one. Counts are valid only if it is within the range."""
    from qat.lean._histogram_kernel import count_magnitudes

    counts, largest = count_magnitudes(values.numpy(), log2_range, LOG2_BINS, torch.get_num_threads())
    return torch.from_numpy(counts), largest


def count_with_torch(values: torch.Tensor, log2_range: int) -> tuple[torch.Tensor, float]:
    """Like `count_on_cpu`, on any device.

    (Not torch.histc, whose counts are float32: above 2²⁴ values in a bin it loses some.)
    """
    magnitude = values.abs()
    largest = float(magnitude.max()) if len(values) else 0.0
    if not largest < 2.0**log2_range:
        return torch.zeros(BINS, dtype=torch.int64, device=values.device), largest
    index = (magnitude * 2.0 ** (LOG2_BINS - log2_range)).int()  # exact except for the truncation: a power of two
    index.masked_fill_(magnitude == 0, BINS)
    return torch.bincount(index, minlength=BINS + 1)[:BINS], largest


def best_mse_bin(counts: torch.Tensor) -> int:
    """The number of bins to keep for the least squared error of rounding.

    Values are assumed to be spread evenly over their bin. (With values at the bins' centres, a step of a whole number of bins
    would seem better than it is.) Rounding to multiples of s = amax/127 that saturates at amax then costs
    ∫ v²f(v) dv − 2s·Σ_k G((k − ½)·s), k = 1…127, with G(e) = ∫_e (v − e)·f(v) dv: each boundary between two levels
    below a value reduces its error. This has 127 terms for a candidate, instead of one for each bin.
    """
    last = int(counts.nonzero().max()) + 1
    kept = counts[:last]
    beyond = kept.flip(0).cumsum(0).flip(0)  # from the bin's lower edge on
    gain = (beyond - kept / 2).flip(0).cumsum(0).flip(0)  # G at that edge
    table = torch.nn.functional.pad(torch.stack([gain, -beyond, kept / 2]), (0, 1))  # nothing beyond the last edge
    level = torch.arange(1, LEVELS, dtype=torch.float64, device=counts.device)

    def best(candidates: torch.Tensor) -> int:
        step = candidates.to(counts) / (LEVELS - 1)
        edge = ((level - 0.5) * step[:, None]).clamp_(max=last)
        inside = edge.frac()
        constant, linear, quadratic = table[:, edge.long()]
        return int(candidates[(step * (constant + inside * (linear + inside * quadratic)).sum(1)).argmax()])

    coarse = _candidates(last)
    near = best(coarse)
    apart = last // len(coarse) + 1
    return best(torch.arange(max(int(coarse[0]), near - apart), min(last, near + apart) + 1))


def _candidates(last: int) -> torch.Tensor:
    """Numbers of bins to try: up to 256 of them, evenly from a twentieth of the range to all of it."""
    low = max(LEVELS if last > 2 * LEVELS else 1, last // 20)
    return torch.linspace(low, last, min(256, last - low + 1)).round().long().unique()


def best_entropy_bin(counts: torch.Tensor) -> int:
    """The number of bins to keep so that the quantized distribution is nearest the true one.

    Least Kullback-Leibler divergence between the clipped histogram P (values beyond it are added to its last bin) and
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
