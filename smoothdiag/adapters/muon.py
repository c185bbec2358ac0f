"""Muon: the momentum of a matrix, made orthogonal. Its steps are as long as the rate says, whatever the gradient."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from smoothdiag.adapters.derived import Derived
from smoothdiag.adapters.protocol import Ball, Group
from smoothdiag.geometry import Convolution, Spectral

_NAMES = ("Muon", "MuonWithAuxAdam", "SingleDeviceMuon", "SingleDeviceMuonWithAuxAdam")
"""The class of torch, and those of Jordan's package; further packages have classes called Muon."""


class Muon(Derived):
    """Describes Muon.

    An update is the rate times an approximate polar factor of the momentum. So neither the norm of the gradient nor a
    diagonal says how long the update is. To compute it from the state would take the orthogonalisation once more, which
    costs more than a copy of the parameter. Curvature is measured in the spectral norm, see `unit_balls`.

    Source: Jordan et al. 2024, *Muon: an optimizer for hidden layers in neural networks*.
    """

    @staticmethod
    def matches(optimizer: torch.optim.Optimizer) -> bool:
        """Returns whether the class is called Muon: torch has such a class, and so have other packages."""
        return type(optimizer).__name__ in _NAMES

    def unit_balls(self, parameters: Sequence[Tensor]) -> Sequence[Ball | None]:
        """Returns the spectral norm for matrices, with the factor by which Muon multiplies the rate for a shape.

        That factor is sqrt(max(1, rows / columns)), or 0.2 sqrt(max(rows, columns)) where options say so. A kernel of a
        convolution is a matrix with a row for each output. ``None`` for vectors, with ``use_muon=False``, and for
        factors of other names.
        """
        return [_ball(p.shape, self.group_of(p)) for p in parameters]


def _ball(shape: torch.Size, group: Group) -> Ball | None:
    known = group.get("adjust_lr_fn") in (None, "original", "match_rms_adamw")
    if len(shape) < 2 or not group or not group.get("use_muon", True) or not known:
        return None
    outputs, inputs, positions = (max(n, 1) for n in (*shape[:2], math.prod(shape[2:])))
    if group.get("adjust_lr_fn") == "match_rms_adamw" or group.get("use_adjusted_lr"):
        factor = 0.2 * math.sqrt(max(outputs, inputs * positions))
    elif len(shape) > 2 and "use_adjusted_lr" not in group:
        factor = math.sqrt(max(1, shape[-2] / shape[-1]))  # Jordan's code takes the sides of the kernel here
    else:
        factor = math.sqrt(max(1, outputs / (inputs * positions)))
    # The geometries divide by the gain of an identity from root mean square to root mean square, Muon does not.
    radius = factor / math.sqrt(outputs / inputs) * positions
    return (Spectral(exact=True) if len(shape) == 2 else Convolution(exact=True)), radius
