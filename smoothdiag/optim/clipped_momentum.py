"""Clipped momentum: one framework for clipped SGD, clipped momentum and the mixtures of the two."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from smoothdiag.momentum import shortening
from smoothdiag.optim.arithmetic import add_scaled, average_, global_norm, multiply_
from smoothdiag.optim.base import COMMON, FLAG, NON_NEGATIVE, Bucket, CappedOptimizer, Group, Option
from smoothdiag.optim.clipped_update import Clip, averages_norm, clipped_momentum_update
from smoothdiag.vectors import widest

Scope = Literal["all", "group"]


class ClippedMomentum(CappedOptimizer):
    """Momentum as an average, with the step clipped by a global norm.

    The momentum is m = momentum * m + (1 - momentum) * g, from m = 0. `clipped_momentum_update` describes the step.
    Class methods give the known members of the family: `sgd_clip`, `mom_clip`, `mix_clip`, `qhm`, `nsgd_m`.

    Things to know:
        * A learning-rate schedule changes ``lr``. With ``threshold``, the norm at which clipping begins stays, and the
          longest step lr * threshold shrinks with the rate. With ``longest_step``, the longest step stays, and the
          threshold longest_step / lr grows as the rate falls, so that in the end nothing is clipped.
        * PyTorch's SGD adds gradients up, but this class averages them: ``lr`` here corresponds to
          ``lr * (1 - momentum)`` in PyTorch.
        * Without ``bias_correction``, as in the paper, the first steps are short: m lacks momentum^t of its weight.
        * A parameter without a gradient is left alone: it neither moves nor decays, its momentum stays, and it counts
          in no norm.
        * While ``nu`` is 0 in every group, no momentum is kept.
        * ``.grad`` is only read. A gradient with an inf or a NaN is not filtered: skip that step.
        * Momenta have the dtype of their parameters. In bfloat16 an average with ``momentum=0.999`` stands still.
        * DTensors (FSDP2, tensor parallelism) count in the norm with all their parts. The norm covers the parameters
          of this optimizer: stages of a pipeline do not see each other's parameters.

    Args:
        params: Parameters, named parameters or groups of them. Every option may be set per group.
        lr: Learning rate eta, a number or a 0-dim tensor, whose value is not checked.
        threshold: Norm above which the step stops growing, a number or a 0-dim tensor. ``inf`` never clips.
        longest_step: Length at which the step stops growing, instead of ``threshold``: one of the two per group.
        momentum: Weight of the past in the average, in [0, 1).
        nu: Weight of the averaged gradient against the raw one, in [0, 1].
        clip: ``"hard"`` cuts the norm at the threshold; ``"soft"`` divides by 1 + norm/threshold; ``"normalize"`` gives
            every step the length lr * threshold, or the length ``longest_step`` at every rate.
        weight_decay: Parameters are multiplied by 1 - lr * weight_decay before the step.
        decoupled_weight_decay: False adds weight_decay * parameter to the gradient instead, before norm and momentum.
        bias_correction: Whether to divide m by 1 - momentum^t after t steps, which corrects its start at zero. An
            average restored from a run without correction has an unknown age and is not corrected.
        norm_scope: ``"all"`` clips a group by the norm over all groups, ``"group"`` by its own norm. The second is
            another algorithm, whose longest step grows with the number of groups.
        maximize: Whether to ascend instead of descending.
        foreach: Whether to use operations on lists of tensors. None: wherever that is faster, at present everywhere.
        capturable: Promises that a CUDA graph may capture the step. Tensors among the options must then be on the
            GPU; numbers are frozen in the graph.

    Raises:
        ValueError: If an option is out of its range, now or at a later step.
        RuntimeError: If a step meets a gradient that is sparse or complex, or whose dtype or mesh differs from the
            parameter's.

    Units: lr [x^2/f], threshold [f/x], longest_step [x], weight_decay [f/x^2].

    Source: Zhang, Jin, Fang, Wang 2020 (NeurIPS), "Improved analysis of clipping algorithms for non-convex
    optimization", Algorithm 1.

    Examples:
        The gradient (3, 4) has the norm 5. Clipped at 1, it moves the weights by lr * threshold = 0.1:

        >>> weights = nn.Parameter(torch.zeros(2))
        >>> optimizer = sd.ClippedMomentum([weights], lr=0.1, threshold=1.0, momentum=0.0)
        >>> weights.grad = torch.tensor([3.0, 4.0])
        >>> optimizer.step()
        >>> print(weights.data)
        tensor([-0.0600, -0.0800])
    """

    OPTIONS: ClassVar[Mapping[str, Option]] = {
        **COMMON,
        **CappedOptimizer.CAPS,
        "momentum": Option(lambda v: 0 <= v < 1, "in [0, 1)"),
        "nu": Option(lambda v: 0 <= v <= 1, "in [0, 1]"),
        "clip": Option(lambda v: v in ("hard", "soft", "normalize"), '"hard", "soft" or "normalize"'),
        "weight_decay": NON_NEGATIVE,
        "decoupled_weight_decay": FLAG,
        "bias_correction": FLAG,
        "norm_scope": Option(lambda v: v in ("all", "group"), '"all" or "group"'),
    }
    LATER: ClassVar[Mapping[str, Any]] = {
        "longest_step": None,
        "decoupled_weight_decay": True,
        "bias_correction": False,
        "norm_scope": "all",
        "foreach": None,
        "capturable": False,
    }

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        *,
        threshold: float | Tensor | None = None,
        longest_step: float | Tensor | None = None,
        momentum: float = 0.9,
        nu: float = 1.0,
        clip: Clip = "hard",
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = True,
        bias_correction: bool = False,
        norm_scope: Scope = "all",
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "threshold": threshold,
            "longest_step": longest_step,
            "momentum": momentum,
            "nu": nu,
            "clip": clip,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "bias_correction": bias_correction,
            "norm_scope": norm_scope,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
        }
        super().__init__(params, defaults)

    @classmethod
    def sgd_clip(cls, params: ParamsT, lr: float | Tensor, **options: Any) -> Self:
        """Returns clipped SGD, without momentum. Published: CIFAR-10 ResNet-32 lr 1, longest_step 1."""
        return cls(params, lr, **{"nu": 0.0, **options})

    @classmethod
    def mom_clip(cls, params: ParamsT, lr: float | Tensor, **options: Any) -> Self:
        """Returns clipped momentum 0.9. Published, with ``clip="soft"``: CIFAR-10 lr 1.5, longest_step 0.25."""
        return cls(params, lr, **{"nu": 1.0, "momentum": 0.9, **options})

    @classmethod
    def mix_clip(cls, params: ParamsT, lr: float | Tensor, **options: Any) -> Self:
        """Returns the mixture nu = 0.7 of momentum 0.999. Published, soft: CIFAR-10 lr 1, longest_step 1."""
        return cls(params, lr, **{"nu": 0.7, "momentum": 0.999, **options})

    @classmethod
    def qhm(cls, params: ParamsT, lr: float | Tensor, **options: Any) -> Self:
        """Returns quasi-hyperbolic momentum, nu = 0.7 of momentum 0.999, which clips nothing.

        Source: Ma, Yarats 2019 (ICLR), "Quasi-hyperbolic momentum and Adam for deep learning".
        """
        return cls(params, lr, **{"threshold": math.inf, "nu": 0.7, "momentum": 0.999, **options})

    @classmethod
    def nsgd_m(cls, params: ParamsT, lr: float | Tensor, **options: Any) -> Self:
        """Returns normalized SGD with momentum: ``lr`` [x] is the length of every step, so a schedule scales it.

        Source: Cutkosky, Mehta 2020 (ICML), "Momentum improves normalized SGD", Algorithm 1.
        """
        return cls(params, lr, **{"threshold": 1.0, "clip": "normalize", "momentum": 0.9, **options})

    def _check(self, group: Group) -> None:
        super()._check(group)
        if group["clip"] == "normalize" and _is_infinite(group):
            raise ValueError('Parameter `threshold` should be finite with clip="normalize". Found an infinite cap.')

    def shortening(self, group: Mapping[str, Any]) -> float:
        """Returns the length of steps over uncorrelated gradients, as a share of the length over equal gradients."""
        return shortening(self.momentum(group), float(group["nu"]))

    def stability_limit(self, parameters: Sequence[Tensor]) -> tuple[float, bool, float]:
        """Returns the largest curvatures [f/x^2] at which steps that are not clipped do not diverge on a quadratic.

        With momentum b, past the bias correction, that is (2 / lr) / (1 - nu + nu (1 - b) / (1 + b)) for full batches
        and 2 / lr for small ones, see `smoothdiag.adapters.limits`. Weight decay in the gradient is subtracted from it;
        decoupled weight decay w makes 2 / lr into 2 / lr - w. NaN if groups differ, for ``maximize``, and for
        ``clip="normalize"``. It is never preconditioned, which is the second entry.

        Source: the eigenvalue -1 of the recurrence, and 1 of that of second moments; tests/adapters/test_stability.py
        has spectral radii and real steps.
        """
        counted = set(parameters)
        found = {_limits(group) for group in self.param_groups if any(p in counted for p in group["params"])}
        curvature, small_batch = found.pop() if len(found) == 1 else (math.nan, math.nan)
        return curvature, False, small_batch

    def refusal(self) -> str:
        """Returns why AutoClip must not act on this optimizer; empty if it may."""
        scopes = [group["norm_scope"] for group in self.param_groups if group["norm_scope"] != "all"]
        if not scopes or len(self.param_groups) == 1:
            return ""
        return (
            'Parameter `norm_scope` should be "all": the longest step is one of all groups together. '
            f'Found `norm_scope = "{scopes[0]}"` with {len(self.param_groups)} groups.'
        )

    def _kept(self, group: Group) -> Sequence[str]:
        averaging = group["nu"] > 0 or any(g["nu"] > 0 and g["norm_scope"] == "all" for g in self.param_groups)
        if not averaging:
            return ()
        return ("step", "momentum_buffer") if group["bias_correction"] else ("momentum_buffer",)

    def _update(self, buckets: list[Bucket]) -> None:
        for bucket in buckets:
            group, decay = bucket.group, bucket.group["weight_decay"]
            if decay != 0 and not group["decoupled_weight_decay"]:
                decay = -decay if group["maximize"] else decay  # decay shrinks parameters in either direction
                bucket.grads = add_scaled(bucket.grads, bucket.params, decay, foreach=bucket.foreach)
            if "step" in bucket.states:
                torch._foreach_add_(bucket.states["step"], 1)
            if "momentum_buffer" in bucket.states:
                momenta = bucket.states["momentum_buffer"]
                average_(momenta, bucket.grads, 1 - group["momentum"], foreach=bucket.foreach)

        _clip([b for b in buckets if b.group["norm_scope"] == "all"], buckets)
        for group in self.param_groups:
            if group["norm_scope"] == "group":
                own = [b for b in buckets if b.group is group]
                _clip(own, own)


def _limits(group: Mapping[str, Any]) -> tuple[float, float]:
    momentum, nu, lr = float(group["momentum"]), float(group["nu"]), float(group["lr"])
    if group["clip"] == "normalize" or group["maximize"] or momentum >= 1:
        return math.nan, math.nan  # steps of one length never settle, whatever the curvature
    decay, gain = float(group["weight_decay"]), 1 - nu + nu * (1 - momentum) / (1 + momentum)
    limit = 2 / lr if lr > 0 else math.inf if lr == 0 else math.nan
    full = (limit - decay) / gain if group["decoupled_weight_decay"] else limit / gain - decay
    return full, limit - decay


def _clip(moved: Sequence[Bucket], counted: Sequence[Bucket]) -> None:
    """Moves the buckets ``moved`` by steps that are clipped by the norm over the buckets ``counted``."""
    if not moved:
        return
    clipped = [b.group for b in moved if not _is_infinite(b.group)]  # groups that never clip need no norm
    foreach = all(b.foreach for b in counted)
    one = torch.ones((), device=moved[0].params[0].device)
    momentum_norm = grad_norm = one.to(widest(one.device))
    if any(group["nu"] > 0 for group in clipped):
        averages = [(b.states["momentum_buffer"], b.owners, _corrections(b)) for b in counted]
        momentum_norm = averages_norm(averages, foreach)
    if any(group["nu"] < 1 for group in clipped):
        grad_norm = global_norm([(b.grads, b.owners) for b in counted], foreach=foreach)

    for bucket in moved:
        group = bucket.group
        lr = group["lr"]
        if group["weight_decay"] != 0 and group["decoupled_weight_decay"]:
            multiply_(bucket.params, 1 - lr * group["weight_decay"], foreach=bucket.foreach)
        clipped_momentum_update(
            bucket.params,
            bucket.grads,
            bucket.states.get("momentum_buffer", ()),
            lr=-1.0 * lr if group["maximize"] else lr,
            threshold=group["threshold"],
            longest_step=group["longest_step"],
            nu=group["nu"],
            clip=group["clip"],
            grad_norm=grad_norm,
            momentum_norm=momentum_norm,
            corrections=_corrections(bucket),
            foreach=bucket.foreach,
        )


def _corrections(bucket: Bucket) -> Sequence[Tensor] | None:
    """Returns the divisor of each momentum: the sum of the weights of all gradients in it."""
    if "step" not in bucket.states:
        return None
    steps = torch.stack(bucket.states["step"])
    return list((1 - bucket.group["momentum"] ** steps.to(widest(steps.device))).unbind())


def _is_infinite(group: Group) -> bool:
    """Returns whether a group never clips; the value of a cap that is a tensor is not read."""
    cap = group["longest_step"] if group["threshold"] is None else group["threshold"]
    return not isinstance(cap, Tensor) and math.isinf(cap)
