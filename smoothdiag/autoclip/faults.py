"""Faults: an error in a step is said, noted and survived; one in the first step is a mistake in the set-up."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist

from smoothdiag.memory import is_out_of_memory
from smoothdiag.rows import SmoothdiagWarning

UNCLIPPED, UNREAD, STOPPED = "not clipped", "not read", "stopped"

_CONSEQUENCES = {
    UNCLIPPED: "the optimizer took this step unclipped, or clipped in part, and AutoClip goes on with the next one",
    UNREAD: "AutoClip clips by the longest step it knew before, and tries again at the next step",
    STOPPED: "AutoClip stops acting: it keeps measuring and leaves the steps to the optimizer",
}
_NO_MEMORY = (
    "Memory ran out, also after what was unused had been freed. Use smaller micro-batches if this happens often."
)
_REPLICAS = " Other ranks may have clipped it: compare the weights of the ranks, or go on from a checkpoint."


class Unfit(Exception):
    """Says that AutoClip does not fit an optimizer, and that this will not change.

    Args:
        error: What the user gets to see where that may end the run.
    """

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class Guard:
    """Keeps the faults of AutoClip out of the run, except in the first step that it takes.

    Args:
        note: Takes an event and its details.

    Attributes:
        is_first: Whether an error may still end the run.
        is_lost: Whether the step at hand has failed, so that the rest of it is left out.
        stopped: Why AutoClip has stopped acting; empty as long as it acts.
    """

    def __init__(self, note: Callable[[str, str], None]) -> None:
        self._note = note
        self._said: set[tuple[str, str]] = set()
        self._late: Exception | None = None
        self.is_first, self.is_lost, self.stopped = True, False, ""

    def begin(self) -> None:
        """Begins a step."""
        self.is_lost, self._late = False, None

    def end(self) -> None:
        """Ends a step; raises what its closure was spared."""
        late, self._late = self._late, None
        if late is not None:
            raise late
        self.is_first = False

    def try_to(self, do: Callable[[], None]) -> None:
        """Does what the next step will try again."""
        try:
            do()
        except SmoothdiagWarning:
            raise
        except Exception:
            return

    @contextmanager
    def during(self, event: str, *, by_closure: bool = False) -> Iterator[None]:
        """Runs a part of a step: an error in it is noted as ``event``.

        Where the optimizer evaluates a closure, it may have moved the parameters for a while. An error that says so
        waits for the end of the step.
        """
        try:
            yield
        except SmoothdiagWarning:  # whoever makes errors of warnings wants to see them
            raise
        except Unfit as unfit:
            self.is_lost = True
            if not self.is_first:
                self.stopped = str(unfit)
                self._say(STOPPED, unfit, str(unfit))
            elif by_closure:
                self._late = unfit.error
            else:
                raise unfit.error from None
        except Exception as error:
            self.is_lost = self.is_lost or event == UNCLIPPED
            if self.is_first and not is_out_of_memory(error):
                raise
            self._say(event, error, _NO_MEMORY if is_out_of_memory(error) else f"{type(error).__name__}: {error}")

    def _say(self, event: str, error: Exception, cause: str) -> None:
        self._note(event, cause)
        kind = (event, type(error).__name__)
        if kind in self._said:
            return
        self._said.add(kind)
        replicas = _REPLICAS if event == UNCLIPPED and dist.is_available() and dist.is_initialized() else ""
        warnings.warn(
            f"AutoClip met an error, and the run goes on: {_CONSEQUENCES[event]}. {cause}{replicas} "
            "`history` lists such steps.",
            SmoothdiagWarning,
        )
