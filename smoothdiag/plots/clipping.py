"""plot_clipping: the lengths that AutoClip measured, the longest step that it derived, and the length of the steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np

from smoothdiag import arguments
from smoothdiag.plots.common import Array, as_table, check_axes, floats, positive, select
from smoothdiag.plots.density import DENSE, draw_hollow, draw_series
from smoothdiag.plots.looks import NORM, current_axes, extent, head, legend_below, limits, log_axis, outside
from smoothdiag.rows import CLIP_SUFFIX, USABLE_STATUSES

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from smoothdiag.trace import Trace


class Clipper(Protocol):
    """Anything with a trace and a history, such as an AutoClip."""

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
    """Draws measured lengths, the longest step, and the length of steps without clipping, over the steps.

    A measured length is the step at which a quadratic with the measured curvature is lowest: ||g||/L along the
    gradient, or -slope/curvature if AutoClip's estimator measures a slope. A step without clipping is rate times gain
    of the momentum times gradient norm; it is drawn if the history has a threshold. If it lies above the longest step,
    AutoClip clipped the step.

    Args:
        data: An AutoClip, or the trace of its probe.
        history: The ``history`` of the AutoClip, which has every event. None takes the one of an AutoClip, or of a
            trace the longest step at each measurement, if its rows have the columns longest_step, threshold and
            peak_lr.
        ax: Axes to draw on; None takes the current axes.

    Returns:
        The axes.

    Raises:
        ValueError: If there is no history, or the trace has no rows to draw.

    Units: lengths [parameter].

    Examples:
        >>> import pandas as pd, matplotlib.pyplot as plt
        >>> rows = pd.DataFrame({"estimator": "local_clip", "step": [0, 1], "grad_norm": [4, 1], "smoothness": 2})
        >>> history = pd.DataFrame({"step": [1], "longest_step": [0.9], "threshold": [0.9], "lr": [1.0]})
        >>> ax = sd.plot_clipping(rows, history=history, ax=plt.subplots()[1])  # or sd.plot_clipping(clipper)
        >>> print(ax.get_lines()[0].get_ydata())  # the measured lengths, grad_norm / smoothness
        [2.  0.5]
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
    history = recorded(frame) if history is None else history
    if history is None or history.empty:
        raise ValueError(
            "Parameter `history` should be the history of an AutoClip that has taken a step, as `clipper.history` is. "
            f"Found {'none' if history is None else 'an empty table'}."
        )
    if missing := [name for name in ("step", "longest_step", "threshold", "lr") if name not in history]:
        raise ValueError(
            f"Parameter `history` should have the columns of an AutoClip's. Missing: {', '.join(missing)}."
        )
    names = sorted({name for name in frame.get("estimator", ()) if str(name).endswith(CLIP_SUFFIX)})
    if len(names) != 1:
        raise ValueError(
            "Parameter `data` should have rows that one AutoClip asked for, of an estimator such as "
            f"`local{CLIP_SUFFIX}`. Found rows of {names or sorted(map(str, set(frame.get('estimator', ()))))}."
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
    dots: dict[str, Any] = {"color": colors[0], "marker": "o", "markersize": 3.5}
    draw_series(
        ax, step[good], length[good], label=name, **dots | ({} if good.sum() > DENSE else {"linestyle": "none"})
    )
    draw_hollow(ax, step, length, bad, 14, "not usable")

    last = float(np.nanmax([*step, floats(history, "step").max()]))
    at, longest = _held(history, "longest_step", last)
    ax.step(at, longest, where="post", color="black", linewidth=1.6, label="longest step $S$")
    reach = [np.array(limits(length[shown])), longest] if shown.any() else [longest]
    sustained = _sustained(history, step, floats(rows, "lr"), norm)
    if (drawn := positive(sustained)).any():
        name = rf"unclipped step lr $\times$ gain $\times$ {NORM}"
        draw_series(ax, step[drawn], sustained[drawn], label=name, color=colors[1], linewidth=1, linestyle="--")
        reach.append(np.array(limits(sustained[drawn])))
    log_axis(ax, "y", *extent(reach))
    ax.set(xlabel="step", ylabel="length of a step [parameter]")
    beyond = outside(ax, step, length, shown)
    head(ax, "Steps, and the longest that AutoClip allows", log=int((~shown).sum()), beyond=beyond)
    sns.despine(ax=ax)
    legend_below(ax, None)
    return ax


def recorded(frame: pd.DataFrame) -> pd.DataFrame | None:
    """Returns what AutoClip held at each of its measurements, as its ``history`` does; None if the rows do not tell."""
    if not {"step", "estimator", "longest_step"} <= set(frame.columns):
        return None
    import pandas as pd

    ours = frame[frame["estimator"].astype(str).str.endswith(CLIP_SUFFIX)]
    # Where updates are shortened there is no threshold, and none where groups differ.
    found: pd.DataFrame = ours.reindex(columns=["step", "longest_step", "threshold", "peak_lr", "clip_fraction"])
    found = found.apply(pd.to_numeric, errors="coerce").rename(columns={"peak_lr": "lr"})
    return found[found["longest_step"].notna()].sort_values("step", kind="stable", ignore_index=True)


def _held(history: pd.DataFrame, column: str, last: float) -> tuple[Array, Array]:
    """Returns steps and values of a column of events, up to a last step."""
    at, value = floats(history, "step"), floats(history, column)
    return np.append(at, max(last, at[-1])), np.append(value, value[-1])


def _sustained(history: pd.DataFrame, step: Array, lr: Array, norm: Array) -> Array:
    """Returns the length of unclipped steps for a constant gradient; S / threshold is largest rate times gain."""
    at, longest, threshold, peak = (floats(history, c) for c in ("step", "longest_step", "threshold", "lr"))
    with np.errstate(divide="ignore", invalid="ignore"):
        gain = longest / threshold / peak
    event = np.clip(np.searchsorted(at, step, side="right") - 1, 0, len(at) - 1)
    found: Array = gain[event] * lr * norm
    return found
