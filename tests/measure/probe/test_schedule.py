"""measure.probe.schedule: schedules measure the steps and spend the time that they promise."""

import pytest

from smoothdiag import budget, every, log_spaced


def test_every() -> None:
    assert [s for s in range(10) if every(4)(s)] == [0, 4, 8]


def test_log_spaced_hits_powers_of_ten_and_thins_out() -> None:
    due = [s for s in range(10_001) if log_spaced(3)(s)]
    assert due == [0, 1, 3, 5, 10, 22, 47, 100, 216, 465, 1000, 2155, 4642, 10_000]


def test_log_spaced_measures_each_step_where_points_are_denser_than_steps() -> None:
    assert [s for s in range(12) if log_spaced(50)(s)] == list(range(12))


@pytest.mark.parametrize("n", [0, -1, 1.5, True, "3"])
@pytest.mark.parametrize(("make", "name"), [(every, "n"), (log_spaced, "per_decade")])
def test_bad_intervals(make, name, n) -> None:
    with pytest.raises(ValueError, match=f"Parameter `{name}` should be a whole number of at least 1. Found"):
        make(n)


@pytest.mark.parametrize("fraction", [0, 1, -0.1, float("nan"), "much"])
def test_bad_fractions(fraction) -> None:
    with pytest.raises(ValueError, match=r"Parameter `fraction` should be in \(0, 1\). Found"):
        budget(fraction)


@pytest.mark.parametrize("fraction", [0.01, 0.05, 0.3])
@pytest.mark.parametrize("probe_seconds", [0.5, 7.0])
def test_a_budget_is_kept_and_used(fraction, probe_seconds) -> None:
    schedule = budget(fraction)
    train = probe = since = 0.0
    steps = 0
    for step in range(20_000):
        train, since, steps = train + 1.0, since + 1.0, steps + 1
        if schedule(step):
            cost = probe_seconds * (10 if probe == 0 else 1)  # the first one compiles
            probe += cost
            schedule.next = step + schedule.interval(since, steps, cost)
            since, steps = 0.0, 0
    assert fraction * 0.9 < probe / (train + probe) < fraction * 1.02


def test_a_budget_waits_longer_when_measuring_gets_dearer() -> None:
    schedule = budget(0.1)
    # A ninth of the time of training: 2 s need 18 s of it, of which 10 are there; then 3 s need 27 s of 20; then 22 s.
    assert [schedule.interval(10.0, 10, seconds) for seconds in (1.0, 1.0, 10.0)] == [8, 7, 168]
