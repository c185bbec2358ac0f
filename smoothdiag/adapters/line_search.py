"""LBFGS: it evaluates its closure many times in a step, and chooses the length of the step itself."""

import torch

from smoothdiag.adapters.protocol import Way
from smoothdiag.adapters.unknown import Unknown


class LineSearch(Unknown):
    """Describes LBFGS, which takes many gradients in a step, whereas AutoClip acts on one."""

    way: Way = "nothing"

    @staticmethod
    def matches(optimizer: torch.optim.Optimizer) -> bool:
        """Returns whether the optimizer is LBFGS, or of a subclass of it."""
        return isinstance(optimizer, torch.optim.LBFGS)

    def refusal(self) -> str:
        """Returns the refusal: LBFGS needs no clipping."""
        return (
            "Parameter `optimizer` should evaluate its closure once in a step: AutoClip acts on one gradient. "
            f"Found {type(self.optimizer).__name__}, which searches along a line and needs no clipping: "
            'its option line_search_fn="strong_wolfe" keeps steps short.'
        )
