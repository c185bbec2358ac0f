"""measure.probe.trust, measure.estimators.secants: the training gradient saves a gradient, and never misleads a row."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from asserts import assert_identical, state_of
from losses import classification
from networks import VOCABULARY, Gpt, Point, mlp
from torch import Tensor, nn

from smoothdiag import AutoClip, Estimate, LocalSmoothness, PathSmoothness, Probe, Step, StepRule, every, objective
from smoothdiag.measure.estimators.base import Contradicted
from smoothdiag.measure.estimators.secants import OFF
from smoothdiag.measure.probe import trust
from smoothdiag.rows import USABLE_STATUSES

DEFAULT = (PathSmoothness(), LocalSmoothness())


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rnn = nn.Embedding(VOCABULARY, 8), nn.LSTM(8, 12, batch_first=True)
        self.head = nn.Linear(12, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed(tokens))[0])


def dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 5))


def convolutional() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))


def vectors(number: int) -> tuple[Tensor, Tensor]:
    return torch.randn(number, 8), torch.randint(5, (number,))


def images(number: int) -> tuple[Tensor, Tensor]:
    return torch.randn(number, 1, 8, 8), torch.randint(5, (number,))


def texts(number: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(VOCABULARY, (number, 6))
    return tokens[:, :-1], tokens[:, 1:]


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], tuple[Tensor, Tensor]], float]] = {
    "mlp": (partial(mlp, 8, 16, 16, 5), vectors, 0.1),
    "dropout": (dropout, vectors, 0.1),
    "relu": (convolutional, images, 0.05),
    "lstm": (Recurrent, texts, 0.5),
    "gpt": (Gpt, texts, 0.02),
}


class Run:
    """Training of a small network, measured at every step on the step's own batch.

    A subclass says what is wrong with it, by overriding how a gradient or a step is made.
    """

    begins = 0
    """Step from which on something is wrong."""

    def __init__(self, name: str = "mlp", adaptive: bool = False, **options: Any) -> None:
        torch.manual_seed(0)
        build, self.draw, lr = NETWORKS[name]
        self.model = self.built(build)
        self.optimizer = self.made(lr, adaptive)
        options = {"estimators": DEFAULT, "schedule": every(1), "data": "step", **options}
        self.probe = Probe(self.model, self.optimizer, classification, **options)
        self.steps = 0

    def built(self, build: Callable[[], nn.Module]) -> nn.Module:
        return build()

    def made(self, lr: float, adaptive: bool) -> torch.optim.Optimizer:
        if adaptive:
            return torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        return torch.optim.SGD(self.model.parameters(), lr=lr, momentum=0.9)

    def batch(self) -> tuple[Tensor, Tensor]:
        return self.draw(8)

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return classification(self.model, batch)

    def between(self) -> None:
        """Does something to the gradients after backward."""

    def step(self) -> None:
        batch = self.batch()
        self.optimizer.zero_grad()
        self.probe.observe(batch)
        is_wrong = self.steps >= self.begins
        (self.loss(batch) if is_wrong else classification(self.model, batch)).backward()
        if is_wrong:
            self.between()
        self.optimizer.step()
        self.steps += 1

    def rows(self, steps: int) -> list[dict[str, Any]]:
        while self.steps < steps:
            self.step()
        return list(self.probe.trace)


def gradients(rows: Sequence[dict[str, Any]], steps: int) -> list[int]:
    """Returns the gradients that the rows of each step count."""
    return [sum(row["num_grads"] for row in rows if row["step"] == step) for step in range(steps)]


def both(monkeypatch: pytest.MonkeyPatch, make: Callable[[], Run], steps: int) -> tuple[list, list]:
    """Returns the rows with the training gradient, tried at every step, and the rows that are all evaluated."""
    found = []
    for changed in ((trust, "PAUSE", 0), (trust.Trust, "step", lambda *args, **options: None)):
        with monkeypatch.context() as patch:
            patch.setattr(*changed)
            run = make()
            found.append((run.rows(steps), state_of(run.model, run.optimizer)))
    (trusting, state), (evaluated, other) = found
    assert_identical(state, other)
    return trusting, evaluated


def without_cost(rows: Sequence[dict[str, Any]]) -> list[str]:
    return [repr({k: v for k, v in row.items() if k not in ("seconds", "num_grads")}) for row in rows]


@pytest.mark.parametrize(
    ("name", "estimators"),
    [("mlp", DEFAULT), ("mlp", DEFAULT[:1]), ("mlp", DEFAULT[1:]), ("gpt", DEFAULT)],
    ids=["default", "path", "local", "gpt"],
)
def test_rows_are_equal_bit_for_bit_and_cost_a_gradient_less(
    name: str, estimators: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def make() -> Run:
        return Run(name, adaptive=True, estimators=estimators, group_by=lambda name: name.split(".")[0])

    trusting, evaluated = both(monkeypatch, make, 4)
    assert without_cost(trusting) == without_cost(evaluated)
    saved = [b - a for a, b in zip(gradients(trusting, 4), gradients(evaluated, 4), strict=True)]
    assert saved == [0, 1, 1, 1]


def test_the_gradient_is_evaluated_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    trusting, evaluated = both(monkeypatch, lambda: Run(estimators=DEFAULT[:1]), 13)
    saved = [b - a for a, b in zip(gradients(trusting, 13), gradients(evaluated, 13), strict=True)]
    assert saved == [0, *[1] * 10, 0, 1]


class Clipped(Run):
    def between(self) -> None:
        nn.utils.clip_grad_norm_(self.model.parameters(), 0.1)


class Unscaled(Run):
    """Gradients are scaled and divided again as by a GradScaler: versions do not count up."""

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return 4 * super().loss(batch)

    def between(self) -> None:
        for p in self.model.parameters():
            p.grad.data.mul_(0.25)


class Writing(torch.optim.SGD):
    """Writes to the gradients within its step."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                p.grad.data.add_(p.detach(), alpha=1e-3)
        return super().step(closure)


class Decayed(Run):
    def made(self, lr: float, adaptive: bool) -> torch.optim.Optimizer:
        return Writing(self.model.parameters(), lr=lr)


class Half(Run):
    def built(self, build: Callable[[], nn.Module]) -> nn.Module:
        return build().bfloat16()

    def batch(self) -> tuple[Tensor, Tensor]:
        x, y = super().batch()
        return x.bfloat16(), y


class Accumulated(Run):
    def step(self) -> None:
        self.optimizer.zero_grad()
        for _ in range(2):
            batch = self.batch()
            self.probe.observe(batch)
            (self.loss(batch) / 2).backward()
        self.optimizer.step()
        self.steps += 1


class Rounded(Run):
    """The loop's gradient is that of the loss up to the last bits."""

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return 0.7 * super().loss(batch) + 0.3 * super().loss(batch)


@pytest.mark.parametrize(
    "kind",
    [Clipped, Unscaled, Decayed, Half, Accumulated, Rounded, partial(Run, data="fixed"), partial(Run, "relu")],
    ids=["clipped", "unscaled", "decayed", "half", "accumulated", "rounded", "fixed", "kinks"],
)
def test_the_training_gradient_is_not_used_where_it_must_not_be(kind: Callable[[], Run], monkeypatch: Any) -> None:
    trusting, evaluated = both(monkeypatch, kind, 4)
    assert without_cost(trusting) == without_cost(evaluated)
    extra = [a - b for a, b in zip(gradients(trusting, 4), gradients(evaluated, 4), strict=True)]
    # Only kinks show in the gradients themselves, which are lost then.
    assert min(extra) == 0
    assert bool(sum(extra)) == (isinstance(kind, partial) and kind.args == ("relu",))


def turned(g: Tensor) -> Tensor:
    return g * (-1.0) ** torch.arange(g.numel()).view(g.shape)


EDITS: dict[str, Callable[[Tensor], Tensor]] = {
    "negative": torch.neg,
    "some signs": turned,
    "other places": lambda g: g.flip(0),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_gradients_with_other_signs_or_places_are_not_taken_for_those_of_backward(edit: Any) -> None:
    class Edited(Run):
        def between(self) -> None:
            for p in self.model.parameters():
                assert p.grad is not None
                p.grad.copy_(edit(p.grad))

    rows = Edited().rows(3)
    assert {row["status"] for row in rows} == {"ok"}


def test_kinks_end_the_attempts_to_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def make() -> Run:
        return Run("relu", estimators=DEFAULT[:1])

    _, evaluated = both(monkeypatch, make, 8)
    monkeypatch.setattr(trust, "PAUSE", 2)
    extra = [a - b for a, b in zip(gradients(make().rows(8), 8), gradients(evaluated, 8), strict=True)]
    assert extra == [0, 2, 0, 0, 2, 0, 0, 0]  # pauses of two rows and of four


class Capped(Run):
    """Under AutoClip, which clips all gradients after the first steps."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, estimators=(), **options)
        AutoClip(self.optimizer, self.probe, rule=StepRule(multiple=0.01))


@pytest.mark.parametrize(
    ("name", "adaptive", "expected"),
    [("mlp", False, [0, 1, 1, 1, 1, 1]), ("lstm", True, [0, 1, 1, 1, 1, 1]), ("dropout", False, [0, -2, 0, 0, 0, 0])],
    ids=["gradients are clipped", "updates are shortened", "halves have other masks"],
)
def test_halves_check_the_training_gradient_for_an_autoclip(
    name: str, adaptive: bool, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    trusting, evaluated = both(monkeypatch, partial(Capped, name, adaptive), 6)
    assert without_cost(trusting) == without_cost(evaluated)
    assert {row["estimator"] for row in trusting} == {"local_clip"}
    saved = [b - a for a, b in zip(gradients(trusting, 6), gradients(evaluated, 6), strict=True)]
    assert saved == expected


@pytest.mark.filterwarnings("ignore::smoothdiag.SmoothdiagWarning")
def test_a_gradient_that_one_row_has_checked_is_checked_or_evaluated_by_the_others(monkeypatch: Any) -> None:
    # A small penalty that the loss lacks hardly shows over the whole step, and is 15% of the change over a short way.
    monkeypatch.setattr(Run, "begins", 1)
    for local in (LocalSmoothness(), LocalSmoothness(two_scale=False)):
        make = partial(Penalised, 1e-4, estimators=(PathSmoothness(), local))
        trusting, evaluated = both(monkeypatch, make, 2)
        (path, *rows), (_, *exact) = ([row for row in rows if row["step"] == 1] for rows in (trusting, evaluated))
        assert path["num_grads"] == 2  # it does without the one at the start
        for row, other in zip(rows, exact, strict=True):
            assert (row["smoothness"], row["grad_norm"]) == (other["smoothness"], other["grad_norm"])


class Weighted(Run):
    def __init__(self, weight: float, *args: Any, **options: Any) -> None:
        self.weight = weight
        super().__init__(*args, **options)

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.weight * super().loss(batch)


class Penalised(Weighted):
    """A penalty on all tensors, or on the last matrix."""

    def __init__(self, weight: float, *args: Any, of_last: bool = False, **options: Any) -> None:
        self.of_last = of_last
        super().__init__(weight, *args, **options)

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        held = list(self.model.parameters())
        held = [p for p in held if p.dim() == 2][-1:] if self.of_last else held
        return classification(self.model, batch) + self.weight * torch.stack([p.square().sum() for p in held]).sum()


@pytest.mark.filterwarnings("ignore::smoothdiag.SmoothdiagWarning")
def test_an_autoclip_finds_out_that_the_training_gradient_is_of_another_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(Penalised):
        begins = 1

        def __init__(self) -> None:
            super().__init__(0.1, estimators=())
            AutoClip(self.optimizer, self.probe)

    trusting, evaluated = both(monkeypatch, Other, 3)
    assert without_cost(trusting) == without_cost(evaluated)
    assert gradients(trusting, 3)[1] == gradients(evaluated, 3)[1] + 2


class Masked(Run):
    """The loop draws a random number between ``observe`` and the forward pass."""

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        torch.rand(1)
        return super().loss(batch)


class ByValue(Run):
    def between(self) -> None:
        nn.utils.clip_grad_value_(self.model.parameters(), 0.01)


class Negated(Run):
    def between(self) -> None:
        for p in self.model.parameters():
            p.grad.data.neg_()


WRONG: dict[str, Callable[..., Run]] = {
    "last group incomplete": partial(Weighted, 0.25),
    "x 0.98": partial(Weighted, 0.98),
    "x 1.02": partial(Weighted, 1.02),
    "x 4": partial(Weighted, 4.0),
    "x -1": partial(Weighted, -1.0),
    "penalty": partial(Penalised, 1e-2),
    "small penalty": partial(Penalised, 1e-4),
    "penalty on one matrix": partial(Penalised, 1e-3, of_last=True),
    "mask": Masked,
    "by value": ByValue,
    "negated": Negated,
}


@pytest.mark.filterwarnings("ignore::smoothdiag.SmoothdiagWarning")
@pytest.mark.parametrize(
    ("name", "adaptive"),
    [("mlp", True), ("lstm", False)]
    + [
        pytest.param(name, adaptive, marks=pytest.mark.slow)
        for name in NETWORKS
        for adaptive in (False, True)
        if (name, adaptive) not in (("mlp", True), ("lstm", False))
    ],
)
def test_no_usable_row_is_off_when_training_leaves_the_loss(name: str, adaptive: bool, monkeypatch: Any) -> None:
    monkeypatch.setattr(Run, "begins", 2)
    checked = 0
    for wrong, kind in WRONG.items():
        if wrong == "mask" and name not in ("dropout", "gpt"):
            continue

        def make(kind: Callable[..., Run] = kind) -> Run:
            return kind(name, adaptive, group_by=lambda name: name.split(".")[0])

        trusting, evaluated = both(monkeypatch, make, 3)
        saved = [b - a for a, b in zip(gradients(trusting, 3), gradients(evaluated, 3), strict=True)]
        assert name == "relu" or saved[1] == 1  # until it goes wrong, the gradient is used
        for row, exact in zip(trusting, evaluated, strict=True):
            if row["status"] in USABLE_STATUSES and math.isfinite(exact["smoothness"]):
                assert row["smoothness"] == pytest.approx(exact["smoothness"], rel=OFF), (wrong, row)
                checked += row["step"] >= 2
    assert checked > 0


@pytest.mark.parametrize("estimator", [PathSmoothness(), LocalSmoothness(direction="update", radius=0.5)])
def test_an_error_is_seen_where_it_lies(estimator: Any) -> None:
    # Along the step, the gradient changes by 10,000 in one coordinate and by 1 in the other, where it is off by 0.1.
    x = [torch.ones(1, dtype=torch.float64) for _ in range(2)]
    loss = objective(nn.ModuleList(map(Point, x)), lambda m, _: (5_000 * m[0].x ** 2 + m[1].x ** 2 / 2).sum(), [None])
    step = Step(0, loss, start=x, end=[torch.zeros_like(p) for p in x], lr=0.1)
    right, diagonal = [10_000 * x[0], x[1]], [torch.ones_like(x[0]), torch.full_like(x[1], 1e-10)]
    options = [{}, {"groups": {"stiff": [0], "soft": [1]}}, {"preconditioner": diagonal}]
    exact = pytest.approx(1e4 / math.sqrt(2), rel=1e-6)
    for more in options:
        assert estimator(replace(step, training=right, **more)).smoothness == exact
    wrong = replace(step, training=[right[0], right[1] + 0.1])
    # Of both coordinates together, it is next to nothing.
    assert estimator(wrong).smoothness == exact
    for more in options[1:]:
        with pytest.raises(Contradicted):
            estimator(replace(wrong, **more))
    for factor in (1 - 1.1 * OFF, 1 + 1.1 * OFF):
        with pytest.raises(Contradicted):
            estimator(replace(step, training=[factor * right[0], right[1]]))


def test_an_estimator_that_writes_to_the_gradient_leaves_that_of_the_loop_alone() -> None:
    def spoil(step: Step) -> Estimate:
        for g in step.at_start.gradient if step.index == 2 else ():
            g.mul_(0.5)
        return Estimate("spoil", math.nan, math.nan, math.nan, step.at_start.loss)

    left: list[list[Tensor]] = []
    for estimators in (DEFAULT[:1], (DEFAULT[0], spoil)):
        run = Run(estimators=estimators)
        rows = run.rows(3)
        left.append([p.grad.clone() for p in run.model.parameters()])
    assert gradients(rows, 3)[1:] == [2, 2]  # the training gradient has served
    assert all(map(torch.equal, *left))
