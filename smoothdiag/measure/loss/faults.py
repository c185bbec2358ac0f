"""Faults: errors of measuring that a probe treats in a way of their own."""

from collections.abc import Callable


class NotPutBack(Exception):
    """What a measurement had touched could not be put back, so the run is not what it was: it must not go on unseen."""


class PeerFailed(RuntimeError):
    """Another rank failed in this measurement, so that it was given up on all of them."""


def put_back(action: Callable[[], object], what: str) -> None:
    """Calls ``action``, which puts something back.

    Raises:
        NotPutBack: If it fails.
    """
    try:
        action()
    except Exception as error:
        raise NotPutBack(
            f"A measurement could not put back {what}: {error!r}. The run is not what it was before this step; start "
            "it again from the last checkpoint, without this measurement."
        ) from error
