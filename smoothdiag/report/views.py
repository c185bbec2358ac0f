"""views: the texts, cells and figures of one run, as the templates of the page take them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from smoothdiag.console import counted
from smoothdiag.report.answer import percent, short
from smoothdiag.report.figures import Figure, figures_of, thinned
from smoothdiag.report.run import Run
from smoothdiag.rows import CLIP_SUFFIX

if TYPE_CHECKING:
    from smoothdiag.fits import SmoothnessFit

MOST_PROBLEMS: Final = 50
"""Problems of a file that the page lists; of more it says how many there are."""

_MOST_LINES: Final = 12
"""Lines of the history of an AutoClip that the page shows."""

_NONE: Final = "–"


@dataclass(frozen=True)
class View:
    """One run on the page.

    Attributes:
        run: the run.
        id: name of its section.
    """

    run: Run
    id: str

    @cached_property
    def figures(self) -> list[Figure]:
        """The figures, drawn once."""
        return figures_of(self.run, f"{self.id}-")

    @cached_property
    def thinned(self) -> list[str]:
        """What was done to keep the page small, in sentences."""
        return thinned(self.run, self.figures)

    @property
    def has_threshold(self) -> bool:
        """Whether a threshold follows from the fit."""
        return not math.isnan(self.run.answer.threshold)

    @property
    def threshold(self) -> str:
        """The threshold with its interval."""
        if not self.has_threshold or self.run.rule is None:
            return _NONE
        ends = span(self.run.rule.threshold_interval)
        return short(self.run.answer.threshold) + ("" if ends == _NONE else f" ({ends})")

    @property
    def verdict(self) -> str:
        """Name of the verdict."""
        return "no fit" if self.run.fit is None else self.run.fit.verdict.name

    @property
    def level(self) -> str:
        """Level of the intervals."""
        return "" if self.run.fit is None else f"{self.run.fit.interval_level:.0%}"

    def __getattr__(self, name: str) -> str:
        """The cells of the fit: L0, L0_range, L1, L1_range, decades and rows."""
        cells = _NO_CELLS if self.run.fit is None else cells_of(self.run.fit)
        if name in cells:
            return cells[name]
        raise AttributeError(name)

    @property
    def modules(self) -> list[dict[str, str]]:
        """One line for each group of parameters."""
        groups = self.run.groups
        if groups is None:
            return []
        lines = [{"name": name, "verdict": fit.verdict.name, **cells_of(fit)} for name, fit in groups.items()]
        return lines + [{"name": name, "fault": fault} for name, fault in groups.failed.items()]

    @property
    def constant_rate(self) -> str:
        """The learning rate, if it is known and stays the same; else nothing."""
        rates = self.run.frame["lr"].dropna().unique()
        return short(float(rates[0])) if len(rates) == 1 else ""

    @property
    def clips(self) -> int:
        """Number of rows that an AutoClip asked for."""
        return int(self.run.frame["estimator"].str.endswith(CLIP_SUFFIX).sum())

    @property
    def clipping_said(self) -> str:
        """What the AutoClip did, in words."""
        clipped = self.run.clipped
        if clipped is None:
            return ""
        shortened = "would have shortened" if not clipped.acts else "shortened"
        share = (
            "" if math.isnan(clipped.fraction) else f" It {shortened} {percent(clipped.fraction)} of the steps so far."
        )
        shadow = "" if clipped.acts else " It was in shadow mode and changed nothing."
        return f"At its last measurement AutoClip held steps within {short(clipped.longest_step)} [x].{share}{shadow}"

    @property
    def history(self) -> list[dict[str, str]]:
        """The measurements at which the longest step changed, and the last one."""
        lines = self._changes
        return lines if len(lines) <= _MOST_LINES else [*lines[: _MOST_LINES // 2], *lines[-_MOST_LINES // 2 :]]

    @property
    def history_caption(self) -> str:
        """What the lines of the history are."""
        number = len(self._changes)
        said = "The measured steps at which the longest step had changed, and the last one"
        said += "." if number <= _MOST_LINES else f": the first and the last six of {number}."
        if all(line["threshold"] == _NONE for line in self._changes):
            said += " AutoClip goes by the length of updates here, so there is no threshold on gradients to list."
        return said

    @cached_property
    def _changes(self) -> list[dict[str, str]]:
        history = self.run.history
        if history is None:
            return []
        longest = history["longest_step"].to_numpy(dtype=np.float64)
        is_shown = np.append(True, longest[1:] != longest[:-1])
        is_shown[-1] = True
        return [
            {
                "step": str(int(row["step"])),
                "longest_step": cell(row["longest_step"]),
                "threshold": cell(row["threshold"]),
                "share": _NONE if math.isnan(row["clip_fraction"]) else percent(row["clip_fraction"]),
            }
            for row in history[is_shown].to_dict("records")
        ]

    @property
    def spikes_said(self) -> str:
        """How many spikes there were, and from which causes."""
        spikes = self.run.spikes
        if spikes is None:
            return ""
        causes = spikes.drop_duplicates("step")["cause"]
        each = ", ".join(f"{number} {name or 'unknown'}" for name, number in causes.value_counts().items())
        return f"{counted(len(causes), 'step')} spiked. By cause: {each}."

    @property
    def spikes(self) -> list[dict[str, Any]]:
        """One line for each step that spiked: the first and the last, if there are many."""
        lines = self._spikes
        return lines if len(lines) <= _MOST_LINES else [*lines[: _MOST_LINES // 2], *lines[-_MOST_LINES // 2 :]]

    @property
    def spikes_caption(self) -> str:
        """What the lines are."""
        number = len(self._spikes)
        return "Every step that spiked." if number <= _MOST_LINES else f"The first and the last six of {number} steps."

    @cached_property
    def _spikes(self) -> list[dict[str, Any]]:
        if self.run.spikes is None:
            return []
        found: dict[int, list[dict[str, Any]]] = {}
        for row in self.run.spikes.to_dict("records"):
            found.setdefault(int(row["step"]), []).append({str(name): value for name, value in row.items()})
        return [
            {
                "step": str(step),
                "signals": [
                    {"name": row["signal"], **{name: cell(row[name]) for name in ("value", "usual", "deviations")}}
                    for row in rows
                ],
                **{name: str(rows[0][name]) for name in ("done", "cause", "explanation")},
            }
            for step, rows in sorted(found.items())
        ]

    @property
    def flags_said(self) -> str:
        """How many doubts the fit has."""
        flags = () if self.run.fit is None else self.run.fit.flags
        return counted(len(flags), "doubt") if flags else "no doubts"

    @property
    def rows_said(self) -> str:
        """How many rows there are, and how many of them fits may use."""
        total = len(self.run.frame)
        used = sum(kind.number for kind in self.run.kinds if kind.is_used)
        return f"{counted(total, 'row')} by status; fits may use {used} of them, those of one estimator at a time."

    @property
    def fit_said(self) -> str:
        """Which rows the fit uses."""
        fit = self.run.fit
        if fit is None:
            return ""
        where = "all parameters" if fit.group == "all" else f"group {fit.group}"
        worth = "" if math.isnan(fit.num_effective) else f", as informative as {fit.num_effective:.0f} independent ones"
        data = _DATA.get(fit.data, fit.data)
        return f"{counted(fit.num_points, 'row')} of estimator {fit.estimator}, {where}, on {data}{worth}."

    @property
    def problems(self) -> list[str]:
        """What is wrong with the file."""
        problems = self.run.trace.problems
        rest = len(problems) - MOST_PROBLEMS
        return problems[:MOST_PROBLEMS] + ([f"and {rest} more"] if rest > 0 else [])

    @property
    def problems_said(self) -> str:
        """How many lines were left out, in words."""
        return (
            f"The file is damaged: {counted(len(self.run.trace.problems), 'problem')}. The page tells about the rest."
        )


_DATA: Final = {
    "step": "the batch of each step",
    "fixed": "the same batches throughout",
    "held-out": "held-out batches",
    "unspecified": "batches that the trace does not name",
}

_NO_CELLS: Final[Mapping[str, str]] = dict.fromkeys(("L0", "L0_range", "L1", "L1_range", "decades", "rows"), _NONE)


def cells_of(fit: SmoothnessFit) -> dict[str, str]:
    """Returns the constants of a fit, their intervals, and what they rest on, as cells of a table."""
    return {
        "L0": cell(fit.L0),
        "L0_range": span(fit.L0_interval),
        "L1": cell(fit.L1),
        "L1_range": span(fit.L1_interval),
        "decades": "–" if math.isnan(fit.decades) else f"{fit.decades:.2f}",
        "rows": str(fit.num_points),
    }


def cell(value: Any) -> str:
    """Returns a number as the cell of a table."""
    return _NONE if math.isnan(value) else "∞" if math.isinf(value) else short(value)


def span(ends: tuple[float, float]) -> str:
    """Returns an interval as the cell of a table."""
    return _NONE if math.isnan(ends[0]) else f"{cell(ends[0])} to {cell(ends[1])}"
