"""measure.probe.probe, measure.probe.measuring: rows hold the step really taken, and training is unharmed."""

import math
import warnings
from contextlib import nullcontext

import pytest
import torch
from asserts import assert_identical, state_of
from losses import regression
from regressions import small_run, step_over
from torch import nn

from smoothdiag import LocalSmoothness, PathSmoothness, Probe, SmoothdiagWarning, Trace, every
from smoothdiag.demo import CharacterLSTM, next_character_loss

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=1.0),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3),
}


def train_lstm(optimizer_name: str, micro_batches: int, *, probed: bool) -> dict:
    torch.manual_seed(0)
    windows = torch.randint(40, (150, 6, 17))
    model = CharacterLSTM(40, width=24, dropout=0.3)
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    probe = Probe(model, optimizer, next_character_loss, schedule=every(1)) if probed else None
    loader = windows[: 50 * micro_batches]
    for i, batch in enumerate(probe.watch(loader) if probe else loader):
        (next_character_loss(model, batch) / micro_batches).backward()
        if (i + 1) % micro_batches == 0:
            optimizer.step()
            optimizer.zero_grad()
    if probe:
        frame = probe.trace.to_frame()
        assert len(frame[~frame["estimator"].str.endswith("preconditioned")]) == 100
        assert set(frame["status"]) <= {"ok", "saturated"}
    return state_of(model, optimizer)


@pytest.mark.thorough
@pytest.mark.parametrize(("optimizer_name", "micro_batches"), list(zip(OPTIMIZERS, (1, 3, 1), strict=True)))
def test_training_with_a_probe_is_bit_identical(optimizer_name, micro_batches) -> None:
    probed = train_lstm(optimizer_name, micro_batches, probed=True)
    assert_identical(probed, train_lstm(optimizer_name, micro_batches, probed=False))


def test_rows_hold_the_literal_secant_of_the_step() -> None:
    model, optimizer, (batch,) = small_run(1)
    parameters = list(model.parameters())

    def gradient() -> torch.Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(regression(model, batch), parameters)])

    def point() -> torch.Tensor:
        return torch.cat([p.detach().flatten() for p in parameters])

    probe = Probe(model, optimizer, regression, estimators=[PathSmoothness()], data="step")
    x0, g0, loss = point(), gradient(), float(regression(model, batch).detach())
    step_over(model, optimizer, probe.watch([batch]))
    x1, g1 = point(), gradient()
    (row,) = probe.trace
    distance, change = float((x1 - x0).norm()), float((g1 - g0).norm())
    expected = {
        "grad_norm": float(g0.norm()),
        "smoothness": change / distance,
        "step_norm": distance,
        "param_norm": float(x0.norm()),
        "loss": loss,
        "lr": 0.1,
        "saturation": change / float(g0.norm() + g1.norm()),
    }
    for name, value in expected.items():
        assert row[name] == pytest.approx(value, rel=1e-10), name
    assert (row["step"], row["group"], row["estimator"], row["status"], row["data"], row["dtype"]) == (
        0, "all", "path", "ok", "step", "float64",
    )  # fmt: skip


def test_micro_batches_measure_the_union_batch() -> None:
    rows = []
    for parts in (1, 4):
        torch.manual_seed(3)
        model, optimizer, (batch,) = small_run(1)
        probe = Probe(model, optimizer, regression)
        chunks = list(zip(batch[0].chunk(parts), batch[1].chunk(parts), strict=True))
        for chunk in probe.watch(chunks):
            (regression(model, chunk) / parts).backward()
        optimizer.step()
        rows.append(list(probe.trace))
    for whole, split in zip(*rows, strict=True):
        for name in ("grad_norm", "smoothness", "step_norm", "loss"):
            assert split[name] == pytest.approx(whole[name], rel=1e-6), name


def test_summed_micro_batches_scale_gradient_and_smoothness_together() -> None:
    rows = {}
    for reduction in ("mean", "sum"):
        torch.manual_seed(3)
        model, optimizer, batches = small_run(2)
        probe = Probe(model, optimizer, regression, estimators=[LocalSmoothness()], reduction=reduction)
        for batch in probe.watch(batches):
            regression(model, batch).backward()
        advice = pytest.warns(SmoothdiagWarning, match='backward left is 2 times.*Pass reduction="sum"')
        with advice if reduction == "mean" else nullcontext():
            optimizer.step()
        (rows[reduction],) = probe.trace
    for name in ("grad_norm", "smoothness", "loss"):
        assert rows["sum"][name] == pytest.approx(2 * rows["mean"][name], rel=1e-5), name


def test_only_due_steps_are_measured_and_cost_what_they_say() -> None:
    model, optimizer, batches = small_run(7)
    calls = 0

    def counting(model: nn.Module, batch) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return regression(model, batch)

    probe = Probe(model, optimizer, counting, schedule=every(3))
    step_over(model, optimizer, probe.watch(batches))
    frame = probe.trace.to_frame()
    assert frame["step"].unique().tolist() == [0, 3, 6]
    # Each estimator takes two points, and they share the start; at step 0 that comes from the self-test, which takes
    # two evaluations out of their count.
    assert frame.groupby("step")["num_grads"].sum().tolist() == [4, 5, 5]
    assert calls == 4 + 5 + 5 + 2


def test_held_out_batches_need_no_watching() -> None:
    model, optimizer, batches = small_run(4)
    probe = Probe(model, optimizer, regression, probe_batches=batches[:2], schedule=every(1))
    step_over(model, optimizer, batches[2:])
    frame = probe.trace.to_frame()
    assert set(frame["data"]) == {"held-out"}
    assert len(frame) == 4


def test_held_out_dropout_masks_are_the_same_at_every_probe() -> None:
    model = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.Linear(64, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    batches = [(torch.randn(8, 4), torch.randn(8, 2))] * 3
    probe = Probe(model, optimizer, regression, probe_batches=batches[:1], schedule=every(1))
    step_over(model, optimizer, batches)
    frame = probe.trace.to_frame()
    assert frame.loc[frame["estimator"] == "local", "smoothness"].nunique() == 1


def test_groups_have_rows_of_their_own_at_no_extra_gradient() -> None:
    model, optimizer, batches = small_run(1)
    probe = Probe(model, optimizer, regression, estimators=[PathSmoothness()], group_by=lambda name: name.split(".")[0])
    step_over(model, optimizer, probe.watch(batches))
    frame = probe.trace.to_frame().set_index("group")
    assert list(frame.index) == ["all", "0", "2"]
    assert frame["num_grads"].tolist() == [2, 0, 0]
    for name in ("grad_norm", "step_norm", "param_norm"):
        assert math.hypot(frame.loc["0", name], frame.loc["2", name]) == pytest.approx(frame.loc["all", name])
    whole, parts = frame.loc["all"], frame.loc[["0", "2"]]
    change = (parts["smoothness"] * parts["step_norm"]).pow(2).sum() ** 0.5
    assert change == pytest.approx(whole["smoothness"] * whole["step_norm"], rel=1e-12)


def test_learning_rates_of_several_groups() -> None:
    model, _, batches = small_run(1)
    optimizer = torch.optim.SGD(
        [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters(), "lr": 0.2}], lr=1.0
    )
    probe = Probe(model, optimizer, regression, estimators=[PathSmoothness()], group_by=lambda name: name[0])
    step_over(model, optimizer, probe.watch(batches))
    rates = probe.trace.to_frame().set_index("group")["lr"]
    assert math.isnan(rates["all"])
    assert rates[["0", "2"]].tolist() == [0.1, 0.2]


def test_a_closure_is_one_step() -> None:
    model, _, batches = small_run(3)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=3)
    probe = Probe(model, optimizer, regression, schedule=every(1))
    for batch in probe.watch(batches):

        def closure(batch=batch) -> torch.Tensor:
            optimizer.zero_grad()
            loss = regression(model, batch)
            loss.backward()
            return loss

        optimizer.step(closure)
    frame = probe.trace.to_frame()
    assert frame["step"].tolist() == [0, 0, 1, 1, 2, 2]
    assert set(frame["status"]) <= {"ok", "saturated"}


def test_an_optimizer_whose_step_calls_the_parents_step_counts_once() -> None:
    class Parent(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    model, _, batches = small_run(3)
    torch.optim.SGD(model.parameters(), lr=0.1)  # instances of both classes get hooked steps
    probe = Probe(model, optimizer := Parent(model.parameters(), lr=0.1), regression, schedule=every(1))
    step_over(model, optimizer, probe.watch(batches))
    assert probe.steps == 3
    assert probe.trace.to_frame()["step"].tolist() == [0, 0, 1, 1, 2, 2]


def test_a_step_that_does_not_move_is_a_status() -> None:
    model, optimizer, batches = small_run(1)
    optimizer.param_groups[0]["lr"] = 0.0
    probe = Probe(model, optimizer, regression)
    step_over(model, optimizer, probe.watch(batches))
    assert [(r["estimator"], r["status"]) for r in probe.trace] == [("path", "zero_step"), ("local", "ok")]


def test_a_loss_that_is_not_finite_is_a_status_and_later_rows_are_fine() -> None:
    model, optimizer, batches = small_run(3)
    optimizer.param_groups[0]["lr"] = 0.0
    batches[1] = (batches[1][0] * math.inf, batches[1][1])
    probe = Probe(model, optimizer, regression, estimators=[LocalSmoothness()], schedule=every(1), data="step")
    for batch in probe.watch(batches):
        optimizer.zero_grad()
        optimizer.step()
        assert batch is not None
    assert [r["status"] for r in probe.trace] == ["ok", "non_finite", "ok"]
    assert math.isnan(probe.trace[1]["smoothness"])


def test_an_error_in_mid_run_costs_one_row_not_the_run() -> None:
    model, optimizer, batches = small_run(3)
    broken = False

    def loss_fn(model: nn.Module, batch) -> torch.Tensor:
        if broken:
            raise RuntimeError("out of memory")
        return regression(model, batch)

    probe = Probe(model, optimizer, loss_fn, estimators=[LocalSmoothness()], schedule=every(1))
    for i, batch in enumerate(probe.watch(batches)):
        optimizer.zero_grad()
        regression(model, batch).backward()
        broken = i == 1
        if broken:
            with pytest.warns(SmoothdiagWarning, match="Step 1 was not measured: RuntimeError.'out of memory'"):
                optimizer.step()
        else:
            optimizer.step()
    assert [r["status"] for r in probe.trace] == ["ok", "failed", "ok"]


def test_an_estimator_that_fails_at_the_first_step_stops_the_run() -> None:
    model, optimizer, batches = small_run(2)

    def broken(step):
        raise ZeroDivisionError("broken estimator")

    probe = Probe(model, optimizer, regression, estimators=[broken])
    with pytest.raises(ZeroDivisionError, match="broken estimator"):
        step_over(model, optimizer, probe.watch(batches))


def test_a_mistake_in_the_set_up_stops_at_the_first_step_with_the_run_unharmed() -> None:
    model, optimizer, batches = small_run(1)
    probe = Probe(model, optimizer, lambda m, b: regression(m, b).detach())
    regression(model, next(probe.watch(batches))).backward()
    before = state_of(model)
    optimizer.param_groups[0]["lr"] = 0.0
    with pytest.raises(ValueError, match="Parameter `loss_fn` should return a loss that depends"):
        optimizer.step()
    assert_identical(state_of(model), before)


def test_a_loss_that_does_not_repeat_is_named_and_marked() -> None:
    model, optimizer, batches = small_run(2)
    private = torch.Generator().manual_seed(0)

    def loss_fn(model: nn.Module, batch) -> torch.Tensor:
        noise = torch.randn(batch[0].shape, generator=private, dtype=torch.float64)
        return regression(model, (batch[0] + noise, batch[1]))

    probe = Probe(model, optimizer, loss_fn, estimators=[LocalSmoothness()], schedule=every(1))
    with pytest.warns(SmoothdiagWarning, match="Two gradients of the same loss on the same data differ by"):
        step_over(model, optimizer, probe.watch(batches))
    assert {r["status"] for r in probe.trace} == {"below_noise_floor"}


def test_a_loop_that_shows_no_batch_is_told_once() -> None:
    model, optimizer, batches = small_run(3)
    probe = Probe(model, optimizer, regression, schedule=every(1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step_over(model, optimizer, batches)
    assert [str(w.message) for w in caught if w.category is SmoothdiagWarning] == [
        "The optimizer stepped but the probe has seen no batch, so it could not measure. Iterate over "
        "probe.watch(loader), or call probe.observe(batch) before each forward pass."
    ]
    assert len(probe.trace) == 0


def test_closing_detaches(tmp_path) -> None:
    model, optimizer, batches = small_run(2)
    with Probe(model, optimizer, regression, schedule=every(1), trace=tmp_path / "t.jsonl") as probe:
        step_over(model, optimizer, probe.watch(batches[:1]))
    step_over(model, optimizer, probe.watch(batches[1:]))
    assert probe.steps == 1
    assert len(Trace.read(tmp_path / "t.jsonl")) == 2


def test_a_resumed_probe_measures_the_same_steps() -> None:
    model, optimizer, batches = small_run(8)
    first = Probe(model, optimizer, regression, schedule=every(3), estimators=[LocalSmoothness()])
    step_over(model, optimizer, first.watch(batches[:5]))
    first.close()
    second = Probe(model, optimizer, regression, schedule=every(3), estimators=[LocalSmoothness()], trace=first.trace)
    second.load_state_dict(first.state_dict())
    step_over(model, optimizer, second.watch(batches[5:]))
    assert [r["step"] for r in second.trace] == [0, 3, 6]


def test_watching_keeps_the_length_and_every_epoch() -> None:
    model, optimizer, batches = small_run(3)
    watched = Probe(model, optimizer, regression).watch(batches)
    assert len(watched) == 3
    assert [len(list(watched)) for _ in range(2)] == [3, 3]
    assert next(Probe(model, optimizer, regression).watch(batches)) is batches[0]


def test_parameters_of_the_loss_that_the_optimizer_moves_are_measured_too() -> None:
    model, _, batches = small_run(1)
    scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    optimizer = torch.optim.SGD([*model.parameters(), scale], lr=0.1)
    probe = Probe(model, optimizer, lambda m, b: scale * regression(m, b), estimators=[PathSmoothness()])
    step_over(model, optimizer, probe.watch(batches), loss_fn=lambda m, b: scale * regression(m, b))
    row = probe.trace[0]
    assert row["param_norm"] > 2
    assert row["step_norm"] == pytest.approx(0.1 * row["grad_norm"], rel=1e-9)


def test_wrong_arguments() -> None:
    model, optimizer, _ = small_run()
    with pytest.raises(ValueError, match="Parameter `reduction` should be one of .* Found `reduction = 'max'`"):
        Probe(model, optimizer, regression, reduction="max")
    with pytest.raises(ValueError, match="Parameter `loss_fn` should be callable as .* Found `loss_fn = 3`"):
        Probe(model, optimizer, 3)
    with pytest.raises(ValueError, match="Parameter `estimators` should be a sequence of instances"):
        Probe(model, optimizer, regression, estimators=[LocalSmoothness])
    with pytest.raises(ValueError, match="Parameter `probe_batches` should hold at least one batch"):
        Probe(model, optimizer, regression, probe_batches=[])
    with pytest.raises(ValueError, match="Parameter `group_by` should return a label other than 'all'"):
        Probe(model, optimizer, regression, group_by=lambda name: "all")
    other = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(
        ValueError, match="Parameter `optimizer` should hold parameters of `model`. Found none of its 4"
    ):
        Probe(model, other, regression)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="Parameter `model` should have trainable parameters. Found none"):
        Probe(model, optimizer, regression)
    with pytest.raises(ValueError, match=r"Parameter `points` should hold fractions in \(0, 1\]. Found"):
        PathSmoothness(points=(0.0, 1.0))
    with pytest.raises(ValueError, match="Parameter `radius` should be positive and finite"):
        LocalSmoothness(radius=math.nan)
    with pytest.raises(ValueError, match="Parameter `direction` should be one of"):
        LocalSmoothness(direction="sideways")


def test_a_failed_construction_leaves_no_hook() -> None:
    model, optimizer, _ = small_run()
    with pytest.raises(ValueError, match="group_by"):
        Probe(model, optimizer, regression, group_by=lambda name: "all")
    with pytest.raises(ValueError, match="Found `group_by = 'head'`"):
        Probe(model, optimizer, regression, group_by="head")
    assert not optimizer._optimizer_step_pre_hooks


def test_further_estimators_measure_at_steps_of_their_own() -> None:
    model, optimizer, batches = small_run(12)
    probe = Probe(model, optimizer, regression, estimators=[LocalSmoothness()], schedule=every(4))

    def thirds(step: int) -> bool:
        return step % 3 == 0

    probe.also(thirds, PathSmoothness(), LocalSmoothness(direction="random"))
    probe.also(thirds, PathSmoothness())  # instead
    step_over(model, optimizer, probe.watch(batches))
    steps = {name: list(rows["step"]) for name, rows in probe.trace.to_frame().groupby("estimator")}
    assert steps == {"local": [0, 4, 8], "path": [0, 3, 6, 9]}


def test_a_probe_without_estimators_measures_what_others_ask_for() -> None:
    model, optimizer, batches = small_run(6)
    probe = Probe(model, optimizer, regression, estimators=(), schedule=every(1))
    probe.also(every(4), LocalSmoothness())
    step_over(model, optimizer, probe.watch(batches))
    assert list(probe.trace.to_frame()["step"]) == [0, 4]


def test_further_estimators_need_names_of_their_own() -> None:
    model, optimizer, batches = small_run(1)
    probe = Probe(model, optimizer, regression, estimators=[LocalSmoothness()])
    probe.also(every(1), LocalSmoothness(radius=1e-2))
    with pytest.raises(ValueError, match="Found two named `local`"):
        step_over(model, optimizer, probe.watch(batches))
