"""optim: torch.compile takes a whole step as one graph, and the graph does what the step does."""

import math

import pytest
import torch
from torch.testing import assert_close

from smoothdiag.optim import Clipped, ClippedMomentum, GradientDescent, LogSmoothed

pytestmark = pytest.mark.thorough

CASES = {
    "momentum": lambda p: ClippedMomentum(p, 0.1, threshold=0.5),
    "free": lambda p: ClippedMomentum(p, 0.1, threshold=math.inf, nu=0.0),
    "mix": lambda p: ClippedMomentum(p, 0.1, threshold=0.5, nu=0.5, clip="soft", weight_decay=0.1),
    "corrected": lambda p: ClippedMomentum(p, 0.1, longest_step=0.1, bias_correction=True),
    "tensors": lambda p: ClippedMomentum(p, torch.tensor(0.1), threshold=torch.tensor(0.5), capturable=True),
    "coupled": lambda p: ClippedMomentum(p, 0.1, threshold=0.5, weight_decay=0.1, decoupled_weight_decay=False),
    "single": lambda p: ClippedMomentum(p, 0.1, threshold=0.5, clip="normalize", foreach=False, norm_scope="group"),
    "clipped": lambda p: GradientDescent(p, Clipped(0.1, 0.5)),
    "smoothed": lambda p: GradientDescent(p, LogSmoothed(0.5, 1.0), maximize=True),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_compiled_step_is_one_graph_and_the_same_step(case):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    def fresh():
        params = [torch.linspace(-1, 2, 6).view(3, 2), torch.ones(4), torch.ones(4, dtype=torch.float64)]
        params = [p.requires_grad_() for p in params]
        return params, CASES[case]([{"params": params[:1]}, {"params": params[1:]}])

    (plain, optimizer), (compiled, other) = fresh(), fresh()
    step = torch.compile(other.step, fullgraph=True, backend="aot_eager")
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        for p, q in zip(plain, compiled, strict=True):
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            q.grad = p.grad.clone()
        optimizer.step()
        step()
        assert_close(compiled, plain, rtol=1e-5, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    for p, q in zip(plain, compiled, strict=True):
        assert_close(dict(other.state[q]), dict(optimizer.state[p]), rtol=1e-5, atol=1e-6)


def test_a_compiled_step_follows_a_scheduled_tensor_rate():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    p = torch.zeros(2, requires_grad=True)
    optimizer = ClippedMomentum([p], torch.tensor(1.0), threshold=math.inf, nu=0.0)
    step = torch.compile(optimizer.step, fullgraph=True, backend="aot_eager")  # before a scheduler wraps the method
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for _ in range(3):
        p.grad = torch.ones(2)
        step()
        scheduler.step()
    assert_close(p.detach(), torch.full((2,), -1.75))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
