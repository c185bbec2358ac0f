"""Several fits side by side: one per parameter group, or one per run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from smoothdiag.console import counted
from smoothdiag.fits.base import SmoothnessFit, Verdict
from smoothdiag.fits.columns import labels
from smoothdiag.fits.plan import headline as headline_of
from smoothdiag.fits.text import RULE, THIN, fixed, interval, table, wrap
from smoothdiag.fits.wording import GLOSSARY, Headline
from smoothdiag.notebooks import as_html
from smoothdiag.rows import printable

WHOLE = "all"
MOST_NAMED = 3  # Groups that the first line of a summary lists by name.


@dataclass(frozen=True, eq=False, repr=False)
class GroupFits(Mapping[str, SmoothnessFit]):
    """The fits of several parameter groups, by the name of the group; "all" comes first.

    Attributes:
        fits: the fits by group.
        failed: for each group whose rows cannot be fitted, the reason.

    Examples:
        >>> import pandas as pd
        >>> norms = 10 ** torch.arange(200.0).sin().double().numpy()
        >>> rows = [pd.DataFrame({"group": f"layer{k}", "grad_norm": norms, "smoothness": k + norms}) for k in (1, 2)]
        >>> fits = sd.fit_groups(pd.concat(rows), num_boot=20)
        >>> print({name: round(fit.L0, 2) for name, fit in fits.items()}, len(fits.failed))
        {'layer1': 1.0, 'layer2': 2.0} 0
    """

    fits: dict[str, SmoothnessFit]
    failed: dict[str, str] = field(default_factory=dict)

    def __getitem__(self, group: str) -> SmoothnessFit:
        if group in self.failed:
            raise KeyError(f"{group!r} has no fit: {self.failed[group]}")
        return self.fits[group]

    def __iter__(self) -> Iterator[str]:
        return iter(self.fits)

    def __len__(self) -> int:
        return len(self.fits)

    def table(self) -> pd.DataFrame:
        """One row per group; groups without a fit come last.

        Returns:
            DataFrame: by `group`, with the columns of `compare_runs`.
        """
        return _frame(self.fits, self.failed).rename_axis("group").drop(columns="group")

    def summary(self) -> str:
        """The fits as a table to read."""
        return _summarise(self.fits, self.failed, "group")

    def __str__(self) -> str:
        return self.summary()

    def _repr_html_(self) -> str:
        reasons = [f"{name}: {fit.verdict_reason}" for name, fit in self.fits.items()]
        reasons += [f"{name} has no fit: {reason}" for name, reason in self.failed.items()]
        return as_html("\n".join([*headline(self), *reasons]), self.table().drop(columns="reason"))

    def __repr__(self) -> str:
        without = f", {counted(len(self.failed), 'group')} without a fit" if self.failed else ""
        return f"<GroupFits of {counted(len(self.fits), 'group')}{without}; print it for all>"


def headline(fit: SmoothnessFit | GroupFits) -> Headline:
    """The verdict of a fit, or of the fits of several groups, and what to do next, a line each.

    The summary begins with these two lines.
    """
    return headline_of(fit) if isinstance(fit, SmoothnessFit) else _headline(fit.fits, fit.failed)


def compare_runs(fits: Mapping[str, SmoothnessFit]) -> pd.DataFrame:
    """Puts the fits of several runs, optimizers or models into one table, under names of your choice.

    Args:
        fits: the fits by name.

    Returns:
        DataFrame: by `run`, in the given order, with the columns `L0`, `L0_low`, `L0_high`, `L1`, `L1_low`, `L1_high`,
        `decades`, `num_points`, `num_effective`, `verdict`, `reason`, `estimator`, `group`, `data` and `quantile`.

    Raises:
        ValueError: if `fits` is empty or holds anything but fits.

    Units: L0 [f/x^2], L1 [1/x]. These constants cannot be compared between runs whose losses or parameters have
        different scales.

    Examples:
        >>> import pandas as pd
        >>> norms = 10 ** torch.arange(200.0).sin().double().numpy()
        >>> runs = {f"run {k}": pd.DataFrame({"grad_norm": norms, "smoothness": 1 + k * norms}) for k in (2, 3)}
        >>> fits = {name: sd.fit_smoothness(run, num_boot=20) for name, run in runs.items()}
        >>> print(sd.compare_runs(fits)[["L0", "L1", "verdict"]].round(2))
                L0   L1 verdict
        run
        run 2  1.0  2.0    L0L1
        run 3  1.0  3.0    L0L1
    """
    wrong = [name for name, fit in fits.items() if not isinstance(fit, SmoothnessFit)]
    if wrong or not fits:
        found = f"{type(fits[wrong[0]]).__name__} at {wrong[0]!r}" if wrong else "none"
        raise ValueError(f"Parameter `fits` should hold fits by name. Found {found}.")
    return _frame(fits, {}).rename_axis("run")


def fit_each(
    frame: pd.DataFrame, groups: Sequence[str] | None, fitter: Callable[..., SmoothnessFit], options: dict[str, Any]
) -> GroupFits:
    """Fits one group after the other, all of them to rows of the same estimator.

    Args:
        frame: rows of all groups.
        groups: the groups to fit; None takes all groups.
        fitter: function that fits one group.
        options: passed on to `fitter`.

    Raises:
        ValueError: if a group is unknown, or no group can be fitted.
    """
    named = dict.fromkeys(labels(frame)["group"].tolist())
    present = sorted(named, key=lambda name: name != WHOLE)  # Stable: the others as recorded.
    asked = present if groups is None else [groups] if isinstance(groups, str) else [str(name) for name in groups]
    if unknown := [name for name in asked if name not in present]:
        raise ValueError(f"Parameter `groups` should hold some of {present}. Found {unknown}.")
    if not asked:
        raise ValueError(f"Parameter `groups` should hold some of {present}. Found none.")
    fits: dict[str, SmoothnessFit] = {}
    failed: dict[str, str] = {}
    first: ValueError | None = None
    for group in asked:
        try:
            fits[group] = fitter(frame, group=group, **options)
        except ValueError as error:
            failed[group], first = str(error), first or error
            continue
        # Constants of different estimators measure different things, and one table would compare them.
        options = options | {"estimator": fits[group].estimator}
    if first is not None and not fits:
        raise first
    return GroupFits(fits, failed)


def _frame(fits: Mapping[str, SmoothnessFit], failed: Mapping[str, str]) -> pd.DataFrame:
    rows: dict[str, dict[str, Any]] = {name: _row(fit) for name, fit in fits.items()}
    rows |= {name: {"verdict": None, "reason": reason} for name, reason in failed.items()}
    return pd.DataFrame.from_dict(rows, orient="index")


def _row(fit: SmoothnessFit) -> dict[str, Any]:
    return {
        "L0": fit.L0,
        "L0_low": fit.L0_interval[0],
        "L0_high": fit.L0_interval[1],
        "L1": fit.L1,
        "L1_low": fit.L1_interval[0],
        "L1_high": fit.L1_interval[1],
        "decades": fit.decades,
        "num_points": fit.num_points,
        "num_effective": fit.num_effective,
        "verdict": fit.verdict.name,
        "reason": fit.verdict_reason,
        "estimator": fit.estimator,
        "group": fit.group,
        "data": fit.data,
        "quantile": fit.quantile,
    }


def _headline(fits: Mapping[str, SmoothnessFit], failed: Mapping[str, str]) -> Headline:
    """How many groups have which verdict, and the next step of the whole or, without it, of the first group."""
    number = len(fits) + len(failed)
    of = {verdict.name: [name for name, fit in fits.items() if fit.verdict is verdict] for verdict in Verdict}
    of["no fit"] = list(failed)
    said = "; ".join(f"{verdict} {len(names)} of {number}{_named(names)}" for verdict, names in of.items() if names)
    first = next(iter(fits))
    of_first = "" if first == WHOLE else f" ({first})"
    return Headline(printable(f"VERDICTS: {said}."), printable(f"{headline_of(fits[first]).next}{of_first}"))


def _named(names: Sequence[str]) -> str:
    return f" ({', '.join(names)})" if len(names) <= MOST_NAMED else ""


def _summarise(fits: Mapping[str, SmoothnessFit], failed: Mapping[str, str], kind: str) -> str:
    """One line per fit, and for each group without a fit the reason."""
    some = next(iter(fits.values()))
    level = f"{some.interval_level:.0%} interval"
    head = [kind, "L0", level, "L1", level, "decades", "rows", "worth", "verdict"]
    cells = [
        [
            name,
            f"{fit.L0:.3g}",
            interval(fit.L0_interval, ".3g"),
            f"{fit.L1:.3g}",
            interval(fit.L1_interval, ".3g"),
            fixed(fit.decades, 2),
            str(fit.num_points),
            "-" if math.isnan(fit.num_effective) else f"{fit.num_effective:.0f}",
            fit.verdict.name,
        ]
        for name, fit in fits.items()
    ]
    lines = table([head, *cells])
    width = max(len(lines[0]), len(RULE))
    rule, thin = RULE[0] * width, THIN[0] * width
    out = [*_headline(fits, failed), rule]
    out += [f"smoothness <= L0 + L1 * gradient norm, quantile {some.quantile:g}, estimator {some.estimator}", thin]
    out += [lines[0], thin, *lines[1:], thin]
    for name, reason in failed.items():
        out += wrap(f"{name} has no fit", reason)
    out.append("worth: independent rows with the same information; L0 [loss / parameter^2], L1 [1 / parameter]")
    return "\n".join(map(printable, [*out, GLOSSARY, rule]))
