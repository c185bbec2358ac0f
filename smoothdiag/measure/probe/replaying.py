"""Replaying: the loss on micro-batches that somebody else has kept of a run that the probe watches."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from smoothdiag import collectives
from smoothdiag.measure.loss.batches import MicroBatch, RandomState, devices_of
from smoothdiag.measure.loss.coordinates import by_module, parameter_groups
from smoothdiag.measure.loss.objective import Objective
from smoothdiag.measure.probe.watched import Watching
from smoothdiag.packing import Packing


class Replaying(Watching):
    """The part of a probe that evaluates its loss again for somebody else, without a trace in the run."""

    is_own_due: bool = False
    """Whether the probe's own schedule names the next step."""

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The coordinates x."""
        probe: Any = self
        return list(probe._parameters)

    @property
    def model(self) -> nn.Module:
        """The model."""
        probe: Any = self
        found: nn.Module = probe._model
        return found

    @property
    def needs_batches(self) -> bool:
        """Whether steps are measured on batches of the loop, and not on held-out ones alone."""
        probe: Any = self
        return bool(probe._data.needs_batches)

    @property
    def packing(self) -> Packing:
        """How x lies in pieces."""
        probe: Any = self
        found: Packing = probe._accumulation.packing
        return found

    def random_state(self) -> RandomState:
        """Returns the present states of all generators that a forward pass may draw from."""
        return RandomState.capture(devices_of(self.parameters))

    def modules(self, group_by: Callable[[str], str] | None = None) -> dict[str, list[int]]:
        """Returns the places of the parameters of each module in x, by name; or of groups by names of parameters."""
        return parameter_groups(self.model, self.parameters, group_by or by_module())

    @property
    def is_distributed(self) -> bool:
        """Whether gradients are averaged over ranks, so that all ranks must make the same calls."""
        probe: Any = self
        return bool(probe._distributed)

    def in_step(self) -> AbstractContextManager[None]:
        """Ends alike on all ranks; to be put around replays, and whatever else may fail."""
        probe: Any = self
        found: AbstractContextManager[None] = probe._ranks.in_step()
        return found

    def on_any_rank(self, is_so: bool) -> bool:
        """Returns whether something is so on any rank, each of which calls this."""
        probe: Any = self
        if not self.is_distributed:
            return is_so
        return bool(collectives.max_over_ranks(is_so, self.parameters[0], probe._ranks.group))

    def replay(self, micro_batches: Sequence[MicroBatch], *, widen_half: bool = False) -> Objective:
        """Returns the loss on micro-batches, as the probe would evaluate it.

        Args:
            micro_batches: The data.
            widen_half: Whether float16 and bfloat16 parameters are float32 meanwhile.
        """
        probe: Any = self
        return Objective(
            probe._model,
            probe._measuring.loss_fn,
            micro_batches,
            probe._parameters,
            state=probe._accumulation.state,
            reduction=probe._measuring.reduction,
            widen_half=widen_half,
            distributed=probe._distributed,
            replicas=probe._ranks.replicas,
            packing=probe._accumulation.packing,
        )
