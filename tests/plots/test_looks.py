"""plots.looks: limits show the rows, and only log-spaced steps count as such."""

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt

from smoothdiag.fits import Verdict
from smoothdiag.names import ESTIMATORS, SUFFIXES, VERDICTS, readable
from smoothdiag.plots.looks import broken, is_log_spaced, limits
from smoothdiag.plots.over_steps import plot_trace
from smoothdiag.plots.smoothness import plot_smoothness


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


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("lm_head", ["lm_head"]),
        ("model.layers.11.self_attn.q_proj", ["model.layers.11.", "self_attn.q_proj"]),
        ("x" * 30, ["x" * 20, "x" * 10]),
        ("a.b" * 40, ["a.ba.ba.ba.ba.ba.ba.", "…", "ba.ba.ba.b"]),
        ("$a$", [r"\$a\$"]),
    ],
)
def test_long_names_are_broken_after_dots_and_never_cut_below_three_lines(name, lines) -> None:
    assert broken(name).split("\n") == lines


def test_two_over_the_rate_is_drawn_only_where_steps_may_follow_gradients() -> None:
    table = pd.DataFrame({"step": [0, 1], "grad_norm": [1.0, 2.0], "smoothness": [1.0, 3.0], "lr": 0.5})
    for follows in (True, None, False):
        table.attrs["follows_gradients"] = follows
        drawn = [*plot_trace(table)[-1].get_lines(), *plot_smoothness(table, ax=plt.subplots()[1]).get_lines()]
        labels = [str(line.get_label()) for line in drawn if str(line.get_label()).startswith("2/lr")]
        assert len(labels) == (0 if follows is False else 2)
