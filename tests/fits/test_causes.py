"""fits.causes: batch, rate, short-lived causes and a low noise floor are found, and laws are left alone."""

import numpy as np
import pandas as pd
import pytest
from scipy.signal import lfilter

from smoothdiag.fits.affine import Line, quantile_line
from smoothdiag.fits.causes import MAX_OF_BATCH, proportional_noise, rate, short_lived, step_batch
from smoothdiag.fits.correlations import rank_correlations
from smoothdiag.fits.rows import as_frame, select_rows

N = 240
STEP = np.arange(N)
LINE = Line(1.0, 2.0)


def rows(x, y, **columns):
    return select_rows(as_frame(pd.DataFrame({"grad_norm": x, "smoothness": y} | columns)), None, "all")


def random(seed=0):
    return np.random.default_rng(seed)


def noise(deviation=0.2, seed=1, n=N):
    return np.exp(deviation * random(seed).standard_normal(n))


X = 10 ** random().uniform(-1, 1, N)


def test_rows_of_step_batches_are_doubted_unless_the_line_is_flat_or_the_data_another():
    found = step_batch(rows(X, 1 + 2 * X, data="step"), LINE)
    assert found.blocking
    assert "grad_variance" in found.evidence
    assert step_batch(rows(X, 1 + 2 * X, data="fixed"), LINE) is None
    assert step_batch(rows(X, 1 + 2 * X), LINE) is None
    assert step_batch(rows(X, 1 + 0 * X, data="step"), Line(1.0, 0.01)) is None


@pytest.mark.parametrize(("times", "found"), [(0.9, False), (1.1, True)])
def test_batches_may_explain_a_quarter_of_the_correlation(times, found):
    # ||g||^2 without the noise is x^2 - V. With V = k x^2 the bound on s is k / (1 - k) / var(log x), in every row.
    y = (1 + 2 * X) * noise(0.5)
    shown = np.corrcoef(np.log(X), np.log(y))[0, 1]
    ratio = (times * MAX_OF_BATCH * shown) ** 2 * np.var(np.log(X))
    variance = ratio / (1 + ratio) * X**2
    assert (step_batch(rows(X, y, data="step", grad_variance=variance), LINE) is not None) is found


def test_batches_explain_no_more_than_the_root_of_their_share():
    # The batch e moves both axes, u only the gradient norm: the correlation is exactly sqrt(s) at best.
    rng = random(3)
    for share in (0.05, 0.3, 0.8):
        e, u = np.sqrt(share) * rng.standard_normal(20_000), np.sqrt(1 - share) * rng.standard_normal(20_000)
        assert np.corrcoef(u + e, e)[0, 1] == pytest.approx(np.sqrt(share), abs=0.03)
        x, y = np.exp(u + e), np.exp(e)
        assert step_batch(rows(x, y, data="step", grad_variance=share * np.exp(2 * u)), LINE) is not None


def test_a_variance_that_is_known_for_few_rows_clears_nothing():
    variance = np.where(STEP < 0.8 * N, 0.0, np.nan)
    assert step_batch(rows(X, 1 + 2 * X, data="step", grad_variance=variance), LINE) is not None
    assert step_batch(rows(X, 1 + 2 * X, data="step", grad_variance=0.0), LINE) is None


def rate_flag(x, y, lr):
    found = rows(x, y, lr=lr)
    return rate(found, rank_correlations(x, y, STEP * 1.0)[0], quantile_line(found.x, found.y, 0.5))


def test_rates_that_move_both_axes_are_no_law():
    # Four rates in turns of ten steps: norm and smoothness follow the rate, and nothing else connects them.
    level = np.array([0.1, 1.0, 3.0, 10.0])[STEP // 10 % 4]
    found = rate_flag(level * noise(0.3), (1 + level) * noise(0.3, 2), 0.1 / level)
    assert found.blocking
    assert "hardly among rows of one rate" in found.cause


def test_a_law_that_holds_at_each_rate_stands():
    lr = np.array([0.1, 0.03, 0.01])[STEP // 10 % 3]
    assert rate_flag(X, (1 + 2 * X) * noise(), lr) is None
    assert rate_flag(X, (1 + 2 * X) * noise(), np.full(N, 0.1)) is None
    # Rates that shift the norms, each with more than a decade of its own.
    wide = 10 ** random(5).uniform(-0.8, 0.8, N) * lr / 0.03
    assert rate_flag(wide, (1 + 2 * wide) * noise(), lr) is None


def test_a_range_that_only_the_rates_make_is_short_unless_each_rate_has_the_slope_of_the_law():
    level = np.array([0.1, 1.0, 10.0])[STEP // 10 % 3]
    x = level * 10 ** random(6).uniform(-0.2, 0.2, N)
    assert rate_flag(x, (1 + 2 * x) * noise(0.1), level) is None
    # The rate moves both axes along a line, and at one rate smoothness is a lower power of the gradient norm.
    found = rate_flag(x, (1 + 2 * level) * (x / level) ** 0.25 * noise(0.02), level)
    assert found.blocking
    # The middle 95% of .4 decades is .38.
    assert float(found.evidence.split(" ")[0]) == pytest.approx(0.38, abs=0.02)


def test_slopes_within_rates_that_are_not_known_clear_nothing():
    level = np.array([0.1, 1.0, 10.0])[STEP // 10 % 3]
    x = level * 10 ** random(6).uniform(-0.2, 0.2, N)
    assert rate_flag(x, (1 + 2 * x) * noise(1.5), level) is not None


def test_classes_of_a_rate_that_falls_smoothly_are_classes_of_time():
    # Norms that fall with the rate by two decades: the tests of time judge them, and not this one.
    lr = 0.5 * (1 + np.cos(np.pi * STEP / N)) + 1e-3
    x = 10 ** (1 - 2 * STEP / N + 0.3 * random(7).standard_normal(N))
    assert rate_flag(x, (1 + 2 * x) * noise(), lr) is None


def kicks(seed, n=400):
    """||g|| and ||H g|| / ||g|| on a quadratic whose weights get small noise and rare kicks in all directions."""
    rng, curvature, w, found = random(seed), np.logspace(-2, 0, 50), random(seed).standard_normal(50), []
    for _ in range(2 * n):
        g = curvature * w
        found.append((np.linalg.norm(g), np.linalg.norm(curvature * g) / np.linalg.norm(g)))
        size = 0.1 * rng.standard_t(1.5) if rng.random() < 0.1 else 0.005
        w = w - 0.5 * (g + size * rng.standard_normal(50))
    return np.array(found[::2]).T


def short_flag(x, y, quantile=0.8, **columns):
    found = rows(x, y, **columns)
    return short_lived(found, quantile_line(found.x, found.y, quantile))


def test_kicks_on_a_quadratic_are_short_lived_and_a_law_on_the_same_norms_is_not():
    pairs = [kicks(seed) for seed in range(10)]
    assert sum(short_flag(x, y) is not None for x, y in pairs) >= 8
    assert not any(short_flag(x, (1 + 2 * x) * noise(0.3, n=len(x))) for x, _ in pairs)
    assert all(flag.blocking for flag in (short_flag(*pair) for pair in pairs) if flag)


def walk(seed, memory=0.98, n=N):
    series = lfilter([1.0], [1.0, -memory], random(seed).standard_normal(n + 600))[600:]
    return series / np.std(series)


def test_a_common_cause_of_a_few_steps_is_found():
    found = [short_flag(np.exp(walk(s) + walk(s + 50, 0.3)), np.exp(walk(s + 50, 0.3)) * noise()) for s in range(10)]
    assert sum(flag is not None for flag in found) >= 9


def test_laws_hold_for_level_and_changes_whatever_drifts():
    for seed in range(10):
        x = np.exp(walk(seed))
        assert short_flag(x, (1 + 2 * x) * noise(0.5, seed + 9)) is None
        white = np.exp(random(seed).standard_normal(N))
        assert short_flag(white, (1 + 2 * white) * np.exp(-2 * STEP / N) * noise(0.3, seed + 9)) is None


def test_levels_of_several_runs_are_compared_within_each():
    # The level of the smoothness differs between runs against the gradient norm; within each run the law holds.
    run = STEP // 60
    x = X * 10.0 ** (run - 1)
    assert short_flag(x, (1 + 2 * X) * noise(0.1), run=run, step=STEP % 60, quantile=0.5) is None


@pytest.mark.parametrize("factor", [4, 10])
def test_a_noise_floor_that_is_too_low_shows_as_proportion(factor):
    rounding = X / 2
    found = rows(X, np.hypot(1, rounding) * noise(), noise_floor=rounding / factor)
    assert proportional_noise(found, quantile_line(found.x, found.y, 0.95), 0.95).blocking


def test_curvature_far_above_its_floor_or_apart_from_it_is_no_noise():
    y = (1 + 2 * X) * noise()
    line = quantile_line(X, y, 0.95)
    for floor in (1e-3 * X, np.full(N, 0.1), 0.1 * X * noise(1.0, 4), np.full(N, np.nan)):
        found = rows(X, y, noise_floor=floor)
        assert proportional_noise(found, line, 0.95) is None
    # The same floors, scattered, with a smoothness that follows them.
    floor = 0.1 * X * noise(1.0, 4)
    found = rows(X, 1 + 10 * floor, noise_floor=floor)
    assert proportional_noise(found, quantile_line(found.x, found.y, 0.95), 0.95) is not None


def spikes(seed, n):
    events = (random(seed).random(n) < 0.08) * np.abs(random(seed + 1).standard_t(2, n))
    return np.log(10) * np.log10(0.1 + lfilter([1.0], [1.0, -0.7], events)) + 0.07 * random(seed + 2).standard_normal(n)


NORMS = {
    "independent": lambda seed, n: np.log(10) * random(seed).uniform(-1, 1, n),
    "memory .98": lambda seed, n: 1.15 * walk(seed, 0.98, n),
    "memory .8": lambda seed, n: 0.92 * walk(seed, 0.8, n),
    "spikes": spikes,
}


@pytest.mark.slow
def test_laws_are_hardly_ever_called_short_lived():
    found = []
    for norms in NORMS.values():
        for deviation, n in ((d, n) for d in (0.2, 0.6, 0.9) for n in (100, 300, 1000)):
            for seed in range(60):
                x = np.exp(norms(seed, n))
                y = (1 + 2 * x) * noise(deviation, seed + 1000, n)
                found.append(short_flag(x, y, 0.8 if seed % 2 else 0.95) is not None)
    print(f"short lived: {sum(found)} of {len(found)} laws")
    assert sum(found) <= 0.02 * len(found)
