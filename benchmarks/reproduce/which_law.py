"""Which law holds where: smoothness beside the gradient norm along lines out of a point, and down to a minimum.

SMOOTHDIAG_DATA=... python benchmarks/reproduce/which_law.py            # 113 scans
SMOOTHDIAG_DATA=... python benchmarks/reproduce/which_law.py --report   # tables, figures of docs/reproduce/which_law.md
"""

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from checkpoints import NETS, STAGES, SUBJECTS, Checkpoint, held_out, trained
from experiment import Experiment, Place, Size, main
from law_figures import draw_grid, draw_points
from law_tables import MODELS, tables
from scipy.stats import spearmanr

import smoothdiag as sd

SEEDS = {"quick": 3, "full": 10}
LATER = {"quick": STAGES, "full": (*STAGES, 4000)}

BUDGET = {"quick": 500, "full": 2000}
"""Gradients of a scan along lines, and of a descent."""

LARGER = 4
"""Times as many examples in a second scan of the first seed, at the first and at the last stage."""

SECANTS = 150
"""Gradients of a scan of secants: they cost a third of Hessian norms or less, so there are about as many points."""

DESCENT = {"spacing": 0.15, "points": 16}

CHANGES = 1.1
"""Factor between largest and smallest ||H|| from which a descent has a rank correlation; the search is off by 3%."""

REASONS = {
    "smoothness rises along": "exponent",
    "on lines left out, smoothness at equal": "scatter",
    "on lines left out, the gradient norm hardly": "skill",
    "these points do not tell": "loss",
    "while the gradient norm grows": "rise",
}
"""How reasons for NOT_IDENTIFIED begin that no flag names, and what decided."""


def cases(size: Size) -> dict[str, Checkpoint]:
    found = [Checkpoint(s, stage, k) for s in SUBJECTS for stage in LATER[size] for k in range(SEEDS[size])]
    found += [Checkpoint(net, stage, 0, LARGER) for net in NETS for stage in (LATER[size][0], LATER[size][-1])]
    return {name_of(checkpoint): checkpoint for checkpoint in found}


def name_of(checkpoint: Checkpoint) -> str:
    name = f"{checkpoint.subject}/{checkpoint.stage}/{checkpoint.seed}"
    return name if checkpoint.times == 1 else f"{name}/x{checkpoint.times}"


def path_of(traces: Path, checkpoint: Checkpoint, kind: str) -> Path:
    return traces / f"{kind}-{name_of(checkpoint).replace(', ', '_').replace('/', '-')}.jsonl"


def run(checkpoint: Checkpoint, place: Place) -> dict[str, Any]:
    """Trains, and scans ||H|| along lines; then secants along the same lines, and ||H|| down the gradient."""
    model = trained(checkpoint, place.steps(checkpoint.stage), place.device)
    batch, loss_fn = held_out(checkpoint, place.device), SUBJECTS[checkpoint.subject].loss_fn
    budget = 40 if place.dry else BUDGET[place.size]

    def scanned(kind: str, **options: Any) -> pd.DataFrame:
        path = path_of(place.traces, checkpoint, kind)
        path.unlink(missing_ok=True)
        options |= {"seed": checkpoint.seed, "step": checkpoint.stage}
        return sd.scan(model, loss_fn, [batch], trace=path, progress=False, **options).to_frame()

    lines = scanned("lines", budget=budget)
    facts = {**vars(checkpoint), "torch": torch.__version__}
    if checkpoint.times > 1:
        return facts | leaving(lines)
    secants = scanned("secants", budget=min(SECANTS, budget), estimators=[sd.LocalSmoothness()])
    descent = scanned("descent", budget=budget, directions=["descent"], **DESCENT)
    return facts | leaving(lines) | beside(lines, secants) | arriving(descent)


def fitted(frame: pd.DataFrame) -> sd.SmoothnessFit | None:
    """Returns the fit, or None where too few points are usable."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return sd.fit_smoothness(frame)
        except ValueError:
            return None


def why(fit: sd.SmoothnessFit) -> str:
    """What kept a scan from a verdict: the first blocking flag, or the rule that applied."""
    if fit.verdict is not sd.Verdict.NOT_IDENTIFIED:
        return ""
    flags = [flag.name for flag in fit.flags if flag.blocking]
    return flags[0] if flags else next(name for begin, name in REASONS.items() if fit.verdict_reason.startswith(begin))


def leaving(frame: pd.DataFrame) -> dict[str, Any]:
    """The verdict on a scan along lines, with the figures behind it."""
    start = frame[frame["scan"] == "start"].iloc[0]
    statuses = {f"status {name}": int(n) for name, n in frame["status"].value_counts().items()}
    facts = {"loss": start["loss"], "gradients": int(frame["num_grads"].sum()), **statuses}
    if (fit := fitted(frame)) is None:
        return {"verdict": "NO_FIT", **facts}
    return {
        "verdict": fit.verdict.name,
        "why": why(fit),
        "exponent_low": fit.exponent_interval[0],
        "exponent_high": fit.exponent_interval[1],
        "L0": fit.L0,
        "L0_low": fit.L0_interval[0],
        "L0_high": fit.L0_interval[1],
        "L1": fit.L1,
        "L1_low": fit.L1_interval[0],
        "L1_high": fit.L1_interval[1],
        "decades": fit.decades,
        "points": fit.num_points,
        "lines": fit.num_scans,
        "factor": math.exp(fit.spread),
        "needed": fit.plan().gradients,
        "reason": fit.verdict_reason,
        **{f"skill {score.name}": score.skill for score in fit.comparison if score.name in MODELS},
        **facts,
    }


def beside(lines: pd.DataFrame, secants: pd.DataFrame) -> dict[str, Any]:
    """What secants along the gradient would have said: the same rules, with their flag "direction" switched off."""
    usable = secants[secants["status"].isin(["ok", "kink_limited"])]
    found: dict[str, Any] = {"kinks": float((usable["status"] == "kink_limited").mean())}
    both = usable.merge(lines[lines["status"] == "ok"], on=["scan", "point"], suffixes=("", "_norm"))
    same = both[np.isclose(both["distance"], both["distance_norm"], rtol=1e-3)]
    found |= {"same_points": len(same), "secant": float((same["smoothness"] / same["smoothness_norm"]).median())}
    if (fit := fitted(usable.assign(estimator="hessian_norm"))) is None:
        return found
    low, high = fit.exponent_interval
    return {**found, "secant_verdict": fit.verdict.name, "secant_low": low, "secant_high": high}


def arriving(frame: pd.DataFrame) -> dict[str, Any]:
    """How ||H|| goes with ||g|| down one path of gradient descent on the batch."""
    rows = frame[(frame["estimator"] == "hessian_norm") & (frame["status"] == "ok")]
    x, y = rows["grad_norm"], rows["smoothness"]
    moves = len(rows) > 3 and y.max() > CHANGES * y.min()
    return {
        "down_points": len(rows),
        "down_rank": float(spearmanr(x, y).statistic) if moves else math.nan,
        "down_decades": float(np.log10(x.max() / x.min())),
        "down_hessian": float(y.iloc[-1] / y.iloc[0]),
        "down_spread": float(y.max() / y.min()),
        "down_loss": float(rows["loss"].iloc[-1] / rows["loss"].iloc[0]),
    }


EXPERIMENT = Experiment(
    name="which_law",
    cases=cases,
    run=run,
    tables=tables,
    page="docs/reproduce/which_law.md",
    draw={"reproduce_which_law.png": draw_grid, "reproduce_which_law_points.png": draw_points},
)


if __name__ == "__main__":
    main(EXPERIMENT, __doc__)
