"""adapters: the preconditioner found in an optimizer's state explains the step that the optimizer really takes."""

import pytest
import torch
from losses import regression
from regressions import small_run, step_over

from smoothdiag import Diagonal, LocalSmoothness, PathSmoothness, Probe, every
from smoothdiag.adapters import adapter_of

OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.0, 0.9)),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.0, 0.9), amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.0, 0.9), weight_decay=0.0),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "centered": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_without_momentum_the_step_is_lr_times_the_gradient_over_p(name) -> None:
    model, _, batches = small_run(5)
    optimizer = OPTIMIZERS[name](model.parameters())
    parameters = list(model.parameters())
    for batch in batches:
        optimizer.zero_grad()
        regression(model, batch).backward()
        before = [p.detach().clone() for p in parameters]
        optimizer.step()
        diagonal = adapter_of(optimizer).preconditioner(parameters)
        for p, x, matrix in zip(parameters, before, diagonal, strict=True):
            torch.testing.assert_close(x - p.detach(), 0.01 * p.grad / matrix, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("beta", [0.9, 0.95, 0.999])
def test_the_correction_has_the_bits_of_python_floats(dtype, beta) -> None:
    p = torch.nn.Parameter(torch.randn(50, generator=torch.Generator().manual_seed(0)).to(dtype))
    optimizer = torch.optim.Adam([p], lr=0.01, betas=(0.9, beta))
    p.grad = p.detach().clone()
    optimizer.step()
    state = optimizer.state[p]
    for step in (*range(1, 300), 1234, 99_999, 10_000_019):
        state["step"].fill_(step)
        (found,) = adapter_of(optimizer).preconditioner([p])
        assert torch.equal(found, (state["exp_avg_sq"] / (1 - beta ** float(step))).sqrt() + 1e-8)


def read_without_values(optimizer, parameters) -> list[torch.Tensor]:
    """Puts the state on the meta device, which has no values to wait for, and reads the diagonal there."""
    groups = optimizer.param_groups
    optimizer.state = {
        p: {name: t.to("meta") if isinstance(t, torch.Tensor) else t for name, t in optimizer.state[q].items()}
        for p, q in zip(parameters, [q for group in groups for q in group["params"]], strict=True)
    }
    groups[0]["params"] = parameters
    return list(adapter_of(optimizer).preconditioner(parameters))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_reading_waits_for_no_device(name) -> None:
    model, _, batches = small_run(1)
    optimizer = OPTIMIZERS[name](model.parameters())
    step_over(model, optimizer, batches)
    elsewhere = [torch.nn.Parameter(p.to("meta")) for p in model.parameters()]
    assert [p.shape for p in read_without_values(optimizer, elsewhere)] == [p.shape for p in elsewhere]
    assert adapter_of(optimizer).stability_limit(elsewhere).curvature > 0


def test_every_reading_is_of_the_present_state_and_none_is_kept() -> None:
    model, _, batches = small_run(2)
    optimizer = OPTIMIZERS["adam"](model.parameters())
    unmoved = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer.add_param_group({"params": [unmoved]})
    parameters = [*model.parameters(), unmoved]
    step_over(model, optimizer, batches[:1])
    diagonal = adapter_of(optimizer).preconditioner(parameters)
    first = [p.clone() for p in diagonal]
    assert torch.equal(first[-1], torch.zeros(3, dtype=torch.float64))
    assert all(map(torch.equal, diagonal[1:3], first[1:3]))
    step_over(model, optimizer, batches[1:])
    assert not torch.equal(diagonal[0], first[0])
    assert all(map(torch.equal, diagonal, adapter_of(optimizer).preconditioner(parameters)))


def test_optimizers_without_one_have_none() -> None:
    model, optimizer, _ = small_run()
    assert adapter_of(optimizer).preconditioner(list(model.parameters())) is None


def test_rows_in_the_optimizers_norm_are_literal() -> None:
    model, _, (batch,) = small_run(1)
    parameters = list(model.parameters())
    optimizer = torch.optim.Adam(parameters, lr=0.01)
    probe = Probe(model, optimizer, regression, estimators=[PathSmoothness()], group_by=lambda n: n[0])

    def flat(tensors) -> torch.Tensor:
        return torch.cat([t.detach().flatten() for t in tensors])

    def gradient() -> torch.Tensor:
        return flat(torch.autograd.grad(regression(model, batch), parameters))

    x0, g0 = flat(parameters), gradient()
    step_over(model, optimizer, probe.watch([batch]))
    x1, g1, p = flat(parameters), gradient(), flat(adapter_of(optimizer).preconditioner(parameters))
    rows = {(r["estimator"], r["group"]): r for r in probe.trace}
    assert set(rows) == {(e, g) for e in ("path", "path_preconditioned") for g in ("all", "0", "2")}
    row = rows["path_preconditioned", "all"]
    assert row["grad_norm"] == pytest.approx(float((g0 / p.sqrt()).norm()), rel=1e-10)
    assert row["step_norm"] == pytest.approx(float((p.sqrt() * (x1 - x0)).norm()), rel=1e-10)
    change = float(((g1 - g0) / p.sqrt()).norm())
    assert row["smoothness"] == pytest.approx(change / row["step_norm"], rel=1e-10)
    assert rows["path", "all"]["num_grads"] > 0
    assert row["num_grads"] == 0


def test_a_gradient_never_seen_by_the_optimizer_is_no_division_by_zero() -> None:
    model, _, batches = small_run(2)
    unused = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = torch.optim.Adam([*model.parameters(), unused], lr=0.01)
    probe = Probe(model, optimizer, regression, estimators=[LocalSmoothness()], schedule=every(1))
    step_over(model, optimizer, probe.watch(batches))
    assert {r["status"] for r in probe.trace} == {"ok"}


def test_diagonal_geometry() -> None:
    p, g = (torch.tensor([4.0, 0.25, 0.0]),), [torch.tensor([2.0, 1.0, 0.0])]
    geometry = Diagonal(p)
    assert float(geometry.norm([torch.tensor([1.0, 2.0, 5.0])])) == pytest.approx((4 + 1) ** 0.5)
    assert float(geometry.dual_norm(g)) == pytest.approx((1 + 4) ** 0.5)
    (minimiser,) = geometry.lmo(g)
    assert float(geometry.norm([minimiser])) == pytest.approx(1.0)
    assert float((minimiser * g[0]).sum()) == pytest.approx(-(5**0.5))
    assert torch.equal(geometry.lmo([torch.zeros(3)])[0], torch.zeros(3))
    assert float(geometry.dual_norm([torch.tensor([0.0, 0.0, 1.0])])) == float("inf")


def test_a_subclass_with_a_state_of_its_own_has_no_known_norm() -> None:
    class Packed(torch.optim.Adam):
        def step(self, closure=None):
            super().step(closure)
            for state in self.state.values():
                state["packed"] = state.pop("exp_avg_sq")

    model, _, batches = small_run(1)
    optimizer = Packed(model.parameters(), lr=0.01)
    probe = Probe(model, optimizer, regression, estimators=[PathSmoothness()])
    step_over(model, optimizer, probe.watch(batches))
    assert [r["estimator"] for r in probe.trace] == ["path"]
