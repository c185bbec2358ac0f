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
from smoothdiag.fits.plan import Plan, make_plan
from smoothdiag.fits.summary import summarise
from smoothdiag.notebooks import as_html

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
        block_length: mean block length of the bootstrap, in steps; in a scan the mean number of points on a line.
        decades: range of the gradient norms in powers of ten, between their 2.5% and 97.5% quantiles.
        spearman: rank correlation of gradient norm and smoothness; NaN if one of them is constant.
        partial_spearman: rank correlation with the effect of the step (in a scan: of the distance from the start) taken
            out; NaN if gradient norm or smoothness follows it too closely.
        loglog_slope: slope of log smoothness on log gradient norm.
        implied_slope: log-log slope of the same rows if they lay exactly on the fitted line.
        coverage: share of rows at or below the line.
        median_saturation: median of the saturation; NaN if it was not recorded.
        lines: (L0, L1) of other lines: quantile lines by level, "hard" envelope, "mean" (non-negative least squares).
        comparison: scores of constant, line, power, isotonic and, if losses are known, loss gap, on later steps. For a
            scan there is the distance from the start, too, and the scores are those on lines left out.
        flags: doubts, fatal ones first.
        verdict: the outcome.
        verdict_reason: reason for the verdict, in words.
        estimator: estimator of the rows.
        group: parameter group of the rows.
        data: what the rows were measured on: "step", "fixed", "held-out" or "unspecified".
        dropped: number of rows left out, by cause.
        grad_norm_quantiles: 101 quantiles of all recorded gradient norms, 0% to 100%.
        corners: points (L1, L0) where the frontier changes slope.
        num_runs: number of runs that the rows come from; with one run the intervals say nothing about other seeds. A
            run that was resumed on other fixed batches counts as two.
        interval_freedom: degrees of freedom of the intervals; the fewer, the wider the intervals.
        replicates: (L0, L1) of the first resamples, for intervals of quantities that depend on both; empty if there
            are too few steps.
        loss_floors: scores of the loss gap for each f* on a grid below the smallest loss, closest first. They show how
            much exponent and skill depend on the unknown minimum. Empty without losses.
        corrected: constants without the errors of the gradient norm; None if these errors are unknown, negligible
            or too large to correct.
        optimizer: class of the optimizer that took the steps; "A and B" for runs that differ, empty if not known, as in
            a scan.
        follows_gradients: whether its steps are the learning rate times an average of gradients, clipped or not; None
            if the rows do not say.
        momentum: momentum of that optimizer at the start of the run; NaN if the rows do not say.
        dampening: dampening of that optimizer, which is the momentum if it averages gradients; NaN likewise.
        exponent_interval: interval of the exponent of the power model at `interval_level`: the rows cannot tell powers
            of the gradient norm inside it apart. NaN if it was not found.
        hessian: what the rows of "hessian_norm" beside the fitted rows say about the law; None without such rows.
        spread: standard deviation of log smoothness around the median line; NaN if that line is zero at a row.
        row_cost: median number of gradients and median seconds that a row took; NaN where the rows do not say. A
            Hessian-vector product counts as two gradients.
        num_scans: number of lines out of the checkpoint that a scan measured along; 0 for rows of a run.
        clip_mode: mode of the AutoClip that the run had last, such as "clip" or "shadow"; empty without one.
        first_step: step of the first row; NaN for a scan, and in fits of earlier versions.

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
    momentum: float = math.nan
    dampening: float = math.nan
    exponent_interval: Interval = (math.nan, math.nan)
    hessian: HessianCheck | None = None
    spread: float = math.nan
    row_cost: Interval = (math.nan, math.nan)
    num_scans: int = 0
    clip_mode: str = ""
    first_step: float = math.nan

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

    def plan(self) -> Plan:
        """What to measure next, in numbers. Print it to read it."""
        return make_plan(self)

    def summary(self) -> str:
        """The fit as a table to read."""
        return summarise(self)

    def __str__(self) -> str:
        return self.summary()

    def _repr_html_(self) -> str:
        return as_html(self.summary())

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
