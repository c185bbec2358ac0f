"""measure.scan: a scan changes nothing, leaves rows on disk if it is killed, and stays within its budget."""

import math
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from asserts import assert_identical, state_of
from networks import Convolutional, Gpt, Recurrent, images, mlp, texts
from ranks import alone
from torch import nn
from torch.nn import functional as F

import smoothdiag as sd


def classification(model: nn.Module, batch) -> torch.Tensor:
    logits = model(batch[0])
    return F.cross_entropy(logits.flatten(0, -2), batch[1].flatten())


def scanned(model: nn.Module, batches, **options) -> sd.Trace:
    return sd.scan(model, classification, batches, **({"budget": 220, "points": 2, "progress": False} | options))


def rows_of(trace: sd.Trace) -> list[dict]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in trace]


def same(one: list[dict], other: list[dict]) -> bool:
    return repr(one) == repr(other)  # NaN differs from NaN


MODELS = {"cnn": (Convolutional, images), "gpt": (Gpt, texts), "lstm": (Recurrent, texts)}


@pytest.fixture(params=MODELS)
def case(request):
    torch.manual_seed(0)
    build, draw = MODELS[request.param]
    model, batches = build(), draw(2, 4)
    next(model.parameters()).requires_grad_(False)
    classification(model, batches[0]).backward()  # gradients that must stay
    torch.rand(3), random.random(), np.random.rand()
    return model, batches


def test_nothing_in_the_model_or_the_process_changes(case) -> None:
    model, batches = case
    needs_grad, before = [p.requires_grad for p in model.parameters()], state_of(model)
    grads = [p.grad for p in model.parameters()]
    trace = scanned(model, batches)
    assert len(trace) > 3
    assert_identical(state_of(model), before)
    assert [p.requires_grad for p in model.parameters()] == needs_grad
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))


@pytest.mark.parametrize("case", ["cnn"], indirect=True)
def test_nothing_changes_when_the_scan_fails_in_the_middle(case) -> None:
    model, batches = case
    before, calls = state_of(model), []

    def failing(model, batch):
        calls.append(1)
        if len(calls) > 120:
            raise RuntimeError("out of luck")
        return classification(model, batch)

    with pytest.raises(RuntimeError, match="out of luck"):
        sd.scan(model, failing, batches, progress=False)
    assert_identical(state_of(model), before)


def test_a_scan_of_a_model_in_eval_mode_measures_and_leaves_it_so() -> None:
    torch.manual_seed(0)
    model, batches = Convolutional().eval(), images(1, 4)
    before = state_of(model)
    trace = scanned(model, batches)
    assert trace[0]["loss"] == pytest.approx(classification(model, batches[0]).item(), rel=1e-6)
    assert_identical(state_of(model), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_precision_is_measured_and_left_as_it_was(dtype) -> None:
    torch.manual_seed(0)
    model, batch = mlp(6, 8, 3).to(dtype), (torch.randn(16, 6).to(dtype), torch.randint(3, (16,)))
    before = state_of(model)
    trace = scanned(model, [batch], budget=150)
    assert_identical(state_of(model), before)
    measured = [row for row in trace if row["status"] == "ok"]
    assert len(measured) > 5
    wide, wide_batch = mlp(6, 8, 3).double(), (batch[0].double(), batch[1])
    wide.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    exact = sd.scan(wide, classification, [wide_batch], directions=["gradient up"], points=1, progress=False)
    assert trace[0]["grad_norm"] == pytest.approx(exact[0]["grad_norm"], rel=1e-4)
    assert trace[0]["smoothness"] == pytest.approx(exact[0]["smoothness"], rel=5e-3)


@pytest.mark.parametrize("case", ["cnn"], indirect=True)
def test_the_same_seed_gives_the_same_rows_and_another_seed_gives_others(case) -> None:
    model, batches = case
    first = rows_of(scanned(model, batches))
    torch.rand(5)  # the state of the process must not matter
    assert same(first, rows_of(scanned(model, batches)))
    assert not same(first, rows_of(scanned(model, batches, seed=1)))


@pytest.mark.parametrize("budget", [60, 61, 75, 100])
def test_the_rows_add_up_to_what_was_spent_within_the_budget(budget) -> None:
    torch.manual_seed(0)
    model, batch, counts = mlp(6, 8, 3), (torch.randn(16, 6), torch.randint(3, (16,))), []

    def counted(model, batch):
        loss = classification(model, batch)
        loss.register_hook(lambda g: counts.append(1))  # called by every backward pass that begins at the loss
        return loss

    trace = sd.scan(model, counted, [batch], budget=budget, progress=False)
    spent = sum(row["num_grads"] for row in trace)
    assert spent <= budget
    assert budget - spent <= max(row["num_grads"] for row in trace if row["scan"] != "start")
    # Products by differentiating twice begin at the gradient, and count as two. The start takes three for its checks.
    products = 3 + sum(row["num_hvps"] for row in trace if row.get("hvp") == "retained")
    assert spent == len(counts) + 2 * products


def test_lines_advance_in_turn() -> None:
    torch.manual_seed(0)
    model, batch = mlp(6, 8, 3), (torch.randn(16, 6), torch.randint(3, (16,)))
    trace = sd.scan(model, classification, [batch], budget=300, progress=False)
    names = [row["scan"] for row in trace]
    assert names[0] == "start"
    assert len(set(names[1:15])) == 14  # one point of each line before the second of any
    for name in set(names):
        points = [row["point"] for row in trace if row["scan"] == name]
        assert points == sorted(points)


def test_a_scan_of_the_same_step_is_refused_before_anything_is_measured() -> None:
    torch.manual_seed(0)
    model, batch, calls = mlp(6, 8, 3), (torch.randn(16, 6), torch.randint(3, (16,))), []

    def counted(model, batch):
        calls.append(1)
        return classification(model, batch)

    trace = sd.Trace()
    options = {"budget": 60, "points": 1, "trace": trace, "progress": False}
    sd.scan(model, counted, [batch], step=100, **options)
    number, before = len(trace), len(calls)
    with pytest.raises(ValueError, match="Parameter `step` should differ.*Found `step = 100`"):
        sd.scan(model, counted, [batch], step=100, **options)
    assert (len(trace), len(calls)) == (number, before)
    sd.scan(model, counted, [batch], step=200, **options)
    assert {row["step"] for row in trace} == {100, 200}
    keys = [(row["step"], row["scan"], row["point"], row["estimator"]) for row in trace]
    assert len(set(keys)) == len(keys)


def test_further_estimators_measure_at_the_same_points() -> None:
    torch.manual_seed(0)
    model, batch = mlp(6, 8, 3), (torch.randn(16, 6), torch.randint(3, (16,)))
    trace = sd.scan(
        model,
        classification,
        [batch],
        estimators=[sd.HessianNorm(), sd.LocalSmoothness()],
        points=2,
        budget=300,
        progress=False,
    )
    frame = trace.to_frame()
    measured = frame[frame["status"].isin(["ok", "saturated"])]
    pairs = measured.pivot_table(index=["scan", "point"], columns="estimator", values="grad_norm").dropna()
    assert len(pairs) > 10
    np.testing.assert_allclose(pairs["hessian_norm"], pairs["local"], rtol=1e-6)
    norms = measured.pivot_table(index=["scan", "point"], columns="estimator", values="smoothness").dropna()
    assert (norms["local"] <= 1.1 * norms["hessian_norm"]).all()
    # The backend is chosen once: its reason stands in no row after the start.
    assert frame["hvp_reason"].notna().sum() == 1


def test_two_estimators_of_one_name_are_refused() -> None:
    model = sd.problems.quadratic([1.0, 2.0]).as_module(torch.ones(2))
    with pytest.raises(ValueError, match="rows have different names. Found two named `hessian_norm`"):
        sd.scan(
            model,
            lambda model, batch: model(),
            [None],
            estimators=[sd.HessianNorm(), sd.HessianNorm(tol=0.1)],
            progress=False,
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"points": 0}, "`points` should be a whole number of at least 1"),
        ({"budget": 0}, "`budget` should be a whole number of at least 1"),
        ({"step": -1}, "`step` should be a whole number"),
        ({"max_distance": 0}, "`max_distance` should be positive"),
        ({"max_loss": math.nan}, "`max_loss` should be a number or None"),
        ({"arcs": "maybe"}, "`arcs` should be one of"),
        ({"estimators": []}, "`estimators` should be a list of estimators"),
        ({"estimators": [sd.HessianNorm]}, "the class `HessianNorm`"),
        ({"directions": ["nowhere"]}, "`directions` should hold names out of"),
        ({"toward": [1]}, "`toward` should be a mapping"),
        ({"progress": 1}, "`progress` should be True or False"),
        ({"trace": "rows.txt"}, "`path` should end in .jsonl"),
    ],
)
def test_wrong_arguments_are_named(options, message) -> None:
    model = sd.problems.quadratic([1.0, 2.0]).as_module(torch.ones(2))
    with pytest.raises(ValueError, match=message):
        sd.scan(model, lambda model, batch: model(), [None], **({"progress": False} | options))


def test_a_loss_that_is_not_finite_at_the_start_is_refused() -> None:
    model = sd.problems.neg_log().as_module(torch.tensor([-1.0]))
    with pytest.raises(ValueError, match="Parameter `model` should have a finite loss"):
        sd.scan(model, lambda model, batch: model(), [None], progress=False)


def test_the_bar_goes_to_the_error_output_and_can_be_switched_off(capsys) -> None:
    model = sd.problems.exponential(dim=2).as_module(torch.ones(2))
    for progress in (True, False):
        sd.scan(model, lambda model, batch: model(), [None], points=1, progress=progress)
        out, err = capsys.readouterr()
        assert out == ""
        assert ("gradient" in err) is progress


@pytest.mark.thorough
@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_a_killed_scan_leaves_a_trace_that_can_be_read(tmp_path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import time, torch, smoothdiag as sd\n"
        "model = sd.problems.exponential(dim=3).as_module(torch.ones(3, dtype=torch.float64))\n"
        "def loss_fn(model, batch):\n"
        "    time.sleep(0.01)\n"
        "    return model()\n"
        "sd.scan(model, loss_fn, [None], trace='scan.jsonl', progress=False)\n"
    )
    path = tmp_path / "scan.jsonl"
    process = subprocess.Popen([sys.executable, str(script)], cwd=tmp_path)
    while process.poll() is None and (not path.exists() or path.read_bytes().count(b"\n") < 5):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    trace = sd.Trace.read(path)
    assert len(trace) >= 4
    assert trace.meta["scan"]["budget"] == 500
    assert trace[0]["scan"] == "start"


@pytest.mark.thorough
def test_a_distributed_model_is_refused(tmp_path) -> None:
    model, batch = mlp(6, 8, 3), (torch.randn(16, 6), torch.randint(3, (16,)))
    with alone(tmp_path), pytest.raises(ValueError, match="`model` should live in one process.*`model.module`"):
        scanned(nn.parallel.DistributedDataParallel(model), [batch])
