"""Wording: the findings of a review in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from smoothdiag.console import counted
from smoothdiag.logs.findings import ADVISED, Findings
from smoothdiag.logs.outliers import RULE, Spike

FEW: Final = 100
"""Number of norms below which the 99th percentile lies between the two largest norms."""

NUM_SHOWN: Final = 10

NOT_KNOWN: Final = """\
NOT KNOWN without measuring: L0 and L1, whether smoothness grows with the gradient norm at all, and which learning rate
or threshold is safe. To know this, the gradient is needed at a second point of the same loss: attach a Probe to a run.
The shares count the run as it was. A run with such a threshold would have become another run at its first clip."""

_COLUMNS: Final = {"grad_norm": "gradient norm", "loss": "loss"}


def dead(review: Findings) -> list[str]:
    """Returns that a run is dead, and what that means."""
    if review.dead_since is None:
        return []
    name = _COLUMNS[review.dead_column]
    lines = [
        f"DEAD since step {review.dead_since}: no {name} is finite from there to the end "
        f"({counted(review.dead_rows, 'row')}).",
        "Once a weight is inf or NaN, no later step mends it: go back to a checkpoint before this step.",
    ]
    if review.num_norms or review.num_losses:
        lines.append("All numbers below describe the steps before.")
    return lines


def notes(review: Findings) -> list[str]:
    """Returns what the log does not say of its numbers."""
    return ["NOT SAID by the log:", *(f"  {note}" for note in review.notes)] if review.notes else []


def head(review: Findings) -> list[str]:
    """Returns how many values there are, in which steps, and what is wrong with them."""
    steps = f"in steps {review.first_step} to {review.last_step}"
    if review.first_step == review.last_step:
        steps = f"at step {review.first_step}"
    if not review.num_norms:
        lines = [f"NO GRADIENT NORMS, so no thresholds and no advice. {_losses(review)} {steps}."]
        return [*lines, *([f"Inf or NaN at {_listed(review.non_finite)}."] if review.non_finite else [])]
    every = f", usually {review.interval:g} steps apart" if review.interval > 1 else ""
    losses = f"; {_losses(review)}" if review.num_losses else "; no losses"
    lines = [f"{counted(review.num_norms, 'gradient norm')} {steps}{every}{losses}."]
    if review.num_zeros:
        lines.append(
            f"{counted(review.num_zeros, 'of the norms is', 'of the norms are')} 0, as if there was no gradient when "
            "they were logged."
        )
    if review.num_norms < FEW:
        lines.append("With so few norms, the upper percentiles depend on single steps.")
    if review.non_finite:
        lines.append(f"Inf or NaN at {_listed(review.non_finite)}.")
    if not math.isnan(review.pile_up):
        lines += [
            f"WARNING: {review.pile_share:.0%} of the norms are {review.pile_up:.4g} to within a thousandth, as if "
            "logged after clipping.",
            "The log does not show how large those gradients were, so from this threshold on the shares are ranges.",
            "Next time, log the norm that clip_grad_norm_ returns: it is the norm before clipping.",
        ]
    return lines


def table(review: Findings) -> list[str]:
    """Returns how often each threshold would have acted."""
    if not review.num_norms:
        return []
    lines = [f"{'threshold':>10}  {'would clip':>11}  {'later half':>10}"]
    for use in review.thresholds:
        hidden = use.clipped_at_most > use.clipped
        share = f"{use.clipped:.0%} to {use.clipped_at_most:.0%}" if hidden else f"{use.clipped:.1%}"
        late = "unknown" if hidden or math.isnan(use.clipped_late) else f"{use.clipped_late:.1%}"
        lines.append(f"{use.threshold:>10.4g}  {share:>11}  {late:>10}  {use.origin}")
    return [*lines, f"{review.percentiles[100]:>10.4g}  the largest norm"]


def advice(review: Findings) -> list[str]:
    """Returns the advice by percentile, or why there is none."""
    if not review.num_norms:
        return []
    if math.isnan(review.advice):
        percentile = f"the {ADVISED}th percentile"
        if review.num_norms < RULE.fewest:
            return [f"No advice by percentile: it needs at least {RULE.fewest} norms."]
        if review.percentiles[ADVISED] == 0:
            return [f"No advice by percentile: {percentile} of the norms is 0."]
        return [f"No advice by percentile: the run's own clipping hides {percentile}."]
    return [
        f"ADVICE BY PERCENTILE, not from a fit: {review.advice:.4g}, the {ADVISED}th percentile. "
        "This threshold stops outliers and guarantees nothing."
    ]


def spikes(review: Findings) -> list[str]:
    """Returns the spikes, and the rule that finds them."""
    lines = []
    columns = (("grad_norm", "gradient norm", review.num_norms), ("loss", "loss", review.num_losses))
    for column, name, count in columns:
        if not count:
            continue
        found = [spike for spike in review.spikes if spike.column == column]
        none = "none" if count > RULE.fewest else f"none, because no row has {RULE.fewest} rows before it"
        lines.append(f"SPIKES of the {name}: {len(found) or none}")
        lines += [f"  {_said(spike)}" for spike in found[:NUM_SHOWN]]
        if len(found) > NUM_SHOWN:
            lines.append(f"  and {len(found) - NUM_SHOWN} more, at {_listed([s.step for s in found[NUM_SHOWN:]])}")
    return [*lines, RULE.text]


def _said(spike: Spike) -> str:
    return f"step {spike.step}: {spike.value:.4g}; the median before it was {spike.usual:.4g}"


def _losses(review: Findings) -> str:
    return counted(review.num_losses, "loss", "losses")


def _listed(steps: Sequence[int]) -> str:
    shown = ", ".join(map(str, steps[:NUM_SHOWN]))
    more = f" and {len(steps) - NUM_SHOWN} more" if len(steps) > NUM_SHOWN else ""
    return f"{'step' if len(steps) == 1 else 'steps'} {shown}{more}"
