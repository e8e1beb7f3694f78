"""Range searches against brute-force definitions."""

import numpy as np
import pytest
import torch

from qat.core.errors import UserError
from qat.lean.calibrators import BINS, HistogramCalibrator, _candidates, best_entropy_bin, best_mse_bin


def collected(*tensors):
    calibrator = HistogramCalibrator("x")
    for tensor in tensors:
        calibrator.collect(tensor)
    return calibrator


def heavy_tailed(seed=0, count=20000):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, generator=generator)
    return torch.cat([x, torch.tensor([12.0, -15.0])])


def quantization_error(x, amax):
    scale = amax / 127
    return float((((x / scale).round().clamp(-128, 127) * scale - x) ** 2).sum())


def test_max_is_the_largest_magnitude():
    assert collected(torch.tensor([0.5, -3.25, 1.0])).compute_amax("max") == 3.25


def test_percentile_is_numpys_within_a_bin():
    x = heavy_tailed()
    amax = collected(x).compute_amax("percentile", 99.0)
    width = 16.0 / BINS
    assert abs(amax - np.percentile(x.abs().numpy(), 99.0)) <= 2 * width


def test_mse_range_has_nearly_the_least_error_of_all_ranges():
    x = heavy_tailed()
    chosen = quantization_error(x, collected(x).compute_amax("mse"))
    best = min(quantization_error(x, amax) for amax in np.linspace(0.5, 15, 600))
    assert chosen <= 1.02 * best
    assert chosen < 0.95 * quantization_error(x, 15.0)


def test_mse_search_equals_a_loop_over_the_same_candidates():
    counts = torch.zeros(BINS, dtype=torch.float64)
    counts[:300] = torch.arange(300, 0, -1).double() ** 2
    found = best_mse_bin(counts)

    def error(bins):
        scale = bins / 127
        return sum(
            float(c) * (min(round((i + 0.5) / scale), 127) * scale - (i + 0.5)) ** 2 for i, c in enumerate(counts[:300])
        )

    assert error(found) <= min(error(b) for b in range(128, 301)) * 1.001


def test_entropy_search_equals_migaczs_loop():
    x = heavy_tailed(count=4000).abs()
    counts = torch.histc(x, BINS, 0, 16.0).double()
    found = best_entropy_bin(counts)

    def divergence(bins):
        values = counts.numpy()
        p = values[:bins].copy()
        p[-1] += values[bins:].sum()
        q = np.zeros(bins)
        level = np.minimum(np.arange(bins) * 128 // bins, 127)
        for k in range(128):
            inside = (level == k) & (values[:bins] > 0)
            if inside.any():
                q[inside] = values[:bins][level == k].sum() / inside.sum()
        p, q = p / p.sum(), q / q.sum()
        kept = p > 0
        return float((p[kept] * np.log((p[kept] + 1e-12) / (q[kept] + 1e-12))).sum())

    last = int(counts.nonzero().max()) + 1
    tried = [divergence(int(b)) for b in _candidates(last)[::5]]
    assert divergence(found) <= min(tried) + 1e-9


def test_ranges_do_not_depend_on_the_order_of_the_frames():
    frames = [torch.randn(500) * scale for scale in (0.1, 7.0, 1.0, 30.0)]
    forward, backward = collected(*frames), collected(*reversed(frames))
    assert torch.equal(forward.counts, backward.counts)
    for method in ("max", "percentile", "mse", "entropy"):
        assert forward.compute_amax(method) == backward.compute_amax(method)


def test_merged_histograms_equal_one_process():
    a, b = torch.randn(1000), torch.randn(1000) * 20
    merged = collected(a)
    merged.merge(collected(b))
    assert torch.equal(merged.counts, collected(a, b).counts)
    assert merged.largest == collected(a, b).largest


def test_zeros_of_a_sparse_tensor_do_not_decide_its_range():
    sparse = torch.zeros(100_000)
    sparse[:50] = torch.linspace(1, 60, 50)
    for method in ("percentile", "mse", "entropy"):
        assert collected(sparse).compute_amax(method) > 40


def test_a_tensor_that_is_always_zero_has_range_zero():
    assert collected(torch.zeros(10), torch.zeros(10)).compute_amax("mse") == 0.0


def test_zeros_first_and_values_later_equal_the_values_alone():
    x = torch.randn(100)
    assert torch.equal(collected(torch.zeros(5), x).counts, collected(x).counts)


def test_nan_names_the_tensor():
    with pytest.raises(UserError, match=r"layer2.*NaN"):
        HistogramCalibrator("layer2").collect(torch.tensor([1.0, float("nan")]))


def test_memory_does_not_grow_with_frames():
    calibrator = collected(*[torch.randn(10) * 2.0**i for i in range(12)])
    assert calibrator.counts.shape == (BINS,)
    assert float(calibrator.counts.sum()) == 120
