"""SpikeGuard: spikes of a run as they happen, and why they happened."""

from smoothdiag.spikes.causes import Explanation
from smoothdiag.spikes.events import SpikeEvent
from smoothdiag.spikes.guard import SpikeGuard
from smoothdiag.spikes.rules import SPAM, SixSigma, ZClip
from smoothdiag.spiking import SpikeRule

__all__ = ["SPAM", "Explanation", "SixSigma", "SpikeEvent", "SpikeGuard", "SpikeRule", "ZClip"]
