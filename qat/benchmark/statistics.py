"""Statistics of samples that were taken round by round."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

OUTLIER = 5.0  # deviations beyond the median
MOST_OUTLIERS = 20  # that are listed with their lengths
Rounds = Sequence[Sequence[float]]  # milliseconds, by round


def summary(rounds: Rounds) -> dict[str, Any]:
    """median, p90, p99, mean and number of samples, all with outliers included, and the outliers among them.

    An outlier is slower than the median by more than OUTLIER standard deviations, these estimated by 1.4826·MAD (the median
    absolute deviation, which for a normal distribution is that share of σ; outliers do not move it) and taken as at least 1 % of
    the median, so that a row without any spread has no outliers of a few microseconds.
    """
    values = np.concatenate([np.asarray(r, float) for r in rounds])
    median = float(np.median(values))
    deviation = max(1.4826 * float(np.median(np.abs(values - median))), 0.01 * median)
    beyond = np.sort(values[values > median + OUTLIER * deviation])[::-1]
    return {
        "median": round(median, 4),
        "p90": round(float(np.percentile(values, 90)), 4),
        "p99": round(float(np.percentile(values, 99)), 4),
        "mean": round(float(values.mean()), 4),
        "samples": len(values),
        "outliers": {"count": len(beyond), "longest": [round(float(v), 4) for v in beyond[:MOST_OUTLIERS]]},
    }


def ratio_interval(old: Rounds, new: Rounds, resamples: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """Median of `new` over median of `old`, with its 95 % bootstrap interval.

    Whole rounds are drawn with replacement, separately for each run: samples of one round are taken close together, so
    the same disturbance slows them all.

    Returns:
        ratio, low, high.
    """

    def medians(rounds: Rounds, random: np.random.Generator) -> np.ndarray:
        values = [np.asarray(r, float) for r in rounds]
        drawn = random.integers(0, len(values), (resamples, len(values)))
        return np.array([np.median(np.concatenate([values[i] for i in row])) for row in drawn])

    seeds = np.random.SeedSequence(seed).spawn(2)
    ratios = medians(new, np.random.default_rng(seeds[1])) / medians(old, np.random.default_rng(seeds[0]))
    low, high = np.percentile(ratios, [2.5, 97.5])
    exact = float(np.median(np.concatenate([np.asarray(r, float) for r in new]))) / float(
        np.median(np.concatenate([np.asarray(r, float) for r in old]))
    )
    return exact, float(low), float(high)
