"""Selects the rows of a trace that a fit can use: one estimator, group and kind of data; counts the other rows."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pandas as pd

from smoothdiag.console import counted
from smoothdiag.fits.base import Array
from smoothdiag.fits.columns import Labels, causes, choose_estimator, labels, names, numbers
from smoothdiag.fits.ranges import check_decades, scaled, unit
from smoothdiag.rows import NO_ROWS, Status, printable

MOMENTUM, GAIN = "momentum", "gain"
"""Facts of a trace; the gain is (1 - dampening) / (1 - momentum)."""

LEAST_DAMPENING = 1e-9
"""Less is rounding of the gain."""

Indices = npt.NDArray[np.int64]


class HasFrame(Protocol):
    """Anything that turns into a table, such as a `Trace`."""

    def to_frame(self) -> pd.DataFrame:
        """One row per step, estimator and group."""
        ...


@dataclass(frozen=True)
class Rows:
    """The usable rows of one fit in order of steps, several runs interleaved, and counts of the others by cause."""

    x: Array
    y: Array
    step: Array
    run: Array
    saturation: Array
    noise_floor: Array
    step_norm: Array
    status: Labels
    recorded: Array
    loss: Array
    grad_variance: Array
    lr: Array
    estimator: str
    group: str
    data: str
    dropped: dict[str, int]
    cost: tuple[float, float] = (math.nan, math.nan)

    @property
    def num_runs(self) -> int:
        """Number of runs that the rows come from."""
        return len(np.unique(self.run))

    @property
    def num_steps(self) -> int:
        """Number of steps that the rows come from; steps of different runs are different steps."""
        return sum(len(np.unique(self.step[self.run == run])) for run in np.unique(self.run))

    def units(self) -> tuple[int, int]:
        """Powers of two next to the median gradient norm and the median smoothness."""
        return unit(self.x), unit(self.y)

    def scaled(self, like: Rows | None = None) -> Rows:
        """The rows in their own `units` or in the units of other rows.

        Powers of two keep every digit, and the units keep products finite.
        """
        x, y = (like or self).units()
        return replace(
            self,
            x=scaled(self.x, -x),
            y=scaled(self.y, -y),
            noise_floor=scaled(self.noise_floor, -y),
            step_norm=scaled(self.step_norm, y - x),
            grad_variance=scaled(self.grad_variance, -2 * x),
            lr=scaled(self.lr, 0),
        )

    def check_range(self, like: Rows | None = None) -> None:
        """Refuses rows whose products and powers a float could not hold, together with other rows if given.

        Raises:
            ValueError: if gradient norms or smoothness cover more than `MOST_DECADES`.
        """
        beside = like or self
        for name, parts in (("gradient norms", (self.x, beside.x)), ("smoothness", (self.y, beside.y))):
            check_decades(name, np.concatenate(parts))


def step_blocks(step: Array, run: Array, num_blocks: int) -> list[Indices]:
    """Indices of the rows in order of run and step, cut into blocks of one run each.

    Each run gets a share of `num_blocks` in proportion to its number of rows, and at least one block.
    """
    order, sizes = ordered_blocks(step, run, num_blocks)
    return np.split(order, np.cumsum(sizes)[:-1])


def ordered_blocks(step: Array, run: Array, num_blocks: int) -> tuple[Indices, Indices]:
    """As `step_blocks`: the indices of all blocks, one after the other, and the sizes of the blocks."""
    order = np.lexsort((step, run))
    ends = np.append(np.flatnonzero(np.diff(run[order])) + 1, len(order))
    sizes: list[Indices] = []
    for length in np.diff(ends, prepend=0).tolist():
        share = max(1, round(num_blocks * length / len(run)))
        size, larger = divmod(length, share)
        sizes.append(np.repeat([size + 1, size], [larger, share - larger]))
    return order, np.concatenate(sizes)


def as_frame(data: object) -> pd.DataFrame:
    """The rows of a trace or table as one table; several of them are joined and numbered in the column `run`.

    Raises:
        ValueError: if `data` is none of these, has no rows, or lacks a column that every fit needs.
    """
    if isinstance(data, list | tuple):
        if not data:
            raise ValueError("Parameter `data` should hold at least one trace or table. Found none.")
        frames = [_numbered(as_frame(one), number) for number, one in enumerate(data)]
        together = pd.concat(frames, ignore_index=True)
        said = {follows_gradients(frame) for frame in frames if optimizer_of(frame)}
        together.attrs["follows_gradients"] = False if False in said else True if said == {True} else None
        for name in (MOMENTUM, GAIN):
            if len(values := {str(frame.attrs.get(name)) for frame in frames}) == 1 and values != {"None"}:
                together.attrs[name] = frames[0].attrs[name]
        together.attrs["optimizer"] = " and ".join(sorted({optimizer_of(frame) for frame in frames} - {""}))
        return together
    if not isinstance(data, pd.DataFrame) and hasattr(data, "to_frame"):
        data = data.to_frame()
    if not isinstance(data, pd.DataFrame):
        has_trace = hasattr(data, "trace") and not isinstance(data, np.ndarray)  # whose trace is a sum
        hint = "pass its `trace`" if has_trace else "read a file with `Trace.read`"
        found = repr(data) if isinstance(data, str) else type(data).__name__
        raise ValueError(
            "Parameter `data` should be an object with `to_frame`, such as a Trace, or a DataFrame with at least the "
            f"columns `grad_norm` and `smoothness`; {hint}. Found `data = {found}`."
        )
    missing = [name for name in ("grad_norm", "smoothness") if name not in data.columns]
    if missing:
        raise ValueError(f"Parameter `data` should have the columns `grad_norm` and `smoothness`. Found no {missing}.")
    if twice := sorted({str(name) for name in data.columns[data.columns.duplicated()]}):
        raise ValueError(f"Parameter `data` should have every column only once. Found {twice} more often.")
    if len(data) == 0:
        raise ValueError(f"Parameter `data` should have rows. {NO_ROWS}")
    return data


def optimizer_of(frame: pd.DataFrame) -> str:
    """The name of the class of the optimizer that took the steps; empty if it is not known."""
    return printable(str(frame.attrs.get("optimizer", "")))


def follows_gradients(frame: pd.DataFrame) -> bool | None:
    """Whether its steps are the learning rate times an average of gradients; None if the rows do not say."""
    said = frame.attrs.get("follows_gradients")
    return said if isinstance(said, bool) else None


def momentum_of(frame: pd.DataFrame) -> float:
    """The momentum of the optimizer at the start of the run; NaN if the rows do not say."""
    said = frame.attrs.get(MOMENTUM)
    return float(said) if isinstance(said, int | float) and 0 <= said < 1 else math.nan


def dampening_of(frame: pd.DataFrame) -> float:
    """The dampening of the optimizer at the start of the run; NaN if the rows do not say."""
    momentum, gain = momentum_of(frame), frame.attrs.get(GAIN)
    if math.isnan(momentum) or not isinstance(gain, int | float):
        return math.nan
    found = 1 - gain * (1 - momentum)
    return (found if found > LEAST_DAMPENING else 0.0) if -LEAST_DAMPENING < found < 1 else math.nan


def clip_mode_of(frame: pd.DataFrame) -> str:
    """The mode of the AutoClip that the run had last; empty without one."""
    modes = frame["clip_mode"].dropna().tolist() if "clip_mode" in frame.columns else []
    return printable(str(modes[-1])) if modes else ""


def _numbered(frame: pd.DataFrame, number: int) -> pd.DataFrame:
    own = frame["run"].map(lambda name: f"{number}/{name}") if "run" in frame.columns else str(number)
    step = frame["step"] if "step" in frame.columns else np.arange(len(frame))
    return frame.assign(run=own, step=step)


def companion(frame: pd.DataFrame, estimator: str, rows: Rows) -> Rows | None:
    """Rows of another estimator for the same group and kind of data; None if it has no usable rows."""
    if "estimator" not in frame.columns:
        return None
    beside = frame[frame["estimator"] == estimator]
    if "data" in frame.columns:
        beside = beside[beside["data"] == rows.data]
    try:
        return select_rows(beside, estimator, rows.group) if len(beside) else None
    except ValueError:
        return None


def select_rows(frame: pd.DataFrame, estimator: str | None, group: str) -> Rows:
    """Rows of one estimator and group that a fit can use.

    Rows with a saturated status stay: they are the steep ones, and leaving out rows for their high smoothness would
    bias the line. Rows with a smoothness of zero are dropped: zero has no relative error, and no noise floor below it.

    Args:
        frame: from `as_frame`.
        estimator: name of the estimator; None prefers "local", "path", "hessian_norm", then the only one there is.
        group: parameter group.

    Raises:
        ValueError: if estimators or kinds of data would be mixed, if no row is usable, or if a run has no usable row.
    """
    label = labels(frame)
    number = numbers(frame)
    in_group = label["group"] == (group := str(group))
    if not in_group.any():
        raise ValueError(f"Parameter `group` should be one of {names(label['group'])}. Found `group = {group!r}`.")
    cause = causes(label["status"], number)
    usable = cause == ""
    if estimator is None:
        estimator = choose_estimator(label["estimator"][in_group], usable[in_group])
    chosen = in_group & (label["estimator"] == estimator)
    if not chosen.any():
        known = names(label["estimator"][in_group])
        raise ValueError(f"Parameter `estimator` should be one of {known}. Found `estimator = {estimator!r}`.")
    dropped = Counter(cause[chosen & ~usable].tolist())
    if not (chosen & usable).any():
        counts = ", ".join(f"{name}: {count}" for name, count in sorted(dropped.items()))
        most = max(dropped, key=lambda name: dropped[name])
        remedy = next((f" Most are {most}: {status.value}" for status in Status if status.name.lower() == most), "")
        raise ValueError(
            f"Parameter `data` should have usable rows for the group {group!r} and the estimator {estimator!r}. "
            f"Found {counted(int(chosen.sum()), 'row')}, all dropped ({counts}).{remedy}"
        )
    kinds = names(label["data"][chosen & usable])
    if len(kinds) > 1:
        raise ValueError(
            f"Parameter `data` should hold rows measured on one kind of data. Found {kinds}: give each a "
            f"file of its own, or in Python pass one kind, as in `trace.to_frame().query('data == {kinds[0]!r}')`."
        )
    if lost := sorted(set(label["run"][in_group]) - set(label["run"][chosen & usable])):
        raise ValueError(
            f"Parameter `data` should have usable rows of every run for the group {group!r} and the estimator "
            f"{estimator!r}. Found none of the runs {lost}; leave these runs out."
        )
    outside = {"other_group": int((~in_group).sum()), "other_estimator": int((in_group & ~chosen).sum())}
    keep = np.flatnonzero(chosen & usable)
    # A resumed run keeps other fixed batches, so its rows are about another loss: they count as another run.
    own = pd.factorize(label["run"], sort=True)[0]
    resumed = np.unique(number["data_step"], return_inverse=True)[1]
    run = np.unique(own * (np.max(resumed) + 1) + resumed, return_inverse=True)[1].astype(np.float64)
    keep = keep[np.lexsort((run[keep], number["step"][keep]))]
    gradients = number["grad_norm"][chosen]
    return Rows(
        x=number["grad_norm"][keep],
        y=number["smoothness"][keep],
        step=number["step"][keep],
        run=run[keep],
        saturation=number["saturation"][keep],
        noise_floor=number["noise_floor"][keep],
        step_norm=number["step_norm"][keep],
        status=label["status"][keep],
        loss=number["loss"][keep],
        grad_variance=number["grad_variance"][keep],
        lr=number["lr"][keep],
        recorded=gradients[np.isfinite(gradients) & (gradients > 0)],
        estimator=estimator,
        group=group,
        data=kinds[0],
        dropped=dict(sorted(dropped.items())) | {name: count for name, count in outside.items() if count},
        cost=_cost(number, keep),
    )


def _cost(number: dict[str, Array], keep: Indices) -> tuple[float, float]:
    """Median gradients and median seconds of a row; NaN if unknown. A Hessian-vector product is two gradients."""
    gradients, products = (np.nan_to_num(number[name][keep]) for name in ("num_grads", "num_hvps"))
    # Products from differences of gradients are among the gradients already: at least one of these for each product.
    gradients = gradients + np.where(gradients < products, 2 * products, 0)
    known = [values[values > 0] for values in (gradients, np.nan_to_num(number["seconds"][keep]))]
    first, second = (float(np.median(values)) if len(values) else math.nan for values in known)
    return first, second
