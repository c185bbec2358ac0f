"""measure.loss.selftest: rows in low precision are right, or say that they are not."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from losses import classification
from networks import Convolutional, Gpt, Recurrent, images, mlp, texts
from torch import Tensor, nn

from smoothdiag import LocalSmoothness, PathSmoothness, Probe, every, vectors
from smoothdiag.measure.estimators import Estimate, Step
from smoothdiag.measure.loss.batches import MicroBatch
from smoothdiag.measure.loss.objective import Objective
from smoothdiag.measure.loss.selftest import dtypes_of

Loss = Callable[[nn.Module, Any], Tensor]


def deep() -> nn.Module:
    return mlp(20, 64, 64, 5)


def vectors_of(num: int, size: int) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(size, 20), torch.randint(5, (size,))) for _ in range(num)]


MODELS = {"mlp": (deep, vectors_of), "cnn": (Convolutional, images), "gpt": (Gpt, texts), "lstm": (Recurrent, texts)}


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif hasattr(module, "dropout"):
            module.dropout = 0.0
    return model


def under_autocast(dtype: torch.dtype, factor: float = 1.0) -> Loss:
    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        with torch.autocast("cpu", dtype):
            return classification(model, batch) * factor

    return loss_fn


@dataclass(frozen=True)
class Truth:
    """Measures in float64 at the very points that the rows of the step are about."""

    model: nn.Module
    probes: list[Probe]
    errors: list[tuple[str, str, float]] = field(default_factory=list)
    gradient_errors: list[float] = field(default_factory=list)

    def __call__(self, step: Step) -> Estimate:
        step.objective.place()  # with the buffers that evaluations start from
        model = copy.deepcopy(self.model).double()
        micros = [
            MicroBatch(
                tuple(t.double() if t.is_floating_point() else t for t in micro.batch),
                micro.random_state,
            )
            for micro in step.objective._micro_batches
        ]
        objective = Objective(model, classification, micros, list(model.parameters()))
        start = [x.double() for x in step.start]
        wide = Step(step.index, objective, start, [x.double() for x in step.end], step.lr)
        # Downhill in float64 is another direction than downhill in bfloat16 by the rounding of the gradient.
        rows = {row["estimator"]: row for row in list(self.probes[0].trace)[-2:]}
        radius = rows["local"]["step_norm"] / float(vectors.norm(start))
        truth = [PathSmoothness()(wide), LocalSmoothness(radius=radius)(wide)]
        for known in truth:
            row = rows[known.estimator]
            self.errors.append((known.estimator, row["status"], row["smoothness"] / known.smoothness - 1))
        exact, here = wide.at_start.gradient, [g.double() for g in step.at_start.gradient]
        self.gradient_errors.append(float(vectors.norm(vectors.sub(here, exact)) / vectors.norm(exact)))
        return replace(truth[0], estimator="truth", parts=())


def train(kind: str, loss_fn: Loss, lr: float, *, half: torch.dtype | None = None) -> tuple[Truth, Probe]:
    torch.manual_seed(0)
    make, data = MODELS[kind]
    model, batches = without_dropout(make()), data(8, 16)
    if half:
        model.to(half)
        batches = [(x.to(half) if x.is_floating_point() else x, y) for x, y in batches]
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    truth = Truth(model, [])
    probe = Probe(model, optimizer, loss_fn, estimators=[PathSmoothness(), LocalSmoothness(), truth], schedule=every(1))
    truth.probes.append(probe)
    for batch in probe.watch(batches):
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        optimizer.step()
    return truth, probe


@pytest.mark.thorough
@pytest.mark.parametrize("kind", MODELS)
def test_rows_under_autocast_are_right_or_marked(kind) -> None:
    usable, marked = [], []
    for lr in (1e-3, 1e-1):  # a step that bfloat16 does not resolve, and one that it does
        truth, probe = train(kind, under_autocast(torch.bfloat16), lr)
        # The error found in the self-test is that of the gradient.
        assert 0.5 < probe.self_test.gradient_error / max(truth.gradient_errors) < 2
        for name, status, error in truth.errors:
            if status in ("ok", "saturated", "kink_limited"):
                assert abs(error) < 0.15, (lr, name, status)
                usable.append(name)
            else:
                marked.append((name, status))
    assert usable.count("local") == 16  # the radius was chosen so that they rise above rounding
    assert ("path", "below_noise_floor") in marked


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_half_precision_are_measured_in_float32(dtype) -> None:
    truth, probe = train("mlp", classification, 0.1, half=dtype)
    assert {(name, status) for name, status, _ in truth.errors} == {("path", "ok"), ("local", "ok")}
    assert max(abs(error) for _, _, error in truth.errors) < 1e-3
    assert {row["dtype"] for row in probe.trace} == {"float32"}
    assert all(p.dtype == dtype for p in truth.model.parameters())


def test_half_precision_under_autocast_too() -> None:
    truth, probe = train("mlp", under_autocast(torch.bfloat16), 0.1, half=torch.bfloat16)
    assert probe.self_test.gradient_error > 1e-3
    assert all(abs(error) < 0.15 for _, status, error in truth.errors if status == "ok")


@pytest.mark.parametrize("kind", ["mlp", "gpt"])
def test_small_float16_gradients_are_not_lost(kind) -> None:
    # Where a loss scaler trains, the plain loss would have gradients below the smallest number of float16.
    torch.manual_seed(0)
    make, data = MODELS[kind]
    model, loss_fn = without_dropout(make()), under_autocast(torch.float16, 1e-4)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu")
    probe = Probe(model, optimizer, loss_fn, schedule=every(1), data="step")
    for batch in probe.watch(data(6, 16)):
        optimizer.zero_grad()
        scaler.scale(loss_fn(model, batch)).backward()
        scaler.unscale_(optimizer)
        expected = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))
        scaler.step(optimizer)
        scaler.update()
        assert probe.trace[-1]["grad_norm"] == pytest.approx(expected, rel=1e-3)
    assert {row["status"] for row in probe.trace if row["estimator"] == "local"} == {"ok"}


def test_a_scale_that_overflows_is_lowered() -> None:
    torch.manual_seed(0)
    model, loss_fn = without_dropout(deep()), under_autocast(torch.float16, 1e4)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    probe = Probe(model, optimizer, loss_fn, estimators=[LocalSmoothness()], schedule=every(1))
    for batch in probe.watch(vectors_of(3, 16)):
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        optimizer.step()
    assert 1 <= probe.self_test.loss_scale < 2.0**16
    assert [row["status"] for row in probe.trace] == ["ok"] * 3


def test_rounding_is_estimated_anew_as_training_goes() -> None:
    torch.manual_seed(0)
    model, loss_fn = deep(), under_autocast(torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = Probe(model, optimizer, loss_fn, estimators=[LocalSmoothness()], schedule=every(1))
    errors = []
    for batch in probe.watch(vectors_of(24, 16)):
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        errors.append(probe.self_test.gradient_error)
    assert len(set(errors)) == 3
    assert len(set(errors[:10])) == 1


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("way", "kind"),
    [
        pytest.param(way, kind, marks=pytest.mark.slow if (way[:8], kind) == ("compiled", "gpt") else ())
        for way in ("eager", "reentrant", "non_reentrant", "compiled", "compiled_loss")
        for kind in ("cnn", "gpt", "lstm")
    ],
)
def test_narrow_dtypes_are_seen_from_outside(kind, way) -> None:
    make, data = MODELS[kind]
    model = make({"reentrant": True, "non_reentrant": False}.get(way))
    (batch,) = data(1, 4)
    plain, narrow = classification, under_autocast(torch.bfloat16)
    torch.compiler.reset()
    if way == "compiled":
        model = torch.compile(model, backend="aot_eager")
    if way == "compiled_loss":
        plain, narrow = (torch.compile(f, backend="aot_eager") for f in (plain, narrow))
    assert torch.bfloat16 not in dtypes_of(plain(model, batch))
    assert torch.bfloat16 in dtypes_of(narrow(model, batch))
