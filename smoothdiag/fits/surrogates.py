"""Surrogates: how much a line seems to explain when gradient norm and smoothness only drift together."""

from __future__ import annotations

import numpy as np

from smoothdiag.fits.affine import Line, pinball, quantile_line, relative_weights
from smoothdiag.fits.artefacts import MIN_POINTS
from smoothdiag.fits.base import Array, Flag
from smoothdiag.fits.models import EXACT, fit_constant, searched
from smoothdiag.fits.rows import Rows, step_blocks
from smoothdiag.fits.verdict import FLAT, rises

NUM_BLOCKS = 12
NUM_SURROGATES = 39  # The skill has to exceed the second largest one, as it does by chance once in twenty runs.


def shuffled(rows: Rows, line: Line, quantile: float, seed: int = 0) -> Flag | None:
    """Whether the line explains the rows better than it explains rows shuffled within blocks of steps.

    A surrogate shuffles smoothness within each block. Every value stays in its block, so a drift over the run keeps
    its effect; but no row keeps its own gradient norm. Each block holds steps of one run. Of
    more than `models.SEARCHED` rows that many are taken: a line that they do not show removes next to no error.

    Args:
        rows: the rows of the fit.
        line: the line fitted to them.
        quantile: its level.
        seed: of the shuffling.
    """
    if len(rows.x) < MIN_POINTS or rises(line, (float(np.min(rows.x)), float(np.max(rows.x)))) < FLAT:
        return None
    some = searched(len(rows.x))
    blocks = step_blocks(rows.step[some], rows.run[some], NUM_BLOCKS)
    order = np.concatenate(blocks)
    x, y = rows.x[some][order], rows.y[some]
    rng = np.random.default_rng(seed)
    skill = _skill(x, y[order], line, quantile)
    surrogates = [
        _skill(x, y[np.concatenate([rng.permutation(block) for block in blocks])], line, quantile)
        for _ in range(NUM_SURROGATES)
    ]
    limit = float(np.sort(surrogates)[-2])
    if skill > limit:
        return None
    return Flag(
        "surrogates",
        "the line explains these rows no better than rows whose smoothness was shuffled within blocks of steps. It may "
        "show nothing but the slow drift of the run",
        f"it removes {skill:.0%} of a constant's error on the rows, and {limit:.0%} in the second best of "
        f"{NUM_SURROGATES} shufflings",
        "scan one checkpoint (sd.scan), where time plays no part, or add runs of other seeds or learning rates, so "
        "that the same gradient norm occurs at different steps",
        blocking=True,
    )


def _skill(x: Array, y: Array, start: Line, quantile: float) -> float:
    """Share of the constant's pinball loss that the line removes on the rows of the fit."""
    weights = relative_weights(x, y)
    curves = (quantile_line(x, y, quantile, weights, start=start), fit_constant(x, y, weights, quantile))
    line, constant = (float(weights @ pinball(y - curve(x), quantile)) / len(x) for curve in curves)
    return 1 - max(line, EXACT) / max(constant, EXACT)
