"""Prints the tables of docs/intervals.md: how often the intervals of L0, L1 and the threshold hold the truth.

    python docs/coverage.py            # five to ten minutes on two cores

The script simulates runs of training. The logarithm of the gradient norm is an autoregression with a memory of .98 per
step and spans two decades. Smoothness is (1 + 2 * grad_norm) times lognormal noise, which is independent from step to
step or an autoregression with a memory of .8. The true line at the quantile .9 is (1, 2) times that quantile of the
noise.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
from scipy.signal import lfilter
from scipy.stats import norm
from tqdm import tqdm

from smoothdiag.clipping import safe_threshold
from smoothdiag.fits.affine import Line, quantile_line, relative_weights
from smoothdiag.fits.intervals import (
    bootstrap_lines,
    degrees_of_freedom,
    line_dependence,
    line_intervals,
    percentile_interval,
)
from smoothdiag.fits.resamples import stationary_counts

L0, L1 = 1.0, 2.0
NUM_BOOT = 400
MEMORY = 0.98
DEVIATION = 0.3  # Of the logarithm of the noise.
BETWEEN = 0.15  # Of the logarithm of L1 from run to run.
NAMES = ("L0", "L1", "threshold")


@dataclass(frozen=True)
class Case:
    """One simulated situation.

    Attributes:
        num_steps: Rows of each run.
        noise: Memory of the noise; 0 means independent noise.
        num_runs: Number of separate runs. Several runs differ in L1 and have independent noise; the fit is the median
            line, whose slope has its median at the true L1.
    """

    num_steps: int
    noise: float = 0.0
    num_runs: int = 1

    @property
    def quantile(self) -> float:
        """Level of the line."""
        return 0.9 if self.num_runs == 1 else 0.5

    @property
    def truth(self) -> tuple[float, float]:
        """Constants of the true line at that level."""
        lift = float(np.exp(DEVIATION * norm.ppf(self.quantile)))
        return L0 * lift, L1 * lift


def autoregression(num: int, memory: float, rng: np.random.Generator) -> np.ndarray:
    """Returns a stationary autoregression with deviation one."""
    warm_up = 600
    innovations = np.sqrt(1 - memory**2) * rng.standard_normal(num + warm_up)
    return lfilter([1.0], [1.0, -memory], innovations)[warm_up:]


def simulate(case: Case, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns gradient norms, smoothness, steps and run numbers."""
    rng = np.random.default_rng(seed)
    x, y = [], []
    for _ in range(case.num_runs):
        walk = autoregression(case.num_steps, MEMORY, rng)
        x.append(10 ** (2 * (walk - walk.min()) / np.ptp(walk) - 1))
        slope = L1 * np.exp(BETWEEN * rng.standard_normal() * (case.num_runs > 1))
        y.append((L0 + slope * x[-1]) * np.exp(DEVIATION * autoregression(case.num_steps, case.noise, rng)))
    steps = np.tile(np.arange(float(case.num_steps)), case.num_runs)
    return np.concatenate(x), np.concatenate(y), steps, np.repeat(np.arange(float(case.num_runs)), case.num_steps)


def trial(case: Case, num_boot: int, seed: int) -> np.ndarray:
    """Returns the intervals of L0, L1 and the threshold: by plain resampling, and as `fit_smoothness` makes them."""
    x, y, steps, runs = simulate(case, seed)
    quantile = case.quantile
    weights = relative_weights(x, y)
    line = quantile_line(x, y, quantile, weights)
    memory = line_dependence(x, y, weights, line, quantile, steps, runs)
    plain = stationary_counts(np.arange(float(len(x))), 1.0, num_boot, seed)
    blocks = stationary_counts(steps, memory.block_length, num_boot, seed, runs)
    freedom = degrees_of_freedom(memory, quantile, case.num_runs)
    return np.array([
        intervals((x, y, weights), line, quantile, counts, rate(case), degrees)
        for counts, degrees in ((plain, np.inf), (blocks, freedom))
    ])  # fmt: skip


def intervals(
    rows: tuple[np.ndarray, np.ndarray, np.ndarray],
    line: Line,
    quantile: float,
    counts: np.ndarray,
    eta: float,
    freedom: float,
) -> list[tuple[float, float]]:
    """Returns the intervals of L0, L1 and the threshold at an effective rate; the last comes from its inverse."""
    replicates = bootstrap_lines(*rows, line, quantile, counts)
    low, high = percentile_interval(
        1 / safe_threshold(replicates[:, 0], replicates[:, 1], eta), float(1 / safe_threshold(*line, eta)), freedom
    )
    constants = line_intervals(*rows, line, quantile, counts, replicates, freedom)
    return [*constants, (1 / high if high > 0 else np.inf, 1 / low if low > 0 else np.inf)]


def rate(case: Case) -> float:
    """Returns the effective rate: half of the rate recommended for the true constants."""
    return 1 / (4 * case.truth[0])


def coverage(case: Case, repetitions: int, *, num_boot: int = NUM_BOOT, workers: int = 2) -> pd.DataFrame:
    """Returns, by way of resampling, the share of intervals that hold the truth and their median relative width."""
    truth = np.array([*case.truth, float(safe_threshold(*case.truth, rate(case)))])
    with ProcessPoolExecutor(workers) as pool:
        found = pool.map(partial(trial, case, num_boot), range(repetitions), chunksize=5)
        ends = np.array(list(tqdm(found, str(case), repetitions, leave=False)))
    held = np.mean((ends[..., 0] <= truth) & (truth <= ends[..., 1]), axis=0)
    width = np.median((ends[..., 1] - ends[..., 0]) / truth, axis=0)
    columns = [f"{name} {what}" for what in ("held", "width") for name in NAMES]
    return pd.DataFrame(np.hstack([held, width]), index=["rows one by one", "as fitted"], columns=columns)


def tables(repetitions: int) -> Iterator[pd.DataFrame]:
    """Yields the table of single runs and the table of several runs."""
    alone = [Case(n, noise) for n in (200, 1000) for noise in (0.0, 0.8)]
    several = [Case(60, num_runs=3)]
    labels: list[Callable[[Case], str]] = [
        lambda c: f"{c.num_steps} steps, noise {c.noise:g}",
        lambda c: f"{c.num_runs} runs",
    ]
    for cases, label in zip((alone, several), labels, strict=True):
        yield pd.concat({label(case): coverage(case, repetitions) for case in cases})


if __name__ == "__main__":
    for table in tables(300):
        print(table.to_string(float_format="{:.2f}".format), end="\n\n", flush=True)
