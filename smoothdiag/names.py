"""Names for people: what the estimators of a trace measure, and what each verdict means, in a few words."""

from collections.abc import Mapping
from typing import Final

ESTIMATORS: Final[Mapping[str, str]] = {
    "local": "smoothness along the gradient",
    "local_random": "smoothness in a random direction",
    "local_update": "smoothness along the update",
    "local_steepest": "smoothness along the steepest descent",
    "path": "smoothness along the step",
    "debiased": "smoothness along the step, from two halves",
    "hessian_norm": "Hessian norm",
    "sharpness": "sharpness",
    "batch_sharpness": "batch sharpness",
    "curvature_update": "curvature along the update",
    "critical_step": "curvature from the critical step",
}
"""What the rows of each estimator measure, by its name in the trace."""

SUFFIXES: Final[Mapping[str, str]] = {
    "_preconditioned": ", preconditioned",
    "_own": ", in the optimizer's norm",
    "_clip": ", for AutoClip",
}
"""What the ends of such names mean."""

VERDICTS: Final[Mapping[str, str]] = {
    "L0L1": "L0 and L1 can be used",
    "CONSTANT": "one constant is enough",
    "POWER": "a power, not a line",
    "LOSS_GAP": "smoothness follows the loss",
    "NOT_IDENTIFIED": "do not use L0 and L1",
    "ARTEFACT": "do not use L0 and L1",
}
"""What each verdict means, short enough for a figure."""


def readable(estimator: str) -> str:
    """Returns what an estimator measures, or its name as it is if nobody knows it."""
    for suffix, meaning in SUFFIXES.items():
        if estimator.endswith(suffix) and (stem := estimator.removesuffix(suffix)) in ESTIMATORS:
            return ESTIMATORS[stem] + meaning
    return ESTIMATORS.get(estimator, estimator)
