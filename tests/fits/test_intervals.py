"""fits.intervals: the bootstrap agrees with closed forms and with the resampling that it shortens."""

import math
import time

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t

from smoothdiag.fits.affine import Line, quantile_line, relative_weights
from smoothdiag.fits.intervals import (
    Dependence,
    bootstrap_lines,
    degrees_of_freedom,
    dependence,
    line_dependence,
    percentile_interval,
)
from smoothdiag.fits.lines import quantile_fit
from smoothdiag.fits.resamples import stationary_counts
from smoothdiag.fits.rows import as_frame, select_rows


def autoregression(n, memory, seed):
    noise = np.random.default_rng(seed).standard_normal(n)
    series = np.zeros(n)
    for k in range(1, n):
        series[k] = memory * series[k - 1] + noise[k]
    return series


@pytest.mark.parametrize("memory", [0.0, 0.5, 0.9])
def test_effective_number_is_that_of_the_autoregression(memory):
    found = np.median([dependence(autoregression(4000, memory, seed)).num_effective for seed in range(9)])
    assert found == pytest.approx(4000 * (1 - memory) / (1 + memory), rel=0.25)


def test_block_length_is_the_optimal_one_of_the_autoregression():
    # (2 G^2 / D)^(1/3) n^(1/3) with G = 2 sum k R(k) and D = 2 g(0)^2; for AR(.7), G/g(0) = 2 * .7 / (1 - .7^2).
    found = np.median([dependence(autoregression(4000, 0.7, seed)).block_length for seed in range(9)])
    assert found == pytest.approx((2 * 0.7 / (1 - 0.49)) ** (2 / 3) * 4000 ** (1 / 3), rel=0.25)


def test_constant_series_has_no_memory():
    found = dependence(3.0 + 4e-16 * (np.arange(100) % 10 < 5))  # Constant up to rounding.
    assert (found.block_length, found.num_effective) == (1, 100)


def test_line_dependence_sees_noise_that_persists():
    x = 10 ** np.random.default_rng(0).uniform(-1, 1, 1000)
    line = Line(1.0, 2.0)
    effective = []
    for memory in (0.0, 0.95):
        noise = autoregression(1000, memory, 1)
        y = line(x) * np.exp(0.2 * noise / np.std(noise))
        steps = np.arange(1000.0)
        effective.append(line_dependence(x, y, relative_weights(x, y), line, 0.5, steps).num_effective)
    assert effective[0] > 500
    assert effective[1] < 100


def test_counts_hold_every_step_as_often_as_blocks_say():
    counts = stationary_counts(np.arange(500.0), 5.0, 1500, seed=0)
    assert (counts.sum(axis=1) == 500).all()
    np.testing.assert_allclose(counts.mean(axis=0), 1, atol=0.4)
    # Neighbours come together unless a block ends between them: probability 1 - 1/5.
    assert np.corrcoef(counts[:, 10], counts[:, 11])[0, 1] == pytest.approx(0.8, abs=0.05)
    alone = stationary_counts(np.arange(500.0), 1.0, 1500, seed=0)
    assert abs(np.corrcoef(alone[:, 10], alone[:, 11])[0, 1]) < 0.1


def test_rows_of_one_step_stay_together():
    counts = stationary_counts(np.array([0.0, 0, 1, 1, 2, 2]), 2.0, 50, seed=0)
    assert (counts[:, ::2] == counts[:, 1::2]).all()


def test_same_seed_gives_the_same_resamples_and_another_seed_others():
    first, again, other = (stationary_counts(np.arange(99.0), 4.0, 20, seed=seed) for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()


def test_replicate_is_the_fit_of_the_resampled_rows():
    rng = np.random.default_rng(0)
    x = 10 ** rng.uniform(-1, 1, 120)
    y = (1 + 2 * x) * np.exp(0.3 * rng.standard_normal(120))
    weights = relative_weights(x, y)
    counts = stationary_counts(np.arange(120.0), 4.0, 10, seed=0)
    lines = bootstrap_lines(x, y, weights, quantile_line(x, y, 0.9, weights), 0.9, counts)
    for line, count in zip(lines, counts, strict=True):
        rows = np.repeat(np.arange(120), count)
        np.testing.assert_allclose(line, quantile_line(x[rows], y[rows], 0.9, weights[rows]), rtol=1e-9, atol=1e-9)


@pytest.mark.thorough
def test_intervals_contain_the_true_median_line_about_as_often_as_they_say():
    hits = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        x = 10 ** rng.uniform(-1, 1, 300)
        y = (1 + 2 * x) * np.exp(0.2 * rng.standard_normal(300))
        weights = relative_weights(x, y)
        counts = stationary_counts(np.arange(300.0), 1.0, 60, seed=seed)
        lines = bootstrap_lines(x, y, weights, quantile_line(x, y, 0.5, weights), 0.5, counts)
        low, high = percentile_interval(lines[:, 1])
        hits += low <= 2 <= high
    assert hits >= 31  # 90% of 40 is 36.


def test_persistent_noise_widens_the_interval():
    rng = np.random.default_rng(0)
    x = 10 ** rng.uniform(-1, 1, 800)
    noise = autoregression(800, 0.95, 3)
    y = (1 + 2 * x) * np.exp(0.2 * noise / np.std(noise))
    weights = relative_weights(x, y)
    line = quantile_line(x, y, 0.5, weights)
    widths = []
    for block in (1.0, line_dependence(x, y, weights, line, 0.5, np.arange(800.0)).block_length):
        counts = stationary_counts(np.arange(800.0), block, 200, seed=0)
        low, high = percentile_interval(bootstrap_lines(x, y, weights, line, 0.5, counts)[:, 1])
        widths.append(high - low)
    assert widths[1] > 2 * widths[0]


def test_interval_reaches_the_estimate_it_belongs_to():
    assert percentile_interval(np.linspace(1, 2, 101), 5.0) == (pytest.approx(1.05), 5.0)


def test_few_degrees_of_freedom_widen_the_interval_as_students_t_does():
    normal = np.random.default_rng(0).standard_normal(200_000)
    for freedom in (1.0, 3.0, 30.0, math.inf):  # Of normal replicates the ends are those of Student's t.
        ends = percentile_interval(normal, freedom=freedom)
        if freedom > 1:
            np.testing.assert_allclose(ends, (-t.isf(0.05, freedom), t.isf(0.05, freedom)), rtol=0.02)
    assert degrees_of_freedom(Dependence(1, 100), 0.9) == pytest.approx(10)
    assert degrees_of_freedom(Dependence(1, 100), 0.1) == pytest.approx(10)
    assert degrees_of_freedom(Dependence(1, 100), 0.9, num_runs=4) == 3
    assert degrees_of_freedom(Dependence(1, 2), 0.9) == 1


def test_blocks_never_hold_steps_of_two_runs_and_runs_are_drawn_whole():
    runs, steps = np.repeat(np.arange(4.0), 50), np.tile(np.arange(50.0), 4)
    counts = stationary_counts(steps, 10.0, 800, seed=0, runs=runs)
    assert (counts.sum(axis=1) == 200).all()
    size = np.array([counts[:, runs == run].sum(axis=1) for run in range(4)])
    assert set((size % 50).ravel().tolist()) == {0}
    assert set((size // 50).ravel().tolist()) >= {0, 1, 2, 3}
    # Within the resamples that drew two runs once each, their counts have nothing to do with each other.
    once = (size[0] == 50) & (size[1] == 50)
    last, first = counts[once][:, 49] - counts[once][:, 40], counts[once][:, 50] - counts[once][:, 59]
    assert abs(np.corrcoef(last, first)[0, 1]) < 4 / np.sqrt(once.sum())


def test_one_run_is_resampled_as_before_whatever_its_number():
    steps = np.arange(60.0)
    alone, named = (stationary_counts(steps, 4.0, 9, seed=3, runs=runs) for runs in (None, np.full(60, 7.0)))
    assert (alone == named).all()


def test_runs_that_differ_are_worth_few_rows():
    rng = np.random.default_rng(0)
    runs, steps = np.repeat(np.arange(6.0), 200), np.tile(np.arange(200.0), 6)
    x = 10 ** rng.uniform(-1, 1, 1200)
    line, effective = Line(1.0, 2.0), []
    for spread in (0.0, 0.5):
        y = line(x) * np.exp(0.2 * rng.standard_normal(1200) + spread * np.repeat(rng.standard_normal(6), 200))
        effective.append(line_dependence(x, y, relative_weights(x, y), line, 0.5, steps, runs).num_effective)
    assert effective[0] > 300
    assert effective[1] < 30


def clustered(seed, num_runs=6, n=60):
    rng = np.random.default_rng(seed)
    runs, steps = np.repeat(np.arange(float(num_runs)), n), np.tile(np.arange(float(n)), num_runs)
    x = 10 ** rng.uniform(-1, 1, len(runs))
    L1 = 2 * np.exp(0.2 * rng.standard_normal(num_runs))
    return x, (1 + np.repeat(L1, n) * x) * np.exp(0.2 * rng.standard_normal(len(runs))), steps, runs


@pytest.mark.thorough
def test_runs_as_clusters_contain_the_slope_where_pooled_rows_miss_it():
    hits = np.zeros(2)
    for seed in range(40):
        x, y, steps, runs = clustered(seed)
        weights = relative_weights(x, y)
        line = quantile_line(x, y, 0.5, weights)
        for k, (order, cluster, number) in enumerate(((steps, runs, 6), (np.arange(len(x)), None, 1))):
            memory = line_dependence(x, y, weights, line, 0.5, order, cluster)
            counts = stationary_counts(order, memory.block_length, 60, seed, cluster)
            slopes = bootstrap_lines(x, y, weights, line, 0.5, counts)[:, 1]
            low, high = percentile_interval(slopes, freedom=degrees_of_freedom(memory, 0.5, number))
            hits[k] += low <= 2 <= high
    assert hits[0] >= 31  # 90% of 40 is 36; three standard deviations below is 30.
    assert hits[1] < 27


def test_four_hundred_replicates_of_a_thousand_rows_take_a_second():
    rng = np.random.default_rng(0)
    x = 10 ** rng.uniform(-1, 1, 1000)
    y = (1 + 2 * x) * np.exp(0.2 * rng.standard_normal(1000))
    weights = relative_weights(x, y)
    line = quantile_line(x, y, 0.95, weights)
    begin = time.process_time()
    bootstrap_lines(x, y, weights, line, 0.95, stationary_counts(np.arange(1000.0), 5.0, 400, seed=0))
    assert time.process_time() - begin < 1.5


def one_fit(x, y, quantile=0.5, seed=0):
    frame = pd.DataFrame({"grad_norm": x, "smoothness": y})
    return quantile_fit(select_rows(as_frame(frame), None, "all"), quantile, 60, seed)


def test_rows_at_one_gradient_norm_leave_every_split_open():
    y = 1.2 * np.exp(0.1 * np.random.default_rng(0).standard_normal(50))
    found = one_fit(np.full(50, 2.0), y)
    height = found.replicates[:, 0] + 2 * found.replicates[:, 1]
    assert (found.L0_interval[0], found.L1_interval[0]) == (0, 0)
    top = percentile_interval(height, None, found.freedom)[1]
    assert found.L0_interval[1] == pytest.approx(top, rel=1e-12)
    assert found.L1_interval[1] == pytest.approx(top / 2, rel=1e-12)
    # A range that rounding could make is no range, even if the rows lie exactly on a line.
    x = np.linspace(2, 2 + 1e-9, 50)
    assert one_fit(x, 0.6 * x).L0_interval == pytest.approx((0, 1.2))


def test_rows_that_vary_keep_the_intervals_of_their_resamples():
    x = 10 ** np.random.default_rng(1).uniform(-1, 1, 200)
    found = one_fit(x, (1 + 2 * x) * np.exp(0.2 * np.random.default_rng(2).standard_normal(200)))
    for number, ends in enumerate((found.L0_interval, found.L1_interval)):
        own = percentile_interval(found.replicates[:, number], found.line[number], found.freedom)
        assert ends == pytest.approx(own, rel=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("spread", [0.0, 1e-6, 0.1, *(pytest.param(x, marks=pytest.mark.slow) for x in (1e-12, 1e-2))])
def test_a_short_range_holds_both_extreme_splits(spread):
    held = 0
    for seed in range(12):
        rng = np.random.default_rng(seed)
        x, noise = 1 + spread * rng.uniform(-1, 1, 60), np.exp(0.1 * rng.standard_normal(60))
        for L0, L1 in ((1.0, 0.0), (0.0, 1.0)):
            found = one_fit(x, (L0 + L1 * x) * noise)
            held += found.L0_interval[0] <= L0 <= found.L0_interval[1]
            held += found.L1_interval[0] <= L1 <= found.L1_interval[1]
    assert held >= 41  # 90% of 48 is 43.
