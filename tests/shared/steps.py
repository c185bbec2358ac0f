"""Steps on landscapes, as estimators get them."""

from torch import Tensor

from smoothdiag.measure.estimators import Step
from smoothdiag.measure.loss.batches import MicroBatch, RandomState
from smoothdiag.measure.loss.objective import Objective


def step_on(problem, start: Tensor, end: Tensor, **values) -> Step:
    module = problem.as_module(start)
    objective = Objective(
        module, lambda m, _: m(), [MicroBatch(None, RandomState.capture())], list(module.parameters())
    )
    return Step(index=0, objective=objective, start=[start], end=[end], lr=0.1, **values)
