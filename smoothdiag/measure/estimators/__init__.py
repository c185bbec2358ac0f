"""Estimators of local smoothness: frozen dataclasses that turn a Step into an Estimate."""

from smoothdiag.measure.estimators.base import Estimate, Estimator, Status, Step
from smoothdiag.measure.estimators.critical import CriticalStep
from smoothdiag.measure.estimators.halves import DebiasedSmoothness
from smoothdiag.measure.estimators.hessian import DirectionalCurvature, HessianNorm, Sharpness
from smoothdiag.measure.estimators.local import LocalSmoothness
from smoothdiag.measure.estimators.path import PathSmoothness

__all__ = [
    "CriticalStep",
    "DebiasedSmoothness",
    "DirectionalCurvature",
    "Estimate",
    "Estimator",
    "HessianNorm",
    "LocalSmoothness",
    "PathSmoothness",
    "Sharpness",
    "Status",
    "Step",
]
