"""A warm-up that reads the loss: while the loss is far from its minimum, the rate is small."""

from __future__ import annotations

import math
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from smoothdiag import arguments
from smoothdiag.adapters import adapter_of

if TYPE_CHECKING:
    from smoothdiag.fits import SmoothnessFit


class LossGapWarmup(LRScheduler):
    """Learning rate 1 / (H0 + H1 (f - f*)^rho): it rises by itself as the loss f falls towards its minimum f*.

    ``step(loss)`` sets the rate for the next step of the optimizer. So call it after the loss is known and before
    `optimizer.step()`. Until the first call the rate is zero, so a step before it moves nothing.

    The optimizer's own learning rate is the peak P that the warm-up ends at. The rate is 1 / (max(H0, 1/P) +
    H1 (f - f*)^rho), so it exceeds neither P nor 1/H0, and the warm-up has one constant, H1. P is the largest rate of
    the groups, and all groups keep their ratios to it. For optimizers that follow gradients, P counts as the effective
    rate: the learning rate times the gain of the momentum.

    Proved: if ||H|| <= H0 + H1 (f - f*)^rho wherever the loss is at most f, a step along the full gradient at this rate
    lowers the loss by at least rate * ||g||^2 / 2. f* needs not be the infimum: any number serves for which the bound
    holds. Not proved: anything about minibatch losses, momentum, and optimizers such as Adam, whose steps are no rate
    times gradients. There the shape of the warm-up is measured practice.

    1. Nobody can observe f*. A fit tries several, and this takes the one that predicted later smoothness best. For
       another one, give the constants of its entry of `fit.loss_floors` by hand. Zero is a lower bound of most training
       losses. At losses below f* the rate is the peak.
    2. A loss that is NaN or infinite leaves the rate as it was.
    3. A loss on another device is read, which waits for it, unless the rates are tensors on the same device, as in
       ``Adam(parameters, lr=torch.tensor(1e-3), capturable=True)``: then nothing waits.
    4. Every call sets the rate anew, so another scheduler of the same optimizer has no effect beside it. Go over to
       that one when the warm-up has reached the peak.

    Args:
        optimizer: Of torch, of this library, or any other.
        fit: A fit whose verdict is LOSS_GAP, instead of all constants. Rows along a direction, such as those of
            "local", bound the Hessian norm from below. If the optimizer follows no gradients, only the ratio H1/H0
            counts.
        H0: Smoothness at the minimum, which bounds the rate; 0 leaves that to the optimizer's own rate.
        H1: Growth of smoothness with the distance of the loss from f*. For optimizers that follow no gradients, in
            units of one over their rate.
        f_star: f*.
        exponent: rho.
        last_epoch: Number of the last step before a resumed run, as for all schedulers of torch.

    Raises:
        ValueError: If the verdict of the fit is another one, a constant is out of range, or there are both a fit and
            constants or neither. Also if the optimizer follows no gradients and the H0 of the fit is zero.

    Units: H0 [f/x^2], H1 [f/x^2 f^-exponent], f_star [f].

    Source: The law and the warm-up: Alimisis, Islamov, Lucchi, Why do we need warm-up? (arXiv 2510.03164, ICML 2026),
        whose theorems have further safety factors. docs/rates.md proves what is promised here, without them.

    Examples:
        >>> optimizer = torch.optim.SGD(nn.Linear(2, 1).parameters(), lr=0.5)
        >>> warmup = sd.LossGapWarmup(optimizer, H1=4.0)
        >>> for loss in (2.0, 0.5, 0.0):
        ...     warmup.step(loss)
        ...     print(warmup.get_last_lr())
        [0.1]
        [0.25]
        [0.5]
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        fit: SmoothnessFit | None = None,
        *,
        H0: float = 0.0,
        H1: float | None = None,
        f_star: float = 0.0,
        exponent: float = 1.0,
        last_epoch: int = -1,
    ) -> None:
        """Sets the rates to zero until the first loss is known."""
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise arguments.wrong("optimizer", "an optimizer", optimizer)
        if fit is None:
            for name, value in (("H0", H0), ("H1", H1)):
                arguments.number(name, value, "at least 0 and finite", lambda v: 0 <= v < math.inf)
            arguments.number("f_star", f_star, "finite", math.isfinite)
            arguments.positive("exponent", exponent)
            constants: dict[str, Any] = {"H0": H0, "H1": H1, "f_star": f_star, "exponent": exponent, "ratio": 0.0}
        elif H1 is None and (H0, f_star, exponent) == (0.0, 0.0, 1.0):
            constants = _constants_of(fit, adapter_of(optimizer).follows_gradients)
        else:
            raise ValueError("Parameter `fit` should be None if constants are given by hand. Found both.")
        self.constants = {name: float(value) for name, value in constants.items()}
        self._begun = False
        super().__init__(optimizer, last_epoch)

    def step(self, loss: float | Tensor | None = None) -> None:
        """Sets the rates for the next step of the optimizer.

        Args:
            loss: Loss at the parameters that the step starts from.

        Raises:
            ValueError: If there is no loss, if it is no single number, or if the optimizer got further groups.
        """
        if not self._begun:  # The constructor of the base class takes the first step, without a loss.
            self._begun = True
            # Rates that are tensors would be read from their device in every step.
            self.base_lrs: list[float | Tensor] = [float(base) for base in self.base_lrs]
            self._set(0.0, known=True)
        else:
            found = _number(loss)
            if len(self.optimizer.param_groups) != len(self.base_lrs):
                raise ValueError(
                    "Parameter `optimizer` should have as many parameter groups as at the start of the warm-up, "
                    f"{len(self.base_lrs)}. Found {len(self.optimizer.param_groups)}: make a new LossGapWarmup."
                )
            if isinstance(found, Tensor) and not self._rates_are_on(found.device):
                found = float(found)
            self._set(self._share(found), known=_is_finite(found))
        self._step_count = getattr(self, "_step_count", 0) + 1
        self.last_epoch += 1

    def get_lr(self) -> list[float | Tensor]:
        """Returns the rates in force; tensors are copied."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        return [rate.clone() if isinstance(rate, Tensor) else rate for rate in rates]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over a state, and gives the optimizer the rates of that state."""
        super().load_state_dict(state_dict)
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            _assign(group, rate)

    def _share(self, loss: float | Tensor) -> Any:
        """The rate as a share of the peak P, 1 / (max(H0 P, 1) + (H1 P + ratio) gap^rho)."""
        constants, peak = self.constants, self._peak()
        growth = constants["H1"] * peak + constants["ratio"]
        if isinstance(loss, Tensor):
            gap: Any = (loss - constants["f_star"]).clamp(min=0)
        else:
            gap = max(loss - constants["f_star"], 0.0)
        try:
            return 1 / (max(constants["H0"] * peak, 1.0) + growth * gap ** constants["exponent"])
        except OverflowError:
            return 0.0

    def _peak(self) -> float:
        adapter = adapter_of(self.optimizer)
        groups = zip(self.base_lrs, self.optimizer.param_groups, strict=True)
        if adapter.follows_gradients:
            return max(float(base) * adapter.gain(group) for base, group in groups)
        return max(map(float, self.base_lrs))

    def _set(self, share: Any, known: bool | Tensor) -> None:
        for base, group in zip(self.base_lrs, self.optimizer.param_groups, strict=True):
            if isinstance(known, Tensor):
                _assign(group, torch.where(known, base * share, group["lr"]))
            elif known:
                _assign(group, float(base) * share)
        self._last_lr: list[float | Tensor] = self.get_lr()

    def _rates_are_on(self, device: torch.device) -> bool:
        rates = [group["lr"] for group in self.optimizer.param_groups]
        return all(isinstance(rate, Tensor) and rate.device == device for rate in rates)


def _constants_of(fit: SmoothnessFit, follows_gradients: bool) -> dict[str, float]:
    """The constants of a fit; its ratio H1/H0 alone if the optimizer does not follow gradients."""
    from smoothdiag.clipping.trust import check_fit

    check_fit(fit)
    score = next((score for score in fit.comparison if score.name == "loss gap"), None)
    if fit.verdict.name != "LOSS_GAP" or score is None:
        raise ValueError(
            f"Parameter `fit` should have the verdict LOSS_GAP: otherwise the loss was not found to set smoothness. "
            f"Found the verdict {fit.verdict.name}."
        )
    shape = {"f_star": score.floor, "exponent": score.exponent}
    if follows_gradients:
        return shape | {"H0": score.intercept, "H1": score.coefficient, "ratio": 0.0}
    if not score.intercept > 0:
        raise ValueError(
            "Parameter `fit` should have an H0 above zero for an optimizer that does not follow gradients: only the "
            "ratio H1/H0 holds in its units. Found an H0 of zero; give `H1` by hand."
        )
    return shape | {"H0": 0.0, "H1": 0.0, "ratio": score.coefficient / score.intercept}


def _number(loss: object) -> float | Tensor:
    if isinstance(loss, Tensor) and loss.numel() == 1 and not loss.is_complex():
        value = loss.detach().reshape(())
        return value if value.dtype is torch.float64 else value.float()
    if not isinstance(loss, Real) or isinstance(loss, bool):
        raise arguments.wrong("loss", "the loss of this step, as a number or a tensor with one element", loss)
    return float(loss)


def _is_finite(loss: float | Tensor) -> bool | Tensor:
    return torch.isfinite(loss) if isinstance(loss, Tensor) else math.isfinite(loss)


def _assign(group: dict[str, Any], rate: float | Tensor) -> None:
    """Gives a group a rate; a rate that is a tensor stays the same tensor, because a captured graph may hold it."""
    if not isinstance(group["lr"], Tensor):
        group["lr"] = float(rate)
    elif isinstance(rate, Tensor):
        group["lr"].copy_(rate)
    else:
        group["lr"].fill_(rate)
