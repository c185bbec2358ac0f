"""Curvature in the norm in which an optimizer steps, for optimizers that step to the surface of a ball.

Let s be the steepest direction, <g, s> = ||g||_* with ||s|| = 1, and S the largest <d, H d> over ||d|| <= 1. A step
x - eta t s changes a quadratic loss by -eta t ||g||_* (1 - eta t <s, H s> / (2 ||g||_*)).

Spectral descent has t = ||g||_*. Its loss falls iff eta <s, H s> < 2, so it falls everywhere if eta S < 2. That is the
best such bound: where d attains S, <g, d'> at x = a d is largest for d' = d sign(a), so the next point is
(1 - eta S) a d, and the run diverges along this line iff eta S > 2.

Muon has t = 1 whatever the gradient. Its loss falls iff eta <s, H s> < 2 ||g||_*. Along the same line it ends by going
to and fro between a = eta / 2 and -eta / 2, where ||g||_* = eta S / 2. So it reaches eta S / (2 ||g||_*) = 1 there,
whatever the curvature: the gradient shrinks until it holds.

Source: Islamov, Crawshaw, Cohen, Gower 2026 (arXiv 2603.05002) for S in the norm of an optimizer as its sharpness; the
rest is derived here, and tests/benchmarks/test_bench_reproduce_edge.py has it in numbers.
"""

import math
from collections.abc import Callable, Iterable
from typing import ClassVar

import torch
from torch import Tensor

import smoothdiag as sd

ROUNDS = 4
Vector = list[Tensor]
Times = Callable[[Vector], Vector]


def dot(a: Iterable[Tensor], b: Iterable[Tensor]) -> float:
    return sum(float((x * y).sum()) for x, y in zip(a, b, strict=True))


def ascend(times: Times, geometry: sd.geometry.Geometry, start: Vector, rounds: int) -> tuple[float, Vector]:
    """Returns the largest <d, H d> that is met from a start in the unit ball, and its d.

    Each round goes to the maximiser of <H d, d'> over the ball. On a convex quadratic that never lowers <d, H d>; it
    ends at a local maximum, so what it finds is a lower bound of S.

    Source: Journée, Nesterov, Richtárik, Sepulchre 2010, "Generalized power method".
    """
    best, at, d = -math.inf, start, start
    for _ in range(rounds):
        product = times(d)
        if (value := dot(d, product)) > best:
            best, at = value, d
        d = [-x for x in geometry.lmo(product)]
    return best, at


class OwnCurvature:
    """Curvature of the measured loss in the norm in which the step was taken, by exact products.

    The row's smoothness is <s, H s> along the steepest direction s, its gradient norm the dual norm, its step norm the
    length of the step. Extra columns: ``largest``, a lower bound of S; ``update``, <d, H d> along the step d;
    ``slope``, <g, d>.
    """

    of_step: ClassVar[bool] = False

    def __call__(self, step: sd.Step) -> sd.Estimate:
        """Returns the estimate."""
        part = step.own.parts[0]
        geometry, gradient = part.geometry, part.of(step.at_start.gradient)
        update = [end - start for end, start in zip(part.of(step.end), part.of(step.start), strict=True)]
        steepest = [-x for x in geometry.lmo(gradient)]
        length = float(geometry.norm(update))
        if (before := step.memory.get(OwnCurvature)) is None:
            random = torch.Generator().manual_seed(step.index)
            before = [-x for x in geometry.lmo([torch.randn(x.shape, generator=random).to(x) for x in gradient])]
        with sd.hvp(step.objective, step.start) as hessian:

            def times(d: Vector) -> Vector:
                whole = [torch.zeros_like(x) for x in step.start]
                for i, x in zip(part.indices, d, strict=True):
                    whole[i] = x
                return part.of(hessian(whole))

            found = [ascend(times, geometry, start, ROUNDS) for start in (steepest, before)]
            along, of_update = dot(steepest, times(steepest)), dot(update, times(update))
        largest, step.memory[OwnCurvature] = max(found, key=lambda pair: pair[0])
        extra = {"largest": largest, "update": of_update, "slope": dot(gradient, update)}
        return sd.Estimate(
            "own", along, part.dual_norm(step.at_start.gradient), length, step.at_start.loss, extra=extra
        )
