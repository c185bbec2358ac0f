"""fits: a fit of several runs keeps them apart where it should, and says what it did."""

import numpy as np
import pandas as pd
import pytest
from traces import Recorded

from smoothdiag.fits import SmoothnessFit, fit_smoothness


def one_run(seed, n=100, L1=2.0, **columns):
    rng = np.random.default_rng(seed)
    x = 10 ** rng.uniform(-1, 1, n)
    y = (1 + L1 * x) * np.exp(0.2 * rng.standard_normal(n))
    return pd.DataFrame({"grad_norm": x, "smoothness": y, "saturation": 0.1} | columns)


RUNS = [one_run(seed) for seed in range(6)]


def fit(data, **options):
    return fit_smoothness(data, num_boot=60, quantile=0.5, **options)


@pytest.mark.thorough
def test_lists_of_traces_and_of_tables_and_a_column_give_the_same_fit():
    found = fit(RUNS)
    stacked = pd.concat([frame.assign(run=str(k), step=np.arange(100)) for k, frame in enumerate(RUNS)])
    assert found.num_runs == 6
    assert found.num_points == 600
    assert found == fit(tuple(Recorded(frame) for frame in RUNS))
    assert found == fit(stacked)
    assert found == fit(stacked.sample(frac=1, random_state=0))
    assert found == fit(stacked.drop(columns="step"))


@pytest.mark.thorough
def test_one_run_in_a_list_is_that_run():
    assert fit(RUNS[:1]) == fit(RUNS[0])
    assert fit(RUNS[0]).num_runs == 1
    assert "nothing about other seeds" in fit(RUNS[0]).summary()


def test_a_list_of_tables_with_runs_keeps_them_apart():
    pair = pd.concat([RUNS[0].assign(run="a"), RUNS[1].assign(run="b")])
    assert fit([pair, pair]).num_runs == 4


@pytest.mark.thorough
@pytest.mark.parametrize(("number", "expected"), [(1, False), (2, True), (4, True), (5, False)])
def test_few_runs_are_said_to_be_few(number, expected):
    found = fit(RUNS[:number])
    assert ("few runs" in {flag.name for flag in found.flags}) is expected
    assert found.num_runs == number


@pytest.mark.thorough
def test_more_runs_than_one_widen_the_interval_where_they_differ():
    differ = [one_run(seed, L1=2.0 * np.exp(0.3 * (-1) ** seed)) for seed in range(6)]
    apart, together = fit(differ), fit(pd.concat(differ))
    width = [one.L1_interval[1] - one.L1_interval[0] for one in (apart, together)]
    assert width[0] > 1.4 * width[1]
    assert apart.num_effective < together.num_effective / 3
    assert apart.interval_freedom == 5


@pytest.mark.thorough
def test_rows_are_compared_with_later_steps_of_all_runs():
    # A drift that begins in the middle of every run: judged run after run, it would be seen and forgotten in turns.
    step = np.arange(100)
    late = [frame.assign(smoothness=frame["smoothness"] * np.where(step < 50, 1, 3)) for frame in RUNS]
    shuffled = pd.concat([frame.assign(step=step, run=k) for k, frame in enumerate(late)])
    scores = {score.name: score for score in fit(late).comparison}
    assert scores["affine"].later_loss > 1.5 * {s.name: s for s in fit(RUNS).comparison}["affine"].later_loss
    assert fit(late).comparison == fit(shuffled.iloc[::-1]).comparison


def test_round_trip_keeps_runs_and_replicates():
    found = fit(RUNS)
    again = SmoothnessFit.from_dict(found.to_dict())
    assert again == found
    assert (again.num_runs, len(again.replicates)) == (6, 60)


def test_runs_of_different_estimators_or_data_are_refused():
    with pytest.raises(ValueError, match="mine.*yours"):
        fit([RUNS[0].assign(estimator="mine"), RUNS[1].assign(estimator="yours")])
    with pytest.raises(ValueError, match="held-out"):
        fit([RUNS[0].assign(data="step"), RUNS[1].assign(data="held-out")])


@pytest.mark.parametrize(("wrong", "message"), [([], "at least one"), (["run.jsonl"], "run.jsonl"), ([RUNS], None)])
def test_what_is_no_list_of_tables_is_refused(wrong, message):
    if message is None:
        assert fit(wrong).num_runs == 6
        return
    with pytest.raises(ValueError, match=message):
        fit(wrong)


@pytest.mark.thorough
def test_units_move_the_fit_of_several_runs():
    moved = [f.assign(grad_norm=3e5 * f["grad_norm"], smoothness=7e-4 * f["smoothness"]) for f in RUNS]
    found, other = fit(RUNS), fit(moved)
    np.testing.assert_allclose(other.L0_interval, np.multiply(found.L0_interval, 7e-4), rtol=1e-8)
    np.testing.assert_allclose(other.step_cap_interval, np.multiply(found.step_cap_interval, 3e5 / 7e-4), rtol=1e-8)
    np.testing.assert_allclose(other.num_effective, found.num_effective, rtol=1e-8)


def test_a_run_without_rows_of_the_estimator_is_refused():
    named = RUNS[0].assign(estimator="local")
    with pytest.raises(ValueError, match=r"usable rows of every run .* Found none of the runs \['1'\]"):
        fit([named, RUNS[1]])


@pytest.mark.thorough
def test_rows_on_other_fixed_batches_count_as_another_run():
    first = one_run(0, data="fixed", data_step=0).assign(step=np.arange(100))
    resumed = one_run(1, data="fixed", data_step=100).assign(step=np.arange(100, 200))
    assert fit(pd.concat([first, resumed])).num_runs == 2
    assert fit(pd.concat([first, resumed.assign(data_step=0)])).num_runs == 1


def test_a_run_and_its_fixed_batches_are_told_apart_whatever_their_names():
    pair = (("1", 21), ("12", 1))  # Side by side both read "121".
    rows = [one_run(seed, data="fixed", data_step=step).assign(run=name) for seed, (name, step) in enumerate(pair)]
    assert fit(pd.concat(rows)).num_runs == 2
