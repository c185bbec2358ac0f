"""logs.review: a run that is dead is called dead before anything else."""

import json
import math

import pytest

from smoothdiag import read_log, review_log
from smoothdiag.clipping.rule import FALLBACK_PERCENTILE
from smoothdiag.logs.outliers import PART, find_pile, find_spikes
from smoothdiag.logs.wording import ADVISED


def reviewed(tmp_path, rows):
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps({"step": k, "grad_norm": g, "loss": v}) + "\n" for k, (g, v) in enumerate(rows)))
    return review_log(read_log(path))


NAN = math.nan
ALIVE = [(1.0 + 0.1 * (k % 3), 2.0) for k in range(30)]


@pytest.mark.parametrize(
    ("end", "column"),
    [
        ([(NAN, NAN)] * 3, "loss"),
        ([(1.0, NAN)] * 4, "loss"),
        ([(NAN, 0.0)] * 3, "grad_norm"),
        ([(1.0, math.inf)] * 3, "loss"),
    ],
)
def test_nothing_finite_to_the_end_is_dead(tmp_path, end, column) -> None:
    review = reviewed(tmp_path, ALIVE + end)
    assert (review.dead_since, review.dead_column, review.dead_rows) == (30, column, len(end))
    assert review.summary().startswith("DEAD since step 30: no ")
    assert review.to_dict()["dead_since"] == 30


@pytest.mark.parametrize("end", [[], [(NAN, 2.0)] * 5, [(NAN, NAN)] * 2, [*[(NAN, NAN)] * 9, (1.0, 2.0)]])
def test_a_run_that_skips_steps_is_not_dead(tmp_path, end) -> None:
    review = reviewed(tmp_path, ALIVE + end)
    assert review.dead_since is None
    assert "DEAD" not in review.summary()


def test_a_run_without_one_finite_number_is_dead_from_its_start(tmp_path) -> None:
    review = reviewed(tmp_path, [(NAN, NAN)] * 5)
    assert (review.dead_since, review.num_norms, review.num_losses) == (0, 0, 0)
    assert review.summary().startswith("DEAD since step 0: ")


def test_long_columns_are_looked_at_in_parts_with_the_same_result(monkeypatch) -> None:
    import numpy as np

    rng = np.random.default_rng(0)
    step = np.arange(2000)
    norm = np.exp(0.4 * rng.standard_normal(2000))
    norm[[25, 470, 499, 500, 501, 1999]] *= 60
    norm[::9] = 0.75
    norm[100:450] = 0  # does not count, so a window of norms reaches over five parts
    loss = 3 + 0.1 * rng.standard_normal(2000)
    loss[700] += 5
    loss[step % 70 > 3] = np.nan  # a window of losses reaches over nine parts
    columns = (norm, loss), (norm, np.full(2000, np.nan))
    whole, pile = [find_spikes(step, *both) for both in columns], find_pile(norm)
    assert {25, 470, 499, 500, 501, 700, 1999} <= {spike.step for spike in whole[0]}
    assert pile.sum() >= 1650 // 9
    monkeypatch.setattr("smoothdiag.logs.outliers.PART", 100)
    assert [find_spikes(step, *both) for both in columns] == whole
    assert np.array_equal(find_pile(norm), pile)
    assert PART > 1000


def test_losses_that_a_log_has_rounded_are_no_spikes() -> None:
    import numpy as np

    draw = np.random.default_rng(3)
    loss = np.round(2e-3 * np.exp(0.25 * draw.standard_normal(5000)), 3)
    loss[3000] = 0.02
    assert {spike.step for spike in find_spikes(np.arange(5000), np.ones(5000), loss)} == {3000}


def test_the_advice_is_that_of_a_rule_without_a_fit() -> None:
    assert ADVISED == FALLBACK_PERCENTILE
