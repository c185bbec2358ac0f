"""measure.probe: gradients outside the model survive a measurement on several micro-batches or halves."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import smoothdiag as sd


@pytest.mark.parametrize("num_micro_batches", [1, 2])
@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.filterwarnings("ignore:loss_fn depends on")
def test_gradients_outside_the_model_are_put_back(num_micro_batches, clips) -> None:
    encoder, head = nn.Linear(6, 8), nn.Linear(8, 4)

    def loss_fn(model, batch):
        return F.cross_entropy(head(model(batch[0]).tanh()), batch[1])

    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)
    probe = sd.Probe(encoder, optimizer, loss_fn, schedule=sd.every(1), data="step", reduction="sum")
    clipper = sd.AutoClip(optimizer, probe, mode="shadow") if clips else None
    for _ in range(3):
        head.zero_grad()
        optimizer.zero_grad()
        for _ in range(num_micro_batches):
            batch = torch.randn(10, 6), torch.randint(4, (10,))
            probe.observe(batch)
            loss_fn(encoder, batch).backward()
        before = [p.grad.clone() for p in head.parameters()]
        optimizer.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(head.parameters(), before, strict=True))
    assert len(probe.trace) >= 6
    assert clipper is None or clipper.longest_step > 0
