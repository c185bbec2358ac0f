"""Muon: the momentum of a matrix, made orthogonal. Its steps are as long as the rate says, whatever the gradient."""

import torch

from smoothdiag.adapters.derived import Derived


class Muon(Derived):
    """Describes Muon.

    An update is the rate times an approximate polar factor of the momentum. So neither the norm of the gradient nor a
    diagonal says how long the update is. To compute it from the state would take the orthogonalisation once more, which
    costs more than a copy of the parameter. Curvature would have to be measured in the spectral norm.

    Source: Jordan et al. 2024, *Muon: an optimizer for hidden layers in neural networks*.
    """

    @staticmethod
    def matches(optimizer: torch.optim.Optimizer) -> bool:
        """Returns whether the class is called Muon: torch has such a class, and so have other packages."""
        return type(optimizer).__name__ == "Muon"
