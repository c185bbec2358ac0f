"""Faults: the run survives an error of AutoClip, with a warning and a note, unless it comes in the first step."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist

from smoothdiag.memory import is_out_of_memory
from smoothdiag.rows import SmoothdiagWarning

UNCLIPPED, UNREAD, STOPPED = "not clipped", "not read", "stopped"

_CONSEQUENCES = {
    UNCLIPPED: "the optimizer took this step unclipped, or clipped in part, and AutoClip goes on with the next step",
    UNREAD: "AutoClip goes on with the longest step that it knew before, and reads the measurements at the next step",
    STOPPED: "AutoClip stops acting: it keeps measuring, and the optimizer takes its steps unclipped",
}
_NO_MEMORY = "Memory ran out, even after unused memory had been freed. Use smaller micro-batches if this happens often."
_REPLICAS = " Other ranks may have clipped it: compare the weights of the ranks, or go on from a checkpoint."


class Unfit(Exception):
    """AutoClip does not fit an optimizer, and never will.

    Args:
        error: The error that the user gets to see, if it may still end the run.
    """

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class Guard:
    """Keeps errors of AutoClip out of the run. In the first step they may end it: the set-up is wrong.

    Args:
        note: Adds an event and its details to the history.

    Attributes:
        is_first: Whether an error may still end the run.
        is_lost: Whether AutoClip has failed in the present step, and leaves out the rest of it.
        stopped: Why AutoClip has stopped acting; empty as long as it acts.
        spares: Whether errors of the first step are kept out of the run as well.
    """

    def __init__(self, note: Callable[[str, str], None]) -> None:
        self._note = note
        self._said: set[tuple[str, str]] = set()
        self._late: Exception | None = None
        self.is_first, self.is_lost, self.stopped, self.spares = True, False, "", False

    def begin(self) -> None:
        """Begins a step."""
        self.is_lost, self._late = False, None

    def end(self) -> None:
        """Ends a step, and raises an error that its closure was spared."""
        late, self._late = self._late, None
        if late is not None:
            raise late
        self.is_first = False

    def try_to(self, do: Callable[[], None]) -> None:
        """Does something that the next step will do if it fails now."""
        try:
            do()
        except SmoothdiagWarning:
            raise
        except Exception:
            return

    @contextmanager
    def during(self, event: str, *, by_closure: bool = False) -> Iterator[None]:
        """Runs a part of a step. An error in it becomes an ``event`` of the history.

        While the optimizer evaluates a closure, it may have moved the parameters for a moment. An error that ends the
        run waits for the end of the step, so that the optimizer can move them back.
        """
        try:
            yield
        except SmoothdiagWarning:  # whoever turns warnings into errors wants to see them
            raise
        except Unfit as unfit:
            self.is_lost = True
            if not self.is_first or self.spares:
                self.stopped = str(unfit)
                self._say(STOPPED, unfit, str(unfit))
            elif by_closure:
                self._late = unfit.error
            else:
                raise unfit.error from None
        except Exception as error:
            self.is_lost = self.is_lost or event == UNCLIPPED
            if self.is_first and not self.spares and not is_out_of_memory(error):
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
            "`history` lists every such step.",
            SmoothdiagWarning,
        )
