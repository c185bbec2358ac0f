"""plot_sharpness: curvature over the steps, with the limit at which the optimizer becomes unstable."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from smoothdiag.console import counted
from smoothdiag.names import readable
from smoothdiag.plots.common import Array, check_axes, floats, positive, rows_of_group
from smoothdiag.plots.density import draw_hollow, draw_series
from smoothdiag.plots.looks import current_axes, extent, head, legend_below, limits, log_axis, outside
from smoothdiag.rows import USABLE_STATUSES

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from matplotlib.axes import Axes

    from smoothdiag.trace import Trace

_RECORDED_BY: Final = {
    "sharpness": "Sharpness()",
    "hessian_norm": "HessianNorm()",
    "batch_sharpness": "DirectionalCurvature()",
    "curvature_update": 'DirectionalCurvature("update")',
    "critical_step": "CriticalStep()",
}
_PRECONDITIONED: Final = "_preconditioned"
_LOOKS: Final[dict[str, tuple[int, str, Any]]] = {
    "sharpness": (0, "o", "-"),
    "hessian_norm": (9, "s", (0, (6, 2))),
    "batch_sharpness": (2, "^", "-"),
    "curvature_update": (3, "v", ":"),
    "critical_step": (1, "D", (0, (5, 1, 1, 1, 1, 1))),
}
"""Colour of the palette, marker and dashes."""

_SAME: Final = 0.01
"""Relative difference of two lines below which they are drawn as one: the width of a line on an axis of three
decades."""

_LINE_REACH: Final = 100.0
"""Factor by which a line may stretch the axis beyond the points. At the rates near zero of warm-up and decay, lines lie
far away."""


def plot_sharpness(
    data: Trace | pd.DataFrame,
    *,
    estimators: str | Sequence[str] | None = None,
    group: str = "all",
    ax: Axes | None = None,
) -> Axes:
    """Draws curvature over the steps, with the limit at which the optimizer becomes unstable.

    The limit is the column ``stability_limit``: the largest eigenvalue at which the optimizer does not diverge on a
    quadratic at the learning rate of that step. It is 2/lr for gradient descent, (2 + 2 beta)/lr with momentum, and
    38/lr for Adam with beta1 = 0.9 in the norm that Adam divides by. That limit is for the sharpness under full
    batches. With momentum a dashed line, the small-batch limit, shows ``stability_limit_small_batch``, (2 - 2 beta)/lr:
    compare the batch sharpness of small batches with it. If the limit differs from 2/lr, a faint line shows 2/lr as
    well: the critical step depends on the update alone, so its limit is 2/lr with any momentum.

    Rows that fits may not use are hollow. A note above the axes counts rows that a logarithmic axis cannot show, such
    as negative curvature, and outliers that would squeeze all other rows. More than 5000 rows of an estimator are drawn
    as the median and the range of stretches of rows.

    Args:
        data: A trace, or its DataFrame.
        estimators: Names, as in the trace, of the estimators whose rows to draw; they must come from Sharpness,
            HessianNorm, DirectionalCurvature or CriticalStep. None takes all estimators in the norm of the limit: the
            preconditioned ones if any of them has a limit, else the ones of the plain Hessian.
        group: Parameter group whose rows to draw.
        ax: Axes to draw on; None takes the current axes.

    Returns:
        The axes drawn on.

    Raises:
        ValueError: If ``data`` has no such rows, or none that a logarithmic axis can show, or if ``estimators`` mixes
            the plain Hessian with the preconditioned one.

    Units: y axis [loss / parameter^2]; [1 / parameter] for preconditioned curvature, where P has the unit of a
    gradient.

    Examples:
        >>> import pandas as pd, matplotlib.pyplot as plt
        >>> curvature = {"estimator": "sharpness", "grad_norm": 1.0, "smoothness": [4.0, 12.0, 20.0], "lr": 0.1}
        >>> table = pd.DataFrame({"step": [0, 20, 40], **curvature, "stability_limit": 20.0})
        >>> ax = sd.plot_sharpness(table, ax=plt.subplots()[1])
        >>> print(ax.get_legend_handles_labels()[1])
        ['sharpness', 'stability limit, 2/lr']
    """
    if ax is not None:
        check_axes("ax", ax)
    rows, names = _choose(rows_of_group(data, group), estimators, group)
    value, usable = floats(rows, "smoothness"), rows["status"].isin(USABLE_STATUSES).to_numpy()
    shown = positive(value)
    if not shown.any():
        raise ValueError(
            "Parameter `data` should have rows whose curvature is positive and finite. "
            f"Found {counted(len(rows), 'row')} of {names}, group `{group}`, without such a value."
        )

    import seaborn as sns

    ax = current_axes() if ax is None else ax
    colors = sns.color_palette("colorblind")
    step, hollow_label = floats(rows, "step"), "not usable"
    for name in names:
        of_name = (rows["estimator"] == name).to_numpy()
        good, bad = of_name & shown & usable, of_name & shown & ~usable
        color, marker, dashes = _LOOKS[name.removesuffix(_PRECONDITIONED)]
        every = max(1, int(good.sum()) // 20)  # Enough markers to tell lines apart, but few enough to see the lines.
        look: dict[str, Any] = {
            "color": colors[color],
            "marker": marker,
            "markersize": 4,
            "markevery": every,
            "linestyle": dashes,
            "linewidth": 1,
        }
        draw_series(ax, step[good], value[good], label=readable(name), alpha=0.85, **look)
        draw_hollow(ax, step, value, bad, 14, hollow_label, marker=marker)
        if bad.any():
            hollow_label = "_" + hollow_label  # One entry in the legend stands for all.
    reach = [np.array(limits(value[shown]))]
    reach += _draw_limits(ax, rows, extent(reach), of_critical="critical_step" in names)

    unlike = rows["preconditioned"].iloc[0]
    label = "preconditioned\ncurvature [1 / parameter]" if unlike else "curvature [loss / parameter$^2$]"
    ax.set(xlabel="step", ylabel=label)
    log_axis(ax, "y", *extent(reach))
    sns.despine(ax=ax)
    head(ax, "Curvature over the steps", group, log=int((~shown).sum()), beyond=outside(ax, step, value, shown))
    legend_below(ax, None)
    return ax


def _choose(frame: pd.DataFrame, estimators: str | Sequence[str] | None, group: str) -> tuple[pd.DataFrame, list[str]]:
    """Returns the rows to draw in order of steps, all in one norm, and the names of their estimators."""
    present = set(frame["estimator"])
    known = [name + suffix for name in _RECORDED_BY for suffix in ("", _PRECONDITIONED)]
    found = [name for name in known if name in present]
    if not found:
        raise ValueError(
            "Parameter `data` should have rows of an estimator of curvature, one of "
            f"{', '.join(_RECORDED_BY.values())} in Probe(..., estimators=[...]). "
            f"Found rows of {sorted(present)} in group `{group}`."
        )
    # If the optimizer divides by P, its rate and the critical rate have the unit of 1 / (P^-1/2 H P^-1/2).
    divides = any(name.endswith(_PRECONDITIONED) for name in present)
    norms = {name: name.endswith(_PRECONDITIONED) or (name == "critical_step" and divides) for name in found}
    if estimators is None:
        limited = frame[frame["stability_limit"].notna() & frame["estimator"].isin(found)]["estimator"]
        preconditioned = any(name.endswith(_PRECONDITIONED) for name in limited) or all(norms.values())
        names = [name for name in found if norms[name] == preconditioned]
    else:
        asked = list(estimators) if isinstance(estimators, list | tuple) else [estimators]
        if not asked or not all(name in found for name in asked):
            raise ValueError(f"Parameter `estimators` should hold some of {found}. Found `estimators = {asked!r}`.")
        names = [name for name in found if name in asked]
        if len({norms[name] for name in names}) > 1:
            raise ValueError(
                "Parameter `estimators` should hold either preconditioned estimators or others, because their units "
                "and limits differ; `critical_step` belongs to the norm of its optimizer. "
                f"Found `estimators = {asked!r}`: {[name for name in names if norms[name]]} are preconditioned, "
                f"and {[name for name in names if not norms[name]]} are not."
            )
    preconditioned = norms[names[0]]
    rows = frame[frame["estimator"].isin(names)].sort_values("step", kind="stable")
    # 2/lr belongs to the norm in which the optimizer moves; for curvature in the other norm its unit would be wrong.
    lr = rows["lr"] if preconditioned == divides else np.nan
    return rows.assign(preconditioned=preconditioned, lr=lr), names


def _draw_limits(ax: Axes, rows: pd.DataFrame, near: tuple[float, float], *, of_critical: bool) -> list[Array]:
    """Draws the limits of stability over the steps, and 2/lr if it differs; returns the heights near the points."""
    import seaborn as sns

    pink = sns.color_palette("colorblind")[4]  # the colour of 2/lr in the other figures
    # Rows without a limit of their own share the limit of their step.
    columns = {name: floats(rows, name) for name in ("stability_limit", "stability_limit_small_batch", "lr")}
    by_step = rows[["step"]].assign(**columns).groupby("step").first()
    step, *found = floats(by_step.reset_index(), "step"), *(floats(by_step, name) for name in columns)
    limit, small, lr = (np.where(positive(line), line, np.nan) for line in found)
    black: dict[str, Any] = {"color": "black", "linewidth": 1.2, "zorder": 3, "linestyle": "-."}
    lines: list[tuple[Array, str, dict[str, Any]]] = [(limit, "stability limit" + _factor(limit, lr), black)]
    if np.isfinite(small).any() and not _is_same(small, limit):
        lines = [(limit, "full-batch limit" + _factor(limit, lr), black)]
        lines.append((small, "small-batch limit" + _factor(small, lr), black | {"linestyle": "--"}))
    seen = [line for line, *_ in lines]
    if not any(_is_same(line, 2 / lr) for line in (seen[:1] if of_critical else seen)):
        name = "2/lr, limit of the critical step" if of_critical else "2/lr"
        look: dict[str, Any] = {"color": pink, "linewidth": 1.2, "alpha": 0.6, "zorder": 1.6, "linestyle": "-."}
        lines.append((2 / lr, name, look))
    worth = []
    low, high = near[0] / _LINE_REACH, near[1] * _LINE_REACH
    for height, label, look in lines:
        there = height[np.isfinite(height)]
        if there.size:
            far = ", far above" if there.min() > high else ", far below" if there.max() < low else ""
            marker = "_" if len(step) == 1 else ""  # A line needs two steps.
            ax.step(step, height, where="post", marker=marker, label=label + far, **look)
            worth.append(there[(low <= there) & (there <= high)])
    return worth


def _is_same(line: Array, other: Array) -> bool:
    return bool(np.allclose(line, other, rtol=_SAME, atol=0, equal_nan=True))


def _factor(line: Array, lr: Array) -> str:
    """Returns what a line times the rate is, for the legend; nothing if that changes from step to step."""
    factor = (line * lr)[np.isfinite(line * lr)]
    return f", {factor[0]:.3g}/lr" if factor.size and np.ptp(factor) < 1e-3 * factor[0] else ""
