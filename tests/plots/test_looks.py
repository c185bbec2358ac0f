"""plots.looks: limits show the rows, and only log-spaced steps count as such."""

import numpy as np
import pytest

from smoothdiag.fits import Verdict
from smoothdiag.names import ESTIMATORS, SUFFIXES, VERDICTS, readable
from smoothdiag.plots.looks import is_log_spaced, limits


@pytest.mark.parametrize("count", [1, 2, 19, 20, 500])
def test_rows_without_outliers_are_all_inside(count: int) -> None:
    values = 10 ** np.random.default_rng(0).uniform(-1, 2, count)
    assert limits(values) == pytest.approx((values.min(), values.max()))
    assert limits(values, is_log=False) == pytest.approx((values.min(), values.max()))
    assert limits(np.full(count, 3.0)) == pytest.approx((3, 3))
    assert limits(np.full(count, 3.0), is_log=False) == (3, 3)


def test_outliers_are_outside_where_they_would_squeeze_the_rest() -> None:
    values = np.geomspace(1, 10, 100)
    far = np.append(values, [1e5, 1e-7])
    assert limits(far) == pytest.approx((1, 10))
    assert limits(np.append(values, 50.0))[1] == pytest.approx(50), "half as far again squeezes nothing"
    assert limits(np.append(values, 50.0), is_log=False)[1] == 10
    assert limits(np.append(values, [1e5] * 10))[1] == pytest.approx(1e5), "ten rows of a hundred are no outliers"
    assert limits(np.array([1.0, 1e9]))[1] == pytest.approx(1e9), "of a few rows nobody knows"


def test_steps_count_as_log_spaced_only_where_small_ones_lie_denser() -> None:
    assert is_log_spaced(np.array([0, *np.geomspace(1, 1e4, 50)]))
    assert not is_log_spaced(np.geomspace(1, 50, 50))
    assert not is_log_spaced(np.arange(0, 1e5, 20))
    assert not is_log_spaced(np.zeros(3))


def test_every_verdict_and_every_estimator_has_a_name() -> None:
    assert VERDICTS.keys() == Verdict.__members__.keys()
    assert readable("sharpness_preconditioned") == "sharpness, preconditioned"
    assert readable("mine_clip") == "mine_clip"
    assert len({readable(name + end) for name in ESTIMATORS for end in ("", *SUFFIXES)}) == 4 * len(ESTIMATORS)
