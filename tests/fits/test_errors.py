"""fits.errors: simulation and extrapolation take out what errors of the gradient norm do to the line."""

import numpy as np
import pandas as pd
import pytest

from smoothdiag.fits import fit_smoothness
from smoothdiag.fits.affine import quantile_line
from smoothdiag.fits.errors import extrapolate

N = 300


def rows(seed, error=0.3):
    rng = np.random.default_rng(seed)
    truth = 10 ** rng.uniform(-1, 1, N)
    y = (1 + 2 * truth) * np.exp(0.2 * rng.standard_normal(N))
    return truth * np.exp(error * rng.standard_normal(N)), y


def plain_and_corrected(num_seeds, quantile):
    lines = []
    for seed in range(num_seeds):
        x, y = rows(seed)
        line = quantile_line(x, y, quantile)
        lines.append((line, extrapolate(x, y, np.full(N, 0.3), line, quantile)))
    return np.median(lines, axis=0)


# The .95 quantile of the noise of y, which is no error of x, lifts the line.
TRUTH = {0.5: (1, 2), 0.95: tuple(np.array([1, 2]) * np.exp(1.645 * 0.2))}


@pytest.mark.parametrize(("num_seeds", "quantile"), [
    (10, 0.95), pytest.param(50, 0.95, marks=pytest.mark.slow), pytest.param(50, 0.5, marks=pytest.mark.slow),
])  # fmt: skip
def test_correction_halves_the_bias_of_the_slope(num_seeds, quantile):
    plain, corrected = plain_and_corrected(num_seeds, quantile)
    print(f"quantile {quantile}: truth {TRUTH[quantile]}, plain {plain}, corrected {corrected}")
    assert abs(corrected[1] - TRUTH[quantile][1]) <= abs(plain[1] - TRUTH[quantile][1]) / 2
    # Sideways scatter attenuates the median and steepens an upper line.
    assert bool(plain[1] > TRUTH[quantile][1]) is (quantile > 0.5)


def test_without_errors_nothing_is_corrected():
    x, y = rows(0)
    line = quantile_line(x, y, 0.95)
    np.testing.assert_allclose(extrapolate(x, y, np.zeros(N), line, 0.95), line, rtol=1e-9)


def fit(**columns):
    x, y = rows(0)
    return fit_smoothness(pd.DataFrame({"grad_norm": x, "smoothness": y, "saturation": 0.1} | columns), num_boot=20)


@pytest.mark.thorough
def test_fit_corrects_where_the_variance_of_the_gradient_is_known():
    x, _ = rows(0)
    found = fit(grad_variance=(0.3 * x) ** 2)
    assert found.corrected.deviation == pytest.approx(0.3)
    assert found.corrected.L1 < found.L1
    assert "after correcting errors" in found.summary()
    assert found.L1 == fit().L1


@pytest.mark.thorough
@pytest.mark.parametrize("variance", [np.nan, 0.0, -1.0, 1e6, np.where(np.arange(N) < 60, np.nan, 0.01)])
def test_unknown_or_overwhelming_errors_are_not_corrected(variance):
    found = fit(grad_variance=variance)
    assert found.corrected is None
    assert "L1 too large" in found.summary()
