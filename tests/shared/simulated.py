"""Simulated runs: gradient norm, smoothness and saturation of every row, from a random generator."""

import numpy as np


def spread(rng, n, deviation):
    return np.exp(deviation * rng.standard_normal(n))


def uniform(rng, n, decades=2):
    return 10 ** rng.uniform(-decades / 2, decades / 2, n)


def law(draw, n):
    def run(rng):
        x = draw(rng, n)
        return x, (1 + 2 * x) * spread(rng, n, 0.2), 0.1

    return run


def white(rng):
    return uniform(rng, 300), spread(rng, 300, 0.5), 0.1


def different_batches(rng, n=200, step=0.1):
    """Normalised steps on a quadratic, each gradient with noise of its own that outweighs the signal."""
    curvature, x = np.logspace(-1, 0, 50), 1e-3 * rng.standard_normal(50)
    rows = []
    for deviation in uniform(rng, n):
        here = curvature * x + deviation * rng.standard_normal(50)
        x = x - step * here / np.linalg.norm(here)
        there = curvature * x + deviation * rng.standard_normal(50)
        change, size = np.linalg.norm(there - here), np.linalg.norm(here)
        rows.append((size, change / step, change / (size + np.linalg.norm(there))))
    return np.array(rows).T
