"""The step of clipped momentum as a pure function of parameters, gradients and momenta."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from smoothdiag.optim.arithmetic import global_norm, lengths, scalar, subtract_scaled_
from smoothdiag.vectors import total, widest

Clip = Literal["hard", "soft", "normalize"]


# Differences from the code released with the paper:
# 1. One norm over all groups, whatever their rates and thresholds; theirs takes one norm per group, which is another
#    algorithm (`norm_scope="group"`): its longest step grows with the number of groups.
# 2. Both forms of clipping for every nu; theirs ties the soft form to nu > 0 and the hard one to nu = 0.
# 3. A zero gradient gives a zero step; theirs divides by its norm.
# 4. Weight decay is decoupled unless asked otherwise; theirs enters the gradient, hence norm, momentum and the
#    user's `.grad`.
# 5. The group holds the threshold, and gamma = lr * threshold, or gamma itself (`longest_step`); theirs holds lr and
#    gamma, and schedules both.
# 6. The momentum can be corrected for its start at zero.
def clipped_momentum_update(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    *,
    lr: float | Tensor,
    threshold: float | Tensor | None = None,
    longest_step: float | Tensor | None = None,
    nu: float = 1.0,
    clip: Clip = "hard",
    grad_norm: Tensor | None = None,
    momentum_norm: Tensor | None = None,
    corrections: Sequence[Tensor] | None = None,
    foreach: bool = True,
) -> None:
    """Moves ``params`` in place by one clipped step, without keeping state or waiting for a device.

    With eta = lr and gamma = lr * threshold, the longest step::

        hard:       x -= nu min(eta, gamma/||m||) m + (1 - nu) min(eta, gamma/||g||) g
        soft:       x -= nu eta/(1 + eta ||m||/gamma) m + (1 - nu) eta/(1 + eta ||g||/gamma) g
        normalize:  x -= nu gamma/||m|| m + (1 - nu) gamma/||g|| g

    Args:
        params: Tensors to move, all of one dtype and on one device.
        grads: Gradients g; not read if ``nu`` is 1.
        momenta: Averaged gradients m, including this step's gradient; not read if ``nu`` is 0.
        lr: Learning rate eta, a number or 0-dim tensor; a negative one ascends.
        threshold: Norm from which the hard form clips; ``inf`` never clips.
        longest_step: Longest step gamma, instead of ``threshold``.
        nu: Weight of the averaged gradient against the raw one.
        clip: ``"hard"``, ``"soft"`` or ``"normalize"``.
        grad_norm: 0-dim ||g||, if it covers more than ``grads``.
        momentum_norm: 0-dim ||m||, if it covers more than ``momenta``.
        corrections: 0-dim divisors of the momenta; ``momentum_norm`` is then the norm of the quotients.
        foreach: Whether to use the operations on lists.

    Units: lr [x^2/f], threshold [f/x], longest_step [x].

    Source: Zhang, Jin, Fang, Wang 2020 (NeurIPS), "Improved analysis of clipping algorithms for non-convex
    optimization", Algorithm 1; "normalize" is its limit of large eta, Cutkosky, Mehta 2020 (ICML), "Momentum improves
    normalized SGD", Algorithm 1.
    """
    if nu > 0:
        if momentum_norm is None:
            momentum_norm = averages_norm([(momenta, momenta, corrections)], foreach)
        scale = nu * _rate(momentum_norm, lr, threshold, longest_step, clip)
        subtract_scaled_(
            params, momenta, scale if corrections is None else [scale / c for c in corrections], foreach=foreach
        )
    if nu < 1:
        if grad_norm is None:
            grad_norm = global_norm([(grads, grads)], foreach=foreach)
        subtract_scaled_(params, grads, (1 - nu) * _rate(grad_norm, lr, threshold, longest_step, clip), foreach=foreach)


def averages_norm(
    averages: Sequence[tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor] | None]], foreach: bool
) -> Tensor:
    """Returns the norm over averages; each item holds averages, their parameters and their divisors."""
    squares = []
    for tensors, owners, corrections in averages:
        found = [length.to(widest(length.device)) for length in lengths(tensors, foreach=foreach)]
        if corrections is not None:
            found = [length / c for length, c in zip(found, corrections, strict=True)]
        squares.append(([length.square() for length in found], owners))
    return total(squares).sqrt()


def _rate(
    norm: Tensor, lr: float | Tensor, threshold: float | Tensor | None, longest_step: float | Tensor | None, clip: Clip
) -> Tensor:
    """Returns the rate at which a vector of this norm is subtracted; 0-dim."""
    norm = norm.to(widest(norm.device))  # quotients of extreme rates and lengths exceed the range of float32
    eta = scalar(lr, norm)
    if longest_step is None:
        cap = scalar(math.inf if threshold is None else threshold, norm)
        gamma = eta * cap
    else:
        gamma = scalar(longest_step, norm).copysign(eta)
        cap = gamma / eta
    if clip == "hard":
        rate = torch.where(norm <= cap, eta, eta * (cap / norm))
    elif clip == "soft":
        rate = torch.where(cap.isinf(), eta, eta * (cap / (cap + norm)))
    else:
        rate = gamma / norm
    # A vector whose norm is 0, perhaps by underflow, has no direction; at a huge rate it would still be a long step.
    return torch.where(norm == 0, 0.0, rate)
