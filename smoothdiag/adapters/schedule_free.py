"""Schedule-free optimizers: they take the gradient at y, and the model is evaluated at x, an average of iterates z."""

import torch
from torch import Tensor

from smoothdiag.adapters.unknown import Unknown, is_of_torch, keeps_iterate

_OPTIONS = frozenset({"weight_sum", "train_mode"})


class ScheduleFree(Unknown):
    """Describes schedule-free optimizers.

    In training the parameters hold y = (1 - b) z + b x. The model is evaluated at x, which the optimizer computes from
    y and from the z in its state. If AutoClip shortened an update in y alone, it would spoil x.

    Source: Defazio et al. 2024, *The road less scheduled*.
    """

    @staticmethod
    def matches(optimizer: torch.optim.Optimizer) -> bool:
        """Returns whether the name of the class or an option says schedule-free."""
        named = "schedulefree" in type(optimizer).__name__.lower().replace("_", "")
        return not is_of_torch(optimizer) and (named or bool(_OPTIONS & optimizer.param_groups[0].keys()))

    def evaluated(self, parameter: Tensor) -> Tensor:
        """Returns x, without a change to the optimizer."""
        group, z = self.group_of(parameter), self.state_of(parameter).get("z")
        if z is None or not group.get("train_mode", True):
            return parameter
        weight = group["betas"][0] if "betas" in group else group["momentum"]
        return parameter.detach().lerp(z.to(parameter), weight=1 - 1 / weight)

    def refusal(self) -> str:
        """Returns the refusal: the optimizer keeps a copy of the parameters."""
        name, options = type(self.optimizer).__name__, _OPTIONS & self.optimizer.param_groups[0].keys()
        return keeps_iterate(f"{name}, whose groups have `{min(options)}`" if options else name)
