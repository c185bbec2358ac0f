"""fits.exponent: the interval of a free exponent holds the truth, and a slow twin gives nearly the same."""

import numpy as np
import pytest

from smoothdiag.fits.affine import Line, pinball, quantile_line, relative_weights
from smoothdiag.fits.exponent import exponent_interval
from smoothdiag.fits.intervals import percentile_interval
from smoothdiag.fits.models import fit_power
from smoothdiag.fits.resamples import stationary_counts


def case(seed, exponent=1.0, n=200, decades=2.0, deviation=0.3):
    rng = np.random.default_rng(seed)
    x = 10 ** rng.uniform(-decades / 2, decades / 2, n)
    y = (1 + 2 * x**exponent) * np.exp(deviation * rng.standard_normal(n))
    return x, y, relative_weights(x, y), stationary_counts(np.arange(n), 1.0, 60, seed)


def interval(x, y, weights, counts, quantile=0.8, **options):
    return exponent_interval(x, y, weights, quantile, counts, fit_power(x, y, weights, quantile).exponent, **options)


def refitted(x, y, weights, counts, quantile=0.8):
    """The slow twin: each resample fits intercept, coefficient and exponent anew."""
    z, exponents = x / np.median(x), np.arange(5, 61, 2) * 0.05
    losses = np.empty((len(counts), len(exponents)))
    for number, rho in enumerate(exponents):
        for replicate, count in enumerate(counts):
            line = quantile_line(z**rho, y, quantile, weights * count, start=Line(float(np.median(y)), 0.0))
            losses[replicate, number] = weights * count @ pinball(y - line(z**rho), quantile)
    return percentile_interval(exponents[np.argmin(losses, axis=1)])


@pytest.mark.thorough
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_ends_are_those_of_fits_to_every_resample(seed):
    low, high = interval(*case(seed, decades=1.5))
    slow = refitted(*case(seed, decades=1.5))
    assert low == pytest.approx(slow[0], abs=0.2)
    assert high == pytest.approx(slow[1], abs=0.25)


@pytest.mark.parametrize("exponent", [0.5, 2 / 3, 1.0, 2.0])
def test_exact_powers_have_their_exponent(exponent):
    low, high = interval(*case(0, exponent, deviation=0.0))
    assert low <= round(exponent, 2) <= high
    assert high - low <= 0.05


@pytest.mark.thorough
@pytest.mark.parametrize("exponent", [0.5, 1.0])
def test_intervals_hold_the_truth(exponent):
    ends = [interval(*case(seed, exponent)) for seed in range(15)]
    assert sum(low <= exponent <= high for low, high in ends) >= 11  # 90% of 15 is 13.5; two standard deviations below.
    assert np.median([high - low for low, high in ends]) < 1.0


def test_a_shorter_range_leaves_more_exponents():
    widths = [np.ptp(interval(*case(0, decades=decades))) for decades in (3.0, 1.0)]
    assert widths[1] > 1.5 * widths[0]


def test_units_do_not_matter_and_equal_norms_have_no_exponent():
    x, y, weights, counts = case(0)
    assert interval(x, y, weights, counts) == interval(2**20 * x, 2**-9 * y, 2**9 * weights, counts)
    assert np.isnan(exponent_interval(np.ones(200), y, weights, 0.8, counts, 1.0)).all()


def test_less_freedom_is_wider():
    free, tight = interval(*case(1)), interval(*case(1), freedom=2.0)
    assert tight[0] <= free[0]
    assert tight[1] > free[1]
