"""Faults: errors of a measurement that a probe does not treat like the others."""

from collections.abc import Callable


class NotPutBack(Exception):
    """A measurement could not put back what it had changed, so the run is not what it was and must not go on."""


class PeerFailed(RuntimeError):
    """Another rank failed in this measurement, so all ranks gave the measurement up."""


def put_back(action: Callable[[], object], what: str) -> None:
    """Calls ``action``, which puts something back.

    Raises:
        NotPutBack: If it fails.
    """
    try:
        action()
    except Exception as error:
        raise NotPutBack(
            f"A measurement could not put back {what}: {error!r}. The run is no longer what it was before this step, "
            "so it stops here. Resume from the last checkpoint, without this measurement."
        ) from error


class NothingToSay(Exception):
    """An estimator has nothing to say about a step, so it gets no row."""
