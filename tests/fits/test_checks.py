"""fits.checks, fits.verdict: every null test fires on what it is meant for, and every rule of the verdict decides."""

import numpy as np
import pytest
from scipy.stats import rankdata, spearmanr

from smoothdiag.fits import Flag, ModelScore, Verdict
from smoothdiag.fits.affine import Line, quantile_line
from smoothdiag.fits.checks import check, direction
from smoothdiag.fits.correlations import Correlations, correlate, decades, loglog_slope, rank_correlations
from smoothdiag.fits.lossgap import LossGap
from smoothdiag.fits.rows import Rows, step_blocks
from smoothdiag.fits.surrogates import shuffled
from smoothdiag.fits.verdict import decide

N = 200
RNG = np.random.default_rng(0)
X = 10 ** RNG.uniform(-1, 1, N)
UNKNOWN = np.full(N, np.nan)
STEP = np.arange(float(N))


LINE = Line(1.0, 2.0)


def flags(
    x=X,
    y=None,
    *,
    estimator="local",
    correlations=(0.9, 0.9),
    num_effective=100.0,
    dropped=None,
    line=LINE,
    q=0.95,
    **columns,
):
    y = 1 + 2 * x if y is None else y
    n = len(x)
    known = {"saturation": np.full(n, 0.1), "noise_floor": UNKNOWN[:n], "step_norm": UNKNOWN[:n]}
    known["status"] = np.full(n, "ok", dtype=object)
    known |= {"loss": UNKNOWN[:n], "grad_variance": UNKNOWN[:n], "lr": UNKNOWN[:n], "run": np.zeros(n)}
    labels = {"estimator": estimator, "group": "all", "data": "fixed", "dropped": dropped or {}}
    rows = Rows(x=x, y=y, step=STEP[:n], recorded=x, **(known | columns), **labels)
    found = check(rows, num_effective, Correlations(*correlations), line, q, np.ones(n))
    return {flag.name: flag for flag in found}


def test_sound_rows_set_no_flag():
    assert flags() == {}


@pytest.mark.parametrize(("level", "found"), [(0.45, False), (0.55, True)])
def test_median_saturation_is_fatal_above_a_half(level, found):
    saturation = np.full(N, level)
    saturation[:80] = np.where(level > 0.5, 0.01, 0.99)  # The mean lies on the other side.
    assert (flags(saturation=saturation).get("saturation") is not None) is found
    if found:
        assert flags(saturation=saturation)["saturation"].fatal


@pytest.mark.parametrize("share", [0.0, 0.4, 0.6])
def test_saturation_that_most_rows_lack_is_said(share):
    saturation = np.where(np.arange(N) < share * N, 0.1, np.nan)
    assert ("saturation unknown" in flags(saturation=saturation)) is (share < 0.5)


def test_saturation_of_the_large_gradients_and_of_the_highest_rows_counts():
    # Nearly half of the rows, so the median over all of them is low.
    assert flags(saturation=np.where(np.quantile(X, 0.55) < X, 0.7, 0.1))["saturation"].fatal
    y = np.where(np.arange(N) % 10 == 0, 1.1, 0.6) * (1 + 2 * X)
    on_top = flags(y=y, saturation=np.where(y > 1 + 2 * X, 0.7, 0.1))["saturation"]
    assert "at or above the line" in on_top.evidence
    assert "saturation" not in flags(y=y, saturation=np.where(y > 1 + 2 * X, 0.1, 0.4))


@pytest.mark.parametrize(("below", "outcome"), [(10, None), (60, False), (300, True)])
def test_share_of_rows_below_the_noise_floor(below, outcome):
    flag = flags(dropped={"below_noise_floor": below}).get("noise floor")
    assert (None if flag is None else flag.fatal) is outcome


def test_rows_of_zero_smoothness_count_as_noise():
    assert "noise floor" in flags(dropped={"zero_smoothness": 60})
    assert flags(dropped={"zero_smoothness": 150, "rounding_limited": 150})["noise floor"].fatal


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


def test_small_noise_on_long_steps_is_a_doubt_of_path_rows_and_none_of_local_ones():
    # Local rows shorten their radius where the gradient changes much, so theirs falls with the radius by design.
    step_norm = 10 ** RNG.uniform(-2, 0, N)
    assert not flags(y=0.01 * X / step_norm, step_norm=step_norm, estimator="path")["step length"].fatal
    assert "step length" not in flags(y=0.01 * X / step_norm, step_norm=step_norm)


@pytest.mark.thorough
def test_step_length_and_curvature_that_drift_together_are_no_noise():
    time = STEP / N
    drift = {"y": (1 + 2 * X) * np.exp(-time), "step_norm": 1e-3 * (1 + time), "estimator": "path"}
    assert "step length" not in flags(**drift)
    # A jump of the rate is no drift: noise follows one over the length across it.
    length = np.where(STEP < 90, 0.1, 0.02)
    assert flags(y=0.01 * X / length, step_norm=length, estimator="path")["step length"]


def test_curvature_that_follows_the_learning_rate():
    rate = np.where(STEP < 100, 0.1, 0.02)
    noise = np.exp(0.1 * RNG.standard_normal(N))
    assert flags(y=2 / rate * noise, lr=rate)["learning rate"].blocking
    # With a slope of its own in the gradient norm the rate is only a doubt.
    assert not flags(y=2 / rate * X**0.5 * noise, lr=rate)["learning rate"].blocking
    assert "learning rate" not in flags(y=(1 + 2 * X) * noise, lr=rate)
    assert "learning rate" not in flags(y=2 / 0.1 * noise, lr=np.full(N, 0.1))


def surrogate_flag(x, y):
    known = {name: UNKNOWN for name in ("saturation", "noise_floor", "step_norm", "loss", "grad_variance", "lr")}
    labels = {"estimator": "local", "group": "all", "data": "fixed", "dropped": {}, "status": np.full(N, "ok")}
    rows = Rows(x=x, y=y, step=STEP, run=np.zeros(N), recorded=x, **known, **labels)
    return shuffled(rows, quantile_line(x, y, 0.9), 0.9)


def test_drift_explains_as_much_in_surrogates():
    rng = np.random.default_rng(0)
    level = 10 ** (1 - 2 * STEP / N)
    noise = np.exp(0.3 * rng.standard_normal((2, N)))
    assert surrogate_flag(level * noise[0], (1 + 2 * level) * noise[1]).blocking
    assert surrogate_flag(level * noise[0], (1 + 2 * level * noise[0]) * noise[1]) is None
    assert surrogate_flag(X, (1 + 2 * X) * noise[1]) is None
    assert surrogate_flag(X, np.ones(N)) is None  # No slope, nothing to explain.


def test_range_below_a_decade():
    assert flags(x=np.logspace(0, 0.9, N))["range"].blocking
    assert "range" not in flags(x=np.logspace(0, 1.2, N))


def test_two_groups_of_gradient_norms_are_no_range():
    x = np.where(np.arange(N) % 2, 0.3, 10.0)
    assert flags(x=x)["range"].blocking
    x[:3] = 2.0
    assert "range" not in flags(x=x)


def test_few_points():
    assert flags(x=X[:19])["few points"].blocking
    assert "few points" in flags(num_effective=9.0, q=0.5)
    assert flags(num_effective=79.0)["few points"].evidence.endswith("should be at least 4 beyond the quantile")
    assert "few points" in flags(num_effective=79.0)
    assert "few points" not in flags(num_effective=80.0)
    assert "few points" in flags(q=0.99)


def test_line_that_misses_its_quantile():
    assert flags(line=Line(0.5, 1.5))["coverage"].blocking
    # Rows on the line are on both sides of it; falling smoothness leaves a slope of zero that cannot fit.
    assert "coverage" not in flags(q=0.2)
    assert "coverage" not in flags(line=Line(1.0, 0.0), correlations=(-0.5, -0.5))


def test_few_rows_that_decide_the_slope():
    y = 1 + 2 * X
    y[(STEP >= 96) & (STEP < 112)] *= 1 + 2 * X[(STEP >= 96) & (STEP < 112)]
    assert "steps" in flags(y=y, line=quantile_line(X, y, 0.95, np.ones(N)))["leverage"].evidence
    assert not flags(y=y, line=quantile_line(X, y, 0.95, np.ones(N)))["leverage"].blocking


@pytest.mark.parametrize(("share", "found", "blocking"), [(0, False, False), (0.05, True, False), (0.6, True, True)])
def test_gradients_that_are_not_those_of_the_run(share, found, blocking):
    flag = flags(status=np.where(np.arange(N) < share * N, "not_reproduced", "ok")).get("not reproduced")
    assert (flag is not None) is found
    assert found is False or flag.blocking is blocking


def test_kinks_on_most_rows_are_said():
    assert not flags(status=np.where(np.arange(N) < 0.6 * N, "kink_limited", "ok"))["kinks"].blocking
    assert "kinks" not in flags(status=np.where(np.arange(N) < 0.4 * N, "kink_limited", "ok"))


def test_time_trend_and_rows_tied_to_time():
    assert flags(correlations=(0.8, 0.05))["time trend"].blocking
    assert "time trend" not in flags(correlations=(0.8, 0.3))
    assert flags(correlations=(0.9, np.nan))["tied to time"].blocking
    assert flags(correlations=(np.nan, np.nan)) == {}


@pytest.mark.parametrize(
    ("within", "found"), [((0.2, 0.3, 0.15), True), ((0.3, 0.3, 0.15), False), ((0.3, 0.1, 0.15), True)]
)
def test_correlation_that_blocks_of_steps_do_not_show(within, found):
    assert ("time trend" in flags(correlations=(0.8, 0.5, *within))) is found
    assert "time trend" not in flags(correlations=(0.3, 0.2, 0.2, 0.2, 0.25))  # Weak everywhere.


def test_direction_contradicts_only_where_one_rises_and_the_other_cannot():
    rising, flat, bounds = (LINE, (1.8, 2.2)), (Line(1.0, 0.01), (0.0, 0.05)), (0.1, 10.0)
    assert direction(*rising, *flat, bounds).blocking
    assert "along random directions and not along the gradient" in direction(*flat, *rising, bounds).cause
    assert direction(*rising, *rising, bounds) is None
    assert direction(*rising, Line(1.0, 0.5), (0.0, 9.0), bounds) is None


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


def test_common_steps_correlate_raw_and_not_within_blocks():
    level = np.where(STEP < 75, 10.0, 0.3)
    noise = [np.exp(0.1 * RNG.standard_normal(N)) for _ in range(2)]
    found = correlate(level * noise[0], (1 + level) * noise[1], STEP, np.zeros(N))
    assert found.raw > 0.6
    assert found.within < 0.25
    same = correlate(level * noise[0], level * noise[0], STEP, np.zeros(N))
    assert same.within == pytest.approx(1)
    assert same.within_given_time == pytest.approx(1)


def test_drift_inside_the_blocks_is_taken_out():
    drift = np.exp(-STEP / 10)
    noise = [np.exp(0.5 * RNG.standard_normal(N)) for _ in range(2)]
    found = correlate(drift * noise[0], drift * noise[1], STEP, np.zeros(N))
    assert found.within > 0.4
    assert found.within_given_time < found.critical


def test_blocks_hold_steps_of_one_run():
    run = RNG.permutation(np.repeat([0.0, 1.0, 2.0], [100, 95, 5]))
    blocks = step_blocks(STEP, run, 12)
    assert np.sort(np.concatenate(blocks)).tolist() == list(range(N))
    assert [len(np.unique(run[block])) for block in blocks] == [1] * 13
    assert all((np.diff(STEP[block]) > 0).all() for block in blocks)


def test_a_jump_from_run_to_run_is_no_correlation_within_blocks():
    # Seven runs against twelve blocks: blocks cut without regard to runs would hold the jumps between their levels.
    run = np.floor(STEP * 7 / N)
    level = np.where(run % 2 == 0, 10.0, 0.3)
    noise = [np.exp(0.1 * RNG.standard_normal(N)) for _ in range(2)]
    found = correlate(level * noise[0], (1 + level) * noise[1], STEP, run)
    assert found.raw > 0.6
    assert found.within < 0.2


def test_correlations_without_meaning_are_nan():
    assert np.isnan(rank_correlations(X, np.ones(N), STEP)).all()
    raw, partial = rank_correlations(np.sort(X), np.sort(X), STEP)
    assert raw == pytest.approx(1)
    assert np.isnan(partial)


def test_slope_and_decades_of_a_power():
    assert loglog_slope(X, 3 * X**0.7) == pytest.approx(0.7, rel=1e-12)
    assert np.isnan(loglog_slope(1 + 2.3e-16 * np.arange(5), np.arange(1.0, 6)))  # Constant up to rounding.
    assert decades(np.logspace(0, 2, 1001)) == pytest.approx(1.9, rel=1e-9)


def loss_gap(gain=0.5, low=0.3, later=0.01, beyond=0.0, time=None):
    score = ModelScore("loss gap", 1, 2, 1, 0.1, later, 0.9, (low, 0.95), gain, (low, 0.9), floor=0.0)
    return LossGap(score, (score,), 0.05, beyond, (beyond - 0.01, 1.0), X, X > 0, time)


DOUBT = Flag("time trend", "", "", "")


def verdict(
    *,
    gap=None,
    found=(),
    line=(1.0, 2.0),
    interval=(1.8, 2.2),
    exponent=1.0,
    gain=0.0,
    gain_low=-0.1,
    skill=0.9,
    skill_low=0.5,
    top=0.9,
    exponents=None,
):
    nothing = (np.nan, np.nan)
    comparison = (
        ModelScore("constant", 1, 0, 0, 1, 1, 0, (0, 0), -1, nothing),
        ModelScore("affine", 1, 2, 1, 0.1, 0.1, skill, (skill_low, 0.95), 0, (0, 0)),
        ModelScore("power", 1, 2, exponent, 0.1, 0.1, 0.9, nothing, gain, (gain_low, 0.9)),
    )
    free = {"saturation", "kinks"}
    names = tuple(Flag(name, "", "", "", fatal=name == "saturation", blocking=name not in free) for name in found)
    return decide(
        names, Line(*line), interval, comparison, (0.1, 10.0), top, exponents=exponents or (exponent, exponent), gap=gap
    )[0]


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ({}, Verdict.L0L1),
        ({"found": ["kinks"]}, Verdict.L0L1),
        ({"found": ["tied to time"]}, Verdict.NOT_IDENTIFIED),
        ({"found": ["coverage"]}, Verdict.NOT_IDENTIFIED),
        ({"found": ["coverage"], "exponent": 0.6, "gain": 0.5, "gain_low": 0.3}, Verdict.POWER),
        ({"found": ["range"], "exponent": 0.6, "gain": 0.5, "gain_low": 0.3}, Verdict.NOT_IDENTIFIED),
        ({"found": ["saturation", "range"]}, Verdict.ARTEFACT),
        ({"found": ["range"]}, Verdict.NOT_IDENTIFIED),
        ({"found": ["few points"]}, Verdict.NOT_IDENTIFIED),
        ({"found": ["time trend"]}, Verdict.NOT_IDENTIFIED),
        ({"line": (1.0, 0.01), "interval": (0.0, 0.05)}, Verdict.CONSTANT),
        ({"line": (1.0, 0.01), "interval": (0.005, 0.05)}, Verdict.CONSTANT),
        ({"line": (1.0, 0.1), "interval": (0.0, 0.9)}, Verdict.NOT_IDENTIFIED),
        ({"exponent": 0.6, "gain": 0.5, "gain_low": 0.3}, Verdict.POWER),
        ({"exponent": 0.6, "gain": 0.5, "gain_low": 0.3, "exponents": (0.5, 1.0)}, Verdict.L0L1),
        ({"exponent": 0.6, "gain": 0.5, "gain_low": -0.1, "exponents": (0.5, 1.0)}, Verdict.L0L1),
        ({"exponent": 0.9, "gain": 0.5, "gain_low": 0.3, "exponents": (0.8, 1.1)}, Verdict.L0L1),
        ({"exponent": 0.6, "gain": 0.04, "gain_low": 0.03, "exponents": (0.5, 1.2)}, Verdict.L0L1),
        ({"exponent": 0.9, "gain": 0.5, "gain_low": 0.3}, Verdict.NOT_IDENTIFIED),
        ({"exponent": 0.6, "gain": 0.5, "gain_low": -0.1}, Verdict.NOT_IDENTIFIED),
        ({"exponents": (0.25, 1.5)}, Verdict.NOT_IDENTIFIED),
        ({"exponents": (1.2, 1.5), "top": 1.0}, Verdict.L0L1),
        ({"exponents": (1.2, 1.5), "top": 1.3}, Verdict.NOT_IDENTIFIED),
        ({"exponents": (np.nan, np.nan)}, Verdict.NOT_IDENTIFIED),
        ({"exponent": 1.3, "gain": 0.5, "gain_low": 0.3}, Verdict.L0L1),
        ({"exponent": 2.0, "gain": 0.5, "gain_low": 0.3, "top": 1.9}, Verdict.POWER),
        ({"gap": loss_gap()}, Verdict.LOSS_GAP),
        ({"gap": loss_gap(), "found": ["time trend", "coverage", "surrogates"]}, Verdict.LOSS_GAP),
        ({"gap": loss_gap(), "found": ["few points"]}, Verdict.NOT_IDENTIFIED),
        ({"gap": loss_gap(), "found": ["saturation"]}, Verdict.ARTEFACT),
        ({"gap": loss_gap(low=-0.1)}, Verdict.L0L1),
        ({"gap": loss_gap(gain=0.04, low=0.01)}, Verdict.L0L1),
        ({"gap": loss_gap(later=0.0499)}, Verdict.L0L1),
        ({"gap": loss_gap(beyond=0.2)}, Verdict.L0L1),
        ({"gap": loss_gap(time=DOUBT)}, Verdict.L0L1),
        ({"skill": 0.15, "skill_low": 0.1}, Verdict.NOT_IDENTIFIED),
        ({"skill_low": -0.1}, Verdict.NOT_IDENTIFIED),
        ({"skill_low": np.nan}, Verdict.NOT_IDENTIFIED),
    ],
)
def test_rules_of_the_verdict(case, expected):
    assert verdict(**case) is expected
