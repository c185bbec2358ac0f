"""fits.hessian: Hessian norms beside the rows confirm the law, contradict it, or say nothing where they cannot."""

import numpy as np
import pandas as pd
import pytest

from smoothdiag.fits import Verdict, fit_smoothness

N = 200


def law(x):
    return 1 + 2 * x


def norms(seed, n, low=-1.0, high=1.0):
    return 10 ** np.random.default_rng(seed).uniform(low, high, n)


def table(secants, hessians, *, n=N, low=-1.0, high=1.0, deviation=0.1, **columns):
    """Local rows over two decades, and Hessian norms of their own gradient norms beside them."""
    rng = np.random.default_rng(5)
    x, z = norms(0, N), norms(1, n, low, high)
    local = {"step": np.arange(N), "estimator": "local", "grad_norm": x, "smoothness": secants(x), "saturation": 0.1}
    beside = {"step": np.arange(n) + 0.5, "estimator": "hessian_norm", "grad_norm": z, "smoothness": hessians(z)}
    frames = [pd.DataFrame(local), pd.DataFrame(beside | columns)]
    for frame in frames:
        frame["smoothness"] *= np.exp(deviation * rng.standard_normal(len(frame)))
    return pd.concat(frames)


def fit(*laws, quantile=0.9, **options):
    return fit_smoothness(table(*laws, **options), quantile=quantile, num_boot=60)


def names(found):
    return {flag.name for flag in found.flags}


def test_hessian_norms_on_the_line_confirm_it():
    found = fit(law, law)
    assert found.verdict is Verdict.L0L1
    assert found.hessian.agrees is True
    # Those beyond the middle 95% of the fitted gradient norms are left out.
    assert 0.9 * N <= found.hessian.num_rows <= N
    assert found.hessian.coverage == pytest.approx(0.9, abs=0.06)
    assert found.hessian.slope_interval[0] < 2 * np.exp(0.128) < found.hessian.slope_interval[1]
    assert "Hessian norms beside the rows follow the same line" in found.verdict_reason
    assert "probed direction" not in found.verdict_reason
    assert "they follow the line" in found.summary()


def test_flat_hessian_norms_contradict_a_law():
    found = fit(law, lambda x: 30 + 0 * x)
    assert found.verdict is Verdict.NOT_IDENTIFIED
    assert "Hessian norms" in names(found)
    assert found.hessian.agrees is False
    assert "hardly rises" in found.verdict_reason
    assert 'estimator="hessian_norm"' in found.flags[0].remedy


@pytest.mark.thorough
@pytest.mark.parametrize(("factor", "contradicts"), [(1.1, False), (3.0, True)])
def test_hessian_norms_above_the_line_name_the_factor(factor, contradicts):
    found = fit(law, lambda x: factor * law(x))
    assert ("Hessian norms" in names(found)) is contradicts
    if contradicts:
        assert "lie above the line" in found.verdict_reason
        lift = float(found.flags[0].evidence.split("takes a line ")[1].split(" ")[0])
        assert lift == pytest.approx(factor, rel=0.05)


def test_hessian_norms_that_rise_more_steeply_contradict():
    assert "more steeply" in fit(law, lambda x: 0.1 * law(x) ** 2).verdict_reason


def test_rises_are_those_of_the_formula():
    found = fit(law, lambda x: law(x) ** 0.25, deviation=0.0)
    words = found.flags[0].evidence.split("the line changes ")[1]
    line, own = (float(part.split("-fold")[0]) for part in (words, words.split("they change ")[1]))
    assert own == pytest.approx(line**0.25, rel=0.01)


@pytest.mark.thorough
def test_few_hessian_norms_or_a_short_range_decide_nothing():
    flat = lambda x: 1.3 + 0 * x  # noqa: E731
    few, short = fit(law, flat, n=12), fit(law, flat, low=-1.0, high=-0.9)
    for found in (few, short):
        assert found.hessian.agrees is None
        assert found.verdict is Verdict.L0L1
        assert "do not contradict it" in found.verdict_reason
    assert few.hessian.num_rows == 12


def test_secants_that_are_flat_do_not_make_the_curvature_constant():
    flat = lambda x: 3 + 0 * x  # noqa: E731
    assert fit(flat, lambda x: 0.1 * law(x)).verdict is Verdict.NOT_IDENTIFIED
    found = fit(flat, flat)
    assert found.verdict is Verdict.CONSTANT
    assert found.hessian.agrees is True


@pytest.mark.thorough
def test_hessian_norms_that_drift_with_the_gradient_norm_do_not_confirm():
    frame = table(law, law)
    is_beside = frame["estimator"] == "hessian_norm"
    level = 10 ** (1 - 2 * np.arange(N) / N)
    rng = np.random.default_rng(2)
    frame.loc[is_beside, "grad_norm"] = level * np.exp(0.1 * rng.standard_normal(N))
    frame.loc[is_beside, "smoothness"] = law(level) * np.exp(0.1 * rng.standard_normal(N))
    assert fit_smoothness(frame, quantile=0.9, num_boot=60).hessian.agrees is None


@pytest.mark.thorough
def test_units_do_not_matter():
    frame = table(law, lambda x: 30 + 0 * x)
    moved = frame.assign(smoothness=7e5 * frame["smoothness"], grad_norm=3e-4 * frame["grad_norm"])
    first, other = (fit_smoothness(one, quantile=0.9, num_boot=60) for one in (frame, moved))
    assert first.hessian.coverage == other.hessian.coverage
    np.testing.assert_allclose(
        other.hessian.slope_interval, np.multiply(first.hessian.slope_interval, 7e5 / 3e-4), rtol=1e-8
    )
    ceilings = [float(one.flags[0].remedy.split("L = ")[1].split(",")[0]) for one in (first, other)]
    assert ceilings[1] == pytest.approx(7e5 * ceilings[0], rel=1e-3)
    assert first.flags[0].evidence == other.flags[0].evidence


@pytest.mark.thorough
def test_rows_of_another_kind_say_nothing():
    frame = table(law, lambda x: 30 + 0 * x)
    held_out = frame.assign(data=np.where(frame["estimator"] == "local", "fixed", "held-out"))
    assert fit_smoothness(held_out, quantile=0.9, num_boot=60).hessian is None
    scaled = frame.replace({"estimator": {"local": "local_preconditioned"}})
    assert fit_smoothness(scaled, estimator="local_preconditioned", quantile=0.9, num_boot=60).hessian is None
    assert fit_smoothness(frame, estimator="hessian_norm", quantile=0.9, num_boot=60).hessian is None


@pytest.mark.thorough
def test_without_hessian_norms_the_summary_names_measurement_and_cost():
    frame = table(law, law, num_grads=0)
    local = frame[frame["estimator"] == "local"].assign(num_grads=3, num_hvps=0, seconds=0.6)
    found = fit_smoothness(local, quantile=0.9, num_boot=60)
    assert found.row_cost == (3, pytest.approx(0.6))
    assert "probed direction and not about ||H||" in found.verdict_reason
    assert "HessianNorm rows (6 to 20 gradients, 1.2 to 4 s, each)" in found.summary()
    products = local.assign(num_grads=[1, 9] * (N // 2), num_hvps=4)
    # Products by differentiating twice cost two gradients each; those by differences are among the gradients.
    assert fit_smoothness(products, quantile=0.9, num_boot=60).row_cost[0] == 9
