"""Rows of a trace: columns, types and statuses."""

import math
from collections.abc import Callable, Mapping
from enum import Enum
from numbers import Integral
from typing import Any, Final

COLUMNS: Final[Mapping[str, type]] = {
    "step": int,
    "group": str,
    "estimator": str,
    "grad_norm": float,
    "smoothness": float,
    "step_norm": float,
    "param_norm": float,
    "loss": float,
    "lr": float,
    "saturation": float,
    "noise_floor": float,
    "two_scale": float,
    "grad_variance": float,
    "noise_scale": float,
    "status": str,
    "data": str,
    "num_grads": int,
    "num_hvps": int,
    "seconds": float,
    "device": str,
    "dtype": str,
}
"""The columns of every trace, with their types. Units: ``grad_norm`` [f/x], ``smoothness`` and ``noise_floor``
[f/x^2], ``step_norm`` and ``param_norm`` [x], ``lr`` [x^2/f], ``grad_variance`` [f^2/x^2]; ``noise_scale`` counts
batches; ``saturation`` and ``two_scale`` have no unit."""

REQUIRED: Final = ("step", "grad_norm", "smoothness")

KEY: Final = ("step", "estimator", "group", "data", "run", "scan", "point")
"""Columns that identify a row: no two rows of a trace agree in all of these columns that they have."""

CHECK: Final = "smoothdiag_check"
"""Name of the check sum in the lines of a file; it is not a column of the table."""

LONGEST_SHOWN: Final = 80
"""Most characters of a value in an error message."""

CLIP_SUFFIX: Final = "_clip"
"""End of the estimator's name in rows that an AutoClip asked for."""

SPIKE: Final = "spike"
"""The estimator's name in rows that a SpikeGuard has written: one for each spike, with nothing measured."""

CLIP_BENEFIT: Final = "clip_benefit"
"""The estimator's name in rows that an AutoClip in shadow mode has written: what clipping would have been worth. It is
also the column for how much lower the loss of the step's own batch would be at the clipped end of the step [f]."""

BENEFIT_BEFORE: Final = "clip_benefit_before"
"""Column: the same on the batch of the step before."""

BENEFIT_HELD_OUT: Final = "clip_benefit_held_out"
"""Column: the same on held-out batches."""

NOTES: Final = (SPIKE, CLIP_BENEFIT)
"""Names of estimators whose rows note what happened in a run, with no smoothness measured."""

_DEFAULTS: Final[Mapping[str, Any]] = {
    "group": "all",
    "estimator": "unknown",
    "status": "ok",
    "data": "unspecified",
    "num_grads": 0,
    "num_hvps": 0,
    "device": "",
    "dtype": "",
}

NO_ROWS = (
    "Found none: no step was measured. Show the probe its batches (`for batch in probe.watch(loader)` or "
    "`probe.observe(batch)`) before `optimizer.step()`, and keep its estimators: with `estimators=()` it measures for "
    "AutoClip alone."
)


class SmoothdiagWarning(UserWarning):
    r"""A warning about a measurement: something a user should know that does not stop the run.

    Examples:
        >>> import pathlib, warnings
        >>> _ = pathlib.Path("run.csv").write_text("step,grad_norm,smoothness\n0,3.0,7.0\n1,2.0")  # cut off
        >>> with warnings.catch_warnings(record=True, action="always", category=sd.SmoothdiagWarning) as caught:
        ...     trace = sd.Trace.read("run.csv")
        >>> print(len(trace), caught[0].message)
        1 run.csv: line 3 left out: it has 2 cells instead of 3
    """


class Status(Enum):
    """Whether a row can be trusted; each value says what happened and what to change.

    The column ``status`` of a trace holds ``name.lower()``.

    Examples:
        >>> print(sd.Status.OK.usable, sd.Status.SATURATED.usable, sd.Status.NON_FINITE.usable)
        True True False
        >>> print(sd.Status.NON_FINITE.value)
        the loss or a gradient is inf or NaN at one of the points. Look at the loss of this step.
    """

    OK = "the measurement passed its checks."
    SATURATED = (
        "the gradient turned round almost completely between the two points, so the value tells the length of the step "
        "and hardly the curvature. Use a shorter radius (LocalSmoothness) or a smaller learning rate."
    )
    BELOW_NOISE_FLOOR = (
        "the two gradients or losses differ hardly more than two evaluations at the same point do, so the value is "
        "noise. Use a longer radius, float32 or float64 parameters, or a loss that is deterministic on fixed data."
    )
    KINK_LIMITED = (
        "the value grows as the two points move closer, which happens where the loss has many small kinks (ReLU, "
        "max-pooling). The value holds for this distance only: compare only rows of the same radius."
    )
    ROUNDING_LIMITED = (
        "the change of the gradient hardly depends on the distance between the two points, so it is rounding or noise. "
        "Use a longer radius or a wider dtype."
    )
    HALVES_DISAGREE = (
        "the gradient changes in different directions on two halves of the data, so noise hides the value. Use more or "
        "larger probe_batches."
    )
    DATA_CHANGED = (
        "a tensor of the batch was overwritten after the probe saw it, so the loss of the step cannot be repeated. "
        "Observe the batch after such changes, or let the loader return new tensors."
    )
    NOT_REPRODUCED = (
        "the gradient of loss_fn differs in direction or length from the gradient that backward left in the loop, so "
        "the row describes another loss than the one you train. Move everything that changes the loss into loss_fn."
    )
    NON_FINITE = "the loss or a gradient is inf or NaN at one of the points. Look at the loss of this step."
    RADIUS_DEPENDENT = (
        "Hessian-vector products from differences of gradients at two radii disagree, so neither belongs to the "
        "Hessian. Use a backend that differentiates twice, a wider dtype, or a loss without kinks."
    )
    NOT_SYMMETRIC = (
        "the gradient does not belong to one scalar function (detached targets, straight-through estimators, reversed "
        "gradients), so there is no Hessian. Measure LocalSmoothness, which needs none."
    )
    NOT_CONVERGED = (
        "the search reached its limit before it was as accurate as you asked for. Raise the limit, or ask for less "
        "accuracy."
    )
    NO_DESCENT = (
        "the loss rises along the step from the very start, as it may with momentum or on held-out data, so there is "
        "no critical rate. Measure LocalSmoothness, which needs no descent."
    )
    NO_CROSSING = (
        "the loss did not rise however far the step was prolonged, so there is no critical rate. Measure "
        "LocalSmoothness instead."
    )
    ZERO_STEP = (
        "the two points coincide: the step was skipped, or the radius is smaller than rounding. Skipped steps need "
        "nothing. Otherwise use a longer radius or a wider dtype."
    )
    NOT_MEASURED = (
        "the row comes from a log, or notes what happened in a run, such as a spike, so it says nothing about "
        "smoothness. Notes need nothing. To measure the run of a log, attach a Probe to it."
    )
    END_OF_LINE = (
        "a line of a scan ended here, because the loss or the distance passed its limit or the gradients were used up, "
        "so smoothness was not measured. To go further, raise max_loss, max_distance or budget."
    )
    FAILED = "evaluating the loss again raised an error, which was shown as a warning. Correct loss_fn."

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        """Pickles by name, because texts change between versions."""
        return getattr, (type(self), self.name)

    @property
    def usable(self) -> bool:
        """Whether fits may use the row. They use saturated rows, because leaving out high values would bias a bound."""
        return self in (Status.OK, Status.SATURATED, Status.KINK_LIMITED, Status.NOT_REPRODUCED)


USABLE_STATUSES: Final = frozenset(status.name.lower() for status in Status if status.usable)
"""Entries of the column ``status`` that fits may use; rows with any other entry are dropped and counted."""


def clean_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the row with all columns in their types, and further columns as they are.

    Raises:
        ValueError: If a required column is missing or a value has the wrong type.
    """
    missing = [name for name in REQUIRED if name not in row]
    if missing:
        raise ValueError(f"A row should have the columns {', '.join(REQUIRED)}. Missing: {', '.join(missing)}.")
    clean: dict[str, Any] = {}
    for name, kind, default in _FORM:
        value = row.get(name, default)
        if value.__class__ is not kind or (kind is int and not _fits(value)):
            try:
                value = _CONVERTED[kind](value)
            except (TypeError, ValueError, OverflowError, RecursionError) as error:
                raise ValueError(f"Column `{name}` should be {kind.__name__}. Found `{shown(value)}`.") from error
        clean[name] = _writable(value) if kind is str else value
    for key, value in row.items():
        # A check sum belongs to one line of one file, and the row may go to another file.
        if key not in COLUMNS and key != CHECK:
            name = _writable(str(key))
            clean[name] = _plain(name, value)
    return clean


def printable(text: str) -> str:
    """Returns the text with every character escaped that a terminal would obey or could not show."""
    if text.isprintable():
        return text
    return "".join(mark if mark.isprintable() else mark.encode("unicode_escape").decode("ascii") for mark in text)


def shown(value: object) -> str:
    """Returns a value as an error message shows it: on one line, without control characters, and short."""
    try:
        text = printable(repr(value))
    except (RecursionError, ValueError):  # deeply nested, or a whole number of thousands of digits
        text = f"a value of {type(value).__name__}"
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


def plain_fact(value: object) -> object:
    """Returns a fact of a header as people read it: a number without the rounding of its last digits."""
    return float(f"{value:.12g}") if isinstance(value, float) else value


def _whole(value: Any) -> int:
    if isinstance(value, str):
        try:
            # Not through float, which holds no whole number beyond 2^53 exactly.
            return _whole(int(_without_underscores(value)))
        except ValueError:
            value = float(value)
    # Tables write 3 as 3.0, so that counts as whole; 3.5 does not.
    if not isinstance(value, Integral) and not float(value).is_integer():
        raise ValueError(value)
    number = int(value)
    if not _fits(number):
        raise ValueError("a whole number beyond 64 bits")
    return number


def _fits(number: Any) -> bool:
    """Whether a whole number fits into 64 bits, as in the columns of tables."""
    return bool(-(2**63) <= number < 2**63)


def _number(value: Any) -> float:
    return float(_without_underscores(value) if isinstance(value, str) else value)


def _text(value: Any) -> str:
    if isinstance(value, Mapping | list | tuple):
        raise TypeError(value)
    return str(value)


_FORM: Final[tuple[tuple[str, type, Any], ...]] = tuple(
    (name, kind, _DEFAULTS.get(name, math.nan)) for name, kind in COLUMNS.items()
)

_CONVERTED: Final[Mapping[type, Callable[[Any], Any]]] = {int: _whole, float: _number, str: _text}


def _writable(text: str) -> str:
    # Half a character (a lone surrogate) is kept as its escape, because no file and no terminal accepts it.
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode("utf-8")


def _without_underscores(text: str) -> str:
    # Python reads 1_0 as 10, but no table means that.
    if "_" in text:
        raise ValueError(text)
    return text


def _plain(name: str, value: Any) -> str | int | float | bool | None:
    if isinstance(value, str):
        # Tables hold everything as text, and JSON holds inf and NaN as text.
        try:
            return _number(value)
        except ValueError:
            return _writable(value)
    if isinstance(value, int) and not _fits(value):
        raise ValueError(f"Column `{printable(name)}` should hold numbers of at most 64 bits. Found `{shown(value)}`.")
    if value is None or isinstance(value, (int, float, bool)):
        return value
    raise ValueError(f"Column `{printable(name)}` should hold a number, a string or None. Found `{shown(value)}`.")
