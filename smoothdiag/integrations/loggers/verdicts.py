"""Verdicts: fits the law to a growing trace now and then, and says the verdict so far in numbers and words."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Final

from smoothdiag.rows import SmoothdiagWarning

if TYPE_CHECKING:
    from smoothdiag.fits import SmoothnessFit
    from smoothdiag.trace import Trace

FIRST: Final = 64
"""Measured steps before the first verdict during a run. A law needs the information of 80 independent rows
(`fit_smoothness`, ``quantile``), so little is lost before. Each later verdict takes twice as many steps as the one
before: a fit takes 0.2 to 0.8 s of one CPU core, and a run of 100 000 measured steps pays for eleven."""

LEAST: Final = 20
"""Measured steps below which the last verdict is left out too: checks for artefacts need as many rows."""


class Verdicts:
    """Fits a trace whenever its measured steps have doubled.

    Args:
        trace: The trace to fit.
    """

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._doublings = 0
        self._num_fitted = 0
        self._has_failed = False
        self._refusal = ""
        self.fit: SmoothnessFit | None = None

    def passed_over(self, num_measured: int) -> None:
        """Counts the steps of an earlier process: its verdicts are in the log already."""
        self._doublings = _doublings(num_measured)

    def update(self, num_measured: int, *, is_last: bool = False) -> bool:
        """Fits the trace if a verdict is due, and returns whether there is news.

        Args:
            num_measured: Number of steps with rows that a fit may use.
            is_last: Whether the run is over, so that all rows should be in the fit.
        """
        doublings = _doublings(num_measured)
        rest = is_last and num_measured >= LEAST and num_measured != self._num_fitted
        if self._has_failed or not (doublings > self._doublings or rest):
            return False
        self._doublings, self._num_fitted = doublings, num_measured
        from smoothdiag.fits import fit_smoothness

        try:
            self.fit = fit_smoothness(self._trace)
        except ValueError as error:  # such as rows of several estimators, none of which is preferred
            self.fit, self._refusal = None, str(error)
        except Exception as error:
            self.fit, self._has_failed = None, True
            message = f"The log gets no further verdicts, because the fit failed: {error!r}. Rows are still logged."
            warnings.warn(message, SmoothdiagWarning)
        return not self._has_failed

    def scalars(self) -> dict[str, float]:
        """Returns 1 for the present verdict and 0 for the others, and the constants if the verdict allows their use.

        Units: L0 [f/x^2], L1 [1/x].
        """
        from smoothdiag.fits import Verdict

        if self.fit is None:
            return {}
        found = {f"fit/verdict/{verdict.name}": float(verdict is self.fit.verdict) for verdict in Verdict}
        if self.fit.verdict in (Verdict.L0L1, Verdict.CONSTANT):
            found |= {"fit/L0": self.fit.L0, "fit/L1": self.fit.L1}
        return found

    def text(self) -> str:
        """Returns the verdict, what it means, and the reason; if the rows cannot be fitted, why not."""
        if self.fit is None:
            return f"No verdict. {self._refusal}"
        verdict, rows = self.fit.verdict, self.fit.num_points
        return f"{verdict.name} after {rows} rows. {verdict.value} Reason: {self.fit.verdict_reason}"


def _doublings(num_measured: int) -> int:
    """0 below `FIRST` steps, 1 from there on, 2 from twice as many on, and so on."""
    return (num_measured // FIRST).bit_length()
