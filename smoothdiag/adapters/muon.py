"""Muon: the momentum of a matrix, made orthogonal. Its steps are as long as the rate says, whatever the gradient."""

import torch

from smoothdiag.adapters.derived import Derived


class Muon(Derived):
    """What is known of Muon.

    An update is the rate times an approximate polar factor of the momentum. So neither the norm of the gradient nor a
    diagonal says how long it is, and the update does not follow from the state without the orthogonalisation, which
    costs more than a copy of the parameter. Curvature would have to be measured in the spectral norm.

    Source: Jordan et al. 2024, *Muon: an optimizer for hidden layers in neural networks*.
    """

    @staticmethod
    def matches(optimizer: torch.optim.Optimizer) -> bool:
        """Returns whether it is called so: torch has one, and packages have others."""
        return type(optimizer).__name__ == "Muon"
