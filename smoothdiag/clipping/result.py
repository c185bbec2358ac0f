"""ClipRule: a threshold, its reason and what to do with it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from smoothdiag.fits.base import Interval
from smoothdiag.notebooks import as_html


@dataclass(frozen=True)
class ClipRule:
    """A threshold on the gradient norm, and the reason for it.

    Attributes:
        threshold: clip gradients whose norm is larger than this.
        step_cap: longest step that results, effective rate times threshold; NaN if no rate is known, and for Adam
            and similar optimizers.
        max_lr: largest learning rate that a small gradient allows, as the optimizer counts rates; NaN if the fit
            cannot tell, for example because the interval of L0 reaches zero. If the rows measure one direction only,
            it is a bound for that direction.
        clip_rate: share of the recorded gradient norms above the threshold; NaN if the optimizer clips an average
            of gradients, because the norms of averages were not recorded; NaN for a scan.
        reason: reason for the threshold, in words.
        lr: the optimizer's learning rate that the rule is meant for: the given one, or the one that the rule chose; NaN
            if there is neither.
        source: "fit", or "percentile" where the fit could not be used.
        threshold_interval: interval of the threshold at this rate, at the level of the fit; NaN for a percentile.
        next: what to do, in one sentence.
        momentum: the optimizer's momentum that the rule is meant for.
        dampening: its dampening.
        better_lr: the largest learning rate to use instead, if the given one is too large for any threshold; else NaN.

    Units: threshold [f/x], step_cap [x], rates [x^2/f].

    Examples:
        >>> import pandas as pd
        >>> norms = 10 ** torch.arange(200.0).sin().double().numpy()
        >>> table = pd.DataFrame({"grad_norm": norms, "smoothness": 1 + 2 * norms, "saturation": 0.1})
        >>> rule = sd.clip_rule(sd.fit_smoothness(table, num_boot=50), lr=0.1)
        >>> print(rule.source, round(rule.threshold, 2), round(rule.step_cap, 2), round(rule.max_lr, 2))
        fit 4.5 0.45 1.0
    """

    threshold: float
    step_cap: float
    max_lr: float
    clip_rate: float
    reason: str
    lr: float
    source: Literal["fit", "percentile"]
    threshold_interval: Interval = (math.nan, math.nan)
    next: str = field(default="", repr=False)
    momentum: float = 0.0
    dampening: float = 0.0
    better_lr: float = math.nan

    def __str__(self) -> str:
        most = "" if math.isnan(self.max_lr) else f", at most {self.max_lr:.4g} for small gradients"
        share = "an unknown share" if math.isnan(self.clip_rate) else f"{self.clip_rate:.1%}"
        clips = f"it clips {share} of the recorded steps"
        if not math.isnan(self.better_lr):
            head = f"no threshold to use: the learning rate {self.lr:.4g} is too large for any."
        elif self.source == "fit":
            head = f"clip gradients at norm {self.threshold:.4g}; {clips}."
        else:
            head = f"no threshold from this fit; norm {self.threshold:.4g} would only stop outliers ({clips})."
        todo = self.next or "read the reason below."
        last = f"learning rate {_say(self.lr)}{most}; longest step {_say(self.step_cap)}"
        return f"{head}\nNEXT: {todo}\n{self.reason}\n{last}"

    def _repr_html_(self) -> str:
        return as_html(str(self))


def _say(value: float) -> str:
    return "unknown" if math.isnan(value) else f"{value:.4g}"
