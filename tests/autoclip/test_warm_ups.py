"""autoclip.warm_ups: the peak of a schedule counts from the first step, unless it is never reached."""

import math

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LinearLR, OneCycleLR, SequentialLR

from smoothdiag.autoclip.rates import Peaks


def noam(taken: int, width: int = 512, warm_up: int = 4000) -> float:
    """Vaswani et al. 2017: the rate of the optimizer is 1, and the peak is 7e-4."""
    return width**-0.5 * min((taken + 1) ** -0.5, (taken + 1) * warm_up**-1.5)


SCHEDULES = {
    "warm-up from zero": lambda o: LambdaLR(o, lambda k: min(k / 50, 1.0)),
    "warm-up and cosine": lambda o: SequentialLR(o, [LinearLR(o, 0.01, 1, 50), CosineAnnealingLR(o, 150)], [50]),
    "one cycle": lambda o: OneCycleLR(o, 2.0, total_steps=200),
    "very long cycle": lambda o: OneCycleLR(o, 2.0, total_steps=10**9),
    "cosine alone": lambda o: CosineAnnealingLR(o, 200),
    "steps": lambda o: torch.optim.lr_scheduler.StepLR(o, 20),
    "ten times the rate": lambda o: LambdaLR(o, lambda k: min(1 + k / 10, 10.0)),
}


@pytest.mark.parametrize(("name", "expected"), [(name, 10.0 if "ten" in name else 2.0) for name in SCHEDULES])
def test_the_peak_counts_from_the_start(name: str, expected: float) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=1.0 if "ten" in name else 2.0)
    schedule, peaks = SCHEDULES[name](optimizer), Peaks(optimizer)
    for taken in range(200):
        peaks.update()
        rate = optimizer.param_groups[0]["lr"]
        assert peaks.values == [pytest.approx(min(1 + taken / 10, 10.0) if "ten" in name else expected)]
        assert peaks.share == pytest.approx(rate / peaks.values[0])
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize(
    ("factor", "doubted_at"),
    [(noam, 1), (lambda k: 0.1, 30), (lambda k: 0.5 * 0.99**k, 1), (lambda k: min(k / 10, 0.5), 35)],
    ids=["Noam", "a tenth for ever", "falls from a half", "stops at a half"],
)
def test_a_peak_that_is_never_reached_is_doubted(factor, doubted_at: int) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=2.0)
    schedule, peaks = LambdaLR(optimizer, factor), Peaks(optimizer)
    highest = 0.0
    for taken in range(60):
        peaks.update()
        highest = max(highest, optimizer.param_groups[0]["lr"])
        assert peaks.values == [highest if taken >= doubted_at else 2.0], taken
        optimizer.step()
        schedule.step()


def test_without_a_schedule_the_largest_rate_so_far_counts() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.0)
    peaks = Peaks(optimizer)
    rose = []
    for rate in (0.1, 0.2, 0.1, 0.3):
        optimizer.param_groups[0]["lr"] = rate
        rose.append(peaks.update())
    assert rose == [True, True, False, True]
    assert peaks.values == [0.3]
    assert math.isclose(float(peaks.share), 1.0)
