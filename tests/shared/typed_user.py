"""What a user's type checker says: mypy reads this against the wheel. An ignored line has to be an error there."""

from typing import assert_type

import torch
from torch import Tensor, nn

import smoothdiag as sd
from smoothdiag.geometry import RMS


def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
    loss: Tensor = model(batch).square().mean()
    return loss


model = nn.Linear(2, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
probe = sd.Probe(model, optimizer, loss_fn, schedule=sd.every(20), estimators=[sd.LocalSmoothness(), sd.HessianNorm()])
assert_type(probe.trace, sd.Trace)

fit = sd.fit_smoothness(probe.trace, quantile=0.9)
assert_type(fit, sd.SmoothnessFit)
assert_type(fit.L0, float)
assert_type(fit.verdict, sd.Verdict)
assert_type(sd.clip_rule(fit, lr=0.1).threshold, float)
assert_type(sd.AutoClip(optimizer, probe).threshold, float)
assert_type(sd.fit_groups(probe.trace), sd.GroupFits)
assert_type(sd.ClippedMomentum(model.parameters(), lr=0.1, threshold=1.0), sd.ClippedMomentum)

sd.clip_rule(fit, lr="0.1")  # type: ignore[arg-type]
sd.clip_rule(probe.trace)  # type: ignore[arg-type]
sd.Probe(model, optimizer, loss_fn, schedule=sd.every)  # type: ignore[arg-type]
sd.Probe(model, optimizer, loss_fn, estimators="local")  # type: ignore[arg-type]
sd.plot_fit(probe.trace, fit)  # type: ignore[arg-type]
sd.ClippedMomentum(model, lr=0.1, threshold=1.0)  # type: ignore[arg-type]
sd.GGNC(model.parameters(), lr=0.1, threshold=1.0, geometry=RMS)  # type: ignore[arg-type]
print(sd.no_such_name)  # type: ignore[attr-defined]
