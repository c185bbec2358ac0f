"""fits.hull: the hull is that of all rows, and rows left out before lie below a chord."""

import numpy as np
import pytest

from smoothdiag.fits.hull import outermost, upper_hull


def slow_hull(x, y):
    """Corners from the leftmost highest row on: the next one has the steepest chord, the farthest of equals."""
    points = sorted(set(zip(x.tolist(), y.tolist(), strict=True)))
    at = max(point for point in points if point[0] == points[0][0])
    hull = [at]
    while right := [point for point in points if point[0] > at[0]]:
        steepest = max((point[1] - at[1]) / (point[0] - at[0]) for point in right)
        if steepest <= 0:
            break
        at = max(point for point in right if (point[1] - at[1]) / (point[0] - at[0]) >= steepest * (1 - 1e-12))
        hull.append(at)
    return np.array(hull[::-1])


@pytest.mark.parametrize("kind", ["noise", "whole numbers", "one gradient norm", "decades"])
def test_hull_is_that_of_all_rows(kind):
    rng = np.random.default_rng(0)
    x, y = rng.uniform(1, 2, 3000), rng.lognormal(size=3000)
    if kind == "whole numbers":
        x, y = np.floor(20 * x), np.floor(3 * y)
    if kind == "one gradient norm":
        x = np.full(3000, 2.0)
    if kind == "decades":
        x = 10 ** (20 * x - 30)
    np.testing.assert_allclose(upper_hull(x, y), slow_hull(x, y))


def test_few_rows_are_left_to_look_at():
    rng = np.random.default_rng(1)
    x = 10 ** rng.uniform(-1, 1, 50_000)
    y = (1 + 2 * x) * np.exp(0.3 * rng.standard_normal(50_000))
    assert len(outermost(x, y)) < 500
    assert len(outermost(x, -y)) < 500
