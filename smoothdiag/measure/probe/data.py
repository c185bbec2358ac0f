"""Data: decides on which micro-batches a step is measured, and keeps those that stay the same during a run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from smoothdiag.measure.estimators import Estimator
from smoothdiag.measure.loss.batches import MicroBatch
from smoothdiag.measure.probe.accumulation import Follows

Kind = Literal["fixed", "step"]

Due = tuple[tuple[Estimator, ...], tuple[Estimator, ...]]
"""What measures a step: the probe's own estimators, and those of ``Probe.also``."""

NOTHING: Due = (), ()

DATA_STEP = "data_step"
"""Column of rows on fixed batches: the step whose micro-batches were kept."""


@dataclass(frozen=True)
class Part:
    """Micro-batches, and what to measure on them.

    Attributes:
        data: Where the micro-batches come from: "step", "fixed" or "held-out".
        micro_batches: The data.
        estimators: What to measure on them; perhaps nothing, where a step is only compared.
        compares: Whether to compare ``loss_fn`` with the training gradient, for the rows on fixed batches.
        columns: Further columns of the rows.
    """

    data: str
    micro_batches: Sequence[MicroBatch]
    estimators: tuple[Estimator, ...]
    compares: bool = False
    columns: Mapping[str, float] = field(default_factory=dict)


class Data:
    """The micro-batches of a probe's measurements.

    Under data parallelism every rank keeps micro-batches of its own, and all ranks keep them at the same step.

    Args:
        kind: What the user asked for.
        held_out: Held-out micro-batches, which replace everything else; ``None`` if there are none.

    Attributes:
        kind: "step", "fixed" or "held-out".
        is_untested: Whether the next step with batches of its own is to be compared with the training gradient.
    """

    def __init__(self, kind: Kind, held_out: Sequence[MicroBatch] | None) -> None:
        self.kind = kind if held_out is None else "held-out"
        self.is_untested = True
        self._held_out, self._fixed, self._step = held_out, list[MicroBatch](), -1

    @property
    def needs_batches(self) -> bool:
        """Whether the loop has to show its batches."""
        return self._held_out is None

    @property
    def has_fixed(self) -> bool:
        """Whether a step can be measured although its own batches are not known."""
        return bool(self._fixed)

    @property
    def facts(self) -> dict[str, str]:
        """What the header of a trace says."""
        said = f"fixed: the batches of the step in column {DATA_STEP}; a resumed run keeps others"
        return {"data": said} if self.kind == "fixed" else {}

    def copies(self, estimators: Sequence[Estimator], *, is_test_due: bool) -> bool:
        """Returns whether a micro-batch that is shown now has to be copied.

        Args:
            estimators: The probe's own estimators that are due.
            is_test_due: Whether the step is to be compared with the training gradient.
        """
        begins = not self._fixed and any(not _is_of_step(e) for e in estimators)
        return self.kind == "fixed" and (begins or (self.has_fixed and (is_test_due or self.is_untested)))

    def follows(self, due: Due, *, is_test_due: bool) -> Follows:
        """Returns what to do with the gradients of the next step's backward passes."""
        own, further = due
        on_own = self.kind == "step" or bool(further) or any(map(_is_of_step, own))
        begins = self.kind == "fixed" and (self.is_untested or not self._fixed)
        if is_test_due or begins or any(map(checks_start, further)):  # AutoClip may clip the gradients of this step
            return "copy"
        return "mark" if on_own else "nothing"

    def parts(
        self,
        step: int,
        own: Sequence[MicroBatch] | None,
        estimators: Sequence[Estimator],
        further: Sequence[Estimator],
        *,
        is_test_due: bool,
    ) -> list[Part]:
        """Returns what to measure at a step; keeps its micro-batches if they are the first.

        Args:
            step: Number of the step.
            own: Its own micro-batches; ``None`` if they are not known.
            estimators: The probe's own estimators that are due.
            further: Estimators of ``Probe.also`` that are due.
            is_test_due: Whether ``loss_fn`` is to be compared with the training gradient again.
        """
        if self._held_out is not None:
            return [Part("held-out", self._held_out, (*estimators, *further))]
        if self.kind == "step":
            return [] if own is None else [Part("step", own, (*estimators, *further))]
        on_own = (*filter(_is_of_step, estimators), *further)
        on_fixed = tuple(e for e in estimators if not _is_of_step(e))
        begins = bool(own and on_fixed and not self._fixed)
        if begins and own:
            # Snapshots of buffers belong to their step.
            self._fixed, self._step = [replace(micro, state=None, others=()) for micro in own], step
        self.is_untested = self.is_untested or is_test_due
        parts, compares = [], bool(own) and self.has_fixed and self.is_untested
        if own and (on_own or compares):
            parts.append(Part("step", own, on_own, compares))
            self.is_untested = self.is_untested and not compares
        if on_fixed and self._fixed:
            fixed = own if begins and own else self._in_state_of(own)
            parts.append(Part("fixed", fixed, on_fixed, columns={DATA_STEP: self._step}))
        return parts

    def forget(self) -> None:
        """Lets go of the kept micro-batches."""
        self._fixed = []

    def _in_state_of(self, own: Sequence[MicroBatch] | None) -> list[MicroBatch]:
        """Returns the fixed micro-batches, to be evaluated from the buffers that the step's forward pass began with."""
        first, *others = self._fixed
        return [replace(first, state=own[0].state if own else None), *others]


def checks_start(estimator: Estimator) -> bool:
    """Returns whether an estimator checks the training gradient, and so may take it for that of the loss."""
    return bool(getattr(estimator, "checks_start", False))


def _is_of_step(estimator: Estimator) -> bool:
    return bool(getattr(estimator, "of_step", False))
