"""fits.resamples: short ways to sums and quantiles of resamples agree with the long ones, in little memory."""

import tracemalloc

import numpy as np
import pytest

from smoothdiag.fits import resamples
from smoothdiag.fits.resamples import resampled_quantile, stationary_counts, sums, with_all


@pytest.mark.parametrize("block_length", [1.0, 7.0, 400.0])
def test_counts_are_those_of_steps_that_follow_each_other(block_length):
    n = 90
    rng, slow = np.random.default_rng(5), np.zeros((30, n))
    for row in slow:
        begins, anywhere = rng.random(n) < 1 / block_length, rng.integers(0, n, size=n)
        at = 0
        for number in range(n):
            at = anywhere[number] if number == 0 or begins[number] else (at + 1) % n
            row[at] += 1
    np.testing.assert_array_equal(stationary_counts(np.arange(float(n)), block_length, 30, seed=5), slow)


def test_sums_over_a_few_columns_at_a_time_are_the_sums(monkeypatch):
    monkeypatch.setattr(resamples, "COLUMNS", 7)
    rng = np.random.default_rng(0)
    counts, values = rng.integers(0, 200, (11, 40)).astype(np.uint8), rng.standard_normal((40, 3))
    slow = np.stack([np.repeat(values, row, axis=0).sum(axis=0) for row in counts])
    np.testing.assert_allclose(sums(counts, values), slow, rtol=1e-11)
    np.testing.assert_allclose(sums(counts, lambda rows: values[rows]), slow, rtol=1e-11)
    np.testing.assert_allclose(sums(with_all(counts), values)[-1], values.sum(axis=0), rtol=1e-11)


@pytest.mark.parametrize("quantile", [0.02, 0.5, 0.95])
@pytest.mark.parametrize(("n", "block"), [(41, 1.0), (5000, 1.0), (5000, 2000.0)])
def test_quantiles_of_resamples_are_those_of_repeated_values(quantile, n, block):
    # Values that follow each other in order, in long blocks: the quantile of a resample is anywhere.
    values = np.sort(np.random.default_rng(0).standard_normal(n))
    counts = stationary_counts(np.arange(float(n)), block, 12, seed=1)
    slow = [np.quantile(np.repeat(values, row), quantile, method="inverted_cdf") for row in counts]
    np.testing.assert_array_equal(resampled_quantile(values, quantile, counts), slow)
    # A weight of two is a row that occurs twice.
    twice = np.where(np.arange(n) % 3, 1, 2)
    slow = [np.quantile(np.repeat(values, row * twice), quantile, method="inverted_cdf") for row in counts]
    np.testing.assert_array_equal(resampled_quantile(values, quantile, counts, twice.astype(float)), slow)


def test_memory_grows_by_a_byte_for_each_row_and_resample():
    peaks = []
    for n in (20_000, 80_000):
        tracemalloc.start()
        values = np.random.default_rng(0).standard_normal(n)
        counts = stationary_counts(np.arange(float(n)), 9.0, 100, seed=0)
        sums(counts, values[:, np.newaxis])
        resampled_quantile(values, 0.9, counts)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (peaks[1] - peaks[0]) / 60_000 < 250  # Counts take 100 bytes a row; as floats they would take 800.
