"""Evidence: what was measured about a spike, in numbers. It knows no model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from smoothdiag.console import counted
from smoothdiag.spikes.events import OF_MODULE, SpikeEvent
from smoothdiag.spikes.signals import ELEMENTS
from smoothdiag.spiking import SpikeRule

NAN = math.nan

JUDGES = {
    "clip_benefit": "this batch",
    "clip_benefit_before": "the one before",
    "clip_benefit_held_out": "held-out batches",
}
"""The data on which clipping is judged, in words."""


@dataclass(frozen=True)
class Evidence:
    """What replays and records show about a spike. NaN where something is not known.

    The step before the spike is the one that led to the weights at which the spike was seen.

    Attributes:
        event: The spike.
        is_replayed: Whether the batch of the spike was evaluated again at the weights before the step.
        why_not: Why not.
        loss: Loss on that batch at these weights [f].
        grad_norm: Gradient norm on it [f/x].
        references: Gradient norms of the other batches at the same weights [f/x].
        reference_losses: Their losses [f].
        bad_inputs: Whether a tensor of the batch is not finite.
        first_module: The first module whose output is not finite, if there is one.
        precise_loss: As ``loss``, with float32 in place of float16 and bfloat16; NaN if none was in use.
        precise_grad_norm: As ``grad_norm``, likewise.
        rate: Rate of the step before the spike, in usual rates.
        rate_now: Rate of the step of the spike, in usual rates.
        update: Length of the update before the spike, in usual lengths.
        update_now: Length of the update at the spike, in usual lengths.
        gradient_before: Gradient norm of the step before the spike, in usual norms.
        own: Gradient norm of the batch of the step before, at the weights that it led to [f/x].
        own_loss: Its loss there [f].
        staleness: Length of the gradient of the step before over that of the root of the second moment, ||g|| / ||P||:
            about 1 where the optimizer's memory fits the gradients.
        staleness_now: As ``staleness``, for the gradient of the spike.
        critical: The multiple of the step before the spike at which it would have stopped lowering its own batch's
            loss.
        slope: Slope of that loss along that step [f]; positive if the step went uphill.
        sharpness: Largest eigenvalue at the weights before that step, over the optimizer's limit of stability.
        clip_benefit: How much lower the loss of the batch would be, had the update been as much shorter as the gradient
            is longer than usual [f].
        clip_benefit_before: The same on the batch of the step before, which the step did not see.
        clip_benefit_held_out: The same on held-out batches, if the guard has some.
        module: The signal of the module whose norm lies furthest above what is usual, if one spiked.
        module_norm: Its norm on the batch of the spike, at the weights before the step [f/x].
        module_references: Its norms on the other batches at the same weights [f/x].
        parts: Share of each module in the squared gradient norm of the spike.
        numbers: The batches of the spike, numbered in the order in which the probe saw them.
        numbers_before: The batches of the step before.
    """

    event: SpikeEvent
    is_replayed: bool = False
    why_not: str = ""
    loss: float = NAN
    grad_norm: float = NAN
    references: tuple[float, ...] = ()
    reference_losses: tuple[float, ...] = ()
    bad_inputs: bool = False
    first_module: str = ""
    precise_loss: float = NAN
    precise_grad_norm: float = NAN
    rate: float = NAN
    rate_now: float = NAN
    update: float = NAN
    update_now: float = NAN
    gradient_before: float = NAN
    own: float = NAN
    own_loss: float = NAN
    staleness: float = NAN
    staleness_now: float = NAN
    critical: float = NAN
    slope: float = NAN
    sharpness: float = NAN
    clip_benefit: float = NAN
    clip_benefit_before: float = NAN
    clip_benefit_held_out: float = NAN
    module: str = ""
    module_norm: float = NAN
    module_references: tuple[float, ...] = ()
    parts: Mapping[str, float] = field(default_factory=dict)
    numbers: tuple[int, ...] = ()
    numbers_before: tuple[int, ...] = ()

    @property
    def share_of_batch(self) -> float:
        """The part of the spike that is due to the batch: 1 if no other batch spikes at the same weights, 0 if all do.

        It is log(value / largest value of other batches) / log(value / usual value), the largest over the signals that
        spiked. The rest is due to the weights.
        """
        found = [
            _share(self.grad_norm, self.references, self.event, "grad_norm"),
            _share(self.loss, self.reference_losses, self.event, "loss"),
            _share(self.module_norm, self.module_references, self.event, self.module),
        ]
        return max((share for share in found if not math.isnan(share)), default=NAN)

    @property
    def share_of_step(self) -> float:
        """The part of the spike that the step before has brought about on its own batch, counted likewise."""
        found = [
            _rise(self.own, self.grad_norm, self.event, "grad_norm"),
            _rise(self.own_loss, self.loss, self.event, "loss"),
        ]
        return max((share for share in found if not math.isnan(share)), default=NAN)

    @property
    def share_of_rounding(self) -> float:
        """The part of the spike that is gone in float32, counted likewise."""
        found = [
            _share(self.grad_norm, (self.precise_grad_norm,), self.event, "grad_norm"),
            _share(self.loss, (self.precise_loss,), self.event, "loss"),
        ]
        return max((share for share in found if not math.isnan(share)), default=NAN)

    def to_dict(self) -> dict[str, float | str]:
        """Returns the numbers that are known, by name."""
        left_out = ("references", "reference_losses", "own", "own_loss")
        names = [f.name for f in fields(self) if f.type == "float" and f.name not in left_out]
        names += ["share_of_batch", "share_of_step", "share_of_rounding"]
        found: dict[str, float | str] = {name: float(getattr(self, name)) for name in names}
        found = {name: value for name, value in found.items() if not math.isnan(float(value))}
        found |= {f"reference_{i}": value for i, value in enumerate(self.references)}
        return found | ({"first_module": self.first_module} if self.first_module else {})


def _share(value: float, others: tuple[float, ...], event: SpikeEvent, name: str) -> float:
    size = _size(event, name)
    if math.isnan(size) or not others or any(map(math.isnan, others)) or not 0 < value < math.inf:
        return NAN
    # A reference on which the loss is not finite spikes, too: none of it is due to the batch.
    other = max(others) if all(map(math.isfinite, others)) else math.inf
    share = math.log(value / other) / size if 0 < other < math.inf else 0.0
    return min(1.0, max(0.0, share))


def _rise(value: float, here: float, event: SpikeEvent, name: str) -> float:
    before, size = event.before.get(name, NAN), _size(event, name)
    if math.isnan(size) or not before > 0 or not 0 < here < math.inf or math.isnan(value):
        return NAN
    # The loop may count the loss in another unit than loss_fn, such as a sum in place of a mean.
    value *= event.values[name] / here
    return math.log(value / before) / size if 0 < value < math.inf else 1.0


def _size(event: SpikeEvent, name: str) -> float:
    """Returns how far a signal is above what is usual, on a log scale; NaN if it is no spike upwards.

    Where single elements alone spiked, a signal counts that is at least as large as a norm that spikes.
    """
    value, usual = event.values.get(name, NAN), event.usual.get(name, NAN)
    counts = name in event.spiked or (event.spiked == (ELEMENTS,) and value >= SpikeRule.least_ratio * usual)
    return math.log(value / usual) if counts and 0 < usual < value < math.inf else NAN


def ratio(values: Mapping[str, float], usual: Mapping[str, float], name: str) -> float:
    """Returns a signal in units of what is usual; NaN if it is not known."""
    value, base = values.get(name, NAN), usual.get(name, NAN)
    return value / base if base > 0 else NAN


def benefit_said(found: Mapping[str, float | str]) -> str:
    """Returns what clipping would have been worth, as a sentence after a space; empty if that is not known."""
    gains = [(float(found[name]), data) for name, data in JUDGES.items() if name in found]
    if not gains:
        return ""
    *first, last = [f"{abs(gain):.3g} {'lower' if gain > 0 else 'higher'} on {data}" for gain, data in gains]
    said = f"{', '.join(first)} and {last}" if first else last
    return f" Clipped to the usual norm, the step would have left the loss {said}."


def loud(found: Evidence) -> str:
    """Returns which modules spiked, as a sentence; empty if none is watched, or none did."""
    signals = found.event.loudest()
    if not signals:
        return ""
    number = sum(name.startswith(OF_MODULE) for name in found.event.spiked) - len(signals)
    more = f" and {counted(number, 'further module')}" if number else ""
    names = ", ".join(f"`{name.removeprefix(OF_MODULE)}`" for name in signals)
    here = (
        f" On this batch the gradient norm of the first is {found.module_norm:.3g}, on the others at most "
        f"{max(found.module_references):.3g}."
        if found.module_references and math.isfinite(found.module_norm)
        else ""
    )
    return f" The gradients of these modules spiked: {names}{more}.{here}"
