"""adapters.scalers: the factor of the GradScaler that takes a step."""

import sys

import pytest
import torch

from smoothdiag.adapters.scalers import scale_of_step


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscales", [False, True])
def test_the_factor_is_known_within_the_step_alone(fused, unscales) -> None:
    x = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([x], lr=0.1, fused=fused)
    found = []
    optimizer.register_step_pre_hook(lambda *_: found.append(scale_of_step(sys._getframe())))
    scaler = torch.amp.GradScaler("cpu", init_scale=512.0, growth_interval=1)
    for _ in range(2):
        scaler.scale(x.sum()).backward()
        if unscales:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    optimizer.step()
    off = torch.amp.GradScaler("cpu", enabled=False)
    off.step(optimizer)
    assert found == [512.0, 1024.0, 1.0, 1.0]
