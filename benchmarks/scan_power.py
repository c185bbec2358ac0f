"""How often the fit of a scan finds the law, on simulated scans that scatter like those of real nets."""

import re

import numpy as np
import pandas as pd
from scipy.stats import norm


def simulated(law="power", exponent=1.0, *, seed=0, num_lines=11, num_points=8, step=0.4, between=0.35, within=0.15,
              names=None, alike=0.0):
    """Points of one scan, in the format of `sd.scan`.

    From the start gradient norm 1 every point of a line multiplies the gradient norm by exp(step). Smoothness is
    law(gradient norm) times a factor of the line, which grows over the first three points, times a factor of the point.
    The distance follows from both: d ||g|| = kappa * smoothness * d distance, with kappa of the line. So does the loss:
    d loss = cosine * ||g|| * d distance.
    """
    rng = np.random.default_rng(seed)
    rows = [{"scan": "start", "point": 0, "distance": 0.0, "grad_norm": 1.0, "loss": 2.0}]
    gap0 = 1.0
    def height(x, loss, distance):
        if law == "power":
            return 1.0 if exponent == 0 else 0.3 + 0.7 * x**exponent
        if law == "distance":
            return 1.0 + 1.5 * (distance / 1.0) ** exponent
        return 0.3 + 0.7 * (loss - 1.0) / gap0
    start = height(1.0, 2.0, 0.0) * np.exp(within * rng.standard_normal())
    rows[0]["smoothness"] = start
    names = names or [f"to {number}" for number in range(num_lines)]
    kinds = [re.sub(r"^(random|layers) .*", r"\1", name) for name in names]
    draws = {kind: rng.standard_normal(3) for kind in sorted(set(kinds))}
    for name, kind in zip(names, kinds):
        own3 = np.sqrt(alike) * draws[kind] + np.sqrt(1 - alike) * rng.standard_normal(3)
        effect = between * own3[0]
        kappa, cosine = 0.2 + 0.7 * norm.cdf(own3[1:])
        if law == "lines":
            own = exponent[0] + (exponent[1] - exponent[0]) * norm.cdf(np.sqrt(alike) * draws[kind][2] + 0)if alike else rng.uniform(*exponent)
        points = rng.integers(max(2, num_points - 3), num_points + 1)
        x, y, loss, distance = 1.0, start, 2.0, 0.0
        for point in range(1, points + 1):
            new = x * np.exp(step * rng.uniform(0.7, 1.3))
            moved = (new - x) / (kappa * y)
            loss += cosine * (x + new) / 2 * moved
            distance += moved
            x = new
            h = (0.3 + 0.7 * x**own) if law == "lines" else height(x, loss, distance)
            y = h * np.exp(effect * min(1, point / 3) + within * rng.standard_normal())
            rows.append({"scan": name, "point": point, "distance": distance, "grad_norm": x, "loss": loss,
                         "smoothness": y})
    return pd.DataFrame(rows).assign(estimator="hessian_norm", data="fixed", step=0, status="ok", num_grads=6)
