"""Range searches against brute-force definitions."""

import numpy as np
import pytest
import torch

from qat.core.errors import UserError
from qat.lean.calibrators import (
    BINS,
    HistogramCalibrator,
    _candidates,
    best_entropy_bin,
    best_mse_bin,
    count_on_cpu,
    count_with_torch,
)


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


def awkward_tensors():
    """Every kind of float32: both signs, zeros of both signs, subnormals, bin edges, the range's own edges."""
    generator = torch.Generator().manual_seed(3)
    spread = torch.randn(10_007, generator=generator) * 2.0 ** torch.randint(-40, 3, (10_007,), generator=generator)
    edges = torch.arange(BINS + 1) / BINS * 8
    special = torch.tensor([0.0, -0.0, 1e-45, -1e-40, 2.0**-24, 7.9999995, -8.0, 8.0, 1.5e-38])
    return {"spread": spread, "edges": edges, "special": special, "zeros": torch.zeros(33), "empty": torch.empty(0)}


@pytest.mark.parametrize("kind", awkward_tensors())
@pytest.mark.parametrize("log2_range", [-24, 3, 4, 30])
def test_the_compiled_kernel_counts_what_torch_counts(kind, log2_range):
    x = awkward_tensors()[kind]
    counts, largest = count_on_cpu(x, log2_range)
    expected, expected_largest = count_with_torch(x, log2_range)
    assert largest == expected_largest == (float(x.abs().max()) if len(x) else 0.0)
    if largest < 2.0**log2_range:
        assert torch.equal(counts, expected)
        present = x[x != 0].abs().double().numpy()
        assert np.array_equal(counts.numpy(), np.histogram(present, BINS, (0, 2.0**log2_range))[0])


@pytest.mark.parametrize("count", [count_on_cpu, count_with_torch])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), -float("nan")])
def test_a_value_that_is_not_finite_is_seen_by_both_ways_of_counting(count, value):
    x = torch.ones(70_001)
    x[60_000] = value
    assert not np.isfinite(count(x, 3)[1])


def test_counts_do_not_depend_on_the_number_of_threads(monkeypatch):
    x = torch.randn(700_003)  # enough that every thread is worth its start
    alone = count_on_cpu(x, 3)[0]
    for threads in (2, 3, 7):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert torch.equal(count_on_cpu(x, 3)[0], alone)


def test_more_values_in_a_bin_than_float32_can_count_are_counted():
    calibrator = collected(torch.ones(2**24 + 3))
    assert float(calibrator.counts.sum()) == 2**24 + 3


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x.transpose(1, 3),
        lambda x: x[:, ::2, 1:, :-1],
        lambda x: x[:, :1].expand(-1, 5, -1, -1),
        lambda x: x[0, 0, 0, 0],
    ],
    ids=["channels_last", "transposed", "sliced", "expanded", "scalar"],
)
def test_the_layout_of_a_tensor_does_not_matter(layout):
    x = layout(torch.randn(2, 6, 5, 4))
    assert torch.equal(collected(x).counts, collected(x.flatten().clone()).counts)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_types_are_counted_as_float32(dtype):
    x = torch.randn(1000).to(dtype)
    assert torch.equal(collected(x).counts, collected(x.float()).counts)


def test_an_empty_tensor_adds_nothing():
    x = torch.randn(10)
    assert torch.equal(collected(torch.empty(0, 3), x).counts, collected(x).counts)


def test_a_value_at_a_power_of_two_is_in_one_bin_whatever_came_before():
    small, large = torch.tensor([1.0]), torch.tensor([3.0])
    assert torch.equal(collected(small, large).counts, collected(large, small).counts)


@pytest.mark.parametrize("tail", ["normal", "half", "exponential", "student"])
def test_mse_range_is_within_a_thousandth_of_the_best_of_all_bins(tail):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(100_000, generator=generator) * 1.9
    if tail == "half":
        x = x.relu()
    elif tail == "exponential":  # its best step is about 18 bins, whole numbers of which look better than they are
        x = -torch.rand(100_000, generator=generator).log() * 1.9
    elif tail == "student":
        x = x / (torch.randn(3, 100_000, generator=generator) ** 2).mean(0).sqrt()
    calibrator = collected(x)
    width = 2.0**calibrator.log2_range / BINS
    chosen = calibrator.compute_amax("mse")
    tried = [quantization_error(x, chosen + i * width) for i in range(-200, 201, 4) if chosen + i * width > 0]
    assert quantization_error(x, chosen) <= 1.001 * min(tried)
