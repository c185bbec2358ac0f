"""clipping.rule, clipping.table: the threshold satisfies its own inequality, and a doubtful fit gives none."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy.integrate import quad

from smoothdiag import SmoothdiagWarning, Trace
from smoothdiag.clipping import clip_rule, clip_table, step_rate
from smoothdiag.fits import Flag, ModelScore, Verdict, fit_smoothness
from smoothdiag.fits.base import HessianCheck

X = 10 ** np.random.default_rng(0).uniform(-1.5, 1.5, 200)
FIT = fit_smoothness(pd.DataFrame({"grad_norm": X, "smoothness": 1 + 2 * X, "saturation": 0.1}), num_boot=20)


def power_law(intercept: float, coefficient: float, exponent: float) -> dict:
    """The changes that make FIT a fit of this law."""
    score = ModelScore(
        "power", intercept, coefficient, exponent, *(0.1, 0.1, 0.9, (0.8, 1.0)), gain=0.5, gain_interval=(0.4, 0.6)
    )
    return {"verdict": Verdict.POWER, "comparison": (score,)}


POWER_ABOVE_ONE = power_law(1.0, 2.0, 1.5)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("dampening", [0.0, 0.5])
@pytest.mark.parametrize("kappa", [0.5, 1.0, 2.0])
def test_threshold_makes_the_effective_rate_just_safe(momentum, dampening, kappa):
    lr = 0.02
    rule = clip_rule(FIT, lr=lr, momentum=momentum, dampening=dampening, kappa=kappa)
    gain = (1 - dampening) / (1 - momentum) if momentum else 1.0  # Without momentum torch ignores the dampening.
    eta = lr * gain
    assert eta * (FIT.L0 + FIT.L1 * rule.threshold) == pytest.approx(kappa, rel=1e-12)
    assert rule.step_cap == pytest.approx(eta * rule.threshold, rel=1e-12)
    assert rule.max_lr * gain == pytest.approx(kappa / FIT.L0, rel=1e-12)
    assert (rule.source, rule.lr) == ("fit", pytest.approx(lr))


@pytest.mark.thorough
@pytest.mark.parametrize("lr", [None, 0.01, 0.3, 0.7, 2.0])
@pytest.mark.parametrize("noise", [None, 100.0])
def test_interval_of_the_threshold_is_that_of_rules_for_each_replicate(lr, noise):
    y = (1 + 2 * X) * np.exp(0.2 * np.random.default_rng(1).standard_normal(len(X)))
    frame = pd.DataFrame({"grad_norm": X, "smoothness": y, "saturation": 0.1})
    fit = replace(fit_smoothness(frame, num_boot=200, quantile=0.8), interval_freedom=math.inf)
    rule = clip_rule(fit, lr=lr, noise=noise)
    rules = [clip_rule(replace(fit, L0=L0, L1=L1), lr=rule.lr, noise=noise) for L0, L1 in fit.replicates]
    ends = np.quantile([one.threshold for one in rules], [0.05, 0.95])
    assert rule.source == "fit"
    np.testing.assert_allclose(rule.threshold_interval, ends, rtol=0.02)
    assert rule.threshold_interval[0] <= rule.threshold <= rule.threshold_interval[1]
    assert rule.threshold_interval[0] < rule.threshold_interval[1] or noise


def test_interval_of_the_threshold_is_infinite_where_the_slope_reaches_zero_and_unknown_without_a_fit():
    flat = replace(FIT, replicates=((1.0, 2.0),) + ((1.0, 0.0),) * 9)
    assert clip_rule(flat, lr=0.1).threshold_interval[1] == math.inf
    assert np.isnan(clip_rule(replace(FIT, replicates=()), lr=0.1).threshold_interval).all()
    assert np.isnan(clip_rule(replace(FIT, verdict=Verdict.NOT_IDENTIFIED), lr=0.1).threshold_interval).all()


def test_too_large_rate_is_called_unsafe_and_capped_in_length():
    rule = clip_rule(FIT, lr=0.3, momentum=0.9)
    assert "No threshold makes this rate safe" in rule.reason
    assert "3 times kappa/L0" in rule.reason
    assert "a learning rate of 0.05" in rule.reason
    assert rule.step_cap == pytest.approx(1 / (2 * FIT.L1))
    assert rule.threshold == pytest.approx(rule.step_cap / 3)


@pytest.mark.parametrize("kappa", [0.5, 1.0, 2.0])
def test_threshold_and_step_fall_with_the_rate_and_never_jump(kappa):
    rates = np.geomspace(0.05, 20, 400) * kappa / FIT.L0
    rules = [clip_rule(FIT, lr=float(rate), kappa=kappa) for rate in rates]
    thresholds, steps = (np.array([getattr(rule, name) for rule in rules]) for name in ("threshold", "step_cap"))
    assert (np.diff(np.log(thresholds)) < 0).all()
    assert np.diff(np.log(thresholds)).min() > -3 * np.diff(np.log(rates)).max()
    assert (np.diff(steps) < 1e-12 * steps[0]).all()
    assert steps[-1] == pytest.approx(kappa / (2 * FIT.L1))


def test_rate_between_the_recommended_and_the_largest_one_is_called_too_large():
    rule = clip_rule(FIT, lr=0.8)
    assert "too large" in rule.reason
    assert "kappa/(2 L0) = 0.5" in rule.reason
    assert "the product is 1.3" in rule.reason
    assert 0.8 * (FIT.L0 + FIT.L1 * rule.threshold) == pytest.approx(1.3)
    assert "too large" not in clip_rule(FIT, lr=0.499).reason


def test_free_rate_shares_kappa_between_rate_and_step():
    rule = clip_rule(FIT, momentum=0.9)
    assert rule.lr / (1 - 0.9) == pytest.approx(1 / (2 * FIT.L0))
    assert rule.step_cap == pytest.approx(1 / (2 * FIT.L1))
    assert rule.threshold == pytest.approx(FIT.L0 / FIT.L1)


def test_threshold_is_raised_above_the_noise():
    quiet, loud = clip_rule(FIT, lr=0.4, noise=0.01), clip_rule(FIT, lr=0.4, noise=2.0)
    assert quiet == clip_rule(FIT, lr=0.4)
    assert loud.threshold == 10
    assert loud.step_cap == pytest.approx(4)
    assert loud.reason.startswith("The threshold is 5 times the noise 2")
    assert "longest step is 4, where rate * (L0 + L1 * norm) reaches 8.4, above" in loud.reason
    unsafe = clip_rule(FIT, lr=3.0, noise=2.0)
    assert "longest step is 30" in unsafe.reason
    assert "held at" not in unsafe.reason


@pytest.mark.parametrize("momentum", [0.5, 0.9])
def test_average_that_is_clipped_is_shorter_than_what_was_recorded(momentum):
    fit = replace(FIT, verdict=Verdict.NOT_IDENTIFIED)
    raw, rule = (clip_rule(fit, lr=0.1, momentum=momentum, dampening=d) for d in (0.0, momentum))
    noise = np.random.default_rng(0).standard_normal(20_000)
    average = np.zeros_like(noise)
    for k in range(1, len(noise)):
        average[k] = momentum * average[k - 1] + (1 - momentum) * noise[k]
    assert rule.threshold / raw.threshold == pytest.approx(np.std(average), rel=0.05)
    assert math.isnan(rule.clip_rate)
    assert "unknown" in rule.reason
    assert "clips an unknown share" in str(rule)
    fitted = clip_rule(FIT, lr=0.1, momentum=momentum, dampening=momentum)
    assert fitted.threshold == pytest.approx(clip_rule(FIT, lr=0.1).threshold)
    assert math.isnan(fitted.clip_rate)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"verdict": Verdict.NOT_IDENTIFIED}, r"its verdict is NOT_IDENTIFIED (`print(fit.plan())` says what"),
        (
            {"verdict": Verdict.LOSS_GAP},
            "its verdict is LOSS_GAP: the loss sets smoothness there, and `sd.LossGapWarmup`",
        ),
        ({"hessian": HessianCheck(60, 0.5, (0.0, 0.1), False)}, "50% of them lie at or below it, and 95% should"),
        (POWER_ABOVE_ONE, "its verdict is POWER with the exponent 1.50. Smoothness grows faster"),
        ({"verdict": Verdict.CONSTANT}, "needs no threshold"),
        ({"L1_interval": (0.0, 3.0)}, "contains zero"),
        ({"L1_interval": (math.nan, math.nan)}, "contains zero"),
        ({"flags": (Flag("saturation", "", "", "", fatal=True),)}, "saturation"),
        ({"flags": (Flag("saturation unknown", "", "", ""),)}, "could not run"),
    ],
)
@pytest.mark.parametrize("lr", [None, 0.1])
def test_doubtful_fit_is_not_used(change, word, lr):
    rule = clip_rule(replace(FIT, **change), lr=lr)
    assert rule.source == "percentile"
    assert rule.threshold == pytest.approx(np.quantile(X, 0.9))
    assert rule.clip_rate == pytest.approx(0.1, abs=1e-9)
    assert word in rule.reason
    assert rule.reason.startswith("Do not clip from this fit, because ")
    assert math.isnan(rule.step_cap) if lr is None else rule.step_cap == pytest.approx(lr * rule.threshold)


def test_zero_l0_is_said_and_does_not_become_a_zero_threshold():
    fit = replace(FIT, L0=0.0, L0_interval=(0.0, 0.5))
    given, free = clip_rule(fit, lr=0.1), clip_rule(fit)
    assert given.threshold == pytest.approx(1 / (0.1 * fit.L1))
    assert math.isnan(given.max_lr)
    assert free.lr == pytest.approx(1)
    assert free.threshold == pytest.approx(0.5 / fit.L1)
    assert "L0 at zero" in given.reason
    assert "upper end stands in for L0" in free.reason
    nothing = clip_rule(replace(fit, L0_interval=(0.0, 0.0)))
    assert nothing.source == "percentile"
    assert "no learning rate" in nothing.reason


def test_interval_of_l0_that_reaches_zero_leaves_the_largest_rate_open():
    fit = replace(FIT, L0_interval=(0.0, 4.0))
    given, free = clip_rule(fit, lr=0.1), clip_rule(fit)
    assert math.isnan(given.max_lr)
    assert math.isnan(free.max_lr)
    assert "undetermined" in given.reason
    assert free.lr == pytest.approx(1 / 8)
    assert free.step_cap == pytest.approx(1 / (2 * FIT.L1))
    assert "upper end" in free.reason


def test_too_large_rate_on_constant_smoothness_is_called_unsafe():
    fit = replace(FIT, verdict=Verdict.CONSTANT)
    rule = clip_rule(fit, lr=3.0)
    assert "No threshold makes this rate safe: the effective rate 3 is 3 times kappa/L0 = 1" in rule.reason
    assert "needs no threshold" not in rule.reason
    assert "No threshold" not in clip_rule(fit, lr=0.9).reason


def test_only_a_fit_is_taken():
    with pytest.raises(ValueError, match=r"pass `fit_smoothness\(trace\)`. Found `fit = DataFrame`"):
        clip_rule(pd.DataFrame({"grad_norm": X}), lr=0.1)


def test_clip_rate_is_the_share_of_recorded_norms_above():
    for lr in (0.02, 0.1, 0.5, 2.0):
        rule = clip_rule(FIT, lr=lr)
        assert rule.clip_rate == pytest.approx(np.mean(rule.threshold < X), abs=0.01)
    assert clip_rule(FIT, lr=1e-6).clip_rate == 0
    nearly = clip_rule(FIT, lr=9.0)
    assert nearly.clip_rate > 0.95
    assert "normalised" in nearly.reason


def test_units_move_the_rule_as_they_move_the_fit():
    # The loss times 3, parameters times 5: L0 by 75, L1 by 5, norms by 15, the safe rate by 1/75.
    frame = pd.DataFrame({"grad_norm": 15 * X, "smoothness": 75 * (1 + 2 * X), "saturation": 0.1})
    other = clip_rule(fit_smoothness(frame, num_boot=20), lr=0.1 / 75)
    rule = clip_rule(FIT, lr=0.1)
    assert other.threshold == pytest.approx(15 * rule.threshold, rel=1e-8)
    assert other.step_cap == pytest.approx(rule.step_cap / 5, rel=1e-8)
    assert other.clip_rate == pytest.approx(rule.clip_rate, rel=1e-8)


def test_rule_reads_as_text():
    text = str(clip_rule(FIT, lr=0.1))
    assert "clip gradients at norm 4.5" in text
    assert "unknown" in str(clip_rule(replace(FIT, verdict=Verdict.NOT_IDENTIFIED)))


@pytest.mark.thorough
def test_constants_of_an_adam_run_make_no_rule():
    def fit(*optimizers):
        said = {"SGD": {"follows_gradients": True}, "MyOld": {}}
        traces = [
            Trace(meta={"optimizer": name, **said.get(name, {"follows_gradients": False})}) for name in optimizers
        ]
        for trace in traces:
            rows = {"estimator": "local", "status": "ok", "group": "all", "saturation": 0.1}
            trace.extend({"step": k, "grad_norm": x, "smoothness": 1 + 2 * x, **rows} for k, x in enumerate(X))
        return fit_smoothness(traces if len(traces) > 1 else traces[0], num_boot=20)

    assert [fit(*names).optimizer for names in (["SGD"], ["Adam", "Adam"], ["SGD", "AdamW"])] == [
        "SGD",
        "Adam",
        "AdamW and SGD",
    ]
    assert clip_rule(fit("SGD"), lr=0.1).source == "fit"
    assert clip_rule(fit("SGD", "SGD"), lr=0.1).source == "fit"
    for names, said in ((["AdamW"], "AdamW"), (["MyOwn"], "MyOwn"), (["SGD", "AdamW"], "AdamW and SGD")):
        rule = clip_rule(fit(*names), lr=0.1)
        assert rule.source == "percentile"
        assert math.isnan(rule.step_cap)
        assert math.isnan(rule.max_lr)
        assert f"its rows come from {said}. L0 and L1 bound" in rule.reason
        assert str(rule).startswith("no threshold from this fit")
        with pytest.raises(ValueError, match=said):
            step_rate(fit(*names))
    assert clip_rule(replace(fit("MyOwn"), follows_gradients=True), lr=0.1).source == "fit"
    for names, said in ((["MyOld"], "MyOld"), (["MyOld", "SGD"], "MyOld and SGD")):
        with pytest.warns(SmoothdiagWarning, match=f"{said}, but do not say .*dataclasses.replace") as warned:
            rule = clip_rule(fit(*names), lr=0.1)
        assert warned[0].filename == __file__
        assert f"its rows do not say how steps are made by {said}." in rule.reason
        assert (rule.source, math.isnan(rule.step_cap)) == ("percentile", True)
    assert clip_rule(replace(fit("SGD"), optimizer="", follows_gradients=None), lr=0.1).source == "fit"


def test_an_old_fit_that_has_no_threshold_anyway_makes_no_noise(recwarn):
    old = replace(FIT, optimizer="SGD", follows_gradients=None, verdict=Verdict.NOT_IDENTIFIED)
    assert clip_rule(old, lr=0.1).source == "percentile"
    assert not recwarn.list


def test_table_holds_the_cited_formulas():
    table = clip_table(FIT)
    np.testing.assert_allclose(table.loc["Pethick 2025"], (1 / (2 * FIT.L0), 1 / (2 * FIT.L1), FIT.L0 / FIT.L1))
    np.testing.assert_allclose(table["max_lr"] * table["threshold"] <= table["step_cap"] * (1 + 1e-9), True)
    np.testing.assert_allclose(table.loc["Vankov 2024"], (0.5, 1 / 6, 1 / 3), rtol=1e-6)
    np.testing.assert_allclose(table.loc["Zhang 2019"], (0.1, 0.05, 0.5), rtol=1e-6)


@pytest.mark.parametrize(
    "wrong",
    [
        *({"lr": value} for value in (0.0, math.nan, math.inf)),
        *({"momentum": value} for value in (1.0, -0.1, math.nan)),
        *(
            {"dampening": 1.0},
            {"kappa": 0.0},
            {"kappa": 2.1},
            {"kappa": math.nan},
            {"noise": -1.0},
            {"noise": math.nan},
        ),
    ],
)
def test_wrong_parameters_are_refused(wrong):
    (name, value), *_ = wrong.items()
    with pytest.raises(ValueError, match=f"Parameter `{name}` should .* Found `{name} = {value}`"):
        clip_rule(FIT, **({"lr": 0.1} | wrong))


@pytest.mark.parametrize(("gain", "momentum"), [(1.0, 0.0), (10.0, 0.9)])
@pytest.mark.parametrize("exponent", [0.5, 0.8, 1.0])
def test_at_the_threshold_of_a_power_the_rate_of_the_law_is_the_effective_rate(exponent, gain, momentum):
    fit = replace(FIT, **power_law(1.0, 2.0, exponent))
    rule = clip_rule(fit, lr=0.1 / gain, momentum=momentum)
    mean = quad(lambda v: 1 / (1 + 2 * (rule.threshold * (1 + v)) ** exponent), 0, 1)[0]
    assert mean == pytest.approx(0.1, rel=1e-9)
    assert (rule.source, rule.step_cap) == ("fit", pytest.approx(0.1 * rule.threshold))
    assert rule.max_lr * gain == pytest.approx(1.0)
    assert f"At the gradient norm {rule.threshold:.4g} the law allows a rate of 0.1." in rule.reason
    assert np.isnan(rule.threshold_interval).all()


def test_threshold_of_a_power_falls_with_the_rate_and_never_jumps():
    fit = replace(FIT, **power_law(1.0, 2.0, 0.5))
    rates = np.geomspace(0.05, 20, 100)
    rules = [clip_rule(fit, lr=float(rate)) for rate in rates]
    thresholds, steps = (np.array([getattr(rule, name) for rule in rules]) for name in ("threshold", "step_cap"))
    assert (np.diff(np.log(thresholds)) < 0).all()
    assert np.diff(np.log(thresholds)).min() > -5 * np.diff(np.log(rates)).max()
    assert (np.diff(steps) < 1e-9 * steps[0]).all()
    assert "too large: the law would leave only uselessly short steps. Use an effective rate of at most 0.5" in (
        clip_rule(fit, lr=0.8).reason
    )
    assert "No threshold makes this rate safe: the law allows at most 1." in clip_rule(fit, lr=2.0).reason
    free = clip_rule(fit)
    assert free.lr == pytest.approx(0.5)
    assert "half of the largest rate that the law allows, 1." in free.reason
    raised = clip_rule(fit, lr=0.4, noise=5.0)
    assert "the longest step is 10, and the law allows no such step" in raised.reason


def test_power_without_a_constant_needs_a_rate():
    fit = replace(FIT, **power_law(0.0, 2.0, 0.5))
    assert clip_rule(fit).source == "percentile"
    assert "smoothness may vanish with the gradient norm" in clip_rule(fit).reason
    rule = clip_rule(fit, lr=0.1)  # 1/(2 c^.5) times the mean of (1 + v)^-.5, which is 2 (2^.5 - 1)
    assert rule.threshold == pytest.approx(((2**0.5 - 1) / 0.1) ** 2)
    assert math.isnan(rule.max_lr)
    with pytest.raises(ValueError, match="Parameter `fit` should hold a power model that rises"):
        clip_rule(replace(FIT, verdict=Verdict.POWER, comparison=()), lr=0.1)


@pytest.mark.parametrize(
    ("estimator", "hessian", "said"),
    [
        ("local", None, True),
        ("path", HessianCheck(3, 1.0, (0.0, 9.0), None), True),
        ("local", HessianCheck(50, 0.95, (1.0, 3.0), True), False),
        ("hessian_norm", None, False),
        ("unnamed", None, False),
    ],
)
def test_rule_from_one_direction_says_that_the_largest_curvature_may_be_larger(estimator, hessian, said):
    fit = replace(FIT, estimator=estimator, hessian=hessian)
    flat = replace(fit, verdict=Verdict.CONSTANT)  # It has no threshold, but a largest rate.
    for reason in (clip_rule(fit, lr=0.1).reason, step_rate(fit).reason, clip_rule(flat, lr=0.1).reason):
        assert ("probed direction only. The largest curvature ||H|| may be larger" in reason) is said
    unknown = replace(fit, verdict=Verdict.NOT_IDENTIFIED)
    assert "probed direction" not in clip_rule(unknown, lr=0.1).reason


def test_points_of_a_scan_make_no_percentile():
    scanned = replace(FIT, num_scans=14)
    rule = clip_rule(scanned, lr=0.1)
    assert rule.source == "fit"
    assert math.isnan(rule.clip_rate)
    assert "A scan does not know the optimizer" in rule.reason
    with pytest.raises(ValueError, match="Parameter `fit` should have constants.*no steps of a run.*NEXT: scan again"):
        clip_rule(replace(scanned, verdict=Verdict.NOT_IDENTIFIED), lr=0.1)


def with_momentum(momentum: float, gain: float) -> pd.DataFrame:
    norms = 10 ** np.sin(np.arange(200.0))
    table = pd.DataFrame({"grad_norm": norms, "smoothness": 1 + 2 * norms, "saturation": 0.1})
    table.attrs.update(momentum=momentum, gain=gain, optimizer="SGD", follows_gradients=True)
    return table


def test_momentum_of_the_trace_makes_the_rule_and_a_given_one_wins() -> None:
    fit = fit_smoothness(with_momentum(0.9, 10.0), num_boot=50)
    assert (fit.momentum, fit.dampening) == (0.9, 0.0)
    rule, same = clip_rule(fit, lr=0.01), clip_rule(fit, lr=0.01, momentum=0.9)
    assert rule.threshold == same.threshold == pytest.approx((1 / (0.01 * 10) - 1) / 2, rel=1e-3)
    assert rule.momentum == 0.9
    assert rule.next.startswith("set max_norm=4.5 at lr=0.01 and momentum=0.9 (")
    assert "It is for the momentum 0.9, which the trace names; `momentum=` overrides it." in rule.reason
    assert "the trace names" not in same.reason
    without = clip_rule(fit, lr=0.01, momentum=0.0)
    assert without.threshold == pytest.approx((1 / 0.01 - 1) / 2, rel=1e-3)
    assert "It is for the given momentum 0, and the trace names 0.9." in without.reason


def test_a_rule_names_a_better_rate_and_no_largest_rate_that_it_does_not_know() -> None:
    high = clip_rule(FIT, lr=0.08, momentum=0.9)
    assert high.better_lr == pytest.approx(0.05)  # half of 1/L0, over the gain of the momentum
    assert math.isnan(clip_rule(FIT, lr=0.04, momentum=0.9).better_lr)
    assert clip_rule(replace(FIT, **power_law(1.0, 2.0, 0.5)), lr=0.8).better_lr == pytest.approx(0.5)
    assert "at most 0.1 for small gradients" in str(high)
    unknown = clip_rule(replace(FIT, verdict=Verdict.NOT_IDENTIFIED), lr=0.1)
    assert str(unknown).splitlines()[-1] == f"learning rate 0.1; longest step {unknown.step_cap:.4g}"


def test_dampening_of_the_trace_makes_the_rule_unless_a_momentum_is_given() -> None:
    fit = fit_smoothness([with_momentum(0.9, 1.0), with_momentum(0.9, 1.0)], num_boot=50)  # it averages gradients
    assert fit.dampening == pytest.approx(0.9)
    rule = clip_rule(fit, lr=0.1)
    assert (rule.momentum, rule.dampening) == (0.9, fit.dampening)
    assert rule.threshold == pytest.approx((1 / 0.1 - 1) / 2, rel=1e-3)
    assert "the momentum 0.9 and the dampening 0.9, which the trace names" in rule.reason
    assert "ClippedMomentum" in rule.next
    assert clip_rule(fit, lr=0.1, momentum=0.9).dampening == 0.0
    assert clip_rule(fit, lr=0.1, dampening=0.5).dampening == 0.5
    assert math.isnan(fit_smoothness([with_momentum(0.9, 1.0), with_momentum(0.0, 1.0)], num_boot=20).momentum)
