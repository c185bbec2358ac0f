"""plot_clipping: what AutoClip measured, the longest step it made of that, and the steps that are taken."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, cast

import numpy as np

from smoothdiag import arguments
from smoothdiag.plots.common import (
    HOLLOW,
    NORM,
    Array,
    as_table,
    check_axes,
    current_axes,
    extent,
    floats,
    legend_below,
    log_axis,
    note,
    positive,
    select,
)
from smoothdiag.rows import CLIP_SUFFIX, USABLE_STATUSES

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from smoothdiag.trace import Trace


class Clipper(Protocol):
    """What has a trace and a history, as an AutoClip does."""

    @property
    def trace(self) -> Trace:
        """The rows that were measured."""
        ...

    @property
    def history(self) -> pd.DataFrame:
        """The events."""
        ...


def plot_clipping(
    data: Clipper | Trace | pd.DataFrame, *, history: pd.DataFrame | None = None, ax: Axes | None = None
) -> Axes:
    """Draws measured lengths, the longest step, and the length that steps would have unclipped, over the steps.

    A length is the step at which a quadratic with the measured curvature is lowest: ||g||/L along the gradient, or
    -slope/curvature where AutoClip's estimator measures a slope. Unclipped steps are rate times gain of the momentum
    times gradient norm, as far as the history has a threshold; above the longest step they were clipped.

    Args:
        data: An AutoClip, or the trace of its probe.
        history: The clipper's ``history``; needed with a trace.
        ax: Axes to draw on; None takes the current ones.

    Returns:
        The axes.

    Raises:
        ValueError: If there is no history, or the trace has no rows to draw.

    Units: lengths [x].
    """
    if ax is not None:
        check_axes("ax", ax)
    if hasattr(data, "history") and not isinstance(data, type):
        clipper = cast("Clipper", data)
        data, history = clipper.trace, clipper.history if history is None else history
    import pandas as pd

    if history is not None and not isinstance(history, pd.DataFrame):
        raise arguments.wrong("history", "the `history` of an AutoClip, a DataFrame", history)
    frame = as_table(data)
    if history is None or history.empty:
        raise ValueError("Parameter `history` should be the history of an AutoClip that has taken a step. Found none.")
    names = sorted({name for name in frame.get("estimator", ()) if str(name).endswith(CLIP_SUFFIX)})
    if len(names) != 1:
        raise ValueError(
            f"Parameter `data` should have rows that one AutoClip asked for, named with `{CLIP_SUFFIX}` at the end. "
            f"Found {names or 'none'}."
        )
    rows = select(frame, names[0], "all").sort_values("step", kind="stable")

    import seaborn as sns

    ax = current_axes() if ax is None else ax
    colors = sns.color_palette("colorblind")
    step, curvature, norm = (floats(rows, name) for name in ("step", "smoothness", "grad_norm"))
    has_slope = "slope" in rows and bool(rows["slope"].notna().any())
    with np.errstate(divide="ignore", invalid="ignore"):
        length = (-floats(rows, "slope") if has_slope else norm) / curvature
    shown, usable = positive(length), rows["status"].isin(USABLE_STATUSES).to_numpy()
    name = "best step along the direction" if has_slope else rf"measured length {NORM}$/L$"
    good, bad = shown & usable, shown & ~usable
    ax.plot(step[good], length[good], linestyle="none", marker="o", markersize=3.5, color=colors[0], label=name)
    if bad.any():
        ax.scatter(step[bad], length[bad], 14, label="not usable", **HOLLOW)

    last = float(np.nanmax([*step, floats(history, "step").max()]))
    at, longest = _held(history, "longest_step", last)
    ax.step(at, longest, where="post", color="black", linewidth=1.6, label="longest step $S$")
    reach = [length[shown], longest]
    sustained = _sustained(history, step, floats(rows, "lr"), norm)
    if (drawn := positive(sustained)).any():
        name = rf"unclipped step lr $\times$ gain $\times$ {NORM}"
        ax.plot(step[drawn], sustained[drawn], color=colors[1], linewidth=1, linestyle="--", label=name)
        reach.append(sustained[drawn])
    log_axis(ax, "y", *extent(reach))
    ax.set(xlabel="step", ylabel="length of a step [x]")
    note(ax, int((~shown).sum()))
    sns.despine(ax=ax)
    legend_below(ax, None)
    return ax


def _held(history: pd.DataFrame, column: str, last: float) -> tuple[Array, Array]:
    """Returns steps and values of a column of events, up to a last step."""
    at, value = floats(history, "step"), floats(history, column)
    return np.append(at, max(last, at[-1])), np.append(value, value[-1])


def _sustained(history: pd.DataFrame, step: Array, lr: Array, norm: Array) -> Array:
    """Returns how long unclipped steps are with a constant gradient: S / threshold is largest rate times gain."""
    at, longest, threshold, peak = (floats(history, c) for c in ("step", "longest_step", "threshold", "lr"))
    with np.errstate(divide="ignore", invalid="ignore"):
        gain = longest / threshold / peak
    event = np.clip(np.searchsorted(at, step, side="right") - 1, 0, len(at) - 1)
    found: Array = gain[event] * lr * norm
    return found
