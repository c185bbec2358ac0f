"""Local smoothness beside the gradient norm: measured in any training loop, fitted, plotted, used to clip.

Units, with [f] the loss and [x] the parameters: gradient norm [f/x], smoothness and L0 [f/x^2], L1 [1/x],
learning rate [x^2/f], threshold [f/x], step cap [x].
"""

import importlib
from typing import TYPE_CHECKING, Any

from smoothdiag.geometry import Diagonal, Euclidean, Geometry
from smoothdiag.measure.curvature import hvp
from smoothdiag.measure.estimators import (
    CriticalStep,
    DebiasedSmoothness,
    DirectionalCurvature,
    Estimate,
    Estimator,
    HessianNorm,
    LocalSmoothness,
    PathSmoothness,
    Sharpness,
    Step,
)
from smoothdiag.measure.loss.calls import returned_loss
from smoothdiag.measure.loss.coordinates import by_module
from smoothdiag.measure.loss.fixed import objective
from smoothdiag.measure.loss.objective import Objective
from smoothdiag.measure.probe import Probe
from smoothdiag.measure.probe.schedule import Schedule, budget, every, log_spaced
from smoothdiag.measure.scan import scan
from smoothdiag.moved import keep_old_paths
from smoothdiag.optim import GGNC, ClippedMomentum, ClippedScion, GradientDescent
from smoothdiag.rows import SmoothdiagWarning, Status
from smoothdiag.schedulers import LossGapWarmup
from smoothdiag.trace import Trace

if TYPE_CHECKING:
    from smoothdiag import doctor as doctor
    from smoothdiag import problems as problems
    from smoothdiag.autoclip import AutoClip, StepRule
    from smoothdiag.clipping import ClipRule, LawRate, StepRate, clip_rule, step_rate
    from smoothdiag.fits import GroupFits, SmoothnessFit, Verdict, compare_runs, fit_groups, fit_smoothness
    from smoothdiag.logs import LogReview, read_log, review_log
    from smoothdiag.plots import (
        plot_benefit,
        plot_clipping,
        plot_constants,
        plot_fit,
        plot_groups,
        plot_sharpness,
        plot_smoothness,
        plot_spikes,
        plot_trace,
    )
    from smoothdiag.report.page import write_report
    from smoothdiag.spikes import SPAM, Explanation, SixSigma, SpikeEvent, SpikeGuard, ZClip
    from smoothdiag.spiking import SpikeRule

# scipy, pandas and matplotlib load when one of these names is first used: a training script pays for what it does.
_LAZY = {
    "AutoClip": "smoothdiag.autoclip",
    "ClipRule": "smoothdiag.clipping",
    "Explanation": "smoothdiag.spikes",
    "GroupFits": "smoothdiag.fits",
    "LawRate": "smoothdiag.clipping",
    "LogReview": "smoothdiag.logs",
    "SPAM": "smoothdiag.spikes",
    "SixSigma": "smoothdiag.spikes",
    "SmoothnessFit": "smoothdiag.fits",
    "SpikeEvent": "smoothdiag.spikes",
    "SpikeGuard": "smoothdiag.spikes",
    "SpikeRule": "smoothdiag.spiking",
    "StepRate": "smoothdiag.clipping",
    "StepRule": "smoothdiag.autoclip",
    "Verdict": "smoothdiag.fits",
    "ZClip": "smoothdiag.spikes",
    "clip_rule": "smoothdiag.clipping",
    "compare_runs": "smoothdiag.fits",
    "fit_groups": "smoothdiag.fits",
    "fit_smoothness": "smoothdiag.fits",
    "plot_benefit": "smoothdiag.plots",
    "plot_clipping": "smoothdiag.plots",
    "plot_constants": "smoothdiag.plots",
    "plot_fit": "smoothdiag.plots",
    "plot_groups": "smoothdiag.plots",
    "plot_sharpness": "smoothdiag.plots",
    "plot_smoothness": "smoothdiag.plots",
    "plot_spikes": "smoothdiag.plots",
    "plot_trace": "smoothdiag.plots",
    "read_log": "smoothdiag.logs",
    "review_log": "smoothdiag.logs",
    "step_rate": "smoothdiag.clipping",
    "write_report": "smoothdiag.report.page",
}

__all__ = [
    # measure
    "CriticalStep",
    "DebiasedSmoothness",
    "DirectionalCurvature",
    "Estimate",
    "Estimator",
    "HessianNorm",
    "LocalSmoothness",
    "Objective",
    "PathSmoothness",
    "Probe",
    "Schedule",
    "Sharpness",
    "Status",
    "Step",
    "budget",
    "by_module",
    "every",
    "hvp",
    "log_spaced",
    "objective",
    "returned_loss",
    "scan",
    # record
    "SmoothdiagWarning",
    "Trace",
    # read what nobody measured
    "LogReview",
    "read_log",
    "review_log",
    # fit
    "GroupFits",
    "SmoothnessFit",
    "Verdict",
    "compare_runs",
    "fit_groups",
    "fit_smoothness",
    # clip
    "AutoClip",
    "ClipRule",
    "LawRate",
    "StepRate",
    "StepRule",
    "clip_rule",
    "step_rate",
    # watch for spikes
    "Explanation",
    "SPAM",
    "SixSigma",
    "SpikeEvent",
    "SpikeGuard",
    "SpikeRule",
    "ZClip",
    # step
    "GGNC",
    "ClippedMomentum",
    "ClippedScion",
    "GradientDescent",
    "LossGapWarmup",
    # geometry
    "Diagonal",
    "Euclidean",
    "Geometry",
    # look
    "plot_benefit",
    "plot_clipping",
    "plot_constants",
    "plot_fit",
    "plot_groups",
    "plot_sharpness",
    "plot_smoothness",
    "plot_spikes",
    "plot_trace",
    "write_report",
    # check the loop
    "doctor",
    # ground truth
    "problems",
]

__version__ = "0.1.0"

keep_old_paths()


if not TYPE_CHECKING:  # a type checker that saw it would let every misspelt name pass

    def __getattr__(name: str) -> Any:
        if name in ("doctor", "problems"):
            return importlib.import_module(f"smoothdiag.{name}")
        if name in _LAZY:
            return getattr(importlib.import_module(_LAZY[name]), name)
        raise AttributeError(f"module 'smoothdiag' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted((globals().keys() | set(__all__)) - {"Any", "TYPE_CHECKING", "importlib"})
