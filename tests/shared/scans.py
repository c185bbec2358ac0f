"""Points of simulated scans, in the format of `sd.scan`."""

import numpy as np
import pandas as pd

NAMES = (
    "gradient up",
    "gradient down",
    "update",
    "to a",
    "from a",
    "to b",
    "from b",
    "random 1",
    "random 2",
    "layers 1",
)


def scanned(law, *, names=NAMES, points=8, between=0.1, within=0.05, seed=0, spin=0.5, falls=True, **columns):
    """A scan whose smoothness is `law(gradient norm, distance, loss)` times a factor of the line and of the point.

    Along every fourth line the gradient norm falls, unless none `falls`. How fast distance and loss follow differs from
    line to line.
    """
    rng = np.random.default_rng(seed)
    rows = [
        {"scan": "start", "point": 0, "distance": 0.0, "grad_norm": 1.0, "loss": 2.0, "smoothness": law(1.0, 0.0, 2.0)}
    ]
    for number, name in enumerate(names):
        effect = between * rng.standard_normal()
        pace, slope = np.exp(rng.normal(0, spin, size=2))
        way = -1 if falls and number % 4 == 3 else 1
        for point in range(1, points + 1):
            x = np.exp(way * 0.4 * point)
            distance = pace * abs(x - 1) ** 0.7
            loss = 2 + way * 0.3 * slope * abs(x - 1)
            y = law(x, distance, loss) * np.exp(effect * min(1, point / 3) + within * rng.standard_normal())
            rows.append(
                {"scan": name, "point": point, "distance": distance, "grad_norm": x, "loss": loss, "smoothness": y}
            )
    fixed = {"estimator": "hessian_norm", "data": "fixed", "step": 7, "status": "ok", "num_grads": 6, "seconds": 0.5}
    return pd.DataFrame(rows).assign(**(fixed | columns))


def linear(x, distance, loss):
    """The law (1, 2)."""
    return 1 + 2 * x
