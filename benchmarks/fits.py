"""What a fit costs: the whole fit of a long run, and one quantile line beside statsmodels' QuantReg.

OMP_NUM_THREADS=1 python benchmarks/fits.py         # a minute; the comparison needs statsmodels
OMP_NUM_THREADS=1 python benchmarks/fits.py --large # 100,000 and 1,000,000 rows as a probe writes them, with memory
"""

import argparse
import importlib.util
import multiprocessing
import platform
import resource
import statistics
import time
from collections.abc import Callable
from datetime import date

import numpy as np
import pandas as pd
from scipy.signal import lfilter
from tqdm import tqdm

from smoothdiag.fits import fit_smoothness
from smoothdiag.fits.affine import pinball, quantile_line, relative_weights

QUANTILE = 0.95
GOAL = 20.0  # Seconds for the whole fit of 50,000 rows.


def run_of(num_steps: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Returns gradient norms with a memory of .98 a step, and smoothness (1 + 2 x) with independent lognormal noise."""
    rng = np.random.default_rng(seed)
    walk = lfilter([1.0], [1.0, -0.98], rng.standard_normal(num_steps))
    x = 10 ** (walk / np.std(walk) / 2)
    return x, (1 + 2 * x) * np.exp(0.3 * rng.standard_normal(num_steps))


def seconds(function: Callable[[], object]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def whole_fit(num_steps: int, repetitions: int) -> str:
    x, y = run_of(num_steps)
    frame = pd.DataFrame({"grad_norm": x, "smoothness": y, "saturation": 0.1})
    taken = [seconds(lambda: fit_smoothness(frame)) for _ in tqdm(range(repetitions), f"{num_steps} rows", leave=False)]
    return f"{num_steps:>8}{statistics.median(taken):>10.2f}{min(taken):>10.2f}{max(taken):>10.2f}"


def path_rows(num_steps: int, kind: str) -> pd.DataFrame:
    """Returns the rows of a probe: one per step, or for "groups" four; "batches" adds the columns of fixed batches."""
    x, y = run_of(num_steps // 4 if kind == "groups" else num_steps)
    frame = pd.DataFrame({"step": 20 * np.arange(len(x)), "grad_norm": x, "smoothness": y, "step_norm": 0.05 * x})
    noise = 0.1 * np.random.default_rng(1).standard_normal(len(x))
    frame = frame.assign(
        group="all", estimator="path", param_norm=30.0, loss=2 + np.log1p(x) + noise, lr=0.05,
        saturation=0.05 * y / (2 + 0.05 * y), noise_floor=1e-4 * y, status="ok", data="fixed", num_grads=2, num_hvps=0,
        seconds=0.01, device="cpu", dtype="float32",
    )  # fmt: skip
    if kind == "batches":
        frame = frame.assign(grad_variance=(0.1 * x) ** 2, data_step=0)
    if kind == "groups":
        parts = [frame.assign(group=name) for name in ("all", "a", "b", "c")]
        frame = pd.concat(parts).sort_values("step", kind="stable", ignore_index=True)
    return frame


def large_fit(num_rows: int, kind: str) -> str:
    """Runs in a process of its own, whose largest memory is then that of the fit."""
    frame = path_rows(num_rows, kind)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.process_time()
    wall = seconds(lambda: fit_smoothness(frame))
    processor = time.process_time() - begin
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return f"{num_rows:>9}{kind:>10}{wall:>10.1f}{processor:>10.1f}{more:>10.0f}"


def beside_statsmodels(num_steps: int, rounds: int) -> str:
    """Both minimise the same weighted loss: QuantReg is given the rows times their weights."""
    from statsmodels.regression.quantile_regression import QuantReg

    x, y = run_of(num_steps)
    ratios, losses, own = [], [], []
    for _ in tqdm(range(rounds), "rounds", leave=False):
        weights = relative_weights(x, y)
        design = np.stack([weights, weights * x], axis=1)
        lines: dict[str, np.ndarray] = {}

        def ours(into: dict[str, np.ndarray] = lines) -> None:
            into["ours"] = np.array(quantile_line(x, y, QUANTILE))

        def theirs(into: dict[str, np.ndarray] = lines, rows: np.ndarray = design, w: np.ndarray = weights) -> None:
            into["theirs"] = QuantReg(w * y, rows).fit(q=QUANTILE).params

        times = {function: seconds(function) for function in (ours, theirs)}
        own.append(times[ours])
        ratios.append(times[theirs] / times[ours])
        loss = {name: float(weights @ pinball(y - a - b * x, QUANTILE)) for name, (a, b) in lines.items()}
        losses.append(loss["theirs"] / loss["ours"] - 1)
    return (
        f"{num_steps:>8}{1000 * statistics.median(own):>10.1f}{statistics.median(ratios):>10.2f}"
        f"{min(ratios):>10.2f}{max(ratios):>10.2f}{max(losses):>14.1e}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--large", action="store_true", help="long runs alone, each in a process of its own")
    arguments = parser.parse_args()
    print(f"{date.today()}, Python {platform.python_version()}, numpy {np.__version__}")
    if arguments.large:
        print(f"\n{'rows':>9}{'kind':>10}{'wall [s]':>10}{'CPU [s]':>10}{'MiB more':>10}")
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            for num_rows in (5000, 50_000, 100_000, 1_000_000):
                for kind in ("plain", "batches", "groups"):
                    print(pool.apply(large_fit, (num_rows, kind)), flush=True)
        return
    print(f"\nwhole fit with intervals [s], goal {GOAL:g} at 50,000 rows")
    print(f"{'rows':>8}{'median':>10}{'least':>10}{'most':>10}")
    for num_steps in (1000, 5000, 50_000):
        print(whole_fit(num_steps, arguments.repetitions))
    if importlib.util.find_spec("statsmodels") is None:
        print("\nstatsmodels is not installed: no comparison")
        return
    print(f"\none line at {QUANTILE:g}: own time [ms], statsmodels' over it, excess of its loss")
    print(f"{'rows':>8}{'own':>10}{'median':>10}{'least':>10}{'most':>10}{'excess loss':>14}")
    for num_steps in (1000, 5000, 50_000):
        print(beside_statsmodels(num_steps, arguments.rounds if num_steps < 50_000 else 3))


if __name__ == "__main__":
    main()
