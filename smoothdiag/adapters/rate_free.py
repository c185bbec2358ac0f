"""Optimizers without a rate, as Prodigy and D-Adaptation: they estimate it from how far they believe to have come."""

import torch

from smoothdiag.adapters.unknown import WAY_OUT, Unknown, is_of_torch

_OPTION = "d"


class RateFree(Unknown):
    """What is known of optimizers that estimate their rate: shortened steps let the estimate grow.

    Source: Defazio, Mishchenko 2023, *Learning-rate-free learning by D-Adaptation*; Mishchenko, Defazio 2023,
    *Prodigy: an expeditiously adaptive parameter-free learner*.
    """

    @staticmethod
    def matches(optimizer: torch.optim.Optimizer) -> bool:
        """Returns whether the groups hold an estimate."""
        return not is_of_torch(optimizer) and _OPTION in optimizer.param_groups[0]

    def refusal(self) -> str:
        """Returns that it estimates its rate."""
        return (
            "Parameter `optimizer` should not estimate its rate from the steps it believes to have taken: steps that "
            "AutoClip shortens let the estimate grow, without end in some. Found "
            f"{type(self.optimizer).__name__}, whose groups have `{_OPTION}`. {WAY_OUT}"
        )
