"""optim.ggnc, optim.scion: on a GPU nothing waits for the device, and a CUDA graph repeats the step."""

import pytest
import torch
from networks import EmbeddingAndHead
from torch import nn
from torch.testing import assert_close

from smoothdiag.geometry import Spectral
from smoothdiag.optim import ClippedScion, scion_groups

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
OPTIONS = [{}, {"weight_decay": 0.1}]


def prepared(device="cuda", **options):
    torch.manual_seed(0)
    model = nn.ModuleDict({"conv": nn.Conv2d(3, 8, 3), "gpt": EmbeddingAndHead(tied=False)})
    for p in model.parameters():
        p.grad = torch.randn(p.shape)
    gradients = [p.grad.to(device) for p in model.parameters()]
    model.to(device)
    for p, g in zip(model.parameters(), gradients, strict=True):
        p.grad = g
    groups = scion_groups(model, radii={"hidden": 2.0})
    return model, ClippedScion(groups, **{"lr": 0.01, "threshold": 5.0, "radius": 1.0, **options})


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("tensor", [False, True])
def test_a_step_never_waits_for_the_device(options, tensor):
    lr = torch.tensor(0.01, device="cuda") if tensor else 0.01
    model, optimizer = prepared(**options, lr=lr)
    optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_captured_step_is_the_step(options):
    (eager, plain), (model, optimizer) = prepared(**options), prepared(**options, capturable=True)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for _ in range(3):
        graph.replay()
    for _ in range(4):
        plain.step()
    assert_close(list(model.parameters()), list(eager.parameters()), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_steps_are_those_of_the_cpu(options):
    found = []
    for device in ("cpu", "cuda"):
        model, optimizer = prepared(device, **options)
        before = [p.detach().cpu().clone() for p in model.parameters()]
        for _ in range(3):
            optimizer.step()
        found.append([p.detach().cpu() - b for p, b in zip(model.parameters(), before, strict=True)])
    for step, expected in zip(found[1], found[0], strict=True):
        assert (step - expected).norm() <= 0.03 * expected.norm()


@pytest.mark.parametrize("shape", [(768, 768), (768, 3072), (3072, 768)])
def test_newton_schulz_in_bfloat16_reaches_its_share_of_the_nuclear_norm(shape):
    g = torch.randn(shape, device="cuda")
    assert 0.77 < float(Spectral().minimize([g])[1][0] / Spectral().dual_norm(g)) < 0.96
