"""Cases of the curvature benchmark: a briefly trained model, its batch, the truth, and how smoothdiag finds it."""

import copy
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from curvature_peers import TOLERANCE, Batch, exact, largest, twice_differentiable
from models import Task
from overhead.clock import clock_of, seconds
from torch import nn

from smoothdiag.measure.curvature import Choice, hvp
from smoothdiag.measure.curvature.spectrum import MIN_PRODUCTS, Spectrum, lanczos
from smoothdiag.measure.loss.batches import MicroBatch, RandomState
from smoothdiag.measure.loss.objective import Objective

STEPS, SETTLING = 150, 20
"""Steps of training, and later forward passes in which running statistics catch up with the weights."""


@dataclass(frozen=True)
class Case:
    """A model at one point of its training, and the batch of its Hessian."""

    model: nn.Module
    batch: Batch
    task: Task

    def copied(self) -> "Case":
        return Case(copy.deepcopy(self.model), self.batch, self.task)

    def objective(self) -> Objective:
        micro = MicroBatch(self.batch, RandomState.capture())
        return Objective(self.model, self.task.loss_fn, [micro], list(self.model.parameters()))

    def truth(self, seed: int) -> float:
        """Returns the eigenvalue of largest magnitude by SciPy in float64, started in float32 to be faster."""
        model = copy.deepcopy(self.model)
        inputs, labels = self.batch
        with twice_differentiable(model):
            _, start = largest(exact(model, self.batch), seed, tol=TOLERANCE)
            inputs = inputs.double() if inputs.is_floating_point() else inputs
            # The residual is at most 1e-4; of the value it leaves about its square.
            return largest(exact(model.double(), (inputs, labels)), start, tol=1e-4, ncv=6)[0]

    def gradient(self) -> None:
        torch.autograd.grad(self.task.loss_fn(self.model, self.batch), list(self.model.parameters()))


@dataclass(frozen=True)
class Cases:
    """The model at the first measurement, and one step later on the same batch and on another batch."""

    here: Case
    later: Case
    other: Case


def prepared(task: Task, seed: int, device: torch.device, steps: int = STEPS) -> Cases:
    """Returns a briefly trained model with settled running statistics."""
    torch.manual_seed(seed)
    model = task.build().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=task.lr)

    def step(batch: Batch) -> None:
        model.train()
        optimizer.zero_grad()
        task.loss_fn(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(steps):
        step(task.batch(device))
    if any(True for _ in model.buffers()):
        with torch.no_grad():
            for _ in range(SETTLING):
                model(task.batch(device)[0])
    batch, other = task.batch(device), task.batch(device)
    here = Case(copy.deepcopy(model).eval(), batch, task)
    step(batch)
    model.eval()
    return Cases(here, Case(model, batch, task), Case(model, other, task))


def eigenvalue(
    case: Case,
    seed: int,
    choice: Choice | str,
    before: Spectrum | None = None,
    limit: int | None = None,
    **options: bool,
) -> Spectrum:
    """Returns the result of smoothdiag, cold or from an earlier result, by its own stop or after ``limit`` products."""
    with hvp(case.objective(), backend=choice, **options) as hessian:
        start, challenger = (hessian.gradient, None) if before is None else (before.pairs[0].vector, before.challenger)
        least = 3 if before else MIN_PRODUCTS
        return lanczos(
            hessian,
            start,
            challenger=challenger,
            tol=TOLERANCE,
            min_products=limit or least,
            max_products=limit or 40,
            seed=seed,
        )


def products_needed(case: Case, seed: int, choice: Choice, before: Spectrum | None, truth: float) -> int:
    """Returns after how many products the value is first right, whether or not the search would stop there."""
    return next(
        limit
        for limit in range(1, 41)
        if abs(eigenvalue(case.copied(), seed, choice, before, limit).norm / abs(truth) - 1) <= TOLERANCE
    )


def forget(case: Case) -> None:
    """Breaks the reference cycle of gradients, their graph and the parameters."""
    for parameter in case.model.parameters():
        parameter.grad = None


def timed(call: Callable[[], Any], device: torch.device) -> float:
    """Returns the median time of five calls after a first one."""
    call()
    return statistics.median(seconds(call, device, clock_of(device)) for _ in range(5))
