"""The result of a fit: `SmoothnessFit`, with its flags, its verdict and its summary."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from smoothdiag.console import counted
from smoothdiag.fits.parts import Array, Correction, Flag, HessianCheck, Interval, ModelScore, Verdict
from smoothdiag.fits.plain import decode, encode
from smoothdiag.fits.text import RULE, THIN, cost, fixed, free_exponent, hessian_cost, interval, number, wrap
from smoothdiag.rows import printable

__all__ = ["Array", "Correction", "Flag", "HessianCheck", "Interval", "ModelScore", "SmoothnessFit", "Verdict"]

FORMAT_VERSION = 1


@dataclass(frozen=True, repr=False)
class SmoothnessFit:
    """The (L0, L1) law fitted to a trace, with everything needed to doubt it.

    Attributes:
        L0: intercept of the quantile line.
        L1: slope of the quantile line.
        L0_interval: bootstrap interval of L0 at `interval_level`; (0, inf) if there are too few steps.
        L1_interval: bootstrap interval of L1, likewise.
        interval_level: level of the intervals.
        quantile: level of the line: the share of rows that should lie below it.
        num_points: number of rows in the fit.
        num_effective: number of independent rows with the same information.
        block_length: mean block length of the bootstrap, in steps.
        decades: range of the gradient norms in powers of ten, between their 2.5% and 97.5% quantiles.
        spearman: rank correlation of gradient norm and smoothness; NaN if one of them is constant.
        partial_spearman: rank correlation with the effect of the step taken out; NaN if gradient norm or smoothness
            follows the step too closely.
        loglog_slope: slope of log smoothness on log gradient norm.
        implied_slope: log-log slope of the same rows if they lay exactly on the fitted line.
        coverage: share of rows at or below the line.
        median_saturation: median of the saturation; NaN if it was not recorded.
        lines: (L0, L1) of other lines: quantile lines by level, "hard" envelope, "mean" (non-negative least squares).
        comparison: scores of constant, line, power, isotonic and, if losses are known, loss gap, on later steps.
        flags: doubts, fatal ones first.
        verdict: the outcome.
        verdict_reason: reason for the verdict, in words.
        estimator: estimator of the rows.
        group: parameter group of the rows.
        data: what the rows were measured on: "step", "fixed", "held-out" or "unspecified".
        dropped: number of rows left out, by cause.
        grad_norm_quantiles: 101 quantiles of all recorded gradient norms, 0% to 100%.
        corners: points (L1, L0) where the frontier changes slope.
        num_runs: number of runs that the rows come from; with one run the intervals say nothing about other seeds.
        interval_freedom: degrees of freedom of the intervals; the fewer, the wider the intervals.
        replicates: (L0, L1) of the first resamples, for intervals of quantities that depend on both; empty if there
            are too few steps.
        loss_floors: scores of the loss gap for each f* on a grid below the smallest loss, closest first. They show how
            much exponent and skill depend on the unknown minimum. Empty without losses.
        corrected: constants without the errors of the gradient norm; None if these errors are unknown, negligible
            or too large to correct.
        optimizer: class of the optimizer that took the steps; "A and B" for runs that differ, empty if not known.
        follows_gradients: whether its steps are the learning rate times an average of gradients, clipped or not; None
            if the rows do not say.
        exponent_interval: interval of the exponent of the power model at `interval_level`; NaN if it was not found.
        hessian: what the rows of "hessian_norm" beside the fitted rows say about the law; None without such rows.
        spread: standard deviation of log smoothness around the median line.
        row_cost: median number of gradients and median seconds that a row took; NaN where the rows do not say. A
            Hessian-vector product counts as two gradients.
        num_scans: number of lines that a scan measured along; 0 for rows of a run.

    Units: L0 [f/x^2], L1 [1/x], gradient norms [f/x].

    Examples:
        >>> import pandas as pd
        >>> norms = 10 ** torch.arange(200.0).sin().double().numpy()
        >>> table = pd.DataFrame({"grad_norm": norms, "smoothness": 1 + 2 * norms, "saturation": 0.1})
        >>> fit = sd.fit_smoothness(table, num_boot=50)
        >>> print(fit.verdict.name, fit.predict(3.0).round(2), round(fit.step_cap, 2), round(fit.max_lr, 2))
        L0L1 7.0 0.5 1.0
    """

    L0: float
    L1: float
    L0_interval: Interval
    L1_interval: Interval
    interval_level: float
    quantile: float
    num_points: int
    num_effective: float
    block_length: float
    decades: float
    spearman: float
    partial_spearman: float
    loglog_slope: float
    implied_slope: float
    coverage: float
    median_saturation: float
    lines: dict[str, tuple[float, float]]
    comparison: tuple[ModelScore, ...]
    flags: tuple[Flag, ...]
    verdict: Verdict
    verdict_reason: str
    estimator: str
    group: str
    data: str
    dropped: dict[str, int]
    grad_norm_quantiles: tuple[float, ...]
    corners: tuple[tuple[float, float], ...]
    num_runs: int = 1
    interval_freedom: float = math.inf
    replicates: tuple[tuple[float, float], ...] = ()
    loss_floors: tuple[ModelScore, ...] = ()
    corrected: Correction | None = None
    optimizer: str = ""
    follows_gradients: bool | None = None
    exponent_interval: Interval = (math.nan, math.nan)
    hessian: HessianCheck | None = None
    spread: float = math.nan
    row_cost: Interval = (math.nan, math.nan)
    num_scans: int = 0

    @property
    def step_cap(self) -> float:
        """Longest step that the law allows, 1/L1; infinite if L1 is zero. Units: [x]."""
        return 1 / self.L1 if self.L1 > 0 else math.inf

    @property
    def max_lr(self) -> float:
        """Largest learning rate at a vanishing gradient, 1/L0; infinite if L0 is zero. Units: [x^2/f]."""
        return 1 / self.L0 if self.L0 > 0 else math.inf

    @property
    def step_cap_interval(self) -> Interval:
        """Interval of `step_cap`: one over the interval of L1; infinite if L1 may be zero. Units: [x]."""
        return _inverse(self.L1_interval)

    @property
    def max_lr_interval(self) -> Interval:
        """Interval of `max_lr`: one over the interval of L0; infinite if L0 may be zero. Units: [x^2/f]."""
        return _inverse(self.L0_interval)

    def predict(self, grad_norm: npt.ArrayLike) -> Array:
        """Smoothness L0 + L1 * grad_norm on the fitted line. Units: [f/x^2] for gradient norms in [f/x]."""
        norm = np.asarray(grad_norm, dtype=np.float64)
        with np.errstate(over="ignore"):  # Beyond the largest float the smoothness is infinite.
            return np.asarray(self.L0 + np.multiply(self.L1, norm, where=norm != 0, out=np.zeros_like(norm)))

    def comparison_frame(self) -> pd.DataFrame:
        """The rival models as a table, one row per model, and one row per f* of `loss_floors`.

        Returns:
            DataFrame: the attributes of `ModelScore`. The ends of the intervals are in the columns `skill_low`,
            `skill_high`, `gain_low` and `gain_high`; `scan` is True for the rows of `loss_floors`.
        """
        scores = [(score, False) for score in self.comparison] + [(score, True) for score in self.loss_floors]
        rows = []
        for score, scan in scores:
            row = {name: value for name, value in asdict(score).items() if not name.endswith("_interval")}
            for name, (low, high) in (("skill", score.skill_interval), ("gain", score.gain_interval)):
                row |= {f"{name}_low": low, f"{name}_high": high}
            rows.append(row | {"scan": scan})
        return pd.DataFrame(rows)

    def frontier(self, L1: npt.ArrayLike | None = None) -> pd.DataFrame:
        """The pairs (L1, L0) whose lines just cover every row of the fit.

        Args:
            L1: values of L1; None takes the corners of the curve.

        Returns:
            DataFrame: columns `L1` and `L0`.
        """
        slopes, intercepts = np.array(self.corners).T
        at = slopes if L1 is None else np.atleast_1d(np.asarray(L1, dtype=np.float64))
        # Between corners the frontier is straight, so interpolating is exact.
        return pd.DataFrame({"L1": at, "L0": np.interp(at, slopes, intercepts)})

    def summary(self) -> str:
        """The fit as a table to read."""
        return _summarise(self)

    def __str__(self) -> str:
        return self.summary()

    def __repr__(self) -> str:
        constants = f"L0={self.L0:.4g}, L1={self.L1:.4g}"
        rows = f"{counted(self.num_points, 'row')} of estimator {self.estimator!r}, group {self.group!r}"
        return f"<SmoothnessFit {self.verdict.name}: {constants}, {rows}; print it for all>"

    def to_dict(self) -> dict[str, Any]:
        """The fit as plain values that JSON can hold; `from_dict` gives the same fit back."""
        plain = {"version": FORMAT_VERSION} | {field.name: getattr(self, field.name) for field in fields(self)}
        plain["verdict"] = self.verdict.name
        plain["flags"] = [asdict(flag) for flag in self.flags]
        for name in ("comparison", "loss_floors"):
            plain[name] = [asdict(score) for score in getattr(self, name)]
        for name in ("corrected", "hessian"):
            plain[name] = None if plain[name] is None else asdict(plain[name])
        return {name: encode(value) for name, value in plain.items()}

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> SmoothnessFit:
        """The fit that `to_dict` wrote down.

        Raises:
            ValueError: if this release does not read the version.
        """
        if plain.get("version") != FORMAT_VERSION:
            raise ValueError(
                f"Parameter `plain` should have `version = {FORMAT_VERSION}`. Found `version = {plain.get('version')}`."
            )
        values = {name: decode(value) for name, value in plain.items() if name != "version"}
        values["verdict"] = Verdict[values["verdict"]]
        values["flags"] = tuple(Flag(**flag) for flag in values["flags"])
        for name in ("comparison", "loss_floors"):
            values[name] = tuple(ModelScore(**score) for score in values.get(name, ()))
        values["corrected"] = Correction(**values["corrected"]) if values.get("corrected") else None
        values["hessian"] = HessianCheck(**values["hessian"]) if values.get("hessian") else None
        return cls(**values)


def _inverse(interval: Interval) -> Interval:
    low, high = (1 / end if end > 0 else math.inf for end in interval)
    return high, low


_LINES = {"hard": "hard envelope", "mean": "mean"}


def _summarise(fit: SmoothnessFit) -> str:
    """The fit as a table: constants with intervals, rows, diagnostics, rivals, flags and verdict."""
    level = f"{fit.interval_level:.0%} interval"
    out = [
        RULE,
        f"smoothness <= L0 + L1 * gradient norm, for a share of {fit.quantile:g} of the rows",
        f"rows of estimator {fit.estimator}, group {fit.group}, data {fit.data}",
        THIN,
        f"{'':4}{'estimate':>12}{level:>26}   {'unit':<21}{'inverse':>30}",
        _constant("L0", fit.L0, fit.L0_interval, "loss / parameter^2", f"max_lr = 1/L0 = {number(fit.max_lr)}"),
        _constant("L1", fit.L1, fit.L1_interval, "1 / parameter", f"step_cap = 1/L1 = {number(fit.step_cap)}"),
        THIN,
        f"rows in the fit       {fit.num_points}, as informative as {fit.num_effective:.0f} independent rows",
        f"bootstrap blocks      {fit.block_length:.1f} steps long on average",
        f"runs                  {fit.num_runs}{'; the intervals say nothing about other seeds' * (fit.num_runs == 1)}",
        f"rows dropped          {_counts(fit.dropped)}",
        f"gradient norms        {number(fit.grad_norm_quantiles[0])} to {number(fit.grad_norm_quantiles[-1])}, "
        f"{fit.decades:.2f} decades (powers of ten) in the middle 95%",
        f"rank correlation      {number(fit.spearman)} of gradient norm and smoothness; "
        f"{number(fit.partial_spearman)} with time taken out",
        f"log-log slope         {number(fit.loglog_slope)}; it would be {number(fit.implied_slope)} if all rows lay on "
        "the line",
        f"exponent              {free_exponent(fit.exponent_interval, fit.interval_level)}",
        *_hessian(fit),
        f"cost of a row         {cost(fit.row_cost)}",
        f"coverage              {fit.coverage:.3f} of the rows lie at or below the line",
        f"errors in the norms   {_errors(fit)}",
        f"median saturation     {number(fit.median_saturation)}; above 0.5 the step length sets the smoothness",
        THIN,
        f"{'other lines':22}{'L0':>12}{'L1':>12}",
        *(
            f"  {_LINES.get(key, f'quantile {key}'):20}{number(a):>12}{number(b):>12}"
            for key, (a, b) in fit.lines.items()
        ),
        THIN,
        f"{'model':12}{'exponent':>10}{'loss':>10}{'later loss':>12}{'skill':>10}{level:>24}",
    ]
    out += [
        f"{score.name:12}{fixed(score.exponent or math.nan, 2):>10}{fixed(score.loss, 4):>10}"
        f"{fixed(score.later_loss, 4):>12}{fixed(score.skill, 2):>10}"
        f"{interval(score.skill_interval, '.2f') if place else 'reference':>24}"
        for place, score in enumerate(fit.comparison)
    ]
    out += [
        "  affine: the line; isotonic: any function that never falls; loss: error on the fitted rows",
        "  later loss: error on later steps; skill: share of the constant's later loss that is removed",
        THIN,
    ]
    for flag in fit.flags:
        weight = " (fatal)" if flag.fatal else " (blocks the verdict)" if flag.blocking else ""
        out += wrap(f"flag {flag.name}{weight}", f"{flag.cause} ({flag.evidence}).")
        out += wrap("    remedy", f"{flag.remedy}.")
    if not fit.flags:
        out.append("no flags")
    out += [RULE, *wrap(f"VERDICT {fit.verdict.name}", f"{fit.verdict.value}"), *wrap("reason", fit.verdict_reason)]
    return "\n".join(map(printable, [*out, RULE]))


def _hessian(fit: SmoothnessFit) -> list[str]:
    """What the Hessian norms say or, if there are none, what measuring them would cost."""
    found, head = fit.hessian, "Hessian norms         "
    if found is not None:
        said = {True: "follow the line", False: "contradict the line", None: "cannot decide"}[found.agrees]
        return [f"{head}{found.num_rows} beside, {found.coverage:.0%} at or below the line; they {said}"]
    costs = [f"{'':22}to test the law on ||H||, add", f"{'':22}{hessian_cost(fit.row_cost)}"]
    return [f"{head}none beside", *(costs if fit.estimator.startswith(("local", "path")) else [])]


def _errors(fit: SmoothnessFit) -> str:
    """The corrected constants or, if there are none, the direction in which errors would move the plain ones."""
    if fit.corrected is not None:
        return (
            f"L0 {number(fit.corrected.L0)}, L1 {number(fit.corrected.L1)} after correcting errors of up to "
            f"{fit.corrected.deviation:.0%}"
        )
    return (
        "not corrected (unknown, negligible or too large); errors make L1 too "
        f"{'large' if fit.quantile > 0.75 else 'small'}"
    )


def _constant(name: str, value: float, ends: Interval, unit: str, inverse: str) -> str:
    return f"{name:4}{number(value):>12}{interval(ends):>26}   {unit:<21}{inverse:>30}"


def _counts(dropped: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in dropped.items()) or "none"
