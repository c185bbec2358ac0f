"""Causes: why a run spiked, from evidence in numbers, and how to say it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from smoothdiag.console import counted
from smoothdiag.spikes.events import SpikeEvent
from smoothdiag.spikes.evidence import Evidence, benefit_said, loud

Cause = Literal["data", "edge", "optimizer", "numerics", "unknown"]

MOST = 0.5
"""Share of a spike, on a log scale, from which on one thing is to blame: the batch, or rounding."""

ALMOST_ALL = 0.75
"""As `MOST`, where the weights may be unstable in any case."""

JUMPED = 1.5
"""A rate this many times the median of the five steps before has jumped."""

STALE = 4.0
"""A gradient this many times as long as the root of the second moment does not fit the optimizer's memory. Where it
fits, the ratio is about 1; a gradient that doubles from step to step stays below."""

LONG = 2.0
"""An update this many usual lengths long is long, as `SpikeRule` has it for norms."""

STALE_NOW = 2.0
"""As `STALE`, where gradients come back after a quiet phase: nothing else explains that they do not fit."""

STALE_SAID = (
    "The optimizer's second moment is stale: the gradient is {how:.3g} times as long as it remembers, so updates are "
    "too long by about that factor. This happens after a quiet phase; a smaller beta2 forgets it sooner."
)

NOT_BROUGHT = 0.25
"""Share of a spike, on a log scale, below which the step before has not brought it about."""

REPRODUCED = 0.2
"""Largest relative distance of a replayed loss or gradient norm from that of the run."""


@dataclass(frozen=True)
class Explanation:
    """Why a run spiked.

    Attributes:
        event: The spike.
        cause: ``"data"``: the batch is unlike others at the same weights. ``"edge"``: curvature times rate was above
            the optimizer's limit of stability. ``"optimizer"``: the rate jumped, or the update was long without a
            reason in the gradient. ``"numerics"``: a narrow dtype rounded or overflowed. ``"unknown"``.
        step: The step that caused it: that of the spike, or the one before.
        text: The reasons in words.
        evidence: The numbers.
        modules: Share of each module in the squared gradient norm of the spike, the largest first.
        exclude: Batches to leave out on resume, numbered from 0 in the order in which the probe saw them; only if the
            batch is to blame.

    Units: as in `SpikeEvent`; ratios have none.

    Examples:
        >>> event = sd.SpikeEvent(80, ("loss",), {"loss": 9.0}, {"loss": 2.0}, {"loss": 12.5})
        >>> print(sd.Explanation(event, "unknown", 80, "The guard has no probe."))
        step 80: unknown. The guard has no probe.
    """

    event: SpikeEvent
    cause: Cause
    step: int
    text: str
    evidence: Mapping[str, float | str] = field(default_factory=dict)
    modules: Mapping[str, float] = field(default_factory=dict)
    exclude: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"step {self.event.step}: {self.cause}. {self.said}"

    @property
    def said(self) -> str:
        """The reasons in words, and what clipping would have been worth, if that is known."""
        return self.text + benefit_said(self.evidence)


def explained(found: Evidence) -> Explanation:
    """Returns the cause that the evidence points to; the first of these that fits."""
    for judge in (
        _bad_inputs,
        _numerics,
        _not_repeated,
        _rate_now,
        _data,
        _rate,
        _stale,
        _sharp,
        _came_back,
        _long,
        _edge,
        _uphill,
    ):
        if (why := judge(found)) is not None:
            cause, is_before, text = why
            step = found.event.step - is_before
            numbers = (found.numbers_before if is_before else found.numbers) if cause == "data" else ()
            parts = dict(sorted(found.parts.items(), key=lambda part: -part[1]))
            return Explanation(found.event, cause, step, text + loud(found), found.to_dict(), parts, numbers)
    text = _unknown(found) + loud(found)
    return Explanation(found.event, "unknown", found.event.step, text, found.to_dict(), found.parts)


Why = tuple[Cause, bool, str] | None
"""A cause, whether the step before the spike is to blame, and the reasons."""


def _bad_inputs(found: Evidence) -> Why:
    if not found.bad_inputs:
        return None
    return "data", False, "The batch holds numbers that are not finite. Find out where they come from, or leave it out."


def _numerics(found: Evidence) -> Why:
    first = f" The first module with an output that is not finite is `{found.first_module}`." * bool(found.first_module)
    is_finite = math.isfinite(found.loss) and math.isfinite(found.grad_norm)
    if found.is_replayed and not is_finite and math.isfinite(found.precise_grad_norm):
        return (
            "numerics",
            False,
            (
                "Loss or gradient overflows in the narrow dtype of the run: in float32 the gradient norm of the same "
                f"batch at the same weights is {found.precise_grad_norm:.3g}.{first} Compute that module in float32 or "
                "bfloat16."
            ),
        )
    if found.first_module:
        return (
            "numerics",
            False,
            (
                f"An output is not finite, and float32 would not help.{first} Look for a division by zero, a logarithm "
                "of zero or a softmax over nothing there."
            ),
        )
    if found.share_of_rounding >= MOST:
        return (
            "numerics",
            False,
            (
                f"Rounding makes the spike: the gradient norm of the batch is {found.grad_norm:.3g} in the narrow "
                f"dtype of the run, and {found.precise_grad_norm:.3g} in float32 at the same weights. Compute the "
                "modules with the largest shares in float32."
            ),
        )
    return None


def _not_repeated(found: Evidence) -> Why:
    if not found.is_replayed:
        return None
    pairs = [(found.loss, "loss", "the loss"), (found.grad_norm, "grad_norm", "the gradient norm")]
    known = [(mine, found.event.values[name], said) for mine, name, said in pairs if name in found.event.values]
    if any(abs(mine - theirs) <= REPRODUCED * abs(theirs) for mine, theirs, _ in known) or not known:
        return None
    mine, theirs, said = known[0]
    return (
        "unknown",
        False,
        (
            f"The replay does not repeat the step: {said} was {theirs:.4g} in the run and is {mine:.4g} in the replay. "
            "So loss_fn, or the batch that the probe saw, is not what the loop trained at this step. A loss scale, a "
            "mask or augmentation outside loss_fn would explain it; move it into loss_fn."
        ),
    )


def _rate_now(found: Evidence) -> Why:
    if found.event.spiked != ("update_norm",) or not found.rate_now >= JUMPED:
        return None
    return (
        "optimizer",
        False,
        (
            f"The rate of this step is {found.rate_now:.3g} times that of the steps before, and the update is long "
            "with it."
        ),
    )


def _data(found: Evidence) -> Why:
    share = found.share_of_batch
    # Beyond the edge of stability a gradient also swings from batch to batch, because the weights do.
    is_stable = found.critical >= 1 or found.sharpness <= 1
    if not share >= (MOST if is_stable else ALMOST_ALL):
        return None
    return (
        "data",
        False,
        (
            f"The batch is unlike the others: at the same weights its loss is {found.loss:.3g} and its gradient norm "
            f"{found.grad_norm:.3g}; those of {counted(len(found.references), 'other batch', 'other batches')} are at "
            f"most {max(found.reference_losses):.3g} and {max(found.references):.3g}. It accounts for {share:.0%} of "
            "the spike. Look at this batch, and leave it out if it is broken."
        ),
    )


def _rate(found: Evidence) -> Why:
    if not found.rate >= JUMPED:
        return None
    return (
        "optimizer",
        True,
        (
            f"The rate of the step before was {found.rate:.3g} times that of the steps before it. "
            f"{_weights(found)}Look at the schedule."
        ),
    )


def _stale(found: Evidence) -> Why:
    if not found.staleness >= STALE:
        return None
    return "optimizer", True, STALE_SAID.format(how=found.staleness)


def _sharp(found: Evidence) -> Why:
    return _edge(found) if found.sharpness > 1 and not found.critical >= 1 else None


def _came_back(found: Evidence) -> Why:
    if not found.share_of_step < NOT_BROUGHT:
        return None
    said = (
        "The step before did no harm on its own batch, and earlier batches have such gradients at the same weights, too"
    )
    if found.staleness_now >= STALE_NOW:
        return "optimizer", False, f"{said}. {STALE_SAID.format(how=found.staleness_now)}"
    return (
        "unknown",
        False,
        (
            f"{said}: the batches of the last steps were easier than these. If that is not meant to be, look at the "
            "order of the data."
        ),
    )


def _long(found: Evidence) -> Why:
    before = found.update >= LONG and not found.update < 1.5 * found.gradient_before
    now = found.event.spiked == ("update_norm",)
    if not before and not now:
        return None
    length = found.update if before else found.update_now
    when = "of the step before" if before else "of this step"
    return (
        "optimizer",
        before,
        (
            f"The update {when} was {length:.3g} times as long as usual, and the gradient was not. The reason lies in "
            "what the optimizer keeps: its momentum or its second moment."
        ),
    )


def _edge(found: Evidence) -> Why:
    if not (found.critical < 1 or found.sharpness > 1):
        return None
    critical = (
        f"It would have stopped lowering the loss of its own batch at {found.critical:.2g} times its length. "
        if found.critical < 1
        else ""
    )
    sharp = (
        f"Before it, the largest curvature was {found.sharpness:.3g} times what this optimizer tolerates at its rate. "
        if not math.isnan(found.sharpness)
        else ""
    )
    return "edge", True, f"The step before was too long for the curvature. {critical}{sharp}Lower the rate, or clip."


def _uphill(found: Evidence) -> Why:
    if not found.slope > 0:
        return None
    return (
        "optimizer",
        True,
        (
            "The step before went uphill on its own batch: the momentum pointed in a wrong direction. A smaller "
            "momentum forgets sooner."
        ),
    )


def _weights(found: Evidence) -> str:
    if math.isnan(found.share_of_batch):
        return ""
    return f"The weights are to blame, not the batch, which accounts for {found.share_of_batch:.0%} of the spike. "


def _unknown(found: Evidence) -> str:
    if not found.is_replayed:
        return found.why_not
    weights = _weights(found) or "No batch to compare with was at hand. "
    if math.isnan(found.critical) and math.isnan(found.slope):
        return (
            f'{weights}With `keep="parameters"` the guard would have measured the step before from where it began, and '
            "told whether it was too long for the curvature."
        )
    return f"{weights}Rate, update and curvature of the step before are nothing out of the ordinary."
