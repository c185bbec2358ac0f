"""measure.probe.closures: the probe handles optimizers that evaluate the loss themselves through a closure."""

import math
import sys

import pytest
import torch
from autoclip_runs import Run, adamw, batches, by_closure, sgd
from losses import cross_entropy

from smoothdiag import LocalSmoothness, Probe, StepRule, every

FIXED = StepRule(None)


@pytest.mark.parametrize("positional", [False, True])
@pytest.mark.parametrize("make", [sgd(3.0, 0.9), adamw(0.1)])
def test_a_step_with_a_closure_is_the_step_without(make, positional) -> None:
    plain, run = Run(make, schedule=every(7)), Run(make, schedule=every(7))
    for batch in batches(40):
        plain.step(batch)
        by_closure(run, batch, positional=positional)
    assert torch.equal(run.weights(), plain.weights())
    assert run.clipper.reason == plain.clipper.reason
    rows, expected = ([{k: v for k, v in row.items() if k != "seconds"} for row in r.probe.trace] for r in (run, plain))
    assert rows == expected


@pytest.mark.parametrize("mode", ["clip", "shadow"])
def test_an_optimizer_that_evaluates_its_closure_repeatedly_is_refused(mode) -> None:
    with pytest.raises(ValueError, match="evaluate its closure once in a step.*Found LBFGS"):
        Run(lambda m: torch.optim.LBFGS(m.parameters()), rule=FIXED, mode=mode)

    class Twice(torch.optim.SGD):
        def step(self, closure):
            closure()
            return super().step(closure)

    run = Run(lambda m: Twice(m.parameters(), lr=1.0), rule=FIXED)
    with pytest.raises(RuntimeError, match="Found a second evaluation"):
        by_closure(run, *batches(1))


def test_an_optimizer_that_ignores_its_closure_is_noticed() -> None:
    class Ignoring(torch.optim.SGD):
        def step(self, closure=None):
            return super().step()

    run = Run(lambda m: Ignoring(m.parameters(), lr=1.0), rule=FIXED)
    with pytest.raises(RuntimeError, match="should evaluate the closure of its step.*Found that Ignoring did not"):
        by_closure(run, *batches(1))


@pytest.mark.filterwarnings("ignore")
def test_a_closure_that_leaves_no_gradient_is_not_measured() -> None:
    run = Run(sgd(), clipped=False, schedule=every(1))
    run.probe.observe(*batches(1))
    run.optimizer.step(lambda: None)
    assert len(run.probe.trace) == 0
    assert run.probe.steps == 1


class Ahead(torch.optim.SGD):
    """Steps along the gradient some way off, as optimizers that look for flat places do."""

    def step(self, closure):
        with torch.no_grad():
            before = [p.clone() for p in self.param_groups[0]["params"]]
            for p in self.param_groups[0]["params"]:
                p.add_(torch.ones_like(p))
        loss = closure()
        with torch.no_grad():
            for p, x in zip(self.param_groups[0]["params"], before, strict=True):
                p.copy_(x)
        super().step()
        return loss


def test_a_gradient_of_elsewhere_is_not_taken_for_that_of_the_start() -> None:
    ahead = Run(lambda m: Ahead(m.parameters(), 0.1), clipped=False, schedule=every(1))
    plain = Run(sgd(), clipped=False, schedule=every(1))
    (batch,) = batches(1)
    by_closure(ahead, batch)
    plain.step(batch)
    (row,), (expected,) = ahead.probe.trace, plain.probe.trace
    assert (row["status"], row["grad_norm"]) == ("ok", expected["grad_norm"])
    assert math.isnan(ahead.probe.self_test.angle), "there is no gradient to compare with"


def test_another_loss_in_the_closure_than_the_probe_has_is_noticed() -> None:
    run = Run(sgd(), clipped=False)
    run.probe.close()
    run.probe = Probe(run.model, run.optimizer, lambda m, b: m(b[0]).sum(), estimators=[LocalSmoothness()])
    with pytest.warns(UserWarning, match="another direction than the gradient of the training loop"):
        by_closure(run, *batches(1))
    assert [row["status"] for row in run.probe.trace] == ["not_reproduced"]


def test_a_closure_that_shows_its_batch_each_time_it_is_evaluated() -> None:
    run = Run(lambda m: torch.optim.LBFGS(m.parameters(), lr=0.1, max_iter=4), clipped=False, schedule=every(1))
    for batch in batches(3):
        by_closure(run, batch)
    rows = [row for row in run.probe.trace if row["estimator"] == "local"]
    assert [(row["step"], row["status"]) for row in rows] == [(0, "ok"), (1, "ok"), (2, "ok")]


def test_a_step_that_failed_leaves_no_batches_for_the_next_one(monkeypatch) -> None:
    run, plain = (Run(sgd(), clipped=False, schedule=every(1)) for _ in range(2))
    first, second = batches(2)
    run.optimizer.zero_grad()
    run.probe.observe(first)
    cross_entropy(run.model, first).backward()
    with monkeypatch.context() as broken:
        broken.setattr(sys.modules["torch.optim.sgd"], "sgd", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run.optimizer.step()
    by_closure(run, second)
    by_closure(plain, second)
    assert run.probe.trace[-1]["grad_norm"] == plain.probe.trace[-1]["grad_norm"]
