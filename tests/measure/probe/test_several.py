"""measure.probe: several optimizers that take one step are measured as one."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from asserts import assert_identical, state_of, without_cost
from networks import Gpt, mlp, texts
from torch import Tensor, nn
from torch.nn import functional as F

from smoothdiag import LocalSmoothness, PathSmoothness, Probe, every
from smoothdiag.rows import SmoothdiagWarning

Loop = Callable[..., list[tuple[list[Tensor], list[Tensor]]]]


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, -2), batch[1].flatten())


def muon_and_adamw(model: nn.Module) -> list[torch.optim.Optimizer]:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    return [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(others, lr=3e-3)]


class Run:
    """A small GPT under Muon and AdamW.

    Args:
        probed: Whether a probe measures every step.
        turned: Whether AdamW steps first.
        skipped: Steps in which the second optimizer is left out.
        accumulation: Micro-batches of a step.
        clears: When gradients are cleared: after each optimizer's step, or after both.
    """

    def __init__(
        self,
        *,
        probed: bool,
        turned: bool = False,
        skipped: tuple[int, ...] = (),
        accumulation: int = 1,
        clears: str = "after both",
    ) -> None:
        torch.manual_seed(0)
        self.model = Gpt().eval()  # without dropout
        self.optimizers = muon_and_adamw(self.model)
        in_turn = self.optimizers[::-1] if turned else self.optimizers
        self.ends: list[tuple[list[Tensor], list[Tensor]]] = []
        self.batches: list[list[tuple[Tensor, Tensor]]] = []
        self.probe = Probe(self.model, self.optimizers, loss_fn, schedule=every(1), data="step") if probed else None
        for k in range(5):
            self.batches.append(texts(accumulation, 4))
            for batch in self.batches[-1]:
                if self.probe is not None:
                    self.probe.observe(batch)
                (loss_fn(self.model, batch) / accumulation).backward()
            start = [p.detach().clone() for p in self.model.parameters()]
            for optimizer in in_turn[: 1 if k in skipped else 2]:
                optimizer.step()
                if clears == "after each":
                    optimizer.zero_grad()
            self.ends.append((start, [p.detach().clone() for p in self.model.parameters()]))
            for optimizer in in_turn:
                optimizer.zero_grad()
        self.state = state_of(self.model)


def gradient_norm(model: nn.Module, start: list[Tensor], batches: list[tuple[Tensor, Tensor]]) -> float:
    """Returns the norm of the gradient of the whole step's loss in float64."""
    twin = copy.deepcopy(model).double()
    with torch.no_grad():
        for p, x in zip(twin.parameters(), start, strict=True):
            p.copy_(x)
    loss = torch.stack([loss_fn(twin, batch) for batch in batches]).mean()
    return float(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(twin.parameters()))]).norm())


@pytest.mark.parametrize("options", [{}, {"turned": True}, {"accumulation": 3, "clears": "after each"}])
def test_all_parameters_are_one_x_and_the_run_stays_the_same(options: dict) -> None:
    run = Run(probed=True, **options)
    assert_identical(run.state, Run(probed=False, **options).state)
    rows = run.probe.trace.to_frame()
    assert (rows.status == "ok").all() or set(rows.status) <= {"ok", "saturated"}
    assert len(rows) == 10
    for step, (start, end) in enumerate(run.ends):
        for row in rows[rows.step == step].itertuples():
            assert row.grad_norm == pytest.approx(gradient_norm(run.model, start, run.batches[step]), rel=1e-6)
        moved = torch.cat([(b - a).flatten() for a, b in zip(start, end, strict=True)]).double().norm()
        (path,) = rows[(rows.step == step) & (rows.estimator == "path")].itertuples()
        assert path.step_norm == pytest.approx(float(moved), rel=1e-6)
    assert math.isnan(rows.lr.iloc[0])  # two rates
    assert run.probe.trace.meta["optimizer"] == "Muon + AdamW"


def test_a_step_without_one_of_them_ends_at_the_next_batch() -> None:
    options = {"skipped": (1, 4), "accumulation": 2}
    run = Run(probed=True, **options)
    assert_identical(run.state, Run(probed=False, **options).state)
    run.probe.close()  # which ends the last step
    rows = run.probe.trace.to_frame().query("estimator == 'path'")
    assert rows.step.tolist() == [0, 1, 2, 3, 4]
    for row, (start, end) in zip(rows.itertuples(), run.ends, strict=True):
        moved = torch.cat([(b - a).flatten() for a, b in zip(start, end, strict=True)]).double().norm()
        assert row.step_norm == pytest.approx(float(moved), rel=1e-6)
        expected = gradient_norm(run.model, start, run.batches[row.step])
        assert row.grad_norm == pytest.approx(expected, rel=1e-6)


def test_groups_of_one_optimizer_and_two_optimizers_give_the_same_rows() -> None:
    def run(*, two: bool) -> list[dict]:
        torch.manual_seed(0)
        model = mlp(4, 16, 16, 3)
        first, rest = list(model.parameters())[:2], list(model.parameters())[2:]
        options = {"momentum": 0.9, "lr": 0.1}
        optimizer = (
            [torch.optim.SGD(part, **options) for part in (first, rest)]
            if two
            else torch.optim.SGD([{"params": first}, {"params": rest}], **options)
        )
        probe = Probe(model, optimizer, loss_fn, schedule=every(2))
        for k in range(6):
            generator = torch.Generator().manual_seed(k)
            batch = torch.randn(8, 4, generator=generator), torch.randint(3, (8,), generator=generator)
            probe.observe(batch)
            loss_fn(model, batch).backward()
            for each in optimizer if two else [optimizer]:
                each.step()
                each.zero_grad()
        return [without_cost(row) for row in probe.trace]

    assert run(two=True) == run(two=False)


def test_states_resume() -> None:
    torch.manual_seed(0)
    model = mlp(4, 3)
    optimizers = [torch.optim.SGD([p], lr=0.1) for p in model.parameters()]
    batch = torch.randn(8, 4), torch.randint(3, (8,))

    def step(probe: Probe) -> None:
        probe.observe(batch)
        loss_fn(model, batch).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    probe = Probe(model, optimizers, loss_fn, schedule=every(3))
    for _ in range(4):
        step(probe)
    resumed = Probe(model, optimizers, loss_fn, schedule=every(3))
    resumed.load_state_dict(probe.state_dict())
    probe.close()
    for _ in range(3):
        step(resumed)
    assert sorted(set(resumed.trace.to_frame().step)) == [6]
    assert resumed.steps == 7


def test_a_loss_for_each_optimizer_is_noticed() -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(3, 1), nn.Linear(3, 1)
    model = nn.ModuleList([first, second])
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in model]
    probe = Probe(model, optimizers, lambda model, x: model[0](x).square().mean(), schedule=every(1))
    x = torch.randn(8, 3)
    with pytest.warns(SmoothdiagWarning, match="between the steps of SGD . SGD"):
        for _ in range(3):
            probe.observe(x)
            for module, optimizer in zip(model, optimizers, strict=True):
                module(x).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()


def test_estimators_and_also_measure_after_the_last() -> None:
    model = mlp(4, 3)
    optimizers = [torch.optim.SGD([p], lr=0.1) for p in model.parameters()]
    probe = Probe(model, optimizers, loss_fn, schedule=every(1), estimators=[PathSmoothness()])
    probe.also(every(2), LocalSmoothness(radius=1e-3))
    batch = torch.randn(8, 4), torch.randint(3, (8,))
    for _ in range(2):
        probe.observe(batch)
        loss_fn(model, batch).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert probe.trace.to_frame().step.tolist() == [0, 0, 1]


def test_an_optimizer_that_replaces_another_is_noticed_and_can_be_followed() -> None:
    """AWD-LSTM changes from SGD to ASGD in mid-run."""
    torch.manual_seed(0)
    model = mlp(4, 16, 3)
    sgd, asgd = (kind(model.parameters(), lr=0.1) for kind in (torch.optim.SGD, torch.optim.ASGD))
    probe = Probe(model, sgd, loss_fn, schedule=every(1), data="step")

    def steps(optimizer: torch.optim.Optimizer, number: int) -> list[float]:
        norms = []
        for _ in range(number):
            batch = torch.randn(8, 4), torch.randint(3, (8,))
            probe.observe(batch)
            loss_fn(model, batch).backward()
            norms.append(float(nn.utils.get_total_norm([p.grad for p in model.parameters()])))
            optimizer.step()
            optimizer.zero_grad()
        return norms

    norms = steps(sgd, 2)
    with pytest.warns(
        SmoothdiagWarning, match=r"without a call of SGD.step\(\).*replaced the optimizer, close"
    ) as said:
        steps(asgd, 3)
    assert len(said) == 1
    before, counted = probe.trace, probe.state_dict()
    assert counted["steps"] == 2
    probe.close()
    probe = Probe(model, asgd, loss_fn, schedule=every(1), data="step", trace=before)
    probe.load_state_dict(counted)
    norms += steps(asgd, 2)
    rows = before.to_frame().query("estimator == 'path'")
    assert rows.step.tolist() == [0, 1, 2, 3]
    assert rows.grad_norm.tolist() == pytest.approx(norms, rel=1e-6)
