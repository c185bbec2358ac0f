"""adapters: copies of the parameters that an optimizer keeps are found wherever it keeps them."""

import warnings

import pytest
import torch
from autoclip_runs import Run, adamw, batches
from torch import nn

from smoothdiag import AutoClip, Probe, SmoothdiagWarning, StepRule

BINDING = StepRule(multiple=None, relative=0.02)


class Momentum(torch.optim.Optimizer):
    """Gradient descent with a moment, which keeps what a subclass wants to keep."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})
        self.count = 0

    @torch.no_grad()
    def step(self, closure=None):
        self.count += 1
        held = [p for group in self.param_groups for p in group["params"]]
        for p in held:
            state = self.state[p]
            state.setdefault("moment", torch.zeros_like(p)).mul_(0.9).add_(p.grad)
            p.sub_(self.param_groups[0]["lr"] * state["moment"])
        self.keep(held)

    def keep(self, held):
        """Keeps nothing."""


def keeping(keep):
    return type("Keeping", (Momentum,), {"keep": keep})


def average(self, held):
    for p in held:
        self.state[p].setdefault("average", p.clone()).lerp_(p, 0.1)


def nested(self, held):
    for p in held:
        self.state[p]["shadow"] = {"weights": [p.clone()]}


def in_a_list(self, held):
    self.slow = [p.clone() for p in held]


def by_parameter(self, held):
    self.slow = {p: p.clone() for p in held}


def in_the_state(self, held):
    self.state["slow"] = [p.clone() for p in held]


def flat(self, held):
    self.flat = torch.cat([p.flatten() for p in held])


def master(self, held):
    for p in held:
        self.state[p]["master"] = p.float().clone()


def of_an_inner_one(self, held):
    if not hasattr(self, "inner"):
        self.inner = torch.optim.SGD(held, lr=0.0)
    for p in held:
        self.inner.state[p]["slow"] = p.clone()


def late(self, held):
    if self.count > 4:
        in_a_list(self, held)
        self.state[held[0]]["mark"] = 1


KEPT = {
    "average": average,
    "nested": nested,
    "list": in_a_list,
    "by parameter": by_parameter,
    "list in the state": in_the_state,
    "flat": flat,
    "inner optimizer": of_an_inner_one,
}


@pytest.mark.parametrize("name", KEPT)
def test_an_iterate_is_refused_before_anything_is_shortened(name) -> None:
    kind = keeping(KEPT[name])
    run, free = Run(lambda m: kind(m.parameters()), rule=BINDING), Run(lambda m: kind(m.parameters()), clipped=False)
    with pytest.raises(ValueError, match="keep no copy of the parameters.*in the state of Keeping.*Clip gradients by"):
        run.over(batches(1))
    free.over(batches(1))
    assert torch.equal(run.weights(), free.weights())


def test_a_master_copy_of_half_parameters_is_one() -> None:
    kind = keeping(master)
    with pytest.raises(ValueError, match="Found `master` in the state of Keeping"):
        Run(lambda m: kind(m.parameters()), rule=BINDING, dtype=torch.bfloat16).over(batches(1, dtype=torch.bfloat16))


def test_a_copy_that_is_there_is_refused_by_the_constructor() -> None:
    class Slow(Momentum):
        def __init__(self, params):
            super().__init__(params)
            for p in self.param_groups[0]["params"]:
                self.state[p]["slow"] = p.detach().clone()

    with pytest.raises(ValueError, match="Found `slow` in the state of Slow, which equals the parameters"):
        Run(lambda m: Slow(m.parameters()), rule=BINDING)
    Run(lambda m: Slow(m.parameters()), rule=BINDING, mode="shadow").over(batches(2))


@pytest.mark.parametrize("keep", [late], ids=["list"])
def test_a_copy_that_comes_later_ends_acting_and_not_the_run(keep) -> None:
    run = Run(lambda m: keeping(keep)(m.parameters(), lr=1.0), rule=BINDING).over(batches(4))
    loader = batches(5, seed=9)
    with pytest.warns(SmoothdiagWarning, match="AutoClip stops acting.*`slow` in the state of Keeping") as said:
        run.over(loader)
    assert len(said) == 1
    events = run.clipper.history
    assert (events["event"].iloc[-1], events["step"].iloc[-1]) == ("stopped", 4)
    assert "has stopped acting" in run.clipper.reason
    assert run.clipper._history.counts.num_acted == 4


def descent(model, loss, *, steps=5, kind=Momentum, lr=0.1):
    """Runs AutoClip on a loss of the parameters alone."""
    optimizer = kind(model.parameters(), lr=lr)
    probe = Probe(model, optimizer, lambda net, _: loss(net), estimators=())
    clipper = AutoClip(optimizer, probe, rule=BINDING)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    return clipper


def half_square(model):
    return 0.5 * sum(p.square().sum() for p in model.parameters())


@pytest.mark.parametrize("size", [1, 2, 100])
def test_a_moment_that_equals_the_parameters_by_chance_is_none(size) -> None:
    clipper = descent(nn.Linear(size, size), half_square, steps=40)
    assert clipper.clip_fraction > 0.9
    assert list(clipper.history["event"]) == ["started"]


def noise(self, held):
    for p in held:
        self.state[p]["noise"] = torch.randn_like(p) * p.norm() / p.numel() ** 0.5


def test_small_models_give_no_false_alarm() -> None:
    for seed in range(40):
        torch.manual_seed(seed)
        model, x, y = nn.Linear(2, 1), torch.randn(8, 2), torch.randn(8, 1)
        descent(model, lambda net, x=x, y=y: (net(x) - y).square().mean(), steps=3, kind=keeping(noise), lr=1e-3)


def test_weights_that_are_zero_at_first_are_looked_at_again() -> None:
    def start():
        model = nn.Linear(12, 12)
        for p in model.parameters():
            nn.init.zeros_(p)
        return model

    def loss(model):
        source = torch.Generator().manual_seed(0)
        inputs, targets = (torch.randn(20, 12, generator=source) for _ in range(2))
        return (model(inputs * torch.arange(12)) - targets).square().sum() / 1000

    assert list(descent(start(), loss).history["event"]) == ["started"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            stopped = descent(start(), loss, kind=keeping(average), steps=60).reason
        except ValueError as error:
            stopped = str(error)
    assert "stopped acting" in stopped or "keep no copy" in stopped


def test_optimizers_of_torch_are_not_looked_through(monkeypatch) -> None:
    monkeypatch.setattr("smoothdiag.adapters.iterates.candidates", lambda _: pytest.fail("looked"))
    Run(adamw(), rule=BINDING).over(batches(3))
