"""diverged: a run that went wrong in shadow mode is told from one that trained, by the losses of its rows."""

import math

import numpy as np
import pytest

from smoothdiag.diverged import why_diverged

PROGRESSION = (0, 1, 2, 3, 4, 5, 6, 8, 10, 13, 17, 22, 29)


def rows(losses, status="ok", estimator="local_clip"):
    return [
        {"step": step, "loss": loss, "status": status, "estimator": estimator, "grad_norm": 1.0}
        for step, loss in zip(PROGRESSION, losses, strict=False)
    ]


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        (np.linspace(2.3, 1.1, 13), ""),
        ([2.3] * 13, ""),
        ([2.3, 2.9] * 6, ""),
        (np.linspace(2.3, 2.9, 13), "the loss rose from 2.3 to 2.9 in the first 30 steps"),
        (
            [1.1, 430, 430, 3e6, 9e6, 6e5, 41, 20, 38, 16, 40, 14, 68],
            "the loss rose from 1.1 to 68 in the first 30 steps",
        ),
        ([-2.0, 5, 6, 7, 6, 5], "the loss rose from -2 to 5 in the first 6 steps"),
        ([1.0, 5, 6, 7, 6], ""),
        ([], ""),
    ],
)
def test_a_loss_that_clearly_rose_is_told(losses, said) -> None:
    assert why_diverged(rows(losses)) == said


def test_losses_without_a_trend_hardly_ever_count_as_risen() -> None:
    source = np.random.default_rng(0)
    assert np.mean([bool(why_diverged(rows(source.lognormal(0, 0.2, 13)))) for _ in range(500)]) < 0.05


def test_what_is_not_finite_is_told_and_other_rows_are_left_out() -> None:
    assert why_diverged([], not_finite=1) == "1 gradient was not finite (inf or NaN)"
    assert "in 2 measured steps" in why_diverged(rows([math.nan] * 2, "non_finite"))
    assert not why_diverged(rows(range(1, 14), estimator="local"))
    later = [row | {"step": 1000 + row["step"]} for row in rows(range(50, 63))]
    assert not why_diverged(rows([2.0] * 13) + later), "S was held long before"
