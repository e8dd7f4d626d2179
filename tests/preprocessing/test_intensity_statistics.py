"""Mean, deviation and percentiles without copies and sorting equal numpy's to the last bit."""

from __future__ import annotations

import numpy as np
import pytest

from umamba.preprocessing.statistics import mean_and_std, percentiles

WANTED = (0.5, 50.0, 99.5)


@pytest.mark.parametrize("seed", range(10))
def test_percentiles_by_counts_are_those_of_all_values(seed):
    generator = np.random.default_rng(seed)
    drawn, distinct = [], []
    for _ in range(4):
        values = generator.normal(100, 50, generator.integers(3, 60)).astype(np.float32)
        values = values.round(int(generator.integers(0, 3)))
        places = generator.integers(0, len(values), generator.integers(50, 300))
        drawn.append(values[places])
        distinct.append((values, np.bincount(places, minlength=len(values))))
    everything = np.concatenate(drawn)
    expected = [float(p) for p in np.percentile(everything, WANTED)]
    assert percentiles(everything, distinct, WANTED) == expected
    assert percentiles(everything, None, WANTED) == expected


@pytest.mark.parametrize("n", [1, 10, 100_003])
def test_mean_and_deviation_are_numpys(n):
    values = np.random.default_rng(n).normal(1000, 30, n).astype(np.float32)
    expected = float(np.mean(values)), float(np.std(values))
    assert mean_and_std(values) == expected
