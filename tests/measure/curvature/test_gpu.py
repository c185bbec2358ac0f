"""measure.curvature: on a GPU the numbers are the numbers of a CPU, and no iteration waits for the device."""

import warnings

import pytest
import torch
from losses import classification
from networks import Convolutional, Gpt, Recurrent, images, texts
from torch import nn

from smoothdiag import HessianNorm, LocalSmoothness, PathSmoothness, Probe, Sharpness, every, hvp, objective
from smoothdiag.measure.curvature import lanczos

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
NETWORKS = {"gpt": (Gpt, texts), "lstm": (Recurrent, texts), "cnn": (Convolutional, images)}


def loss_on(kind: str, device: str):
    torch.manual_seed(0)
    build, data = NETWORKS[kind]
    model = build().eval()  # dropout masks differ between devices
    for module in model.modules():
        if isinstance(module, nn.RNNBase):  # cuDNN differentiates recurrent layers in training mode alone
            module.train().dropout = 0.0
    batch = tuple(t.to(device) for t in data(1, 8)[0])
    return objective(model.to(device), classification, [batch])


@pytest.mark.parametrize("backend", ["auto", "retained", "rebuilt", "central"])
@pytest.mark.parametrize("kind", NETWORKS)
def test_eigenvalues_are_those_of_the_cpu(kind, backend) -> None:
    found = []
    for device, way in (("cpu", "retained"), ("cuda", backend)):
        with hvp(loss_on(kind, device), backend=way) as hessian:
            found.append(lanczos(hessian, hessian.gradient, tol=1e-5).norm)
    assert found[1] == pytest.approx(found[0], rel=5e-3 if backend == "central" else 1e-3)


@pytest.mark.parametrize("kind", NETWORKS)
def test_one_wait_for_each_product(kind) -> None:
    with hvp(loss_on(kind, "cuda"), backend="retained") as hessian:
        start = hessian.gradient
        lanczos(hessian, start, max_products=2)  # kernels load, workspaces are taken
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                found = lanczos(hessian, start, tol=1e-6, max_products=12)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = sum("synchroniz" in str(w.message) for w in caught)
    # Beside the products: the lengths of the start and of the challenger, and the vectors that are returned.
    assert waits <= found.num_products + 8


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", NETWORKS)
def test_training_is_the_same_with_and_without(kind, autocast) -> None:
    build, data = NETWORKS[kind]

    def loss_fn(model, batch):
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            return classification(model, batch)

    states = []
    torch.use_deterministic_algorithms(True, warn_only=True)
    for probed in (False, True):
        torch.manual_seed(0)
        model = build().cuda()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        loader = [tuple(t.cuda() for t in batch) for batch in data(4, 8)]
        if probed:
            estimators = [PathSmoothness(), LocalSmoothness(), HessianNorm(), Sharpness()]
            probe = Probe(model, optimizer, loss_fn, estimators=estimators, schedule=every(1))
            loader = probe.watch(loader)
        for batch in loader:
            optimizer.zero_grad()
            loss_fn(model, batch).backward()
            optimizer.step()
        states.append([p.detach().clone() for p in model.parameters()] + [torch.cuda.get_rng_state()])
    torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))
