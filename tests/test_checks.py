"""Every null test fires on what it is meant for and stays silent beside it; every rule of the verdict decides."""

import numpy as np
import pytest
from scipy.stats import rankdata, spearmanr

from smoothdiag.fits import Flag, ModelScore, Verdict
from smoothdiag.fits.affine import Line
from smoothdiag.fits.checks import Rows, check, decades, decide, loglog_slope, rank_correlations

N = 200
RNG = np.random.default_rng(0)
X = 10 ** RNG.uniform(-1, 1, N)
UNKNOWN = np.full(N, np.nan)
STEP = np.arange(float(N))


def flags(x=X, y=None, *, correlations=(0.9, 0.9), num_effective=100.0, dropped=None, **columns):
    y = 1 + 2 * x if y is None else y
    n = len(x)
    known = {"saturation": np.full(n, 0.1), "noise_floor": UNKNOWN[:n], "step_norm": UNKNOWN[:n], "lr": UNKNOWN[:n]}
    labels = {"estimator": "local", "group": "all", "data": "step", "dropped": dropped or {}}
    rows = Rows(x=x, y=y, step=STEP[:n], recorded=x, **(known | columns), **labels)
    return {flag.name: flag for flag in check(rows, num_effective, correlations)}


def test_sound_rows_set_no_flag():
    assert flags() == {}


@pytest.mark.parametrize(("level", "found"), [(0.45, False), (0.55, True)])
def test_median_saturation_is_fatal_above_a_half(level, found):
    saturation = np.full(N, level)
    saturation[:80] = np.where(level > 0.5, 0.01, 0.99)  # The mean lies on the other side.
    assert (flags(saturation=saturation).get("saturation") is not None) is found
    if found:
        assert flags(saturation=saturation)["saturation"].fatal


def test_unknown_saturation_is_said():
    assert not flags(saturation=UNKNOWN)["saturation unknown"].fatal


@pytest.mark.parametrize(("below", "outcome"), [(10, None), (60, False), (300, True)])
def test_share_of_rows_below_the_noise_floor(below, outcome):
    flag = flags(dropped={"below_noise_floor": below}).get("noise floor")
    assert (None if flag is None else flag.fatal) is outcome


@pytest.mark.parametrize(("factor", "outcome"), [(10.0, None), (2.0, False), (1.2, True)])
def test_distance_from_the_noise_floor(factor, outcome):
    flag = flags(noise_floor=(1 + 2 * X) / factor).get("noise floor")
    assert (None if flag is None else flag.fatal) is outcome


def test_difference_of_batches_shows_as_one_over_the_step_length():
    # The change of the gradient is noise: sqrt(2) times the noise, however long the step.
    step_norm = 10 ** RNG.uniform(-2, 0, N)
    noise = np.sqrt(2) * X * np.exp(0.05 * RNG.standard_normal(N))
    assert flags(y=noise / step_norm, step_norm=step_norm)["step length"].fatal
    assert "step length" not in flags(step_norm=step_norm)
    # One length per gradient norm, up to a wobble: nothing to compare.
    wobble = np.exp(0.03 * RNG.standard_normal(N))
    assert "step length" not in flags(y=noise / (X * wobble), step_norm=X * wobble)


def test_small_noise_on_long_steps_is_a_doubt_and_not_fatal():
    step_norm = 10 ** RNG.uniform(-2, 0, N)
    assert not flags(y=0.01 * X / step_norm, step_norm=step_norm)["step length"].fatal


def test_range_below_a_decade():
    assert "range" in flags(x=np.logspace(0, 0.9, N))
    assert "range" not in flags(x=np.logspace(0, 1.2, N))


def test_few_points():
    assert "few points" in flags(x=X[:19])
    assert "few points" in flags(num_effective=9.0)


def test_time_trend_and_rows_tied_to_time():
    assert "time trend" in flags(correlations=(0.8, 0.05))
    assert "time trend" not in flags(correlations=(0.8, 0.3))
    assert "tied to time" in flags(correlations=(0.9, np.nan))
    assert flags(correlations=(np.nan, np.nan)) == {}


def test_fatal_flags_come_first():
    assert next(iter(flags(saturation=np.ones(N), x=np.logspace(0, 0.5, N)))) == "saturation"


def test_partial_rank_correlation_is_that_of_the_rank_residuals():
    time = STEP
    x = np.round(time / 40 + 3 * RNG.standard_normal(N))
    y = np.round(-time / 50 + 0.7 * x + 2 * RNG.standard_normal(N))
    raw, partial = rank_correlations(x, y, time)
    assert raw == pytest.approx(spearmanr(x, y).statistic, rel=1e-12)
    design = np.stack([np.ones(N), time], axis=1)
    u, v = (rankdata(s) - design @ np.linalg.lstsq(design, rankdata(s), rcond=None)[0] for s in (x, y))
    assert partial == pytest.approx(np.corrcoef(u, v)[0, 1], rel=1e-9)


def test_common_drift_correlates_raw_and_not_given_time():
    drift = np.exp(-STEP / 60)
    noise = [np.exp(0.5 * RNG.standard_normal(N)) for _ in range(2)]
    raw, partial = rank_correlations(drift * noise[0], drift * noise[1], STEP)
    assert raw > 0.6
    assert abs(partial) < 0.2


def test_correlations_without_meaning_are_nan():
    assert np.isnan(rank_correlations(X, np.ones(N), STEP)).all()
    raw, partial = rank_correlations(np.sort(X), np.sort(X), STEP)
    assert raw == pytest.approx(1)
    assert np.isnan(partial)


def test_slope_and_decades_of_a_power():
    assert loglog_slope(X, 3 * X**0.7) == pytest.approx(0.7, rel=1e-12)
    assert np.isnan(loglog_slope(1 + 2.3e-16 * np.arange(5), np.arange(1.0, 6)))  # Constant up to rounding.
    assert decades(np.logspace(0, 2, 1001)) == pytest.approx(1.9, rel=1e-9)


def verdict(
    *, found=(), line=(1.0, 2.0), interval=(1.8, 2.2), exponent=1.0, gain=0.0, gain_low=-0.1, skill_low=0.5, top=0.9
):
    nothing = (np.nan, np.nan)
    comparison = (
        ModelScore("constant", 1, 0, 0, 1, 1, 0, (0, 0), -1, nothing),
        ModelScore("affine", 1, 2, 1, 0.1, 0.1, 0.9, (skill_low, 0.95), 0, (0, 0)),
        ModelScore("power", 1, 2, exponent, 0.1, 0.1, 0.9, nothing, gain, (gain_low, 0.9)),
    )
    names = tuple(Flag(name, "cause", "evidence", "remedy", fatal=name == "saturation") for name in found)
    return decide(names, Line(*line), interval, comparison, (0.1, 10.0), top)[0]


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ({}, Verdict.L0L1),
        ({"found": ["tied to time"]}, Verdict.L0L1),
        ({"found": ["saturation", "range"]}, Verdict.ARTEFACT),
        ({"found": ["range"]}, Verdict.NOT_IDENTIFIED),
        ({"found": ["few points"]}, Verdict.NOT_IDENTIFIED),
        ({"found": ["time trend"]}, Verdict.NOT_IDENTIFIED),
        ({"line": (1.0, 0.01), "interval": (0.0, 0.05)}, Verdict.CONSTANT),
        ({"line": (1.0, 0.01), "interval": (0.005, 0.05)}, Verdict.CONSTANT),
        ({"line": (1.0, 0.1), "interval": (0.0, 0.9)}, Verdict.NOT_IDENTIFIED),
        ({"exponent": 0.6, "gain": 0.5, "gain_low": 0.3}, Verdict.POWER),
        ({"exponent": 0.6, "gain": 0.5, "gain_low": -0.1}, Verdict.L0L1),
        ({"exponent": 0.9, "gain": 0.5, "gain_low": 0.3}, Verdict.L0L1),
        ({"exponent": 0.6, "gain": 0.04, "gain_low": 0.03}, Verdict.L0L1),
        ({"exponent": 1.3, "gain": 0.5, "gain_low": 0.3}, Verdict.L0L1),
        ({"exponent": 2.0, "gain": 0.5, "gain_low": 0.3, "top": 1.9}, Verdict.POWER),
        ({"skill_low": -0.1}, Verdict.NOT_IDENTIFIED),
        ({"skill_low": np.nan}, Verdict.NOT_IDENTIFIED),
    ],
)
def test_rules_of_the_verdict(case, expected):
    assert verdict(**case) is expected
