"""Schedule-free optimizers: they take the gradient at y, and the model is evaluated at x, an average of iterates z."""

from torch import Tensor

from smoothdiag.adapters.derived import KeepsIterate


class ScheduleFree(KeepsIterate):
    """Describes schedule-free optimizers.

    In training the parameters hold y = (1 - b) z + b x. The model is evaluated at x, which the optimizer computes from
    y and from the z in its state. If AutoClip shortened an update in y alone, it would spoil x.

    Source: Defazio et al. 2024, *The road less scheduled*.
    """

    name = "schedulefree"
    options = frozenset({"weight_sum", "train_mode"})

    def evaluated(self, parameter: Tensor) -> Tensor:
        """Returns x, without a change to the optimizer.

        The parameters hold x already in evaluation mode, and in variants without such a mode, which hold y only while
        they evaluate a closure. Variants that keep x are asked for it. With a b of 0, which hides x, this raises the
        same ZeroDivisionError as the optimizer's ``eval``.
        """
        group, state = self.group_of(parameter), self.state_of(parameter)
        # A wrapper has mode and weight as attributes; the groups belong to the optimizer that it wraps.
        wraps = hasattr(self.optimizer, "train_mode")
        is_training = self.optimizer.train_mode if wraps else group.get("train_mode", False)
        if "z" not in state or not is_training:
            return parameter
        if "x" in state:
            kept: Tensor = state["x"]
            return kept
        weight = self.optimizer.momentum if wraps else group["betas"][0] if "betas" in group else group["momentum"]
        return parameter.detach().lerp(state["z"].to(parameter), weight=1 - 1 / weight)
