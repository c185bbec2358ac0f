"""Files of figures: the same figure gives the same bytes, so that a repository shows only changes that are some."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WITHOUT_DATE: Final = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}


def save(figure: Figure, path: Path) -> None:
    """Writes a figure without a date and with the same names of its parts every time.

    Args:
        figure: The figure.
        path: File to write; its suffix says the format. Folders above it are made.

    Raises:
        ValueError: If matplotlib cannot write this format.
    """
    from matplotlib import rc_context

    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context({"svg.hashsalt": "smoothdiag"}):
        figure.savefig(path, dpi=150, metadata=_WITHOUT_DATE.get(path.suffix.lower()))
