"""Helpers of all figures: checks of arguments, the rows to draw, and the interval of a line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from smoothdiag import arguments
from smoothdiag.rows import NO_ROWS, USABLE_STATUSES

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd

    from smoothdiag.fits.base import SmoothnessFit
    from smoothdiag.trace import Trace

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


def check_axes(name: str, axes: object, count: int | None = None) -> None:
    """Makes sure that a parameter is one matplotlib Axes, or holds ``count`` of them.

    Raises:
        ValueError: If it is not.
    """
    from matplotlib.axes import Axes

    if count is None:
        if not isinstance(axes, Axes):
            raise arguments.wrong(name, "matplotlib Axes, such as `plt.subplots()[1]`", axes)
        return
    words = {2: "two", 3: "three", 4: "four"}
    several = np.asarray(axes, dtype=object).ravel()
    if isinstance(axes, type) or not all(isinstance(one, Axes) for one in several):
        raise arguments.wrong(name, f"{words[count]} matplotlib Axes", axes)
    if len(several) != count:
        raise ValueError(f"Parameter `{name}` should hold {words[count]} axes. Found {len(several)}.")


def check_fits(fits: object) -> None:
    """Makes sure that a parameter ``fits`` holds fits by name.

    Raises:
        ValueError: If it does not.
    """
    if not isinstance(fits, Mapping):
        raise arguments.wrong("fits", "fits by name, as from `fit_groups`", fits)
    if not fits:
        raise ValueError("Parameter `fits` should hold at least one fit. Found none.")
    for fit in fits.values():
        if not _is_fit(fit):
            raise arguments.wrong("fits", "fits by name, as from `fit_groups`", fit)


def check_fit(fit: object) -> None:
    """Makes sure that a parameter ``fit`` is a fit.

    Raises:
        ValueError: If it is not.
    """
    if not _is_fit(fit):
        raise arguments.wrong("fit", "a SmoothnessFit: pass `fit_smoothness(trace)`", fit)


def _is_fit(value: object) -> bool:
    return not isinstance(value, type) and all(hasattr(value, name) for name in ("L0", "L1", "verdict"))


def as_table(data: Any) -> pd.DataFrame:
    """Returns the table of a trace, or a table as it is.

    Raises:
        ValueError: If ``data`` is neither.
    """
    import pandas as pd

    if isinstance(data, pd.DataFrame):
        return data
    if isinstance(data, type) or not hasattr(data, "to_frame"):
        hint = "pass its `trace`" if hasattr(data, "observe") else "read a file with `Trace.read`"
        raise arguments.wrong("data", f"a Trace or its DataFrame; {hint}", data)
    frame: pd.DataFrame = data.to_frame()
    return frame


def as_drawn(name: object, *, in_legend: bool = False) -> str:
    """Returns a text that matplotlib draws exactly as the name reads, without formulas, line breaks or missing glyphs.

    Args:
        name: A name that a user chose.
        in_legend: Whether the text begins an entry of a legend; a legend leaves out entries that begin with "_".
    """
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(name))
    return (" " if in_legend and text.startswith("_") else "") + text.replace("$", r"\$")


def select(data: Trace | pd.DataFrame, estimator: str | None, group: str) -> pd.DataFrame:
    """Returns the rows of one estimator and one group, with every column that the figures need."""
    from smoothdiag.fits.columns import choose_estimator

    frame = rows_of_group(data, group)
    if estimator is None:
        names = frame["estimator"].to_numpy(dtype=object)
        estimator = choose_estimator(names, frame["status"].isin(USABLE_STATUSES).to_numpy(dtype=np.bool_))
    return _only(frame, "estimator", estimator)


def rows_of_group(data: Trace | pd.DataFrame, group: str) -> pd.DataFrame:
    """Returns the rows of one group, with every column that the figures need."""
    from smoothdiag.fits.columns import labels

    frame = as_table(data)
    missing = [name for name in ("grad_norm", "smoothness") if name not in frame.columns]
    if missing:
        raise ValueError(f"Parameter `data` should have the columns of a trace. Missing: {', '.join(missing)}.")
    if frame.empty:
        raise ValueError(f"Parameter `data` should have rows. {NO_ROWS}")
    defaults: dict[str, Any] = {"step": range(len(frame))}
    defaults |= dict.fromkeys(("loss", "lr", "saturation", "stability_limit", "stability_limit_small_batch"), np.nan)
    frame = frame.assign(**{name: value for name, value in defaults.items() if name not in frame.columns})
    names = {name: found for name, found in labels(frame).items() if name in ("estimator", "group", "status")}
    return _only(frame.assign(**names), "group", str(group))


def _only(frame: pd.DataFrame, column: str, value: str) -> pd.DataFrame:
    if value not in (names := sorted(frame[column].unique().tolist())):
        raise ValueError(f"Parameter `{column}` should be one of {names}. Found `{column} = {value!r}`.")
    return frame[frame[column] == value]


def rescales(rows: pd.DataFrame) -> bool:
    """Returns whether a trace says that its optimizer rescales gradients, so that 2/lr bounds no smoothness."""
    return rows.attrs.get("follows_gradients") is False


def floats(rows: pd.DataFrame, column: str) -> Array:
    """Returns a column as numbers, with NaN for entries that are not numbers."""
    import pandas as pd

    return np.asarray(pd.to_numeric(rows[column], errors="coerce"), dtype=np.float64)


def runs_together(data: Trace | pd.DataFrame | Sequence[Trace | pd.DataFrame]) -> Trace | pd.DataFrame:
    """Returns the rows of several runs as one table; a single trace or table as it is."""
    import pandas as pd

    if isinstance(data, list | tuple):
        if not data:
            raise ValueError("Parameter `data` should hold at least one trace or table. Found none.")
        frames = [as_table(one) for one in data]
        together: pd.DataFrame = pd.concat(frames, ignore_index=True)
        return together
    return cast("Trace | pd.DataFrame", data)


def runs_by_name(data: Any) -> dict[str, Trace | pd.DataFrame]:
    """Returns runs by name: those of a dict as they are, those of a list numbered, a single one as "run"."""
    if isinstance(data, list | tuple):
        data = {f"run {number}": run for number, run in enumerate(data, start=1)}
    elif not isinstance(data, Mapping):
        data = {"run": data}
    if not data:
        raise ValueError("Parameter `data` should hold at least one trace or table. Found none.")
    return {str(name): as_table(run) for name, run in data.items()}


def band(fit: SmoothnessFit, grid: Array) -> tuple[Array, Array] | None:
    """Returns the ends of the pointwise interval of the line; None if the fit has no resamples.

    L0 and L1 of one resample belong together: where one is high, the other is low. So a band between the ends of their
    separate intervals would be wider than it has to be.
    """
    from smoothdiag.fits.intervals import percentile_interval

    if not fit.replicates:
        return None
    L0, L1 = np.array(fit.replicates, dtype=np.float64).T
    ends = [percentile_interval(L0 + L1 * x, float(fit.predict(x)), fit.interval_freedom) for x in grid]
    low, high = np.array(ends, dtype=np.float64).T
    return low, high


def in_fit(rows: pd.DataFrame) -> Mask:
    """Returns which rows a fit may use by status and known step; figures leave out values that are not positive."""
    return np.asarray(rows["status"].isin(USABLE_STATUSES), dtype=np.bool_) & np.isfinite(floats(rows, "step"))


def positive(value: Array) -> Mask:
    """Returns which values a logarithmic axis can show."""
    return np.isfinite(value) & (value > 0)
