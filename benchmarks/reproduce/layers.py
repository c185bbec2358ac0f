"""Layer-wise (L0, L1) from gradients of consecutive batches: how much of it is the landscape, and how much the step.

SMOOTHDIAG_DATA=... python benchmarks/reproduce/layers.py            # 21 runs
SMOOTHDIAG_DATA=... python benchmarks/reproduce/layers.py --report   # tables and figure of docs/reproduce/layers.md
"""

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from experiment import Experiment, Place, Size, main
from layer_figures import draw
from layer_runs import Noisy, Run, gpt, measured, noise, normalised, own_loss, scion, shakespeare
from layer_tables import KINDS, tables
from scipy.optimize import nnls
from tasks import class_loss

import smoothdiag as sd

Array = npt.NDArray[np.float64]

PENALTY, PENALTIES = 1.0, (0.0, 1.0, 10.0)
"""Weight lambda of the further loss of points above the line, and others to compare: the published one is not known."""

FITTED = (("own", "short"), ("own", "other"), ("Euclidean", "short"))
"""Norms and kinds of rows that get a verdict; with steps or batches of other sizes, only the first ones do."""

NUM_BOOT, QUANTILE = 100, 0.8

DIM, START, STEP, DEVIATION = 20, 3.0, 0.0075, 2.7
"""Of the landscapes: coordinates of a layer, its distance from the minimum at first, the length of its steps, and the
noise of an example in each coordinate. A batch of 16 has noise as long as the gradient at a distance of about 1."""

CONDITIONS = ((1.0, 16), (1 / 16, 16), (1 / 4, 16), (4.0, 16), (1.0, 128))
"""Lengths of steps [published ones] and sizes of batches; the usual ones come first."""


LANDSCAPES = {
    "quadratic": sd.problems.quadratic(np.geomspace(0.1, 1, DIM).tolist()),
    "exponential": sd.problems.exponential(0.7, 2.0, DIM),
}
"""Laws of every layer, with L1 = 0 and L1 = 2."""


def cases(size: Size) -> dict[str, Run]:
    seeds, steps, every = (3, 400, 8) if size == "quick" else (5, 5000, 10)
    found: list[Run] = []
    for k in range(seeds):
        for factor, batch in CONDITIONS:
            found.append(Run("gpt", gpt, shakespeare, class_loss, scion, batch, factor, k, steps, every))
        for name, problem in LANDSCAPES.items():
            model, data = partial(Noisy, problem, START), noise(DEVIATION, DIM)
            found.append(Run(name, model, data, own_loss, normalised(STEP), 16, 1.0, k, steps, every))
    return {name_of(case): case for case in found}


def name_of(case: Run) -> str:
    return f"{case.name}/{case.factor:g}/{case.batch}/{case.seed}"


def run(case: Run, place: Place) -> dict[str, Any]:
    """Trains, measures and fits."""
    if place.dry:
        case = replace(case, steps=place.steps(case.steps), every=1)
    rows, losses = measured(case, place.device)
    frame = pd.DataFrame(rows)
    frame.to_json(place.traces / f"{name_of(case).replace('/', '-')}.jsonl", orient="records", lines=True)
    fits = FITTED if (case.factor, case.batch) == CONDITIONS[0] else FITTED[:1]
    return {
        "name": case.name,
        "factor": case.factor,
        "batch": case.batch,
        "seed": case.seed,
        "torch": torch.__version__,
        "first_loss": losses[0],
        "loss": losses[-1],
        "layers": [summarised(part, fits) for _, part in frame.groupby(["layer", "norm"], sort=False)],
    }


def summarised(part: pd.DataFrame, fits: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Constants of one layer in one norm: by the published fit for every kind of rows, and by ours for some."""
    first = part.iloc[0]
    found: dict[str, Any] = {"layer": first["layer"], "norm": first["norm"], "length": float(part["length"].median())}
    for kind in KINDS:
        usable = part[part[kind].notna() & part[f"{kind} norm"].notna()]
        L0, L1 = hinge_fit(usable[f"{kind} norm"], usable[kind])
        found |= {f"{kind} L0": L0, f"{kind} L1": L1, f"{kind} saturation": float(part[f"{kind} saturation"].median())}
    found["noise"] = float((part["null"] / part["other"]).median())
    found["moved"] = float((part["same"] / part["other"]).median())
    for penalty in PENALTIES:
        found[f"other L1 at {penalty:g}"] = hinge_fit(part["other norm"], part["other"], penalty)[1]
    if first["norm"] == "Euclidean":
        found["bias"] = float(part["bias"].median())
    for norm, kind in fits:
        if norm == first["norm"] and (fit := fitted(part, kind)) is not None:
            found |= {f"{kind} verdict": fit.verdict.name, f"{kind} decades": fit.decades}
            found |= {f"{kind} flags": [flag.name for flag in fit.flags if flag.fatal or flag.blocking]}
            found |= {f"{kind} fit": fit.L1, f"{kind} low": fit.L1_interval[0], f"{kind} high": fit.L1_interval[1]}
    return found


def fitted(part: pd.DataFrame, kind: str) -> sd.SmoothnessFit | None:
    """Returns the fit with its verdict, or None where too few rows are usable."""
    names = {kind: "smoothness", f"{kind} norm": "grad_norm", f"{kind} saturation": "saturation"}
    rows = part[["step", *names]].rename(columns=names)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return sd.fit_smoothness(rows.dropna(), quantile=QUANTILE, num_boot=NUM_BOOT)
        except ValueError:
            return None


def hinge_fit(x: Iterable[float], y: Iterable[float], penalty: float = PENALTY) -> tuple[float, float]:
    """Fits y = L0 + L1 x with L0, L1 >= 0 by least squares, where points above the line count 1 + ``penalty`` times.

    The weights follow from the line and the line from the weights, until the points above it stay the same.

    Source: Riabinin, Shulgin, Gruntkowska, Richtarik 2025, arXiv 2505.13416, equation 30.
    """
    x, y = np.array(list(x)), np.array(list(y))
    if not len(x):
        return math.nan, math.nan
    above = np.zeros(len(x), dtype=bool)
    for _ in range(100):
        weights = np.sqrt(np.where(above, 1 + penalty, 1.0))
        constants, _ = nnls(np.stack([weights, weights * x], axis=1), weights * y)
        now = y > constants[0] + constants[1] * x
        if (now == above).all():
            break
        above = now
    return float(constants[0]), float(constants[1])


EXPERIMENT = Experiment(
    name="layers",
    cases=cases,
    run=run,
    tables=tables,
    page="docs/reproduce/layers.md",
    draw={"reproduce_layers.png": draw},
)


if __name__ == "__main__":
    main(EXPERIMENT, __doc__)
