"""optim: steps on a GPU equal steps on the CPU, wait for nothing, and can be captured in a CUDA graph."""

import pytest
import torch
from torch.testing import assert_close

from smoothdiag.optim import ClippedMomentum, GradientDescent, LogSmoothed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

OPTIONS = {
    "momentum": {"threshold": 0.5},
    "mix": {"threshold": 0.5, "nu": 0.5, "clip": "soft", "weight_decay": 0.1},
    "coupled": {"longest_step": 0.05, "weight_decay": 0.1, "decoupled_weight_decay": False, "nu": 0.7},
    "corrected": {"longest_step": 0.05, "bias_correction": True},
    "normalize": {"threshold": 0.5, "clip": "normalize", "norm_scope": "group"},
    "single": {"threshold": 0.5, "foreach": False},
    "descent": {},
}


def fresh(case, device, **more):
    params = [torch.linspace(-1, 2, 6).view(3, 2), torch.ones(4), torch.ones(5, dtype=torch.bfloat16), torch.ones(())]
    params = [p.to(device).requires_grad_() for p in params]
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    if case == "descent":
        return params, GradientDescent(groups, LogSmoothed(0.5, 1.0), **more)
    return params, ClippedMomentum(groups, **{"lr": 0.1, **OPTIONS[case], **more})


def gradients(num_steps=6):
    generator = torch.Generator().manual_seed(0)
    shapes = [p.shape for p in fresh("momentum", "cpu")[0]]
    return [[torch.randn(s, generator=generator) * 10.0 ** (k % 3 - 1) for s in shapes] for k in range(num_steps)]


def train(case, device, **more):
    params, optimizer = fresh(case, device, **more)
    for grads in gradients():
        for p, g in zip(params, grads, strict=True):
            p.grad = g.to(p.device, p.dtype)
        optimizer.step()
    return [p.detach().cpu() for p in params]


@pytest.mark.parametrize("case", OPTIONS)
def test_steps_are_those_of_the_cpu(case):
    for found, expected in zip(train(case, "cuda"), train(case, "cpu"), strict=True):
        assert_close(found, expected, rtol=2e-2 if found.dtype == torch.bfloat16 else 1e-5, atol=1e-5)


@pytest.mark.parametrize("rate", ["number", "cpu", "cuda"])
@pytest.mark.parametrize("case", OPTIONS)
def test_a_step_waits_for_no_device(case, rate):
    lr = 0.1 if rate == "number" else torch.tensor(0.1, device=rate)
    params, optimizer = fresh(case, "cuda", lr=lr)
    for p in params:
        p.grad = torch.ones_like(p)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.isfinite(p).all() for p in params)


@pytest.mark.parametrize("case", OPTIONS)
def test_a_captured_step_replays_with_new_gradients_and_a_new_rate(case):
    expected_params, eager = fresh(case, "cuda", lr=torch.tensor(0.1, device="cuda"), capturable=True)
    params, optimizer = fresh(case, "cuda", lr=torch.tensor(0.1, device="cuda"), capturable=True)
    steps = [[g.cuda() for g in grads] for grads in gradients()]
    for p in (*params, *expected_params):
        p.grad = torch.zeros_like(p)

    def load(into, grads):
        for p, g in zip(into, grads, strict=True):
            p.grad.copy_(g)

    # The states must exist before the capture: a step on a side stream makes them.
    load(params, steps[0])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()

    load(expected_params, steps[0])
    eager.step()
    for k, grads in enumerate(steps[1:]):
        for group in (*optimizer.param_groups, *eager.param_groups):
            group["lr"].fill_(0.1 * 0.8**k)
        load(params, grads)
        graph.replay()
        load(expected_params, grads)
        eager.step()
    assert_close([p.detach() for p in params], [p.detach() for p in expected_params])


@pytest.mark.parametrize(("more", "message"), [
    ({}, "`capturable` should be True"),
    ({"capturable": True, "lr": torch.tensor(0.1)}, "`lr` should be on the GPU"),
])  # fmt: skip
def test_what_a_graph_would_freeze_is_refused(more, message):
    params, optimizer = fresh("momentum", "cuda", **more)
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match=message), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()
