"""Does `fit.plan()` say the truth? Its numbers of rows, checked against fits of simulated rows.

    python benchmarks/plan.py            # three minutes or so
    python benchmarks/plan.py --seeds 20

Rows follow 1 + x with lognormal noise, and gradient norms x spread evenly in their logarithms. For each cell the plan's
formulas say how many rows the slope and a free exponent take. Then as many rows are drawn, and twice as many:

    L1 > 0    fits whose interval of L1 excludes zero (planned: nine of ten with `rows`)
    L0L1      fits with that verdict, which has to pass all other tests, too
    free      fitted exponents within .25 of the true one, with `rows_for_exponent` (planned: nine of ten)
    error     standard deviation of those exponents over the standard error of the plan (planned: 1)
"""

import argparse
import math

import numpy as np
import pandas as pd

from smoothdiag.fits import Verdict, fit_smoothness
from smoothdiag.fits.affine import relative_weights
from smoothdiag.fits.models import fit_power
from smoothdiag.fits.plan import ERRORS_AWAY, EXPONENT_REACH, FEWEST, IN_TAIL, relative_errors

CELLS = [(0.8, 1.2, 0.35), (0.8, 1.2, 0.9), (0.8, 2.0, 0.56), (0.95, 1.2, 0.56), (0.95, 1.5, 0.9)]
"""Quantile, decades of gradient norms, noise."""


def rows_of(decades: float, noise: float, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Gradient norms and smoothness of simulated rows."""
    rng = np.random.default_rng(seed)
    half = decades / 0.95 / 2
    x = 10 ** rng.uniform(-half, half, count)
    return x, (1 + x) * np.exp(noise * rng.standard_normal(count))


def planned(quantile: float, decades: float, noise: float) -> tuple[int, int, float]:
    """Rows for the slope, rows for the exponent, and the standard error of an exponent from a single row."""
    half = decades / 0.95 / 2
    slope, exponent = relative_errors(np.logspace(-half, half, 101), 1.0, 1.0, noise, quantile)
    floor = max(FEWEST, IN_TAIL / min(quantile, 1 - quantile))
    reach = EXPONENT_REACH / 1.6449
    return math.ceil(max(floor, (ERRORS_AWAY * slope) ** 2)), math.ceil(max(floor, (exponent / reach) ** 2)), exponent


def main(seeds: int) -> None:
    """Prints one line for each cell."""
    print("quantile decades noise |  rows  L1 > 0  L0L1 | twice  L1 > 0  L0L1 |  rows  free  error")
    for quantile, decades, noise in CELLS:
        rows, many, error = planned(quantile, decades, noise)
        line = f"{quantile:8g} {decades:7g} {noise:5g}"
        for count in (rows, 2 * rows):
            fits = []
            for seed in range(seeds):
                x, y = rows_of(decades, noise, count, seed)
                frame = pd.DataFrame({"grad_norm": x, "smoothness": y, "saturation": 0.1})
                fits.append(fit_smoothness(frame, quantile=quantile, num_boot=100))
            above = sum(fit.L1_interval[0] > 0 for fit in fits)
            line += f" | {count:5d}  {above:3d}/{seeds:<2d}  {sum(fit.verdict is Verdict.L0L1 for fit in fits):2d}/{seeds:<2d}"
        exponents = []
        for seed in range(seeds):
            x, y = rows_of(decades, noise, many, seed)
            exponents.append(fit_power(x, y, relative_weights(x, y), quantile).exponent)
        near = int(np.sum(np.abs(np.array(exponents) - 1) <= EXPONENT_REACH))
        ratio = np.std(exponents) * math.sqrt(many) / error
        print(f"{line} | {many:5d}  {near:2d}/{seeds:<2d}  {ratio:4.2f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    main(parser.parse_args().seeds)
