"""The demo's scan of a Poisson regression, whose curvature follows the gradient norm, and what its verdict means."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smoothdiag.clipping import clip_rule, step_rate
from smoothdiag.demo.language import Corpus
from smoothdiag.fits import SmoothnessFit, Verdict, fit_smoothness
from smoothdiag.measure.scan import scan
from smoothdiag.trace import Trace

PROBLEM = (
    "A scan asks a small Poisson regression: how often does each character occur in the next 64, given the last 64?"
)
LENGTH = 64
NUM_WINDOWS = 256
STEPS = 100


def count_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Returns the mean Poisson loss, exp(z) - count z, over windows and characters."""
    features, counts = batch
    return F.poisson_nll_loss(model(features), counts)


def scanned(corpus: Corpus, trace: Trace) -> SmoothnessFit:
    """Trains the regression for a hundred steps, scans it on 256 windows and fits the scan; on the CPU, from seed 0."""
    torch.manual_seed(0)
    model = nn.Linear(corpus.vocabulary, corpus.vocabulary)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(STEPS):
        optimizer.zero_grad()
        count_loss(model, counts(corpus, 64, seed=step)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    scan(model, count_loss, [counts(corpus, NUM_WINDOWS, seed=STEPS)], trace=trace)
    return fit_smoothness(trace)


def counts(corpus: Corpus, num: int, seed: int) -> tuple[Tensor, Tensor]:
    """Returns roots of character frequencies in random windows, and the counts in the windows that follow.

    Both have the shape (num, vocabulary). The roots make all inputs vectors of length one.
    """
    train = corpus.codes[: len(corpus.codes) * 9 // 10]
    starts = torch.randint(len(train) - 2 * LENGTH, (num,), generator=torch.Generator().manual_seed(seed))
    windows = torch.stack([train[i : i + 2 * LENGTH] for i in starts])
    before, after = (F.one_hot(part, corpus.vocabulary).sum(1).float() for part in windows.split(LENGTH, dim=1))
    return (before / LENGTH).sqrt(), after


def what_follows(fit: SmoothnessFit) -> str:
    """Returns what the verdict means for a learning rate, a sentence or two."""
    if fit.verdict is Verdict.L0L1:
        rule = clip_rule(fit)
        return f"SO: a threshold of {rule.threshold:.3g} at the learning rate {rule.lr:.3g} keeps steps within the law."
    if fit.verdict is Verdict.POWER:
        rate = step_rate(fit)
        low, high = fit.grad_norm_quantiles[10], fit.grad_norm_quantiles[90]
        return (
            f"SO: a line is refuted and a power found. The rate that it allows falls from {rate(low):.3g} at the "
            f"gradient norm {low:.3g} to {rate(high):.3g} at {high:.3g}."
        )
    if fit.verdict is Verdict.CONSTANT:
        return f"SO: the law is refuted. A rate below 1/L0 = {fit.max_lr:.3g} needs no clipping here."
    return "SO: this scan decides nothing, and nothing follows from it but the next step above."
