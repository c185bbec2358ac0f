"""Draws the figures of docs/gallery.md from small runs of its own, into docs/figures/gallery/.

    python docs/gallery.py

Everything is seeded. The runs take less than a minute of one core and need nothing beside smoothdiag.
"""

from collections.abc import Iterator
from pathlib import Path

import matplotlib
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import smoothdiag as sd
from smoothdiag.plots.saving import save

matplotlib.use("Agg")
FOLDER = Path(__file__).parent / "figures" / "gallery"
Batch = tuple[Tensor, Tensor]


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    """Returns the mean cross-entropy of a batch."""
    return F.cross_entropy(model(batch[0]), batch[1])


def squared_error(model: nn.Module, batch: Batch) -> Tensor:
    """Returns half the mean squared error of a batch, whose sharpness rises in training."""
    wanted = F.one_hot(batch[1], 5).float()
    return 0.5 * (model(batch[0]) - wanted).square().sum(1).mean()


def perceptron() -> nn.Sequential:
    """Returns a network with one hidden layer and seeded weights."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 5))


def batches(steps: int, size: int = 64, seed: int = 0) -> Iterator[Batch]:
    """Yields batches of five clusters of points that overlap."""
    generator = torch.Generator().manual_seed(seed)
    centres = 0.6 * torch.randn(5, 20, generator=generator)
    for _ in range(steps):
        labels = torch.randint(5, (size,), generator=generator)
        yield centres[labels] + torch.randn(size, 20, generator=generator), labels


def scan_of_a_landscape() -> sd.Trace:
    """Scans a sum of hyperbolic cosines, which obeys the law: ||H|| <= 1 + 1 ||g|| at every point."""
    torch.manual_seed(0)
    problem = sd.problems.sum_cosh(20)
    model = problem.as_module(torch.randn(20, dtype=torch.float64))
    return sd.scan(model, lambda model, batch: model(), [None], budget=500, max_loss=1e4, progress=False)


def training_run(steps: int = 400) -> sd.Trace:
    """Trains a perceptron at a constant rate, measured at log-spaced steps."""
    model = perceptron()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    options = {"schedule": sd.log_spaced(40), "group_by": lambda name: f"layer {name[0]}"}
    with sd.Probe(model, optimizer, loss_fn, **options) as probe:
        for batch in probe.watch(batches(steps)):
            optimizer.zero_grad()
            loss_fn(model, batch).backward()
            optimizer.step()
    return probe.trace


def full_batch_run(steps: int = 400) -> sd.Trace:
    """Trains a perceptron by gradient descent on one batch, measured every fourth step."""
    model = perceptron()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.35)
    batch = next(batches(1, size=128))
    with sd.Probe(model, optimizer, squared_error, estimators=[sd.Sharpness()], schedule=sd.every(4)) as probe:
        for one in probe.watch([batch] * steps):
            optimizer.zero_grad()
            squared_error(model, one).backward()
            optimizer.step()
    return probe.trace


def run_at_a_large_rate(clipping: str, steps: int = 300) -> tuple[sd.Trace, sd.AutoClip | None]:
    """Trains a perceptron at a rate that is too large, with no clipping, with max_norm = 1, or with AutoClip."""
    model = perceptron()
    optimizer = torch.optim.SGD(model.parameters(), lr=3.0, momentum=0.9)
    probe = sd.Probe(model, optimizer, loss_fn, estimators=[sd.LocalSmoothness()], schedule=sd.every(5))
    clipper = sd.AutoClip(optimizer, probe) if clipping == "AutoClip" else None
    for batch in probe.watch(batches(steps)):
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        if clipping == "max_norm = 1":
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    probe.close()
    return probe.trace, clipper


def run_in_shadow(steps: int = 600) -> sd.AutoClip:
    """Trains a perceptron at a rate that is too large beside an AutoClip that only watches, and judges clipping."""
    model = perceptron()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    *data, first, second = batches(steps + 2)
    probe = sd.Probe(model, optimizer, loss_fn, schedule=sd.every(10))
    shadow = sd.AutoClip(optimizer, probe, mode="shadow", held_out=[first, second])
    for batch in probe.watch(data):
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        optimizer.step()
    return shadow


def run_with_spikes(steps: int = 400) -> tuple[sd.SpikeGuard, pd.DataFrame]:
    """Trains a perceptron on a batch with wrong labels (step 120), and once at a rate far too large (step 260)."""
    model = perceptron()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    probe = sd.Probe(model, optimizer, loss_fn, estimators=[sd.LocalSmoothness()])
    guard = sd.SpikeGuard(optimizer, probe, keep="parameters")
    data = list(batches(steps))
    data[120] = data[120][0], (data[120][1] + 1) % 5
    losses = []
    for k, batch in enumerate(probe.watch(data)):
        optimizer.param_groups[0]["lr"] = 1.0 if k == 260 else 3e-3
        loss = loss_fn(model, batch)
        optimizer.zero_grad()
        loss.backward()
        guard.observe(loss)
        optimizer.step()
        losses.append(loss.item())
    return guard, pd.DataFrame({"step": range(steps), "loss": losses})


def figures() -> Iterator[tuple[str, object]]:
    """Yields the name of each figure and the axes that a call has drawn."""
    scan = scan_of_a_landscape()
    identified = sd.fit_smoothness(scan)
    yield "identified", sd.plot_smoothness(scan, fit=identified)
    yield "evidence", sd.plot_fit(identified, scan)

    trace = training_run()
    fit = sd.fit_smoothness(trace)
    yield "not-identified", sd.plot_smoothness(trace, fit=fit)
    yield "evidence-against", sd.plot_fit(fit, trace)
    yield "trace", sd.plot_trace(trace)

    fits = sd.fit_groups(trace)
    yield "groups", sd.plot_groups(trace, fits=fits)
    yield "constants", sd.plot_constants({"landscape": identified, "training run": fit})

    descent = full_batch_run()
    yield "sharpness", sd.plot_sharpness(descent)

    runs = {name: run_at_a_large_rate(name) for name in ("no clipping", "max_norm = 1", "AutoClip")}
    traces = {name: run for name, (run, _) in runs.items()}
    yield "runs", sd.plot_trace(traces)
    clipper = runs["AutoClip"][1]
    yield "clipping", sd.plot_clipping(clipper)

    shadow = run_in_shadow()
    yield "benefit", sd.plot_benefit(shadow)

    guard, log = run_with_spikes()
    yield "spikes", sd.plot_spikes(guard, log=log)


def main() -> None:
    """Writes every figure."""
    from matplotlib import pyplot as plt

    torch.set_num_threads(1)
    for name, _ in figures():
        save(plt.gcf(), FOLDER / f"{name}.svg")
        plt.close("all")


if __name__ == "__main__":
    main()
