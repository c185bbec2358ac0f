"""Table: the rows that were read from a log, as a trace whose rows are made when they are asked for."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from smoothdiag.rows import COLUMNS, Status, clean_row
from smoothdiag.trace import Trace

if TYPE_CHECKING:
    import pandas as pd

ESTIMATOR: Final = "log"
"""Entry in the column ``estimator`` of rows from a log."""

Numbers = npt.NDArray[Any]


class LogTrace(Trace):
    """The trace of a log. Millions of rows take a few bytes each until someone asks for them.

    Attributes:
        step: Steps.
        columns: Values of ``grad_norm``, ``loss`` and ``lr`` by name; NaN where there is none.
        is_bad: Which rows have a gradient norm or a loss that is inf or NaN.
    """

    def __init__(self, step: Numbers, columns: dict[str, Numbers], is_bad: Numbers) -> None:
        self.step, self.columns, self.is_bad = step, columns, is_bad
        self._made: list[dict[str, Any]] | None = None
        super().__init__()

    # Rows of a trace are dictionaries; ten million of them take ten gigabytes.
    @property
    def _rows(self) -> list[dict[str, Any]]:
        if self._made is None:
            self._made = [*self._each()]
        return self._made

    @_rows.setter
    def _rows(self, rows: list[dict[str, Any]]) -> None:
        self._made = rows or None

    @property
    def is_as_read(self) -> bool:
        """Whether the rows are those of the log, and nobody has asked for them or added one."""
        return self._made is None

    def __len__(self) -> int:
        return len(self.step) if self._made is None else len(self._made)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self._each() if self._made is None else super().__iter__()

    def to_frame(self) -> pd.DataFrame:
        """Returns the rows as a DataFrame, with the columns in the order of ``COLUMNS``."""
        if self._made is not None:
            return super().to_frame()
        import pandas as pd

        first = next(self._each(), None)
        fixed = {name: (first or {}).get(name) for name in COLUMNS}
        frame = pd.DataFrame(
            fixed | {"step": self.step.astype(np.int64), "status": self.status(), **self.columns}, columns=[*COLUMNS]
        )
        frame = frame.astype({name: kind for name, kind in COLUMNS.items() if kind is not str})
        frame.attrs.update(self.meta)
        return frame

    def status(self) -> npt.NDArray[np.object_]:
        """Returns the column ``status``."""
        return np.where(self.is_bad, _BAD, _GOOD).astype(object)

    def _each(self) -> Iterator[dict[str, Any]]:
        row = clean_row({"step": 0, "grad_norm": math.nan, "smoothness": math.nan, "estimator": ESTIMATOR})
        names = list(self.columns)
        for step, bad, *values in zip(self.step, self.is_bad, *self.columns.values(), strict=True):
            given = dict(zip(names, map(float, values), strict=True))
            yield {**row, **given, "step": int(step), "status": _BAD if bad else _GOOD}


_GOOD, _BAD = Status.NOT_MEASURED.name.lower(), Status.NON_FINITE.name.lower()
