"""Rows of a trace: columns, types, statuses."""

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
"""The columns every trace has, with their types. Units are those of the documentation: ``grad_norm`` [f/x],
``smoothness`` and ``noise_floor`` [f/x^2], ``step_norm`` and ``param_norm`` [x], ``lr`` [x^2/f],
``grad_variance`` [f^2/x^2]; ``noise_scale`` counts batches; ``saturation`` and ``two_scale`` are numbers."""

REQUIRED: Final = ("step", "grad_norm", "smoothness")

KEY: Final = ("step", "estimator", "group", "data", "run", "scan", "point")
"""What tells one row from another: no two rows of a trace agree in all of these, where they have them."""

CHECK: Final = "smoothdiag_check"
"""Name under which a line of a file carries its check sum; no column of the table."""

LONGEST_SHOWN: Final = 80
"""Characters of a value in an error message."""

CLIP_SUFFIX: Final = "_clip"
"""End of the column ``estimator`` of rows that an AutoClip asked for."""

_DEFAULTS: Final[Mapping[str, Any]] = {
    "group": "all",
    "estimator": "unknown",
    "status": "ok",
    "data": "step",
    "num_grads": 0,
    "num_hvps": 0,
    "device": "",
    "dtype": "",
}


class SmoothdiagWarning(UserWarning):
    """Something about a measurement that a user should know but that does not stop the run."""


class Status(Enum):
    """How far a row can be trusted; each value is the cause and the remedy.

    ``name.lower()`` is what stands in the column ``status`` of a trace.
    """

    OK = "the measurement passed its checks."
    SATURATED = (
        "the gradient turned round almost completely along the displacement, so the value says more about the "
        "length of the step than about curvature; use a shorter radius (LocalSmoothness) or a smaller rate."
    )
    BELOW_NOISE_FLOOR = (
        "the gradients or losses differ hardly more than two evaluations at one point do; use a longer radius, "
        "float32 or float64 parameters, or a loss that is deterministic on fixed data."
    )
    KINK_LIMITED = (
        "the value grows as the displacement shrinks, as it does where many small kinks (ReLU, max-pooling) are "
        "crossed; it holds for this displacement only, so compare rows of one radius."
    )
    ROUNDING_LIMITED = (
        "the change of the gradient hardly depends on the displacement, so it is rounding or noise; use a longer "
        "radius or a wider dtype."
    )
    HALVES_DISAGREE = (
        "two halves of the data give changes of the gradient that point apart, so noise hides the value; use more "
        "or larger probe_batches."
    )
    DATA_CHANGED = (
        "a tensor of the batch was written to after the probe saw it, so the loss of the step cannot be repeated; "
        "observe the batch after such changes, or let the loader return new tensors."
    )
    NOT_REPRODUCED = (
        "the gradient of loss_fn has another direction or length than the one that backward left in the loop, so the "
        "row is about another loss than the one that is trained; move everything that changes the loss into loss_fn."
    )
    NON_FINITE = "the loss or a gradient is inf or NaN at one of the points; look at the loss of this step."
    RADIUS_DEPENDENT = (
        "products of the Hessian from differences of gradients at two radii disagree, so neither is the Hessian's; "
        "use a backend that differentiates twice, a wider dtype, or a loss without kinks."
    )
    NOT_SYMMETRIC = (
        "the gradient is not that of one scalar function (detached targets, straight-through estimators, reversed "
        "gradients), so it has no Hessian; measure LocalSmoothness, which needs none."
    )
    NOT_CONVERGED = (
        "the search ended at its limit before it was as accurate as asked for; raise the limit, or ask for less."
    )
    NO_DESCENT = (
        "the loss rises along the step from its very start, as it may with momentum or on held-out data, so there is "
        "no critical rate; measure LocalSmoothness, which needs no descent."
    )
    NO_CROSSING = (
        "the loss did not rise however far the step was prolonged, so there is no critical rate; measure "
        "LocalSmoothness instead."
    )
    ZERO_STEP = "the two points coincide; the step was skipped, or the radius is below rounding."
    NOT_MEASURED = (
        "the row comes from a log, which holds gradient norms and losses alone and tells nothing of smoothness; attach "
        "a Probe to a run."
    )
    FAILED = "evaluating the loss again raised an error, which was shown as a warning; mend loss_fn."

    @property
    def usable(self) -> bool:
        """Whether fits may use the row. Saturated rows count: leaving out high values would bias a bound."""
        return self in (Status.OK, Status.SATURATED, Status.KINK_LIMITED, Status.NOT_REPRODUCED)


USABLE_STATUSES: Final = frozenset(status.name.lower() for status in Status if status.usable)
"""Entries of the column ``status`` that fits may use; rows with any other are dropped and counted."""


def clean_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the row with all columns in their types, further ones as they are.

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
        # A check sum belongs to a line of a file; the row may go to another one.
        if key not in COLUMNS and key != CHECK:
            name = _writable(str(key))
            clean[name] = _plain(name, value)
    return clean


def printable(text: str) -> str:
    """Returns the text with everything escaped that a terminal would obey, or that nothing can show."""
    if text.isprintable():
        return text
    return "".join(mark if mark.isprintable() else mark.encode("unicode_escape").decode("ascii") for mark in text)


def shown(value: object) -> str:
    """Returns a value as an error message shows it: in one line, harmless, and not long."""
    try:
        text = printable(repr(value))
    except (RecursionError, ValueError):  # deeply nested, or a whole number of thousands of digits
        text = f"a value of {type(value).__name__}"
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


def _whole(value: Any) -> int:
    if isinstance(value, str):
        try:
            # Not through float, which holds no whole number beyond 2^53 exactly.
            return _whole(int(_without_underscores(value)))
        except ValueError:
            value = float(value)
    # Tables write 3 as 3.0; and 3.5 is no step.
    if not isinstance(value, Integral) and not float(value).is_integer():
        raise ValueError(value)
    number = int(value)
    if not _fits(number):
        raise ValueError("a whole number beyond 64 bits")
    return number


def _fits(number: Any) -> bool:
    """Whether 64 bits hold a whole number, as the columns of tables do."""
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
    # Half a character, which no file and no terminal takes, is kept as its escape.
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode("utf-8")


def _without_underscores(text: str) -> str:
    # Python reads 1_0 as 10; no table means that.
    if "_" in text:
        raise ValueError(text)
    return text


def _plain(name: str, value: Any) -> str | int | float | bool | None:
    if isinstance(value, str):
        # Tables hold everything as text, and JSON what is not finite.
        try:
            return _number(value)
        except ValueError:
            return _writable(value)
    if isinstance(value, int) and not _fits(value):
        raise ValueError(f"Column `{printable(name)}` should hold numbers of at most 64 bits. Found `{shown(value)}`.")
    if value is None or isinstance(value, (int, float, bool)):
        return value
    raise ValueError(f"Column `{printable(name)}` should hold a number, a string or None. Found `{shown(value)}`.")
