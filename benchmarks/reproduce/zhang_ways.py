"""Smoothness beside the gradient norm of one run, measured four ways at the same steps, and once as noise alone.

The first way is that of the code that Zhang, He, Sra, Jadbabaie (ICLR 2020, arXiv 1905.11881) released for their
language model, github.com/JingzhaoZhang/why-clipping-accelerates at commit ee240ae, written anew from what `eval_grad`
and `eval_smooth` in its main.py do:

1. The data are the first tenth of the training text, at every step and at both points.
2. That tenth is cut into pieces of random lengths, and cut anew for each of the two points.
3. The gradients of all pieces are added up. Smoothness is the change of the sum between x_k and the midpoint of the
   step, over half the length of the step.
4. The gradient norm is that of the sum at x_k, divided by the number of pieces.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import smoothdiag as sd
from smoothdiag import vectors
from smoothdiag.vectors import Vector

FRACTIONS = tuple(k / 6 for k in range(1, 6))
"""Points of the step whose largest secant counts, as the paper has it according to our notes; its appendix H, which
says so, could not be read for this page."""

RELEASED, ALIKE, STILL, SUCCESSIVE = "released", "cut_alike", "no_step", "successive"
"""Estimators that only this file knows: the released way; the same with one cut for both points and means on both axes;
two cuts at x_k, with no step between; and gradients of successive batches, each at its own point."""

HESSIAN, HESSIAN_NORMS = "hessian_norm", "Hessian norm, held-out batch"
"""Estimator of the Hessian norms, and their name among the controls."""

WAYS = {
    "as released": (RELEASED, "tenth"),
    "path, step's batch": ("path", "step"),
    "local, step's batch": ("local", "step"),
    "local, held-out batch": ("local", "held-out"),
}
"""The four ways: estimator and data of their rows."""

CONTROLS = {"as released, cut alike": (ALIKE, "tenth"), "no step, cut anew": (STILL, "tenth")}
CONTROLS |= {"successive batches": (SUCCESSIVE, "two batches"), HESSIAN_NORMS: (HESSIAN, "held-out")}

Cut = Any
"""How the fixed data are cut into pieces."""

Losses = Callable[[Cut], Iterable[Tensor]]
"""Yields the losses of the pieces at the present parameters; each is differentiated before the next is asked for."""


def trace_of(folder: Path, case: str, seed: int) -> Path:
    """Returns the path of the trace of a run."""
    return folder / f"{re.sub('[^a-z0-9]+', '-', case.lower())}-{seed}.jsonl"


@dataclass(frozen=True)
class Summed:
    """Gradients of pieces, added up.

    Attributes:
        total: Their sum.
        squares: Sum of their squared norms.
        pieces: How many there are.
        loss: Mean of their losses.
    """

    total: Vector
    squares: float
    pieces: int
    loss: float

    @property
    def mean_norm(self) -> float:
        return length(self.total) / self.pieces

    @property
    def noise(self) -> float:
        """Standard deviation of the gradient of one piece, all coordinates together; NaN for a single piece."""
        if self.pieces < 2:
            return math.nan
        return math.sqrt(max(self.squares - length(self.total) ** 2 / self.pieces, 0.0) / (self.pieces - 1))


def length(vector: Vector) -> float:
    return float(vectors.norm(vector))


def add_up(parameters: Sequence[Tensor], losses: Iterable[Tensor]) -> Summed:
    """Returns the sum of the gradients of the losses."""
    total, squares, values = [torch.zeros_like(p) for p in parameters], 0.0, list[float]()
    for loss in losses:
        gradient = torch.autograd.grad(loss, list(parameters))
        squares += length(gradient) ** 2
        torch._foreach_add_(total, list(gradient))
        values.append(loss.item())
    return Summed(total, squares, len(values), sum(values) / len(values))


def on_tenth(model: nn.Module, start: Vector, losses: Losses, cuts: tuple[Cut, Cut]) -> list[dict[str, Any]]:
    """Returns the rows of the released way and of its controls for one step; the model ends as it began.

    Args:
        model: The network, at x_{k+1}.
        start: x_k.
        losses: The fixed data.
        cuts: How they are cut at x_k, and at the midpoint. If both are one object, no control is needed.
    """
    parameters, buffers = list(model.parameters()), list(model.buffers())
    end, kept = copied(parameters), copied(buffers)
    step_norm = length(vectors.sub(end, start))
    half = step_norm / 2
    if not half > 0:
        return []

    def at(point: Vector, cut: Cut) -> Summed:
        put(parameters, point)
        return add_up(parameters, losses(cut))

    first, second = cuts
    middle = [(a + b) / 2 for a, b in zip(start, end, strict=True)]
    here, there = at(start, first), at(middle, second)
    is_anew = second is not first
    alike = at(middle, first) if is_anew else there
    again = at(start, second) if is_anew else here
    put(parameters, end)
    put(buffers, kept)

    def row(estimator: str, a: Summed, b: Summed, over: int) -> dict[str, Any]:
        change, ends = length(vectors.sub(b.total, a.total)), length(a.total) + length(b.total)
        return {
            "estimator": estimator,
            "data": "tenth",
            "grad_norm": here.mean_norm,
            "smoothness": change / half / over,
            "step_norm": half,
            "saturation": change / ends if ends else 0.0,
            "loss": here.loss,
            "pieces": a.pieces,
            "pieces_there": b.pieces,
            "noise_line": math.sqrt(2) * here.noise / step_norm,
        }

    rows = [row(RELEASED, here, there, 1), row(ALIKE, here, alike, here.pieces)]
    return [*rows, row(STILL, here, again, 1)] if is_anew else rows


def copied(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


@torch.no_grad()
def put(tensors: Sequence[Tensor], values: Vector) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


class Ways:
    """Measures a run in all ways at the steps that are due. It changes no bit of the run.

    Call ``observe`` with each batch, ``before`` when its gradients are there and not yet clipped, ``after`` when the
    optimizer has stepped, and ``close`` in the end.

    Args:
        model: The network.
        optimizer: Its optimizer.
        loss_fn: Loss of a batch.
        held_out: Batches that the run never trains on.
        losses: The fixed tenth of the training data.
        cuts: Returns two cuts of it.
        radius: Length of local displacements [||x||].
        every: Steps from one measurement to the next.
        hessian_every: Steps from one Hessian norm on the held-out batches to the next; ``None`` measures none.
        path: File of the trace; ``None`` keeps the rows in memory.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_fn: Callable[[nn.Module, Any], Tensor],
        held_out: Sequence[Any],
        losses: Losses,
        cuts: Callable[[], tuple[Cut, Cut]],
        *,
        radius: float,
        every: int,
        hessian_every: int | None,
        path: Path | None,
    ) -> None:
        if path is not None:
            path.unlink(missing_ok=True)
        self.trace = sd.Trace(path)
        self.model, self.optimizer, self.losses, self.cuts, self.every = model, optimizer, losses, cuts, every
        self.parameters = list(model.parameters())
        local, due = sd.LocalSmoothness(radius=radius), sd.every(every)
        own = (sd.PathSmoothness(points=FRACTIONS, two_scale=False), local)
        self.on_step = sd.Probe(model, optimizer, loss_fn, estimators=own, schedule=due, data="step", trace=self.trace)
        self.on_held_out = sd.Probe(
            model, optimizer, loss_fn, estimators=(local,), schedule=due, probe_batches=held_out, trace=self.trace
        )
        if hessian_every is not None:
            self.on_held_out.also(sd.every(hessian_every), sd.HessianNorm())
        self.step = 0
        self._gradient, self._start, self._moved = list[Tensor](), list[Tensor](), 0.0

    def observe(self, batch: Any) -> None:
        self.on_step.observe(batch)

    def before(self, loss: float) -> None:
        gradient = [p.grad.clone() for p in self.parameters if p.grad is not None]
        if self._gradient and (self.step - 1) % self.every == 0 and self._moved > 0:
            change, ends = length(vectors.sub(gradient, self._gradient)), length(gradient) + length(self._gradient)
            row = {"estimator": SUCCESSIVE, "data": "two batches", "grad_norm": length(self._gradient), "loss": loss}
            row |= {"smoothness": change / self._moved, "step_norm": self._moved, "saturation": change / ends}
            self._write(self.step - 1, row)
        self._gradient, self._start = gradient, copied(self.parameters)

    def after(self) -> None:
        self._moved = length(vectors.sub([p.detach() for p in self.parameters], self._start))
        if self.step % self.every == 0:
            for row in on_tenth(self.model, self._start, self.losses, self.cuts()):
                self._write(self.step, row)
        self.step += 1

    def close(self) -> None:
        for probe in (self.on_step, self.on_held_out):
            probe.close()
        self.trace.close()

    def _write(self, step: int, row: dict[str, Any]) -> None:
        self.trace.append({"step": step, "lr": self.optimizer.param_groups[0]["lr"], **row})
