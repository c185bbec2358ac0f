"""The demo's scans: a landscape where the law is known, and a regression on text where it does not hold."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smoothdiag.clipping import clip_rule, step_rate
from smoothdiag.demo.language import Corpus
from smoothdiag.fits import SmoothnessFit, Verdict, fit_smoothness
from smoothdiag.measure.scan import scan
from smoothdiag.problems import exponential
from smoothdiag.trace import Trace

L0, L1 = 0.7, 2.0
"""Constants of the landscape."""

FAR = 3.0
"""Distance of its checkpoint from the minimum: the gradient norm is e^6 L0/L1 there."""

LENGTH, NUM_WINDOWS, STEPS = 64, 256, 100


def scanned_landscape(trace: Trace) -> SmoothnessFit:
    """Scans a landscape with ||H|| = L0 + L1 ||g|| at every point."""
    torch.manual_seed(0)
    start = torch.randn(20, dtype=torch.float64)
    model = exponential(L0, L1, dim=20).as_module(FAR * start / start.norm())
    scan(model, lambda model, batch: model(), [None], budget=300, trace=trace)
    return fit_smoothness(trace)


def scanned_regression(corpus: Corpus, trace: Trace, seed: int = 0) -> SmoothnessFit:
    """Trains a regression of the next character on the last 64 for a hundred steps, and scans it on 256 windows."""
    torch.manual_seed(seed)
    model = nn.Linear(corpus.vocabulary, corpus.vocabulary)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for step in range(STEPS):
        optimizer.zero_grad()
        regression_loss(model, windows(corpus, 64, seed=1000 * seed + step)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    scan(model, regression_loss, [windows(corpus, NUM_WINDOWS, seed=1000 * seed + STEPS)], trace=trace)
    return fit_smoothness(trace)


def regression_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Returns the mean cross-entropy of the next character [nats]."""
    features, following = batch
    return F.cross_entropy(model(features), following)


def windows(corpus: Corpus, num: int, seed: int) -> tuple[Tensor, Tensor]:
    """Returns roots of character frequencies in random windows, shape (num, vocabulary), and the next characters.

    The roots make all inputs vectors of length one.
    """
    train = corpus.codes[: len(corpus.codes) * 9 // 10].cpu()
    starts = torch.randint(len(train) - LENGTH, (num,), generator=torch.Generator().manual_seed(seed))
    found = torch.stack([train[i : i + LENGTH + 1] for i in starts])
    frequencies = F.one_hot(found[:, :LENGTH], corpus.vocabulary).sum(1).float() / LENGTH
    return frequencies.sqrt(), found[:, LENGTH]


def what_follows(fit: SmoothnessFit) -> str:
    """Returns what the verdict means for clipping and the learning rate, in a sentence or two."""
    if fit.verdict is Verdict.L0L1:
        rule = clip_rule(fit)
        return (
            f"SO: the law is found. At the learning rate {rule.lr:.3g} a threshold of {rule.threshold:.3g} keeps every "
            "step within it."
        )
    if fit.verdict is Verdict.POWER:
        rate = step_rate(fit)
        low, high = fit.grad_norm_quantiles[10], fit.grad_norm_quantiles[90]
        return (
            f"SO: a line is refuted and a power found. The rate that it allows falls from {rate(low):.3g} at the "
            f"gradient norm {low:.3g} to {rate(high):.3g} at {high:.3g}."
        )
    if fit.verdict is Verdict.CONSTANT:
        return (
            "SO: L1 is as good as zero, so large gradients need no shorter steps. Below the learning rate 1/L0 = "
            f"{fit.max_lr:.3g} there is nothing to clip."
        )
    return "SO: this scan decides nothing, and nothing follows from it but the next step above."
