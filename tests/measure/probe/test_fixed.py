"""measure.probe.data: rows on the micro-batches of the first measured step, compared with training now and then."""

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from asserts import assert_identical, state_of, without_cost
from autoclip_runs import Run, by_closure, sgd
from autoclip_runs import batches as classes
from losses import regression
from regressions import small_run, step_over
from torch import Tensor, nn
from torch.nn import functional as F

from smoothdiag import (
    CriticalStep,
    DirectionalCurvature,
    HessianNorm,
    LocalSmoothness,
    PathSmoothness,
    Probe,
    SmoothdiagWarning,
    every,
)
from smoothdiag.measure.loss.selftest import RETEST_EVERY

ONE = [LocalSmoothness(two_scale=False)]
Batch = tuple[Tensor, Tensor]


def half_square(model: nn.Module, batch: Batch) -> Tensor:
    return (model(batch[0])[:, 0] - batch[1]).square().mean() / 2


def lines(num: int, n: int = 8, width: int = 5, seed: int = 0) -> list[Batch]:
    """Returns batches of a linear regression whose examples are of unequal length."""
    source = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=source, dtype=torch.float64)

    truth = draw(width)
    inputs = [draw(n, width) * torch.exp(0.8 * draw(n, 1)) for _ in range(num)]
    return [(x, x @ truth + 0.5 * draw(n)) for x in inputs]


def linear(width: int = 5, lr: float = 0.02) -> tuple[nn.Linear, torch.optim.Optimizer]:
    model = nn.Linear(width, 1, bias=False).double()
    nn.init.constant_(model.weight, 0.3)
    return model, torch.optim.SGD(model.parameters(), lr=lr)


def literal(weight: Tensor, batch: Batch) -> float:
    """Returns the norm of the gradient X'(Xw - y)/n."""
    x, y = batch
    return float((x.T @ (x @ weight - y) / len(x)).norm())


def rows_of(probe: Probe, name: str = "local") -> list[dict[str, Any]]:
    return [row for row in probe.trace if row["estimator"] == name]


def test_every_row_is_about_the_first_batch() -> None:
    data = lines(25)
    model, optimizer = linear()
    probe = Probe(model, optimizer, half_square, estimators=[HessianNorm(tol=1e-10)], schedule=every(1))
    norms = []
    for batch in probe.watch(data):
        norms.append(literal(model.weight.detach()[0], data[0]))
        optimizer.zero_grad()
        half_square(model, batch).backward()
        optimizer.step()
    hessian = data[0][0].T @ data[0][0] / len(data[0][0])
    rows = list(probe.trace)
    assert len(rows) == 25
    assert {(row["data"], row["data_step"], row["status"]) for row in rows} == {("fixed", 0, "ok")}
    assert [row["grad_norm"] for row in rows] == pytest.approx(norms, rel=1e-12)
    largest = float(torch.linalg.eigvalsh(hessian)[-1])
    assert [row["smoothness"] for row in rows] == pytest.approx([largest] * 25, rel=1e-9)


def test_the_first_measured_step_keeps_its_batches() -> None:
    data = lines(9)
    model, optimizer = linear()
    probe = Probe(model, optimizer, half_square, estimators=ONE, schedule=lambda step: step in (3, 6))
    step_over(model, optimizer, probe.watch(data), half_square)
    assert [(row["step"], row["data_step"]) for row in probe.trace] == [(3, 3), (6, 3)]
    x, _ = data[3]
    assert probe.trace[1]["smoothness"] < float(torch.linalg.eigvalsh(x.T @ x / len(x))[-1])


def _overwritten(data: list[Batch]) -> Iterator[Batch]:
    buffer = torch.empty_like(data[0][0]), torch.empty_like(data[0][1])
    for x, y in data:
        buffer[0].copy_(x), buffer[1].copy_(y)
        yield buffer


def _array_overwritten(data: list[Batch]) -> Iterator[Any]:
    for x, y in _overwritten(data):
        yield {"x": x.numpy(), "y": [y]}


class _Graph:
    """A batch of a class that the probe does not know."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y


def _object_overwritten(data: list[Batch]) -> Iterator[Any]:
    graph = _Graph(*data[0])
    for x, y in data:
        graph.x, graph.y = x, y
        yield graph


LOADERS: dict[str, tuple[Callable[[list[Batch]], Iterator[Any]], Callable[[Any], Batch]]] = {
    "tensors": (_overwritten, lambda batch: batch),
    "arrays": (_array_overwritten, lambda batch: (torch.from_numpy(batch["x"]), batch["y"][0])),
    "object": (_object_overwritten, lambda batch: (batch.x, batch.y)),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_a_loader_that_reuses_its_buffers_changes_no_row(kind) -> None:
    loader, read = LOADERS[kind]
    data, found = lines(14), []
    for reused in (False, True):
        model, optimizer = linear()

        def loss_fn(model: nn.Module, batch: Any, read: Callable[[Any], Batch] = read if reused else tuple) -> Tensor:
            return half_square(model, read(batch))

        probe = Probe(model, optimizer, loss_fn, schedule=every(1))
        step_over(model, optimizer, probe.watch(loader(data) if reused else data), loss_fn)
        found.append([without_cost(row) for row in probe.trace])
        assert {row["status"] for row in found[-1]} <= {"ok", "saturated"}
    assert found[0] == found[1]


def test_a_batch_prepared_in_place_after_it_was_shown_is_noticed() -> None:
    model, optimizer = linear()
    probe = Probe(model, optimizer, half_square, estimators=ONE, schedule=every(1))
    with pytest.warns(SmoothdiagWarning, match="overwritten after the probe saw it"):
        for x, y in probe.watch(lines(3)):
            x.mul_(0.5)
            optimizer.zero_grad()
            half_square(model, (x, y)).backward()
            optimizer.step()
    assert [row["status"] for row in probe.trace] == ["data_changed"] * 3


def test_a_wrong_loss_is_noticed_at_the_first_step() -> None:
    data = lines(4)
    model, optimizer = linear()
    probe = Probe(model, optimizer, lambda m, b: half_square(m, b) + m.weight.square().sum(), estimators=ONE,
                  schedule=every(1))  # fmt: skip
    with pytest.warns(SmoothdiagWarning, match="another direction than the gradient of the training loop"):
        step_over(model, optimizer, probe.watch(data), lambda m, b: half_square(m, b) - m.weight.sum())
    assert [row["status"] for row in probe.trace] == ["not_reproduced"] * 4


def test_a_loss_that_changes_is_noticed_at_the_next_test_and_until_the_one_after() -> None:
    tests = [0, RETEST_EVERY + 1, 2 * (RETEST_EVERY + 1)]
    model, optimizer = linear(lr=1e-3)
    probe = Probe(model, optimizer, half_square, estimators=ONE, schedule=every(1))
    with pytest.warns(SmoothdiagWarning, match="trains a multiple of the loss that the probe measures"):
        for i, batch in enumerate(probe.watch(lines(tests[2] + 3))):
            optimizer.zero_grad()
            (half_square(model, batch) * (0.25 if 2 <= i < tests[2] else 1.0)).backward()
            optimizer.step()
    found = [row["status"] for row in probe.trace]
    expected = ["ok"] * tests[1] + ["not_reproduced"] * (tests[2] - tests[1]) + ["ok"] * 3
    assert found == expected


def test_layers_that_are_unfrozen_are_compared_at_once() -> None:
    model, _, batches = small_run(5)
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = Probe(model, optimizer, regression, estimators=ONE, schedule=every(1))
    with pytest.warns(SmoothdiagWarning, match="another direction"):
        for i, batch in enumerate(probe.watch(batches)):
            if i == 2:
                model[0].requires_grad_(True)
            optimizer.zero_grad()
            loss = regression(model, batch)
            (loss + model[0].weight.square().sum() if i >= 2 else loss).backward()
            optimizer.step()
    assert [row["status"] for row in probe.trace] == ["ok"] * 2 + ["not_reproduced"] * 3


def test_a_measurement_that_failed_is_compared_next_time() -> None:
    model, optimizer, batches = small_run(4)
    broken = False

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        if broken:
            raise RuntimeError("broken")
        return regression(model, batch)

    probe = Probe(model, optimizer, loss_fn, estimators=ONE, schedule=every(1))
    for i, batch in enumerate(probe.watch(batches)):
        broken = i == 1
        optimizer.zero_grad()
        regression(model, batch).backward()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step()
    assert [(row["status"], row["data"]) for row in probe.trace] == [
        ("ok", "fixed"), ("failed", "fixed"), ("ok", "fixed"), ("ok", "fixed"),
    ]  # fmt: skip


def test_rows_cost_what_rows_on_held_out_batches_cost() -> None:
    calls = {"fixed": 0, "held-out": 0}
    costs = {}
    for kind in calls:
        model, optimizer, batches = small_run(2 * RETEST_EVERY)

        def loss_fn(model: nn.Module, batch: Batch, kind: str = kind) -> Tensor:
            calls[kind] += 1
            return regression(model, batch)

        options = {"probe_batches": batches[:1]} if kind == "held-out" else {}
        probe = Probe(model, optimizer, loss_fn, schedule=every(1), estimators=ONE, **options)
        step_over(model, optimizer, probe.watch(batches))
        costs[kind] = [row["num_grads"] for row in probe.trace]
        assert {row["data"] for row in probe.trace} == {kind}
    assert max(costs["fixed"]) <= max(costs["held-out"])
    assert calls["fixed"] - sum(costs["fixed"]) == calls["held-out"] - sum(costs["held-out"]) + 1  # the second test


def test_micro_batches_are_kept_with_their_weights() -> None:
    data = lines(12)
    model, optimizer = linear()
    probe = Probe(model, optimizer, half_square, estimators=ONE, schedule=every(1))
    norms = []
    parts = (slice(0, 3), slice(3, 8))
    for i, (x, y) in enumerate(data):
        norms.append(literal(model.weight.detach()[0], data[0]))
        optimizer.zero_grad()
        for part in parts if i % 2 == 0 else [slice(0, 8)]:  # later steps may have another number of micro-batches
            weight = (part.stop - part.start) / 8
            probe.observe((x[part], y[part]), weight=weight)
            (half_square(model, (x[part], y[part])) * weight).backward()
        optimizer.step()
    assert [row["grad_norm"] for row in probe.trace] == pytest.approx(norms, rel=1e-12)
    assert {row["status"] for row in probe.trace} == {"ok"}


def test_micro_batches_of_a_skipped_step_are_not_kept() -> None:
    data = lines(3)
    model, optimizer = linear()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    probe = Probe(model, optimizer, half_square, estimators=ONE, schedule=every(1))
    for i, batch in enumerate(probe.watch(data)):
        optimizer.zero_grad()
        expected = literal(model.weight.detach()[0], data[1])
        scaler.scale(half_square(model, batch) * (math.inf if i == 0 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert [row["step"] for row in probe.trace] == [0, 1]
    assert probe.trace[1]["grad_norm"] == pytest.approx(expected, rel=1e-12)


def test_a_closure_that_fetches_its_batch() -> None:
    data = lines(4)
    model, _ = linear()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=2)
    probe = Probe(model, optimizer, half_square, estimators=ONE, schedule=every(1))
    norms = []
    for batch in data:
        norms.append(literal(model.weight.detach()[0], data[0]))

        def closure(batch: Batch = batch) -> Tensor:
            optimizer.zero_grad()
            probe.observe(batch)
            loss = half_square(model, batch)
            loss.backward()
            return loss

        optimizer.step(closure)
    assert [row["grad_norm"] for row in probe.trace] == pytest.approx(norms, rel=1e-12)


def test_steps_whose_batches_are_not_shown_are_measured_without_comparison() -> None:
    data = lines(RETEST_EVERY + 5)
    model, optimizer = linear()
    probe = Probe(model, optimizer, half_square, estimators=ONE, schedule=every(1))
    probe.also(every(1), DirectionalCurvature())
    step_over(model, optimizer, probe.watch(data[:2]), half_square)
    with pytest.warns(SmoothdiagWarning, match="nothing compares loss_fn") as caught:
        step_over(model, optimizer, data[2:-2], half_square)
    assert len([w for w in caught if issubclass(w.category, SmoothdiagWarning)]) == 1
    with pytest.warns(SmoothdiagWarning, match="another direction"):
        step_over(model, optimizer, probe.watch(data[-2:]), lambda m, b: half_square(m, b) - m.weight.sum())
    statuses = [row["status"] for row in rows_of(probe)]
    assert statuses == ["ok"] * (len(data) - 2) + ["not_reproduced"] * 2  # compared as soon as a batch is shown again
    assert [row["step"] for row in rows_of(probe, "batch_sharpness")] == [0, 1, len(data) - 2, len(data) - 1]


def test_estimators_of_the_step_are_measured_on_its_own_batch() -> None:
    data = lines(5)
    model, optimizer = linear()
    estimators = [PathSmoothness(), DirectionalCurvature(), CriticalStep()]
    probe = Probe(model, optimizer, half_square, estimators=estimators, schedule=every(1))
    sharpness = []
    for batch in probe.watch(data):
        x, y = batch
        g = x.T @ (x @ model.weight.detach()[0] - y) / len(x)
        sharpness.append(float((x @ g).square().mean() / g.square().sum()))
        optimizer.zero_grad()
        half_square(model, batch).backward()
        optimizer.step()
    kinds = {row["estimator"]: row["data"] for row in probe.trace}
    assert kinds == {"path": "fixed", "batch_sharpness": "step", "critical_step": "step"}
    assert [row["smoothness"] for row in rows_of(probe, "batch_sharpness")] == pytest.approx(sharpness, rel=1e-9)


@pytest.mark.parametrize(("loop", "dtype"), [("plain", torch.float32), ("closure", torch.float32),
                                             ("plain", torch.bfloat16)])  # fmt: skip
def test_autoclip_measures_the_same_on_whatever_data_the_probe_measures(loop, dtype) -> None:
    found = []
    for data in ("step", "fixed"):
        run = Run(sgd(0.5, 0.9), schedule=every(3), data=data, dtype=dtype)
        for batch in classes(45, dtype=dtype):
            by_closure(run, batch) if loop == "closure" else run.step(batch)
        clipping = [without_cost(row) for row in run.probe.trace if row["estimator"].endswith("_clip")]
        assert {row["data"] for row in clipping} == {"step"}
        assert {row["data"] for row in rows_of(run.probe)} == {data}
        found.append((clipping, run.losses, run.clipper.state_dict(), run.clipper.threshold))
    assert str(found[0]) == str(found[1])
    assert len(found[0][0]) > 10


class Noisy(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, 2))


def test_a_run_with_batch_statistics_and_dropout_is_unchanged_and_its_rows_repeat() -> None:
    results = []
    for probed in (True, False):
        torch.manual_seed(0)
        model = Noisy()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        data = [(torch.randn(8, 4), torch.randn(8, 2)) for _ in range(30)]
        probes = [Probe(model, optimizer, regression, schedule=every(2)) for _ in range(2)] if probed else []
        for i, batch in enumerate(data):
            for probe in probes:
                probe.observe(batch)
            (regression(model, batch) / 2).backward()
            if i % 2:
                optimizer.step()
                optimizer.zero_grad()
        results.append(state_of(model, optimizer) | {"random": torch.get_rng_state()})
        if probed:
            first, second = ([without_cost(row) for row in probe.trace] for probe in probes)
            assert str(first) == str(second)
            assert {row["status"] for row in first} <= {"ok", "saturated"}
    assert_identical(*results)


def test_dropout_masks_of_the_first_step_return_at_every_step() -> None:
    torch.manual_seed(0)
    model = Noisy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    probe = Probe(model, optimizer, regression, estimators=ONE, schedule=every(1))
    step_over(model, optimizer, probe.watch([(torch.randn(8, 4), torch.randn(8, 2)) for _ in range(4)]))
    assert len({row["loss"] for row in probe.trace}) == 1
    assert len({row["smoothness"] for row in probe.trace}) == 1


class Growing(nn.Linear):
    """Multiplies its output by a buffer that every forward pass increases."""

    def __init__(self) -> None:
        super().__init__(4, 2)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x) * self.scale.clone()
        with torch.no_grad():
            self.scale += 1
        return out


def test_fixed_batches_begin_with_the_buffers_that_the_forward_pass_of_the_step_began_with() -> None:
    model = Growing()
    nn.init.zeros_(model.weight), nn.init.ones_(model.bias)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    probe = Probe(model, optimizer, regression, estimators=ONE, schedule=every(1))
    step_over(model, optimizer, probe.watch([(torch.randn(8, 4), torch.zeros(8, 2)) for _ in range(3)]))
    assert [row["loss"] for row in probe.trace] == [1.0, 4.0, 9.0]


def test_a_resumed_run_keeps_its_own_batches_and_says_so(tmp_path) -> None:
    data = lines(8)
    path = tmp_path / "run.jsonl"
    model, optimizer = linear()
    with Probe(model, optimizer, half_square, estimators=ONE, schedule=every(1), trace=path) as probe:
        step_over(model, optimizer, probe.watch(data[:4]), half_square)
        state = probe.state_dict()
    assert all(isinstance(value, int | None) for value in state.values())
    with Probe(model, optimizer, half_square, estimators=ONE, schedule=every(1), trace=path) as probe:
        probe.load_state_dict(state)
        before = literal(model.weight.detach()[0], data[4])
        step_over(model, optimizer, probe.watch(data[4:]), half_square)
    assert [(row["step"], row["data_step"]) for row in probe.trace] == [(i, 0 if i < 4 else 4) for i in range(8)]
    assert probe.trace[4]["grad_norm"] == pytest.approx(before, rel=1e-12)
    assert "a resumed run keeps others" in probe.trace.meta["data"]


def test_a_batch_that_cannot_be_copied_is_refused_with_a_way_out() -> None:
    model, optimizer, batches = small_run(1)
    shown = (*batches[0], (x for x in range(3)))
    probe = Probe(model, optimizer, lambda m, b: regression(m, b[:2]))
    with pytest.raises(ValueError, match='Found a generator.*probe_batches.*data="step"'):
        probe.observe(shown)
    probe.close()
    probe = Probe(model, optimizer, lambda m, b: regression(m, b[:2]), data="step")
    step_over(model, optimizer, probe.watch([shown]), lambda m, b: regression(m, b[:2]))
    assert {row["status"] for row in probe.trace} <= {"ok", "saturated"}


def test_modules_in_a_batch_are_not_copied() -> None:
    model, optimizer, batches = small_run(3)
    head = nn.Linear(2, 2).double()

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        x, y, head = batch
        return F.mse_loss(head(model(x)), y)

    probe = Probe(model, optimizer, loss_fn, estimators=ONE, schedule=every(1))
    shown = [(*batch, head) for batch in batches]
    step_over(model, optimizer, probe.watch(shown), loss_fn)
    assert probe._data._fixed[0].batch[2] is head


def test_a_closed_probe_lets_go_of_its_batches() -> None:
    model, optimizer, batches = small_run(1)
    probe = Probe(model, optimizer, regression)
    step_over(model, optimizer, probe.watch(batches))
    assert probe._data.has_fixed
    assert probe._data._fixed[0].batch[0].data_ptr() != batches[0][0].data_ptr()
    probe.close()
    assert not probe._data.has_fixed


def test_data_beside_held_out_batches() -> None:
    model, optimizer, batches = small_run(1)
    Probe(model, optimizer, regression, probe_batches=batches, data="fixed")
    with pytest.raises(ValueError, match='Parameter `data` should not be "step" beside `probe_batches`'):
        Probe(model, optimizer, regression, probe_batches=batches, data="step")
    with pytest.raises(ValueError, match="Parameter `data` should be one of"):
        Probe(model, optimizer, regression, data="held-out")
