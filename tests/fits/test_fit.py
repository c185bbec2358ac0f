"""fits: a whole fit is right on known laws, null cases, other units and degenerate input, and survives a round trip."""

import json
import math
from dataclasses import fields

import numpy as np
import pandas as pd
import pytest
from traces import Recorded

from smoothdiag.fits import SmoothnessFit, Verdict, fit_smoothness


def norms(seed=0, n=300, low=-1.5, high=1.5):
    return 10 ** np.random.default_rng(seed).uniform(low, high, n)


def table(x, y, **columns):
    return pd.DataFrame({"grad_norm": x, "smoothness": y, "saturation": 0.1} | columns)


def fit(x, y, **columns):
    return fit_smoothness(table(x, y, **columns), num_boot=100)


def noisy(seed, n=300, deviation=0.2):
    return np.exp(deviation * np.random.default_rng(1000 + seed).standard_normal(n))


X = norms()


def test_exponential_law_returns_its_constants():
    found = fit(X, 0.7 + 3 * X)
    assert pytest.approx(0.7, rel=1e-6) == found.L0
    assert pytest.approx(3, rel=1e-6) == found.L1
    assert found.verdict is Verdict.L0L1
    assert found.coverage == 1
    assert found.loglog_slope == pytest.approx(found.implied_slope, rel=1e-9)
    assert found.step_cap == pytest.approx(1 / 3)
    assert found.max_lr == pytest.approx(1 / 0.7)
    np.testing.assert_allclose(found.predict([0, 1, 2]), [0.7, 3.7, 6.7], rtol=1e-6)


def test_quadratic_is_constant():
    found = fit(X, np.full(300, 5.0))
    assert abs(found.L1) < 1e-6
    assert pytest.approx(5) == found.L0
    assert found.verdict is Verdict.CONSTANT


@pytest.mark.thorough
@pytest.mark.parametrize("law", [lambda x: np.hypot(0.5, 3 * x), lambda x: np.maximum(0.5, 3 * x)])
def test_cosh_and_hybrid_are_bounded_by_a_line(law):
    x = norms(low=-3, high=2, n=500)
    found = fit(x, law(x))
    assert found.verdict is Verdict.L0L1
    assert pytest.approx(0.5, rel=0.08) == found.L0
    assert pytest.approx(3, rel=0.08) == found.L1


@pytest.mark.thorough
@pytest.mark.parametrize("n", [3, 4, 6])
def test_powers_of_the_norm_are_powers(n):
    found = fit(X, 2 * X ** ((n - 2) / (n - 1)))
    assert found.verdict is Verdict.POWER
    assert found.comparison[2].exponent == pytest.approx((n - 2) / (n - 1), abs=0.01)
    assert found.loglog_slope == pytest.approx((n - 2) / (n - 1), abs=1e-9)


def test_square_of_the_gradient_norm_is_a_power_too():
    assert fit(X, X**2).verdict is Verdict.POWER


@pytest.mark.thorough
def test_true_law_with_noise_is_recognised():
    found = [
        fit(norms(seed, low=-1, high=1), (1 + 2 * norms(seed, low=-1, high=1)) * noisy(seed)) for seed in range(12)
    ]
    assert sum(one.verdict is Verdict.L0L1 for one in found) >= 11
    # The .95 quantile of the noise lifts both constants by the same factor.
    lift = np.exp(1.645 * 0.2)
    assert np.median([one.L0 for one in found]) == pytest.approx(lift, rel=0.05)
    assert np.median([one.L1 for one in found]) == pytest.approx(2 * lift, rel=0.05)


@pytest.mark.thorough
def test_noise_that_ignores_the_gradient_norm_has_no_l1():
    verdicts = [fit(norms(seed), noisy(seed, deviation=0.5)).verdict for seed in range(12)]
    assert set(verdicts) <= {Verdict.CONSTANT, Verdict.NOT_IDENTIFIED}


def test_normalised_steps_give_an_artefact_in_spite_of_perfect_numbers():
    saturation = np.random.default_rng(0).uniform(0.7, 1, 300)
    found = fit(X, 10 * X, saturation=saturation, status="saturated")
    assert found.verdict is Verdict.ARTEFACT
    assert found.spearman == pytest.approx(1)
    assert (found.num_points, found.coverage) == (300, 1)
    assert "saturation" in found.verdict_reason


@pytest.mark.thorough
def test_less_than_a_decade_is_not_identified():
    x = norms(low=0, high=0.9)
    assert fit(x, 1 + 2 * x).verdict is Verdict.NOT_IDENTIFIED


@pytest.mark.thorough
@pytest.mark.parametrize(("a", "b"), [(7.3, 1.0), (1.0, 0.013), (1e-4, 300.0)])
def test_units_move_every_field_as_they_should(a, b):
    # The loss times a; parameters in other units, f(b x).
    y, d = (1 + 2 * X) * noisy(0), 0.01 * norms(5)
    loss, lr = 2 + X**0.7 * noisy(7), 0.01 * noisy(8)
    columns = {"step_norm": d, "noise_floor": 1e-3, "loss": loss, "grad_variance": 0.09 * X**2, "lr": lr}
    first = fit(X, y, **columns)
    columns = {"step_norm": d / b, "noise_floor": 1e-3 * a * b**2, "loss": a * loss, "lr": lr / (a * b**2)}
    other = fit(a * b * X, a * b**2 * y, grad_variance=0.09 * (a * b * X) ** 2, **columns)
    L0, L1, x = a * b**2, b, a * b
    moved = first.to_dict()
    for name, factor in {"L0": L0, "L0_interval": L0, "L1": L1, "L1_interval": L1, "grad_norm_quantiles": x}.items():
        moved[name] = np.multiply(moved[name], factor).tolist()
    moved["lines"] = {name: [p * L0, q * L1] for name, (p, q) in moved["lines"].items()}
    moved["replicates"] = [[p * L0, q * L1] for p, q in moved["replicates"]]
    moved["corners"] = [[p * L1, q * L0] for p, q in moved["corners"]]
    for score in (*moved["comparison"], *moved["loss_floors"]):
        score["intercept"] *= L0
        score["coefficient"] *= L0 / (a if score["name"] == "loss gap" else x) ** score["exponent"]
        score["floor"] = score["floor"] if isinstance(score["floor"], dict) else a * score["floor"]
    assert len(moved["loss_floors"]) > 3
    moved["corrected"] |= {"L0": L0 * moved["corrected"]["L0"], "L1": L1 * moved["corrected"]["L1"]}
    assert_close(other.to_dict(), moved)
    assert other.step_cap == pytest.approx(first.step_cap / b, rel=1e-8)
    assert other.max_lr == pytest.approx(first.max_lr / L0, rel=1e-8)
    np.testing.assert_allclose(other.step_cap_interval, np.divide(first.step_cap_interval, b), rtol=1e-8)
    np.testing.assert_allclose(other.max_lr_interval, np.divide(first.max_lr_interval, L0), rtol=1e-8)


def assert_close(found, expected):
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name in expected:
            if name not in ("verdict_reason", "evidence"):  # Text holds rounded constants.
                assert_close(found[name], expected[name])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, two in zip(found, expected, strict=True):
            assert_close(one, two)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-8, abs=1e-12)
    else:
        assert found == expected


def test_round_trip_through_json_is_exact():
    for found in (fit(X, (1 + 2 * X) * noisy(0)), fit(X[:5], X[:5])):
        plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
        again = SmoothnessFit.from_dict(plain)
        assert again.to_dict() == found.to_dict()
        assert repr(again) == repr(found)
        assert {type(getattr(again, f.name)) for f in fields(again)} == {
            type(getattr(found, f.name)) for f in fields(found)
        }
    with pytest.raises(ValueError, match="version"):
        SmoothnessFit.from_dict(plain | {"version": 99})


@pytest.mark.thorough
def test_same_seed_gives_the_same_fit_whatever_the_order_of_rows():
    frame = table(X, (1 + 2 * X) * noisy(0), step=np.arange(300))
    first, again = fit_smoothness(frame, num_boot=50), fit_smoothness(frame.sample(frac=1, random_state=0), num_boot=50)
    assert first.to_dict() == again.to_dict()
    assert first.L1_interval != fit_smoothness(frame, num_boot=50, seed=1).L1_interval


def test_unusable_rows_are_counted_and_never_enter():
    clean = table(X, 1 + 2 * X, step=np.arange(300.0), status="ok", group="all", estimator="local", data="step")
    bad = clean.iloc[:10].copy()
    bad["grad_norm"] = [np.nan, np.inf, -1, 0, 1, 1, 1, 1, 1, 1]
    bad["smoothness"] = [1, 1, 1, 1, np.nan, -np.inf, -5, 0, 1e9, 1e9]
    bad["status"] = ["ok"] * 8 + ["below_noise_floor", "new_word"]
    other = clean.iloc[:4].assign(smoothness=1e9, group="layer")
    found = fit_smoothness(pd.concat([clean, bad, other]), num_boot=50)
    assert found.dropped == {
        "below_noise_floor": 1,
        "negative": 2,
        "new_word": 1,
        "non_finite": 4,
        "zero_gradient": 1,
        "zero_smoothness": 1,
        "other_group": 4,
    }
    assert (found.num_points, found.L1) == (300, pytest.approx(2))
    assert "negative 2" in found.summary()


def test_local_rows_are_preferred_and_estimators_never_pooled():
    both = pd.concat([table(X, 9 * X, estimator="path"), table(X, 1 + 2 * X, estimator="local")])
    found = fit_smoothness(Recorded(both), num_boot=50)
    assert (found.estimator, found.num_points, found.L1) == ("local", 300, pytest.approx(2))
    assert pytest.approx(9) == fit_smoothness(both, estimator="path", num_boot=50).L1
    mixed = both.replace({"estimator": {"path": "mine", "local": "yours"}})
    with pytest.raises(ValueError, match=r"\['mine', 'yours'\]"):
        fit_smoothness(mixed)
    with pytest.raises(ValueError, match="Found `estimator = 'critical'`"):
        fit_smoothness(both, estimator="critical")


def test_variants_are_never_chosen_beside_what_they_vary():
    names = ["hessian_norm", "local_random", "local_update", "local_preconditioned", "path_debiased"]
    frames = [table(X, (1 + k) * (1 + 2 * X), estimator=name) for k, name in enumerate(names)]
    found = fit_smoothness(pd.concat(frames), num_boot=50)
    assert (found.estimator, found.num_points, found.L1) == ("hessian_norm", 300, pytest.approx(2))
    assert fit_smoothness(frames[3], num_boot=50).estimator == "local_preconditioned"
    with pytest.raises(ValueError, match="local_preconditioned.*path_debiased"):
        fit_smoothness(pd.concat(frames[3:]))


def test_statuses_that_may_enter_and_those_that_may_not():
    usable = ["ok", "saturated", "kink_limited", "not_reproduced"]
    bad = ["rounding_limited", "halves_disagree", "data_changed", "below_noise_floor"]
    found = fit(X[:296], 1 + 2 * X[:296], status=[*usable, *bad] * 37)
    assert found.num_points == 148
    assert found.dropped == dict.fromkeys(sorted(bad), 37)


def test_reason_of_a_law_says_what_was_not_shown():
    known, unknown = fit(X, 1 + 2 * X, estimator="local"), fit(X, 1 + 2 * X, estimator="local", saturation=np.nan)
    assert "about the probed direction and not about ||H||" in known.verdict_reason
    assert "not checked" not in known.verdict_reason
    assert unknown.verdict is Verdict.L0L1
    assert "not checked" in unknown.verdict_reason
    assert "probed direction" not in fit(X, 1 + 2 * X, estimator="hessian_norm").verdict_reason


@pytest.mark.thorough
@pytest.mark.parametrize(("a", "b"), [(1e150, 1e150), (1e-150, 1e-150), (1e150, 1e-100), (1e200, 1.0), (1.0, 1e-200)])
def test_extreme_units_change_nothing(a, b):
    y = (1 + 2 * X) * noisy(0)
    found, usual = fit(a * X, b * y), fit(X, y)
    assert found.verdict is usual.verdict
    assert found.L0 / b == pytest.approx(usual.L0, rel=1e-8)
    assert found.L1 / b * a == pytest.approx(usual.L1, rel=1e-8)
    assert "nan" not in found.verdict_reason


@pytest.mark.parametrize("n", [20, 23])
def test_reason_of_a_short_run_holds_no_nan(n):
    found = fit_smoothness(table(X[:n], (1 + 2 * X)[:n]), num_boot=50, quantile=0.5)
    assert found.verdict is Verdict.NOT_IDENTIFIED
    assert "nan" not in found.verdict_reason


class Attached:
    trace = None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("run.jsonl", r"read a file with `Trace.read`. Found `data = 'run.jsonl'`"),
        (Attached(), "pass its `trace`. Found `data = Attached`"),
        (None, "Found `data = NoneType`"),
    ],
)
def test_what_is_no_table_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        fit_smoothness(wrong)


def test_kinds_of_data_are_never_pooled():
    with pytest.raises(ValueError, match=r"held-out.*give each a file of its own, or in Python .*query\('data == "):
        fit_smoothness(table(X, X, data=["step", "held-out"] * 150))


@pytest.mark.parametrize("n", [1, 2, 7, 15])
@pytest.mark.parametrize("equal", [False, True])
def test_few_or_equal_rows_identify_nothing(n, equal):
    x = np.full(n, 2.0) if equal else X[:n]
    found = fit(x, 1 + 2 * x)
    assert found.verdict is Verdict.NOT_IDENTIFIED
    assert {flag.name for flag in found.flags} & {"few points", "range"}
    assert "VERDICT NOT_IDENTIFIED" in found.summary()
    if n < 8:
        assert found.L1_interval == (0, math.inf)


def test_many_equal_rows_identify_nothing():
    assert fit(np.full(100, 2.0), np.full(100, 3.0)).verdict is Verdict.NOT_IDENTIFIED


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf, -1.0])
@pytest.mark.parametrize("column", ["grad_norm", "smoothness"])
def test_rows_without_any_use_are_an_error_that_counts_them(column, value):
    with pytest.raises(ValueError, match="300 rows, all dropped .*: 300"):
        fit_smoothness(table(X, X).assign(**{column: value}))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"quantile": 1.5}, r"Parameter `quantile` should be in \(0, 1\). Found `quantile = 1.5`"),
        ({"quantile": math.nan}, "Found `quantile = nan`"),
        ({"num_boot": 0}, "Found `num_boot = 0`"),
        ({"group": "head"}, "Found `group = 'head'`"),
    ],
)
def test_wrong_parameters_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        fit_smoothness(table(X, X), **wrong)


def test_tables_without_their_columns_or_rows_are_refused():
    with pytest.raises(ValueError, match="smoothness"):
        fit_smoothness(pd.DataFrame({"grad_norm": X}))
    with pytest.raises(ValueError, match="Found none"):
        fit_smoothness(table(X[:0], X[:0]))


def test_frontier_covers_every_row_and_touches_one():
    y = (1 + 2 * X) * noisy(0)
    found = fit(X, y)
    for at in (None, np.linspace(0, 10, 30)):
        for row in found.frontier(at).itertuples():
            slack = row.L0 + row.L1 * X - y
            assert slack.min() >= -1e-9
            assert slack.min() < 1e-9 or row.L0 == 0


def test_summary_says_what_was_found():
    text = fit(X, (1 + 2 * X) * noisy(0)).summary()
    for part in (
        "L0",
        "L1",
        "90% interval",
        "loss / parameter^2",
        "rank correlation",
        "no flags",
        "VERDICT L0L1",
        "reason",
    ):
        assert part in text
    assert max(map(len, text.splitlines())) <= 110
    flagged = fit(X, 1 + 2 * X, saturation=np.nan).summary()
    assert "saturation unknown" in flagged
    assert "remedy" in flagged


def test_comparison_is_a_table():
    assert list(pd.DataFrame(fit(X, 1 + 2 * X).comparison)["name"]) == [*("constant", "affine", "power", "isotonic")]
