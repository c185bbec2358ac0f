"""Resamples of blocks of steps: how often each row occurs in each of them, and sums over the rows of all of them.

Counts take one byte for each row and resample. All sums turn a few columns at a time into floats, so that memory beyond
the counts does not grow with the number of rows times the number of resamples.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from smoothdiag.fits.base import Array

Counts = npt.NDArray[np.uint8]
Codes = npt.NDArray[np.intp]

COLUMNS = 1 << 14  # Rows whose counts are floats at a time: 50 MiB for 400 resamples.
ALL_KEPT = 3000  # Up to this many rows, a window around the quantile is all of them.


def parts_of(steps: Array, runs: Array | None) -> list[tuple[Codes, Codes]]:
    """For each run, its rows, and for each of these rows the number of its step within the run."""
    runs = np.zeros(len(steps)) if runs is None else runs
    rows = [np.flatnonzero(runs == run) for run in np.unique(runs)]
    return [(part, np.unique(steps[part], return_inverse=True)[1]) for part in rows]


def stationary_counts(steps: Array, block_length: float, num_boot: int, seed: int, runs: Array | None = None) -> Counts:
    """How often each row occurs in each resample of blocks of steps.

    Blocks start anywhere, have geometric lengths with mean `block_length` and wrap around at the end. Rows of one step
    stay together. Where there are several runs, as many runs are drawn with replacement, and each drawn run gets its
    own blocks: no block holds steps of two runs.

    Args:
        steps: step of each row.
        block_length: mean block length in steps, at least 1.
        num_boot: number of resamples.
        seed: the same seed gives the same resamples.
        runs: number of the run of each row; None if there is one run.

    Returns:
        Counts: shape (num_boot, rows).

    Source: Politis and Romano, 1994, the stationary bootstrap; for the runs Davison and Hinkley, 1997, section 3.8.
    """
    rng = np.random.default_rng(seed)
    parts = parts_of(steps, runs)
    sizes = [int(codes.max()) + 1 for _, codes in parts]
    # A byte is enough: counts scatter around 1 as numbers of blocks do, and 255 blocks never meet in one step.
    counts = np.zeros((num_boot, len(steps)), dtype=np.uint8)
    for row in counts:
        if len(parts) == 1:
            row[:] = _blocks(rng, sizes[0], block_length)[parts[0][1]]
            continue
        for run in rng.integers(0, len(parts), size=len(parts)):
            rows, codes = parts[run]
            row[rows] += _blocks(rng, sizes[run], block_length)[codes]
    return counts


def _blocks(rng: np.random.Generator, n: int, block_length: float) -> Counts:
    """How often each of n steps occurs in one resample."""
    starts_block = rng.random(n) < 1 / block_length
    starts_block[0] = True
    at = np.flatnonzero(starts_block)
    begins = rng.integers(0, n, size=n)[at]
    ends = begins + np.diff(at, append=n)
    # A block adds one from its begin on and takes it back at its end; what wraps around begins again at zero.
    change = np.bincount(begins, minlength=n + 1)
    change -= np.bincount(np.minimum(ends, n), minlength=n + 1)
    wrapped = ends[ends > n] - n
    np.subtract.at(change, wrapped, 1)
    change[0] += len(wrapped)
    return np.cumsum(change[:n]).astype(np.uint8)


def with_all(counts: Counts) -> Counts:
    """The counts, and last the rows themselves: each of them once."""
    return np.vstack([counts, np.ones((1, counts.shape[1]), dtype=np.uint8)])


def sums(counts: Counts, values: Array | Callable[[slice], Array]) -> Array:
    """The sum of the values over the rows of each resample, in float64.

    Args:
        counts: from `stationary_counts`.
        values: one row of numbers for each row of the data, shape (rows, k), or a function that gives them for a slice.

    Returns:
        Array: shape (num_boot, k).
    """
    at = values if callable(values) else values.__getitem__
    total: Array | None = None
    for begin in range(0, counts.shape[1], COLUMNS):
        part = slice(begin, begin + COLUMNS)
        found = counts[:, part].astype(np.float64) @ at(part)
        total = found if total is None else total + found
    assert total is not None
    return total


def resampled_quantile(values: Array, quantile: float, counts: Counts, weights: Array | None = None) -> Array:
    """The weighted quantile of the values in each resample.

    Values far from the quantile of all rows matter only by their sum. Where the quantile of a resample is not in the
    window around it, all values are looked through.

    Args:
        values: one for each row.
        quantile: level in (0, 1).
        counts: from `stationary_counts`.
        weights: weight of each row; None gives all the same.
    """
    n = len(values)
    order = np.argsort(values)
    weights = np.ones(n) if weights is None else weights
    share = np.cumsum(weights[order])
    middle = int(np.searchsorted(share, quantile * share[-1]))
    reach = n if n <= ALL_KEPT else int(2 * n ** (2 / 3))
    low, high = max(0, middle - reach), min(n, middle + reach)
    below = np.zeros(n)
    below[order[:low]] = weights[order[:low]]
    known = sums(counts, np.stack([below, weights], axis=1))
    found = np.empty(len(counts), dtype=np.intp)
    for number, (row, (left, total)) in enumerate(zip(counts, known, strict=True)):
        window, wanted = order[low:high], quantile * total * (1 - 1e-12)
        share = left + np.cumsum(weights[window] * row[window])
        if (low > 0 and not left < wanted) or (high < n and not share[-1] >= wanted):
            window = order
            share = np.cumsum(weights[window] * row[window])
        found[number] = window[int((share >= wanted).argmax())]
    return np.asarray(values[found])
