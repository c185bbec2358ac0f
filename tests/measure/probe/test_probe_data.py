"""measure.probe.measuring: every row is about the data of its step, whatever the loop does with batches."""

import copy
import math
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from asserts import assert_identical, state_of
from losses import regression
from regressions import small_run, step_over
from torch import nn
from torch.nn import functional as F

from smoothdiag import (
    DebiasedSmoothness,
    Estimate,
    LocalSmoothness,
    PathSmoothness,
    Probe,
    SmoothdiagWarning,
    Status,
    by_module,
    every,
)
from smoothdiag.measure.recording import rows_of

ONE = [LocalSmoothness(two_scale=False)]


def true_norm(model: nn.Module, batch) -> float:
    model = copy.deepcopy(model)  # the probe sees every backward pass through the model itself
    gradient = torch.autograd.grad(regression(model, batch), list(model.parameters()))
    return float(torch.cat([g.flatten() for g in gradient]).norm())


def test_batches_that_the_loop_skips_do_not_count() -> None:
    model, optimizer, batches = small_run(6)
    probe = Probe(model, optimizer, regression, data="step", estimators=ONE, schedule=every(1))
    expected = []
    for i, batch in enumerate(probe.watch(batches)):
        optimizer.zero_grad()
        if i in (0, 3):
            continue
        expected.append(true_norm(model, batch))
        regression(model, batch).backward()
        optimizer.step()
    assert [r["grad_norm"] for r in probe.trace] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_an_abandoned_accumulation_does_not_count(set_to_none) -> None:
    # As after a GradScaler skip: backward ran, the step did not, and the gradients were emptied.
    model, optimizer, batches = small_run(3)
    probe = Probe(model, optimizer, regression, data="step", estimators=ONE, schedule=every(1))
    for i, batch in enumerate(probe.watch(batches)):
        optimizer.zero_grad(set_to_none=set_to_none)
        expected = true_norm(model, batch)
        regression(model, batch).backward()
        if i != 1:
            optimizer.step()
            assert probe.trace[-1]["grad_norm"] == pytest.approx(expected, rel=1e-12), i


def test_a_skipped_scaler_step_leaves_nothing_behind() -> None:
    model, optimizer, batches = small_run(3)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    probe = Probe(model, optimizer, regression, data="step", estimators=ONE, schedule=every(1))
    for i, batch in enumerate(probe.watch(batches)):
        optimizer.zero_grad()
        expected = true_norm(model, batch)
        scaler.scale(regression(model, batch) * (math.inf if i == 1 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert [r["step"] for r in probe.trace] == [0, 1]
    assert probe.trace[1]["grad_norm"] == pytest.approx(expected, rel=1e-12)


def test_layers_that_are_unfrozen_are_taken_up() -> None:
    model, _, batches = small_run(4)
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = Probe(model, optimizer, regression, data="step", estimators=ONE, schedule=every(1))
    for i, batch in enumerate(probe.watch(batches)):
        if i == 2:  # in the loop body, after the batch was seen
            model[0].requires_grad_(True)
        optimizer.zero_grad()
        regression(model, batch).backward()
        expected = math.sqrt(sum(float(p.grad.norm()) ** 2 for p in model.parameters() if p.grad is not None))
        optimizer.step()
        assert probe.trace[-1]["grad_norm"] == pytest.approx(expected, rel=1e-12), i
        assert probe.trace[-1]["status"] == "ok"


def test_random_numbers_drawn_between_batch_and_forward_are_noticed() -> None:
    model = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.Linear(64, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = Probe(model, optimizer, regression, data="step", estimators=ONE, schedule=every(1))
    with pytest.warns(SmoothdiagWarning, match="another direction than the gradient of the training loop"):
        for i, batch in enumerate(probe.watch([(torch.randn(8, 4), torch.randn(8, 2))] * 3)):
            if i == 1:
                torch.rand(3)  # a validation loader that shuffles
            optimizer.zero_grad()
            regression(model, batch).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)  # its length may change, not its direction
            optimizer.step()
    assert [r["status"] for r in probe.trace] == ["ok", "not_reproduced", "ok"]


def test_a_part_of_the_loss_outside_loss_fn_is_noticed() -> None:
    model, optimizer, batches = small_run(1)
    probe = Probe(model, optimizer, regression, estimators=ONE, schedule=every(1))
    (regression(model, next(probe.watch(batches))) + 0.1 * model[0].weight.square().sum()).backward()
    with pytest.warns(SmoothdiagWarning, match="measures another loss than the one you train"):
        optimizer.step()
    assert probe.self_test.angle > 0.01


def test_a_batch_written_to_after_it_was_seen_is_marked() -> None:
    model, optimizer, _ = small_run()
    buffer = (torch.empty(8, 4).double(), torch.empty(8, 2).double())

    def loader():
        for _ in range(4):
            buffer[0].normal_(), buffer[1].normal_()
            yield buffer

    probe = Probe(model, optimizer, regression, data="step", estimators=ONE, schedule=every(1))
    with pytest.warns(SmoothdiagWarning, match="overwritten after the probe saw it"):
        for i, batch in enumerate(probe.watch(loader())):
            (regression(model, batch) / 2).backward()
            if i % 2:
                optimizer.step()
                optimizer.zero_grad()
    assert [r["status"] for r in probe.trace] == ["data_changed"] * 2


def test_a_loss_that_takes_entries_out_of_its_batch() -> None:
    model, optimizer, batches = small_run(3)
    dicts = [{"x": x, "labels": y, "meta": [1, "a"]} for x, y in batches]

    def loss_fn(model: nn.Module, batch: dict) -> torch.Tensor:
        return F.mse_loss(model(batch["x"]), batch.pop("labels"))

    probe = Probe(model, optimizer, loss_fn, estimators=ONE, schedule=every(1))
    step_over(model, optimizer, probe.watch(dicts), loss_fn)
    assert [r["status"] for r in probe.trace] == ["ok"] * 3
    assert all("labels" not in batch for batch in dicts)


def test_weights_of_unequal_micro_batches() -> None:
    model, optimizer, (batch,) = small_run(1, n=10)
    expected = true_norm(model, batch)
    probe = Probe(model, optimizer, regression, estimators=ONE)
    for part in (slice(0, 3), slice(3, 10)):
        chunk, weight = (batch[0][part], batch[1][part]), (part.stop - part.start) / 10
        probe.observe(chunk, weight=weight)
        (regression(model, chunk) * weight).backward()
    optimizer.step()
    assert probe.trace[0]["grad_norm"] == pytest.approx(expected, rel=1e-12)
    assert probe.self_test.angle < 1e-7


def test_a_shuffling_loader_of_held_out_batches_draws_nothing_from_the_run() -> None:
    model, optimizer, batches = small_run(4)
    dataset = torch.utils.data.TensorDataset(*batches[0])
    before = torch.get_rng_state()
    Probe(model, optimizer, regression, probe_batches=torch.utils.data.DataLoader(dataset, 4, shuffle=True))
    assert torch.equal(torch.get_rng_state(), before)


class Stateful(nn.Module):
    """Replaces a buffer and moves a frozen twin in every forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(4, 2), nn.Linear(4, 2)
        self.key.requires_grad_(False)
        self.register_buffer("mean", torch.zeros(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.query(x)
        with torch.no_grad():
            self.key.weight.mul_(0.9).add_(self.query.weight, alpha=0.1)
        self.mean = 0.9 * self.mean + 0.1 * y.detach().mean(0)
        return y + 0.1 * self.key(x) + self.mean


def test_buffers_that_are_replaced_and_teachers_that_move_are_put_back() -> None:
    states = []
    for probed in (True, False):
        torch.manual_seed(0)
        model = Stateful()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        batches = [(torch.randn(8, 4), torch.randn(8, 2)) for _ in range(6)]
        probe = Probe(model, optimizer, regression, schedule=every(2)) if probed else None
        step_over(model, optimizer, probe.watch(batches) if probe else batches)
        states.append(state_of(model, optimizer))
    assert_identical(*states)


def test_a_step_that_failed_does_not_end_the_measuring() -> None:
    model, _, batches = small_run(4)

    class Flaky(torch.optim.SGD):
        calls = 0

        def step(self, closure=None):
            self.calls += 1
            if self.calls == 2:
                raise RuntimeError("flaky")
            return super().step(closure)

    optimizer = Flaky(model.parameters(), lr=0.1)
    probe = Probe(model, optimizer, regression, probe_batches=batches[:1], schedule=every(1), estimators=ONE)
    for batch in batches:
        optimizer.zero_grad()
        regression(model, batch).backward()
        try:
            optimizer.step()
        except RuntimeError:
            continue
    assert probe.trace.to_frame()["step"].tolist() == [0, 1, 2]


def test_a_schedule_that_fails_late_costs_rows_and_not_the_run() -> None:
    model, optimizer, batches = small_run(6)

    def schedule(step: int) -> bool:
        if step in (2, 3):
            raise KeyError("late")
        return True

    probe = Probe(model, optimizer, regression, estimators=ONE, schedule=schedule)
    with pytest.warns(SmoothdiagWarning, match="A schedule failed.*late"):
        step_over(model, optimizer, probe.watch(batches))
    assert [row["step"] for row in probe.trace] == [0, 1, 4, 5]


def test_an_optimizer_within_backward_is_refused() -> None:
    model, optimizer, _ = small_run()
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: p.data.add_(p.grad, alpha=-0.1))
    with pytest.raises(ValueError, match="no hooks that act when a gradient is ready. Found one on `0.weight`"):
        Probe(model, optimizer, regression)


def test_two_probes_on_one_optimizer_measure_the_same() -> None:
    model, optimizer, batches = small_run(6)
    probes = [Probe(model, optimizer, regression, schedule=every(1)) for _ in range(2)]
    for i, batch in enumerate(probes[0].watch(probes[1].watch(batches))):
        (regression(model, batch) / 2).backward()
        if i % 2:
            optimizer.step()
            optimizer.zero_grad()
    frames = [probe.trace.to_frame().drop(columns="seconds") for probe in probes]
    assert frames[0].equals(frames[1])
    assert len(frames[0]) == 6


def test_estimators_of_one_name_are_refused() -> None:
    model, optimizer, batches = small_run(1)
    probe = Probe(model, optimizer, regression, estimators=[LocalSmoothness(), LocalSmoothness(radius=0.1)])
    with pytest.raises(ValueError, match="rows have different names. Found two named `local`"):
        step_over(model, optimizer, probe.watch(batches))


def test_directions_have_names_of_their_own() -> None:
    model, optimizer, batches = small_run(1)
    directions = [LocalSmoothness(direction=d) for d in ("gradient", "update", "random")]
    probe = Probe(model, optimizer, regression, estimators=directions)
    step_over(model, optimizer, probe.watch(batches))
    assert [r["estimator"] for r in probe.trace] == ["local", "local_update", "local_random"]


def test_a_loss_of_another_model_is_refused() -> None:
    model, optimizer, batches = small_run(1)
    other, _, _ = small_run(1)
    probe = Probe(model, optimizer, lambda m, b: regression(other, b))
    with pytest.raises(ValueError, match="depends on the parameters the optimizer holds. Found no gradient"):
        step_over(model, optimizer, probe.watch(batches), lambda m, b: regression(m, b))


def test_a_closed_probe_keeps_no_batches() -> None:
    model, optimizer, batches = small_run(2)
    probe = Probe(model, optimizer, regression)
    probe.close()
    probe.observe(batches[0])
    assert not probe._accumulation.has_observed


def test_watched_loaders_show_their_attributes() -> None:
    model, optimizer, batches = small_run(2)
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    assert Probe(model, optimizer, regression).watch(loader).dataset is batches


def test_a_training_loss_that_changes_on_the_way_is_noticed() -> None:
    model, optimizer, batches = small_run(6)
    probe = Probe(model, optimizer, regression, data="step", estimators=ONE, schedule=every(1))
    with pytest.warns(SmoothdiagWarning, match="trains a multiple of the loss that the probe measures"):
        for i, batch in enumerate(probe.watch(batches)):
            optimizer.zero_grad()
            (regression(model, batch) * (1.0 if i < 3 else 0.25)).backward()
            optimizer.step()
    assert [r["status"] for r in probe.trace] == ["ok"] * 3 + ["not_reproduced"] * 3


def test_a_last_group_that_is_not_complete_is_noticed() -> None:
    model, optimizer, batches = small_run(5)
    probe = Probe(model, optimizer, regression, data="step", estimators=ONE, schedule=every(1))
    with pytest.warns(SmoothdiagWarning, match="trains a multiple of the loss that the probe measures"):
        for i, batch in enumerate(probe.watch(batches)):
            (regression(model, batch) / 4).backward()
            if i % 4 == 3 or i == 4:
                expected = true_norm(model, batch)
                optimizer.step()
                optimizer.zero_grad()
    assert [r["status"] for r in probe.trace] == ["ok", "not_reproduced"]
    assert probe.trace[1]["grad_norm"] == pytest.approx(expected, rel=1e-12)


def test_a_micro_batch_without_gradient_counts() -> None:
    model, optimizer, batches = small_run(4)

    def masked(model: nn.Module, batch) -> torch.Tensor:
        return regression(model, batch) * batch[2]

    probe = Probe(model, optimizer, masked, data="step", estimators=ONE, schedule=every(1))
    loader = [(*batch, mask) for batch, mask in zip(batches, (1.0, 1.0, 0.0, 1.0), strict=True)]
    for i, batch in enumerate(probe.watch(loader)):
        (masked(model, batch) / 2).backward()
        if i % 2:
            expected = true_norm(model, batch[:2]) / 2
            optimizer.step()
            optimizer.zero_grad()
    assert probe.trace[1]["grad_norm"] == pytest.approx(expected, rel=1e-12)
    assert [r["status"] for r in probe.trace] == ["ok", "ok"]


@pytest.mark.parametrize("kind", ["centre", "input", "writes"])
def test_tensors_beside_the_model_are_left_alone(kind) -> None:
    results = []
    for probed in (True, False):
        torch.manual_seed(0)
        model, optimizer, batches = small_run(6)
        extra = torch.ones(2 if kind == "centre" else 4, dtype=torch.float64, requires_grad=True)
        other = torch.optim.SGD([extra], lr=0.1)

        def loss_fn(model: nn.Module, batch, extra=extra) -> torch.Tensor:
            x, y = batch
            if kind == "centre":
                return regression(model, (x, y - extra))
            return regression(model, (x + extra if kind == "input" else x.mul_(0.9), y))

        probe = Probe(model, optimizer, loss_fn, data="step", schedule=every(2)) if probed else None
        warned = pytest.warns(SmoothdiagWarning) if probed and kind == "writes" else nullcontext()
        with warned:
            for batch in probe.watch(batches) if probe else batches:
                optimizer.zero_grad()
                other.zero_grad()
                loss_fn(model, batch).backward()
                optimizer.step()
                other.step()
        results.append(state_of(model, optimizer) | {"extra": extra.detach().clone(), "data": batches[0][0]})
    assert_identical(*results)


def test_batches_in_dataclasses_and_arrays() -> None:
    @dataclass(frozen=True)
    class Pair:
        x: torch.Tensor
        y: np.ndarray

    def loss_fn(model: nn.Module, batch: Pair) -> torch.Tensor:
        return F.mse_loss(model(batch.x), torch.from_numpy(batch.y))

    rows = []
    for refilled in (False, True):
        torch.manual_seed(0)
        model, optimizer, ((x, y),) = small_run(1)
        pair = Pair(x, y.numpy())
        probe = Probe(model, optimizer, loss_fn, data="step", estimators=ONE)
        probe.observe(pair)
        loss_fn(model, pair).backward()
        if refilled:
            pair.y[:] = 0.0
        optimizer.step()
        rows.append(probe.trace[0])
    assert rows[0]["smoothness"] == rows[1]["smoothness"]
    x.zero_()
    kept = Pair(x, y.numpy())
    probe.close()
    probe = Probe(model, optimizer, loss_fn, data="step", estimators=ONE)
    probe.observe(kept)
    optimizer.zero_grad()
    loss_fn(model, kept).backward()
    x.add_(1.0)
    with pytest.warns(SmoothdiagWarning, match="overwritten after the probe saw it"):
        optimizer.step()


def test_halves_are_cut_along_the_examples() -> None:
    model, optimizer, (batch,) = small_run(1)
    sizes = []

    def loss_fn(model: nn.Module, batch) -> torch.Tensor:
        sizes.append((len(batch[0]), len(batch[2])))
        return regression(model, batch[:2])

    probe = Probe(model, optimizer, loss_fn, estimators=[DebiasedSmoothness()])
    step_over(model, optimizer, probe.watch([(*batch, torch.zeros(64, 3))]), loss_fn)
    assert set(sizes[3:]) == {(4, 64)}


def test_debiased_rows_and_noise_columns() -> None:
    model, optimizer, batches = small_run(1, n=16)
    probe = Probe(model, optimizer, regression, estimators=[DebiasedSmoothness(), PathSmoothness()])
    step_over(model, optimizer, probe.watch(batches))
    debiased, path = probe.trace
    assert debiased["estimator"] == "debiased"
    assert debiased["grad_variance"] > 0
    assert math.isnan(path["grad_variance"])  # one micro-batch: nothing to compare


def test_the_variance_between_micro_batches_is_that_of_their_mean() -> None:
    model, optimizer, batches = small_run(4, n=16)
    probe = Probe(model, optimizer, regression, estimators=[PathSmoothness()])
    parts = []
    for batch in probe.watch(batches):
        gradient = torch.autograd.grad(regression(model, batch), list(model.parameters()))
        parts.append(torch.cat([g.flatten() for g in gradient]))
        (regression(model, batch) / 4).backward()
    optimizer.step()
    variance = float(torch.stack(parts).var(dim=0, correction=1).sum()) / 4
    assert probe.trace[0]["grad_variance"] == pytest.approx(variance, rel=1e-9)
    squared = float(torch.stack(parts).mean(0).square().sum()) - variance
    assert probe.trace[0]["noise_scale"] == pytest.approx(variance / squared if squared > 0 else math.inf, rel=1e-9)


def test_module_labels() -> None:
    names = ["embed.weight", "layers.0.attention.q.weight", "layers.11.mlp.bias", "scale"]
    assert [by_module()(n) for n in names] == ["embed", "layers.0", "layers.11", "scale"]
    assert by_module(2)("layers.0.attention.q.weight") == "layers.0"
    assert by_module(3)("layers.0.attention.q.weight") == "layers.0.attention"
    with pytest.raises(ValueError, match="Parameter `depth` should be a whole number of at least 1"):
        by_module(0)


@pytest.mark.parametrize(
    ("found", "doubt", "left"),
    [
        (Status.SATURATED, Status.NOT_REPRODUCED, "not_reproduced"),
        (Status.ZERO_STEP, Status.NOT_REPRODUCED, "zero_step"),
        (Status.ZERO_STEP, Status.DATA_CHANGED, "data_changed"),
        (Status.SATURATED, None, "saturated"),
    ],
)
def test_a_doubt_about_the_data_stands_above_one_about_the_distance(found, doubt, left) -> None:
    step = SimpleNamespace(index=0, start=[torch.zeros(1)], block=lambda group: [0], norm_of_start=lambda group: 0.0)
    estimate = Estimate("local", 1.0, 1.0, 1.0, 1.0, status=found)
    (row,) = rows_of(step, estimate, [0.1], data="step", override=doubt, cost={})
    assert row["status"] == left
