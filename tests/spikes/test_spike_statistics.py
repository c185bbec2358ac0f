"""spikes.statistics, spiking: what the device finds is what the numbers say, and what the published code says."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from smoothdiag import SixSigma, SpikeRule, ZClip
from smoothdiag.spikes.rarity import LastDistances
from smoothdiag.spikes.robust import Alone
from smoothdiag.spikes.rules import Rule, statistics_of
from smoothdiag.spikes.statistics import Judged, Statistics
from smoothdiag.tails import rare

CPU, COUNTS = torch.device("cpu"), torch.ones((), dtype=torch.bool)


def made(rule: Rule, norms: int = 1, losses: int = 1) -> Statistics:
    return statistics_of(rule, 1.0)(norms, losses, CPU)


def judged(statistics: Statistics, *signals: np.ndarray) -> list[Judged]:
    return [
        statistics.judge(torch.tensor(values, dtype=torch.float64), COUNTS) for values in zip(*signals, strict=True)
    ]


def signals(seed: int, steps: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """Returns norms and losses that fall and are noisy, with spikes, gaps and values that are not finite."""
    draw = np.random.default_rng(seed)
    norms = np.exp(0.2 * draw.standard_normal(steps) - np.arange(steps) / 300)
    losses = 3 + 4 * np.exp(-np.arange(steps) / 80) + 0.05 * draw.standard_normal(steps)
    for step in draw.choice(np.arange(10, steps), 25, replace=False):
        norms[step] *= draw.choice([3.0, 10.0, np.inf, np.nan, 0.0])
        losses[step] *= draw.choice([1.05, 1.3, 3.0, np.inf, np.nan])
    return norms, losses


def draw(seed: int, number: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(number)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rule", [SpikeRule(), SpikeRule(window=21, fewest=4, deviations=2.0, least_ratio=1.3)])
def test_the_device_finds_what_the_numbers_say(rule: SpikeRule, seed: int) -> None:
    norms, losses = (np.concatenate([before, after]) for before, after in zip(signals(seed), signals(9), strict=True))
    losses[320:480] = np.exp(draw(seed, 160) - np.linspace(2, 5, 160))  # near zero, over decades
    losses[600:] -= 3.5  # some are negative
    losses[[450, 700]] += 5
    found = judged(made(rule), norms, losses)
    for row, (expected, usual) in enumerate(rule.find_together((norms, True), (losses, False))):
        assert [bool(step.fired[row]) for step in found] == expected.tolist()
        assert expected.any()
        mine = np.array([float(step.usual[row]) for step in found])
        known = np.isfinite(usual)
        np.testing.assert_allclose(mine[known], usual[known], rtol=1e-12)


def test_no_spike_before_the_rule_knows_what_is_usual() -> None:
    norms = np.ones(60)
    norms[[5, 19, 20, 50]] = 100.0
    fired = [bool(step.fired[0]) for step in judged(made(SpikeRule(), 1, 0), norms)]
    assert np.flatnonzero(fired).tolist() == [20, 50]


def test_steps_that_do_not_count_leave_no_trace() -> None:
    rules: list[Rule] = [SpikeRule(), SixSigma(window=16), ZClip()]
    for rule in rules:
        statistics = made(rule)
        judged(statistics, *(1 + 0.1 * np.random.default_rng(0).standard_normal((2, 40))))
        before = statistics.state_dict()
        found = statistics.judge(torch.tensor([1e6, 1e6], dtype=torch.float64), ~COUNTS)
        assert not found.fired.any()
        for name, kept in statistics.state_dict().items():
            np.testing.assert_array_equal(kept, before[name])


class LiteralSkipStep:
    """``SkipStepOptimizer.get_step_factor`` of OLMo-core, as it stands there, on one signal at a time."""

    def __init__(self, window: int = 128, sigmas: float = 6) -> None:
        self.window, self.sigmas = window, sigmas
        self.losses: list[Tensor] = []
        self.norms: list[Tensor] = []

    def skips(self, norm: Tensor, loss: Tensor) -> tuple[bool, bool]:
        for kept, value in ((self.losses, loss), (self.norms, norm)):
            kept.append(value)
            while len(kept) > self.window + 1:
                kept.pop(0)
        if len(self.losses) < max(20, self.window // 2):
            return False, False
        std, mean = torch.std_mean(torch.stack(self.losses[:-1]))
        loss_z = (self.losses[-1] - mean).abs().div(std)
        std, mean = torch.std_mean(torch.stack(self.norms[:-1]))
        norm_z = (self.norms[-1] - mean).abs().div(std)
        return not bool(norm_z <= self.sigmas), not bool(loss_z <= self.sigmas)


@pytest.mark.parametrize("window", [128, 32])
def test_six_sigma_is_that_of_olmo(window: int) -> None:
    norms, losses = (np.where(np.isfinite(x) & (x > 0), x, 40.0) for x in signals(1))
    literal = LiteralSkipStep(window)
    expected = [literal.skips(torch.tensor(n), torch.tensor(x)) for n, x in zip(norms, losses, strict=True)]
    found = judged(made(SixSigma(window)), norms, losses)
    assert [tuple(step.fired.tolist()) for step in found] == expected
    assert np.any(expected, axis=0).all()


class LiteralZClip:
    """ZClip in its mode "zscore" with "adaptive_scaling", as in the authors' code."""

    def __init__(self) -> None:
        self.alpha, self.z_thresh, self.eps, self.warmup_steps = 0.97, 2.5, 1e-6, 25
        self.buffer: list[float] = []
        self.mean = self.var = math.nan

    def step(self, norm: float) -> float | None:
        if math.isnan(self.mean):
            self.buffer.append(norm)
            if len(self.buffer) >= self.warmup_steps:
                self.mean = sum(self.buffer) / len(self.buffer)
                self.var = sum((x - self.mean) ** 2 for x in self.buffer) / len(self.buffer)
            return None
        std = self.var**0.5
        z = (norm - self.mean) / (std + self.eps)
        clip = self.mean + (self.z_thresh * std) / (z / self.z_thresh) if z > self.z_thresh else None
        taken = norm if clip is None else clip
        self.mean = self.alpha * self.mean + (1 - self.alpha) * taken
        self.var = self.alpha * self.var + (1 - self.alpha) * (taken - self.mean) ** 2
        return clip


def test_zclip_is_that_of_its_authors() -> None:
    norms = signals(2)[0]
    norms = np.where(np.isfinite(norms) & (norms > 0), norms, 40.0)
    literal, num = LiteralZClip(), 0
    for norm, found in zip(norms, judged(made(ZClip(), 1, 0), norms), strict=True):
        expected = literal.step(float(norm))
        assert bool(found.fired[0]) == (expected is not None)
        if expected is not None:
            num += 1
            assert float(found.target[0]) == pytest.approx(expected, rel=1e-9)
    assert num >= 10


def test_a_rise_of_all_values_becomes_usual() -> None:
    norms = np.where(np.arange(200) < 100, 1.0, 8.0) * (1 + 0.1 * np.sin(np.arange(200)))
    fired = np.flatnonzero(SpikeRule().find(norms, is_norm=True)[0])
    assert fired[0] == 100
    assert fired[-1] < 130


def test_a_distance_is_rare_where_an_exponential_tail_reaches_it_once_in_ten_thousand() -> None:
    rule, draw = SpikeRule(), np.random.default_rng(5)
    asked = rare(draw.standard_exponential((400, 500)), rule.excesses)
    assert asked.mean() == pytest.approx(math.log(10_000), rel=0.03)
    young = np.where(np.arange(500) < 300, -np.inf, draw.standard_exponential((2000, 500)))
    assert rare(young, rule.excesses).mean() == pytest.approx(math.log(10_000), rel=0.03)
    young[:, 300] = -np.inf
    assert (rare(young, rule.excesses) == -np.inf).all()


def loop_of(distances: list[float], rule: SpikeRule) -> list[bool]:
    """Returns which distances are rare, one after the other, as `SpikeRule` says it in words."""
    found: list[bool] = []
    before: list[float | None] = []  # None for a step of an event that has begun before
    begin = last = -1000
    for step, distance in enumerate(min(each, 60.0) for each in distances):
        goes_on = distance > 6 and step - last <= 5
        others = [each for at, each in enumerate(before) if step - at <= 500 and not (goes_on and at == begin)]
        known = sorted((each for each in others if each is not None), reverse=True)
        tail = len(known) * 5 // 100
        asked = -math.inf
        if tail >= 10:
            excess = sum(x - known[tail] for x in known[:tail]) / tail
            asked = max(min(known[tail] + excess * math.log(0.05 * rule.once_in), 2 * known[0]), known[2])
        found.append(distance > asked)
        before.append(None if goes_on else distance)
        if goes_on:
            before[begin] = max(distance, before[begin] or 0.0)
        elif distance > 6:
            begin = step
        last = step if distance > 6 else last
    return found


def series(seed: int, steps: int = 1300) -> np.ndarray:
    """Returns distances with a heavy tail, in which now and then a far step is followed by others."""
    draw = np.random.default_rng(seed)
    found = 3 * draw.pareto(3.0, steps)
    for step in draw.choice(steps - 20, 12, replace=False):
        found[step : step + 12] += 40 * draw.random() * 0.8 ** np.arange(12)
    found[draw.integers(steps)] = math.inf
    return found


@pytest.mark.parametrize("seed", range(4))
def test_the_memory_of_a_device_is_a_loop_over_the_last_distances(seed: int) -> None:
    distances, rule = series(seed), SpikeRule()
    memory = LastDistances(1, rule, {"dtype": torch.float64, "device": CPU})
    enters = torch.ones(1, dtype=torch.bool)
    found = [bool(memory.are_rare(torch.tensor([x], dtype=torch.float64), enters)) for x in distances]
    assert found == loop_of(list(distances), rule)
    assert 0 < sum(found[200:]) < 100


def bad_at(*steps: int, number: int = 1000) -> tuple[np.ndarray, np.ndarray]:
    """Returns norms and losses of a quiet run, five times as large at some steps."""
    draw, is_bad = np.random.default_rng(9), np.isin(np.arange(number), steps)
    noise = np.exp(0.1 * draw.standard_normal((2, number)))
    return noise[0] * np.where(is_bad, 5, 1), 3 * noise[1] * np.where(is_bad, 5, 1)


LASTING = {
    "six steps, and one more later": (*range(400, 406), 600),
    "twenty steps, and ten later": (*range(400, 420), *range(480, 490)),
    "two steps, twice": (400, 401, 500, 501),
    "six steps before the tail is known": (*range(100, 106), 300),
}


@pytest.mark.parametrize("name", LASTING)
def test_a_spike_that_lasts_does_not_hide_the_next_one(name: str) -> None:
    bad = LASTING[name]
    norms, losses = bad_at(*bad)
    found, without = (
        np.flatnonzero(np.any([is_spike for is_spike, _ in rule.find_together((norms, True), (losses, False))], axis=0))
        for rule in (SpikeRule(), SpikeRule(memory=0))
    )
    assert {*found} <= {*without} <= {*bad}
    assert len(without) - len(found) <= 1, "the last step of a lasting spike may be as small as another event"
    assert {step for step in bad if step - 1 not in bad} <= {*found}
    device = [bool(step.fired.any()) for step in judged(made(SpikeRule()), norms, losses)]
    assert np.flatnonzero(device).tolist() == found.tolist()


def test_a_module_that_spikes_for_long_does_not_hide_its_next_spike() -> None:
    bad = (*range(400, 406), 600)
    norms = np.stack([bad_at(*bad)[0], bad_at()[0], bad_at()[1]])
    found, without = (
        np.flatnonzero([bool(step.fired[0]) for step in judged(Alone(3, 0, CPU, rule, 1.0), *norms)])
        for rule in (SpikeRule(), SpikeRule(memory=0))
    )
    assert found.tolist() == without.tolist()
    assert {400, 600} <= {*found}


def test_what_comes_back_every_hundred_steps_is_usual_after_a_while() -> None:
    norms, losses = bad_at(*range(50, 3000, 100), number=3000)
    found = np.any([flags for flags, _ in SpikeRule().find_together((norms, True), (losses, False))], axis=0)
    assert 2 <= found.sum() <= 6
    assert not found[700:].any()


def test_a_few_zeros_leave_the_other_losses_on_their_logarithmic_scale() -> None:
    draw = np.random.default_rng(10)
    losses = np.exp(-6 + 1.2 * draw.standard_normal(5000)) * (draw.random(5000) > 0.02)
    assert SpikeRule().find(losses, is_norm=False)[0].sum() <= 2
    assert sum(bool(step.fired) for step in judged(made(SpikeRule(), 0, 1), losses)) <= 2


def test_a_loss_that_may_rise_by_anything_is_judged_alike() -> None:
    rule = SpikeRule(least_rise=0.0)
    losses = np.exp(0.8 * draw(11, 400) - 6)
    expected = rule.find(losses, is_norm=False)[0].tolist()
    assert [bool(step.fired) for step in judged(made(rule, 0, 1), losses)] == expected


def usual_and_hard(steps: int = 3000) -> tuple[np.ndarray, np.ndarray]:
    """Returns norms and losses of which one in twenty-five is far above the others."""
    draw = np.random.default_rng(7)
    is_hard = draw.random(steps) < 0.04
    losses = 0.1 * np.exp(0.2 * draw.standard_normal(steps)) * np.where(is_hard, 10 * draw.random(steps) + 3, 1)
    return np.exp(0.2 * draw.standard_normal(steps)) * np.where(is_hard, 4.0, 1.0), losses


def test_what_is_frequent_is_no_spike_and_a_larger_one_still_is() -> None:
    norms, losses = usual_and_hard()
    losses[2000], norms[2000] = 100.0, 50.0
    signals = (norms, True), (losses, False)
    flags, plain = (
        np.any([is_spike for is_spike, _ in rule.find_together(*signals)], axis=0)
        for rule in (SpikeRule(), SpikeRule(memory=0))
    )
    assert flags[2000]
    assert plain.sum() > 50
    assert flags[300:].sum() <= 3


def test_losses_of_zero_scatter_by_rounding_alone() -> None:
    draw = np.random.default_rng(8)
    losses = np.round(2.3 * np.exp(-np.arange(1000) / 3), 9) + 1e-7 * (draw.random(1000) < 0.1)
    losses[900] = 0.05
    for rule in (SpikeRule(), SpikeRule(memory=0)):
        assert np.flatnonzero(rule.find(losses, is_norm=False)[0][100:]).tolist() == [800]


@pytest.mark.parametrize("wrong", [{"memory": 100}, {"memory": 300.5}, {"memory": math.inf}, {"once_in": 20.0}])
def test_wrong_memories(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"`{next(iter(wrong))}` should be"):
        SpikeRule(**wrong)


def test_a_state_without_a_memory_goes_on_with_a_new_one() -> None:
    values = signals(0, 120)
    statistics, resumed = made(SpikeRule()), made(SpikeRule())
    judged(statistics, *values)
    old = {name: kept for name, kept in statistics.state_dict().items() if name in ("counts", "ring")}
    resumed.load_state_dict(old)
    np.testing.assert_array_equal(resumed.state_dict()["ring"], statistics.state_dict()["ring"])
    assert resumed.state_dict()["distance_counts"] == [0]


def test_columns_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`values` should have one number for each step. Found shapes \(3,\), \(2,\)"):
        SpikeRule().find_together((np.ones(3), True), (np.ones(2), False))
