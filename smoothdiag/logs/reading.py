"""Reading: gradient norms and losses from the log of a run that nobody measured."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from smoothdiag.rows import SmoothdiagWarning, Status
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

_BEYOND: Final = ""
"""Name of cells beyond the last column."""

_NOT_OF_A_STEP: Final = re.compile(r"(^|_)(eval|val|valid|validation|test|dev)_|_epoch$")
"""Of names: losses of other data, and means over an epoch."""

_OF_TRAINING: Final = re.compile(r"^(train|training)_|_(train|step)$")
"""Of names: what says no more than that the value is of a step in training."""


def read_log(
    path: str | Path, *, grad_norm: str | None = None, loss: str | None = None, step: str | None = None
) -> Trace:
    """Reads the log of a run as a trace whose smoothness is NaN, since nobody measured it.

    It takes tables with commas (``.csv``, such as Lightning's ``metrics.csv``), JSON lines (``.jsonl``), and a list of
    objects in ``.json``, which may be the ``log_history`` in a ``trainer_state.json`` of Hugging Face. Entries of one
    step are put together; of a value that stands there twice the later counts, as after resuming.

    Args:
        path: The log.
        grad_norm: Column of gradient norms; default: the one with a usual name.
        loss: Column of losses; default: the one with a usual name, if there is any.
        step: Column of step numbers, kept as they are; default: the one with a usual name, else entries are counted.

    Returns:
        A trace with one row for each step that has a gradient norm or a loss, estimator ``log``, and the status
        ``not_measured``, or ``non_finite`` where a logged value is inf or NaN. Fits refuse such rows.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no such log, or no column or several may be meant; the message lists those found.

    Units: grad_norm [f/x], as logged, before or after clipping.
    """
    source = Path(path)
    trace = Trace()
    entries = _entries(source, trace.problems)
    columns = list(dict.fromkeys(name for entry in entries for name in entry if name != _BEYOND))
    if {"smoothness", "estimator"} <= set(columns):
        raise ValueError(f"`{source}` should be a log. Found a trace, which `Trace.read` and `smoothdiag fit` take.")
    asked = {"step": step, "grad_norm": grad_norm, "loss": loss}
    chosen = {role: _column(role, name, columns, source) for role, name in asked.items()}
    rows = _rows(entries, chosen, trace.problems)
    if not any("grad_norm" in row for row in rows.values()):
        raise ValueError(
            "Parameter `grad_norm` should name a column of numbers. Found none in "
            f"`{chosen['grad_norm']}` of `{source}`."
        )
    for number in sorted(rows):
        row = rows[number]
        finite = all(map(math.isfinite, row.values()))
        status = Status.NOT_MEASURED if finite else Status.NON_FINITE
        fixed = {"step": number, "smoothness": math.nan, "estimator": ESTIMATOR, "status": status.name.lower()}
        trace.append({"grad_norm": math.nan, **row, **fixed})
    trace.meta |= {"log": source.name, **{f"{role}_column": name for role, name in chosen.items()}}
    if trace.problems:
        warnings.warn(f"{source}: {'; '.join(trace.problems)}", SmoothdiagWarning, stacklevel=2)
    return trace


def _entries(source: Path, problems: list[str]) -> list[dict[str, Any]]:
    """Returns what was logged, entry by entry; notes what was left out."""
    if not source.exists():
        raise FileNotFoundError(f"There is no log at `{source}`.")
    if source.suffix not in (".csv", ".json", ".jsonl"):
        raise ValueError(f"Parameter `path` should end in .csv, .json or .jsonl. Found `{source}`.")
    text = source.read_text(encoding="utf-8-sig", errors="replace")
    if source.suffix == ".csv":
        found: Any = list(csv.DictReader(io.StringIO(text), restkey=_BEYOND))
        if num_longer := sum(_BEYOND in row for row in found):
            problems.append(f"{num_longer} rows have more cells than the table has columns")
    else:
        found = _parsed(text) or _by_line(text, problems)
    if isinstance(found, dict):
        found = found.get("log_history", [found])
    entries = [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []
    if not entries:
        raise ValueError(f"`{source}` should be a log of named values. Found no entry with names.")
    return entries


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None


def _by_line(text: str, problems: list[str]) -> list[Any]:
    lines = [(number, _parsed(line)) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
    wrong = [number for number, value in lines if not isinstance(value, dict)]
    if wrong:
        problems.append(f"{len(wrong)} lines left out that are no JSON objects, the first of them line {wrong[0]}")
    return [value for _, value in lines]


def _column(role: str, asked: str | None, columns: Sequence[str], source: Path) -> str | None:
    """Returns the column that is asked for, or else the only one with the likeliest name."""
    listed = ", ".join(columns)
    if asked is not None:
        if asked not in columns:
            raise ValueError(
                f"Parameter `{role}` should be a column of `{source}`: {listed}. Found `{role} = {asked!r}`."
            )
        return asked
    for usual in USUAL[role]:
        found = [name for name in columns if usual in _readings(name)]
        exact = [name for name in found if name == usual]
        if len(exact or found) > 1:
            raise ValueError(
                f"Parameter `{role}` should name one of the columns {', '.join(found)} of `{source}`, any of which may "
                f"be meant. Found `{role} = None`."
            )
        if found:
            return (exact or found)[0]
    if role == "grad_norm":
        raise ValueError(
            f"Parameter `grad_norm` should name the column of gradient norms in `{source}`, none of which has a usual "
            f"name. Found the columns {listed}."
        )
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
            except (TypeError, ValueError):
                unreadable.append(f"{value!r} in `{column}`")
        at = values.pop("step", math.nan if chosen["step"] else float(number))
        if not values or math.isnan(at):
            continue
        if not at.is_integer():
            raise ValueError(
                f"Parameter `step` should name a column of whole numbers. Found {at} in `{chosen['step']}`."
            )
        row = rows.setdefault(int(at), {})
        again += any(role in row and row[role] != value for role, value in values.items())
        row |= values
    if unreadable:
        problems.append(f"{len(unreadable)} values left out that are no numbers, the first of them {unreadable[0]}")
    if again:
        problems.append(
            f"{again} entries are of a step that had other values before, and replace them; where the column "
            f"`{chosen['step']}` starts anew in every epoch, name another one"
        )
    return rows
