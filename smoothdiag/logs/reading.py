"""Reading: gradient norms and losses from the log of a run that nobody measured."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from smoothdiag.console import counted
from smoothdiag.logs.formats import SCALAR, noted, read_entries
from smoothdiag.rows import SmoothdiagWarning, Status, printable, shown
from smoothdiag.trace import Trace

ESTIMATOR: Final = "log"
"""Entry in the column ``estimator`` of rows from a log."""

# Usual names, likeliest first, in the form that `_readings` returns. The optimizer's counter of steps comes first.
USUAL: Final[Mapping[str, Sequence[str]]] = {
    "step": ("optimizer_step", "global_step", "step", "num_updates", "iteration", "iter"),
    "grad_norm": (
        "grad_norm", "gradient_norm", "global_grad_norm", "total_grad_norm", "grad_norm_total", "grad_2_0_norm_total",
        "total_norm", "gnorm",
    ),
    "loss": ("loss", "lm_loss", "nll_loss"),
}  # fmt: skip

OVERFLOW: Final = -1.0
"""The number that DeepSpeed and others log instead of a gradient norm that is inf or NaN."""

NUM_LISTED: Final = 30

_PURPOSE: Final = {"step": "steps", "grad_norm": "gradient norms", "loss": "losses"}

_NOT_OF_A_STEP: Final = re.compile(r"(^|_)(eval|val|valid|validation|test|dev)_|_epoch$")
"""Matches names of losses on other data, and of means over an epoch."""

_OF_TRAINING: Final = re.compile(r"^(train|training)_|_(train|step)$")
"""Matches parts of a name that only say that the value belongs to a training step."""


def read_log(
    path: str | Path, *, grad_norm: str | None = None, loss: str | None = None, step: str | None = None
) -> Trace:
    """Reads the log of an earlier run as a trace; its smoothness is NaN, because nobody measured it.

    These logs can be read, all but the folders also compressed (``.gz``):

    * tables (``.csv``, ``.tsv``; commas, semicolons or tabs), such as Lightning's ``metrics.csv``;
    * JSON lines (``.jsonl``, ``.ndjson``);
    * ``.json`` with a list of objects or with columns, or the ``trainer_state.json`` of Hugging Face;
    * TensorBoard folders.

    Nested names are joined, as in ``train/loss``. Entries of one step become one row. If a step has a value twice, as
    after resuming, the later value counts. A gradient norm of -1 is read as NaN, because DeepSpeed writes -1 for NaN.

    Args:
        path: The log.
        grad_norm: Column of gradient norms; default: the column with a usual name. If there is none, only losses are
            read, and a warning says so.
        loss: Column of losses; default: the column with a usual name, if there is one.
        step: Column of step numbers, which are kept as they are; default: the column with a usual name. If there is
            none, entries are counted.

    Returns:
        A trace with one row for each step that has a gradient norm or a loss. The estimator is ``log``; the status is
        ``not_measured``, or ``non_finite`` if a logged value is inf or NaN. Fits refuse such rows.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: If the log needs TensorBoard, which is not installed.
        ValueError: If the file is no such log, if no column or several columns may be meant (the message lists the
            columns), or if gradient norms are negative.

    Units: grad_norm [f/x], as logged, before or after clipping.

    Examples:
        >>> import pandas as pd
        >>> pd.DataFrame({"step": [10, 20], "grad_norm": [0.5, 2.0]}).to_csv("metrics.csv", index=False)
        >>> trace = sd.read_log("metrics.csv")
        >>> [(row["step"], row["grad_norm"], row["status"]) for row in trace]
        [(10, 0.5, 'not_measured'), (20, 2.0, 'not_measured')]
    """
    source = Path(path)
    trace = Trace()
    entries = read_entries(source, trace.problems)
    columns = list(dict.fromkeys(name for entry in entries for name in entry))
    if {"smoothness", "estimator"} <= set(columns):
        raise ValueError(f"`{source}` should be a log. Found a trace, which `Trace.read` and `smoothdiag fit` read.")
    asked = {"step": step, "grad_norm": grad_norm, "loss": loss}
    chosen = {role: _column(role, name, columns, source) for role, name in asked.items()}
    if chosen["grad_norm"] is None and chosen["loss"] is None:
        raise ValueError(
            f"Parameter `grad_norm` should name the column of gradient norms in `{source}`: no column has a usual name "
            f"for gradient norms or losses. Found the columns {_listed(columns)}.{_scalar_hint(columns)}"
        )
    rows = _rows(entries, chosen, trace.problems)
    needed = "loss" if chosen["grad_norm"] is None else "grad_norm"
    if not any(needed in row for row in rows.values()):
        raise ValueError(
            f"Parameter `{needed}` should name a column of numbers. Found none in `{chosen[needed]}` of "
            f"`{source}`{noted(trace.problems)}."
        )
    _check_norms(rows, chosen["grad_norm"], source, trace.problems)
    for number in sorted(rows):
        row = rows[number]
        finite = all(map(math.isfinite, row.values()))
        status = Status.NOT_MEASURED if finite else Status.NON_FINITE
        fixed = {"step": number, "smoothness": math.nan, "estimator": ESTIMATOR, "status": status.name.lower()}
        trace.append({"grad_norm": math.nan, **row, **fixed})
    trace.meta |= {"log": source.name, **{f"{role}_column": name for role, name in chosen.items()}, "columns": columns}
    if chosen["grad_norm"] is None:
        trace.problems.append(
            "only losses are read, because no column has a usual name for gradient norms; if one holds them, name it "
            "as `grad_norm`"
        )
    if trace.problems:
        warnings.warn(f"{source}: {printable('; '.join(trace.problems))}", SmoothdiagWarning, stacklevel=2)
    return trace


def describe_columns(trace: Trace) -> str:
    """Returns in words which columns `read_log` took, and which other columns could be named."""
    chosen = {role: trace.meta[f"{role}_column"] for role in ("grad_norm", "loss", "step")}
    taken = ", ".join(f"{_PURPOSE[role]} from `{printable(name)}`" for role, name in chosen.items() if name is not None)
    others = [name for name in trace.meta["columns"] if name not in chosen.values()]
    without = [role for role, name in chosen.items() if name is None]
    lines = [f"{taken}."]
    if "step" in without:
        lines.append("No column has a usual name for steps, so entries are counted instead.")
    if without and others:
        flags = ", ".join(f"--{role.replace('_', '-')} for {_PURPOSE[role]}" for role in without)
        lines.append(f"Other columns can be named ({flags}): {_listed(others)}.")
    return "\n".join(lines)


def _listed(columns: Sequence[str]) -> str:
    rest = len(columns) - NUM_LISTED
    return ", ".join(map(printable, columns[:NUM_LISTED])) + (f" and {rest} more" if rest > 0 else "")


def _scalar_hint(columns: Sequence[str]) -> str:
    if set(columns) != set(SCALAR):
        return ""
    return " One scalar from TensorBoard has no name: if it holds gradient norms, choose `Value` (`--grad-norm Value`)."


def _column(role: str, asked: str | None, columns: Sequence[str], source: Path) -> str | None:
    """Returns the column that was asked for, or else the only column with the likeliest usual name."""
    if asked is not None:
        if asked not in columns:
            raise ValueError(
                f"Parameter `{role}` should be a column of `{source}`: {_listed(columns)}. Found `{role} = {asked!r}`."
            )
        return asked
    for usual in USUAL[role]:
        found = [name for name in columns if usual in _readings(name)]
        exact = [name for name in found if name == usual]
        if len(exact or found) > 1:
            raise ValueError(
                f"Parameter `{role}` should name one of the columns {_listed(found)} of `{source}`, because each of "
                f"them has a usual name. Found `{role} = None`."
            )
        if found:
            return (exact or found)[0]
    return None


def _readings(name: str) -> set[str]:
    """Returns the ways to read a name, in small letters; none if the name does not belong to a training step."""
    plain, last = (re.sub(r"\W+", "_", part.lower()).strip("_") for part in (name, name.split("/")[-1]))
    return set() if _NOT_OF_A_STEP.search(plain) else {plain, last, _OF_TRAINING.sub("", plain)}


def _rows(
    entries: Sequence[Mapping[str, Any]], chosen: Mapping[str, str | None], problems: list[str]
) -> dict[int, dict[str, float]]:
    """Returns gradient norm and loss by step."""
    rows: dict[int, dict[str, float]] = {}
    unreadable, again = [], 0
    for number, entry in enumerate(entries):
        values = {}
        for role, column in chosen.items():
            try:
                if (value := entry.get(column or "")) not in (None, ""):
                    values[role] = float(value)
            except (TypeError, ValueError, OverflowError):
                unreadable.append(f"{shown(value)} in `{column}`")
        at = values.pop("step", math.nan if chosen["step"] else float(number))
        if not values or math.isnan(at):
            continue
        if abs(at) >= 2**63 and math.isfinite(at):
            unreadable.append(f"step {at:g} in `{chosen['step']}`")
            continue
        if not at.is_integer():
            raise ValueError(
                f"Parameter `step` should name a column of whole numbers. Found {at} in `{chosen['step']}`."
            )
        row = rows.setdefault(int(at), {})
        again += any(role in row and row[role] != value for role, value in values.items())
        row |= values
    if unreadable:
        problems.append(
            f"{counted(len(unreadable), 'value is', 'values are')} left out because only numbers like 0.5 can be "
            f"read; the first is {unreadable[0]}"
        )
    if again:
        problems.append(
            f"{counted(again, 'entry repeats', 'entries repeat')} an earlier step with other values, and the later "
            f"values count; if the column `{chosen['step']}` starts anew in every epoch, name another column of steps"
        )
    return rows


def _check_norms(rows: Mapping[int, dict[str, float]], column: str | None, source: Path, problems: list[str]) -> None:
    """Refuses negative gradient norms, except the number that stands for an overflow, which becomes NaN."""
    negative = {step: row["grad_norm"] for step, row in rows.items() if row.get("grad_norm", 0.0) < 0}
    wrong = {step: value for step, value in negative.items() if value != OVERFLOW}
    if wrong:
        step, more = min(wrong), f", and {len(wrong) - 1} more below zero" if len(wrong) > 1 else ""
        raise ValueError(
            f"Parameter `grad_norm` should name a column of gradient norms, which are never negative. Found "
            f"{wrong[step]} at step {step} in `{column}` of `{source}`{more}."
        )
    for step in negative:
        rows[step]["grad_norm"] = math.nan
    if negative:
        problems.append(
            f"{counted(len(negative), 'gradient norm')} of {OVERFLOW:g} read as NaN, because DeepSpeed logs an "
            "overflow like this"
        )
