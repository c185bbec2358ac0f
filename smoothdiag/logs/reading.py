"""Reading: gradient norms and losses from the log of a run that nobody measured."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from smoothdiag.logs.formats import SCALAR, noted, read_entries
from smoothdiag.rows import SmoothdiagWarning, Status, printable, shown
from smoothdiag.trace import Trace

ESTIMATOR: Final = "log"
"""What stands in the column ``estimator`` of rows from a log."""

# Usual names, the likeliest first, as `_readings` leaves them. Of several counters the optimizer's is wanted.
USUAL: Final[Mapping[str, Sequence[str]]] = {
    "step": ("optimizer_step", "global_step", "step", "num_updates", "iteration", "iter"),
    "grad_norm": (
        "grad_norm", "gradient_norm", "global_grad_norm", "total_grad_norm", "grad_norm_total", "grad_2_0_norm_total",
        "total_norm", "gnorm",
    ),
    "loss": ("loss", "lm_loss", "nll_loss"),
}  # fmt: skip

OVERFLOW: Final = -1.0
"""What DeepSpeed and others log in place of a gradient norm that is inf or NaN."""

NUM_LISTED: Final = 30

_PURPOSE: Final = {"step": "steps", "grad_norm": "gradient norms", "loss": "losses"}

_NOT_OF_A_STEP: Final = re.compile(r"(^|_)(eval|val|valid|validation|test|dev)_|_epoch$")
"""Of names: losses of other data, and means over an epoch."""

_OF_TRAINING: Final = re.compile(r"^(train|training)_|_(train|step)$")
"""Of names: what says no more than that the value is of a step in training."""


def read_log(
    path: str | Path, *, grad_norm: str | None = None, loss: str | None = None, step: str | None = None
) -> Trace:
    """Reads the log of a run as a trace whose smoothness is NaN, since nobody measured it.

    It takes tables (``.csv``, ``.tsv``; commas, semicolons or tabs) such as Lightning's ``metrics.csv``, JSON lines
    (``.jsonl``, ``.ndjson``), in ``.json`` a list of objects, columns, or the ``trainer_state.json`` of Hugging Face,
    any of them compressed (``.gz``), and folders of TensorBoard. Names inside others are joined, as in ``train/loss``.

    Entries of one step are put together; of a value that stands there twice the later counts, as after resuming. A
    gradient norm of -1 is taken as NaN, for which DeepSpeed writes it.

    Args:
        path: The log.
        grad_norm: Column of gradient norms; default: the one with a usual name, else losses alone are read, which a
            warning says.
        loss: Column of losses; default: the one with a usual name, if there is any.
        step: Column of step numbers, kept as they are; default: the one with a usual name, else entries are counted.

    Returns:
        A trace with one row for each step that has a gradient norm or a loss, estimator ``log``, and the status
        ``not_measured``, or ``non_finite`` where a logged value is inf or NaN. Fits refuse such rows.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: If it is of TensorBoard, which is not installed.
        ValueError: If it is no such log, no column or several may be meant (the message lists those found), or gradient
            norms are negative.

    Units: grad_norm [f/x], as logged, before or after clipping.
    """
    source = Path(path)
    trace = Trace()
    entries = read_entries(source, trace.problems)
    columns = list(dict.fromkeys(name for entry in entries for name in entry))
    if {"smoothness", "estimator"} <= set(columns):
        raise ValueError(f"`{source}` should be a log. Found a trace, which `Trace.read` and `smoothdiag fit` take.")
    asked = {"step": step, "grad_norm": grad_norm, "loss": loss}
    chosen = {role: _column(role, name, columns, source) for role, name in asked.items()}
    if chosen["grad_norm"] is None and chosen["loss"] is None:
        raise ValueError(
            f"Parameter `grad_norm` should name the column of gradient norms in `{source}`, none of which has a usual "
            f"name; nor has one of losses. Found the columns {_listed(columns)}.{_scalar_hint(columns)}"
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
        trace.problems.append("losses alone are read, since no column has a usual name for gradient norms")
    if trace.problems:
        warnings.warn(f"{source}: {printable('; '.join(trace.problems))}", SmoothdiagWarning, stacklevel=2)
    return trace


def describe_columns(trace: Trace) -> str:
    """Returns in words which columns `read_log` took, and which are left where none has a usual name."""
    chosen = {role: trace.meta[f"{role}_column"] for role in ("grad_norm", "loss", "step")}
    taken = ", ".join(f"{_PURPOSE[role]} from `{printable(name)}`" for role, name in chosen.items() if name is not None)
    others = [name for name in trace.meta["columns"] if name not in chosen.values()]
    without = [role for role, name in chosen.items() if name is None]
    lines = [f"{taken}."]
    if "step" in without:
        lines.append("No column has a usual name for steps: entries are counted instead.")
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
    return " One scalar from TensorBoard has no name: where it is gradient norms, choose `Value` (`--grad-norm Value`)."


def _column(role: str, asked: str | None, columns: Sequence[str], source: Path) -> str | None:
    """Returns the column that is asked for, or else the only one with the likeliest name."""
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
                f"Parameter `{role}` should name one of the columns {_listed(found)} of `{source}`, any of which may "
                f"be meant. Found `{role} = None`."
            )
        if found:
            return (exact or found)[0]
    return None


def _readings(name: str) -> set[str]:
    """Returns what a name may stand for, in small letters; nothing where it is not of a step in training."""
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
            f"{len(unreadable)} values left out that are no numbers like 0.5, the first of them {unreadable[0]}"
        )
    if again:
        problems.append(
            f"{again} entries are of a step that had other values before, and replace them; where the column "
            f"`{chosen['step']}` starts anew in every epoch, name another one"
        )
    return rows


def _check_norms(rows: Mapping[int, dict[str, float]], column: str | None, source: Path, problems: list[str]) -> None:
    """Refuses gradient norms below zero, but for those that stand for an overflow, which become NaN."""
    negative = {step: row["grad_norm"] for step, row in rows.items() if row.get("grad_norm", 0.0) < 0}
    wrong = {step: value for step, value in negative.items() if value != OVERFLOW}
    if wrong:
        step = min(wrong)
        raise ValueError(
            f"Parameter `grad_norm` should name a column of gradient norms, which are never negative. Found "
            f"{wrong[step]} at step {step} in `{column}` of `{source}`, and {len(wrong) - 1} more below zero."
        )
    for step in negative:
        rows[step]["grad_norm"] = math.nan
    if negative:
        problems.append(f"{len(negative)} gradient norms of {OVERFLOW:g} taken as NaN, as DeepSpeed logs an overflow")
