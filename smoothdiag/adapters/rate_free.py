"""Optimizers that estimate their own learning rate from the steps they have taken: Prodigy and D-Adaptation."""

import torch

from smoothdiag.adapters.derived import Derived
from smoothdiag.adapters.unknown import WAY_OUT, first_options, is_of_torch

_OPTION = "d"


class RateFree(Derived):
    """Describes optimizers that estimate their rate: if AutoClip shortens their steps, the estimate grows.

    Source: Defazio, Mishchenko 2023, *Learning-rate-free learning by D-Adaptation*; Mishchenko, Defazio 2023,
    *Prodigy: an expeditiously adaptive parameter-free learner*.
    """

    @staticmethod
    def matches(optimizer: torch.optim.Optimizer) -> bool:
        """Returns whether the groups hold an estimate."""
        return not is_of_torch(optimizer) and _OPTION in first_options(optimizer)

    def refusal(self) -> str:
        """Returns the refusal: the optimizer estimates its rate."""
        return (
            "Parameter `optimizer` should not estimate its rate from the steps that it has taken. It would not know "
            "that AutoClip has shortened them, and its estimate would grow, in some optimizers without end. Found "
            f"{type(self.optimizer).__name__}, whose groups have `{_OPTION}`. {WAY_OUT}"
        )
