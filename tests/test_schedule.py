import pytest

from smoothdiag import every, log_spaced


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
