"""optim, autoclip: rehearsed without a GPU, steps that are not due wait for nothing and mix no devices."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from autoclip_runs import Run, adamw, batches, never, sgd
from losses import cross_entropy
from networks import EmbeddingAndHead, mlp
from rehearsed import Waited, fake_gpu, moved
from torch import nn

from smoothdiag import AutoClip, ClippedMomentum, Probe, StepRule
from smoothdiag.geometry import ByShape, Euclidean
from smoothdiag.optim import GGNC, ClippedScion, GradientDescent, LogSmoothed, scion_groups

Make = Callable[[nn.Module], torch.optim.Optimizer]


def clipped(**options: Any) -> Make:
    return lambda model: ClippedMomentum(model.parameters(), **{"lr": 0.1, "threshold": 1.0, **options})


OPTIMIZERS: dict[str, Make] = {
    "momentum": clipped(),
    "mix": clipped(nu=0.5, clip="soft", weight_decay=0.1),
    "coupled": clipped(threshold=None, longest_step=0.1, weight_decay=0.1, decoupled_weight_decay=False, nu=0.7),
    "corrected": clipped(bias_correction=True),
    "normalized": clipped(clip="normalize", norm_scope="group"),
    "single": clipped(foreach=False),
    "ggnc": lambda model: GGNC(model.parameters(), lr=0.1, threshold=1.0, geometry=Euclidean()),
    "ggnc by shape": lambda model: GGNC(
        model.parameters(), lr=0.1, threshold=1.0, geometry=ByShape(), weight_decay=0.1
    ),
    "scion": lambda model: ClippedScion(scion_groups(model), lr=0.1, threshold=1.0, radius=1.0),
    "scion, decay": lambda model: ClippedScion(
        scion_groups(model), lr=0.1, threshold=1.0, radius=1.0, weight_decay=0.1
    ),
    "descent": lambda model: GradientDescent(model.parameters(), LogSmoothed(0.5, 1.0)),
}


@pytest.mark.parametrize("rate", ["number", "cuda"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_waits_for_nothing(name: str, rate: str) -> None:
    with fake_gpu():
        model = moved(EmbeddingAndHead(tied=False) if "scion" in name else mlp(8, 16, 16, 2))
        optimizer = OPTIMIZERS[name](model)
        if rate == "cuda" and name != "descent":
            with_tensor_rates(optimizer)
        for _ in range(3):
            optimizer.step()
        assert all(p.device.type == "cuda" for p in model.parameters())


def with_tensor_rates(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Puts the rates on the GPU after the constructor of torch, which reads them."""
    for group in optimizer.param_groups:
        group["lr"] = torch.ones((), device="cuda")
    return optimizer


CLIPPED: dict[str, tuple[Make, dict[str, Any]]] = {
    "sgd": (sgd(0.5, 0.9), {}),
    # SGD of torch reads a rate that is a tensor itself, unless it is fused, and fused it does not run without a GPU.
    "tensor": (lambda m: with_tensor_rates(torch.optim.AdamW(m.parameters(), capturable=True, foreach=True)), {}),
    "adamw": (adamw(0.1), {}),
    "adamw, fused": (lambda m: torch.optim.AdamW(m.parameters(), lr=0.1, fused=True), {}),
    "adam, one by one": (lambda m: torch.optim.Adam(m.parameters(), lr=0.1, foreach=False), {}),
    "rmsprop": (lambda m: torch.optim.RMSprop(m.parameters(), lr=0.1), {}),
    "set": (clipped(threshold=None, longest_step=1.0), {"mode": "set"}),
    "bounded": (sgd(0.5), {"rule": StepRule(bounded=True)}),
    "shadow": (sgd(0.5), {"mode": "shadow"}),
}


@pytest.mark.parametrize("is_held", [False, True])
@pytest.mark.parametrize("name", CLIPPED)
def test_a_clipped_step_that_is_not_due_waits_for_nothing(name: str, is_held: bool) -> None:
    make, options = CLIPPED[name]
    state = None
    if is_held:  # what a run on the CPU has measured is held
        run = Run(lambda m: make(m) if name != "tensor" else adamw(1.0)(m), schedule=never, **options).over(batches(32))
        state = run.clipper.state_dict()
    else:  # nothing is ever measured
        options = {**options, "rule": StepRule(multiple=None, bounded=name == "bounded")}
    with fake_gpu():
        model = moved(mlp(6, 16, 3))
        optimizer = make(model)
        probe = Probe(model, optimizer, cross_entropy, estimators=(), schedule=never)
        probe.load_state_dict({"version": 1, "steps": 32, "next": None})  # the next one that may be measured is 38
        clipper = AutoClip(optimizer, probe, **options)
        if state is not None:
            clipper.load_state_dict(state)
        for _ in range(3):
            optimizer.step()
        assert all(p.device.type == "cuda" for p in model.parameters())


@pytest.mark.parametrize("name", ["adamw", "adamw, fused", "adam, one by one", "rmsprop"])
def test_an_update_that_follows_from_the_state_waits_for_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    following = pytest.importorskip("smoothdiag.autoclip.following").Following
    # To compare with a copy does wait, which the first step of a run may; here the comparison is taken as passed.
    monkeypatch.setattr(following, "_agrees", lambda self, ways: True)
    monkeypatch.setattr(following, "_has_one_count", lambda self: True)
    worked_out, length = list[bool](), following.length
    monkeypatch.setattr(following, "length", lambda self: worked_out.append(True) or length(self))
    with fake_gpu():
        model = moved(mlp(6, 16, 3))
        optimizer = CLIPPED[name][0](model)
        probe = Probe(model, optimizer, cross_entropy, estimators=(), schedule=never)
        AutoClip(optimizer, probe, rule=StepRule(multiple=None))
        for _ in range(4):
            optimizer.step()
    assert len(worked_out) >= 2


WAITS = {
    "float": lambda x: float(x.sum()),
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.isfinite().all()),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "equal": lambda x: torch.equal(x, x),
    "to": lambda x: x.to("cpu"),
    "up": lambda x: torch.ones(3).to("cuda"),
    "tensor": lambda x: torch.tensor(1.0, device="cuda"),
}


@pytest.mark.parametrize("name", WAITS)
def test_the_rehearsal_finds_a_wait(name: str) -> None:
    with fake_gpu(), pytest.raises(Waited):
        WAITS[name](torch.empty(3, device="cuda"))


@pytest.mark.parametrize("call", [torch.add, torch.maximum, lambda x, y: torch._foreach_mul([x], [y])])
def test_the_rehearsal_finds_mixed_devices(call: Callable[..., Any]) -> None:
    with fake_gpu(), pytest.raises(RuntimeError, match="device"):
        call(torch.empty(3, device="cuda"), torch.ones(3))
