"""Does `fit.plan()` say the truth? Its numbers of rows, checked against fits of simulated rows.

    OMP_NUM_THREADS=1 python benchmarks/plan.py    # five minutes; --seeds 20: ten

Rows follow 1 + x with lognormal noise, and gradient norms x spread evenly in their logarithms. For each cell the plan
says how many rows a line takes, and a free exponent. Then as many rows are drawn. Where no number of rows is
certainly enough, 400 are drawn.

    skill     share of a constant's loss that the line would remove with rows without end; the verdict asks for
              .2, the plan for .25
    L0L1      fits with that verdict, with half as many rows and with as many (planned: nine of ten)
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
from smoothdiag.fits.needed import EXPONENT_REACH, Law, relative_errors, rows_for_line, skill_of_line

CELLS = [
    *[(0.8, 1.2, 0.35), (0.8, 1.2, 0.9), (0.8, 2.0, 0.56), (0.95, 1.2, 0.56), (0.95, 1.5, 0.9)],
    *[(0.8, 1.5, 0.56), (0.8, 2.0, 0.9), (0.5, 1.5, 0.4), (0.95, 1.5, 0.35), (0.95, 2.0, 0.7)],
]
"""Quantile, decades of gradient norms, noise."""


def rows_of(decades: float, noise: float, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Gradient norms and smoothness of simulated rows."""
    rng = np.random.default_rng(seed)
    half = decades / 0.95 / 2
    x = 10 ** rng.uniform(-half, half, count)
    return x, (1 + x) * np.exp(noise * rng.standard_normal(count))


def main(seeds: int) -> None:
    """Prints one line for each cell."""
    print("quantile decades noise | skill |  half  L0L1 |  rows  L0L1 |  rows  free  error")
    for quantile, decades, noise in CELLS:
        half = decades / 0.95 / 2
        norms, law = np.logspace(-half, half, 101), Law(1.0, 1.0, noise, quantile)
        rows, error = rows_for_line(norms, law), relative_errors(norms, law)[1]
        line = f"{quantile:8g} {decades:7g} {noise:5g} | {skill_of_line(norms, law)[0]:5.2f}"
        for share in (0.5, 1.0):
            count = math.ceil(share * rows) if math.isfinite(rows) else 400
            found = 0
            for seed in range(seeds):
                x, y = rows_of(decades, noise, count, seed)
                frame = pd.DataFrame({"grad_norm": x, "smoothness": y, "saturation": 0.1})
                found += fit_smoothness(frame, quantile=quantile, num_boot=100).verdict is Verdict.L0L1
            line += f" | {count:5d}  {found:2d}/{seeds:<2d}"
        many, exponents = math.ceil((error * 1.6449 / EXPONENT_REACH) ** 2), []
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
