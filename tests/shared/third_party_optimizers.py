"""Optimizers by name: all of torch with their variants, and those of packages that may be installed.

A row is what makes the optimizer, and what is said about it. Add one to `ROWS` to put an optimizer under the contracts
of `test_optimizer_contract`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

Make = Callable[[nn.Module], torch.optim.Optimizer]


@dataclass(frozen=True)
class Row:
    """An optimizer under contract.

    Attributes:
        make: Makes it for a model.
        loop: How it is driven: ``"plain"``; ``"closure"``, which evaluates the loss; ``"sam"``, a closure after a
            gradient; ``"two steps"``, those of SAM by hand, so that its `step` is never called.
        refused: What AutoClip says where it refuses to act; empty where it acts.
        unwatched: What the probe says where it refuses to watch, and AutoClip with it.
        share: Share of ||x|| that a step may be long for some steps to be clipped, and not so many that it costs much.
    """

    make: Make
    loop: str = "plain"
    refused: str = ""
    unwatched: str = ""
    share: float = 0.05


def matrices(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.ndim == 2]


def of(name: str, lr: float = 0.05, *, only: Callable[..., Any] = nn.Module.parameters, **options: Any) -> Make:
    """Returns what makes an optimizer of torch, or of a package, as "package.Name"."""

    def make(model: nn.Module) -> torch.optim.Optimizer:
        package, _, kind = ("torch.optim." + name if "." not in name else name).rpartition(".")
        module = importlib.import_module(package) if package == "torch.optim" else pytest.importorskip(package)
        return getattr(module, kind)(only(model), lr=lr, **options)  # type: ignore[no-any-return]

    return make


def groups(model: nn.Module) -> list[dict[str, Any]]:
    first, *others = [list(m.parameters()) for m in model if list(m.parameters())]
    return [{"params": first, "lr": 0.1}, {"params": [p for part in others for p in part]}]


def around(name: str, base: Make, **options: Any) -> Make:
    """Returns what makes a wrapper of an optimizer."""
    package, _, kind = name.rpartition(".")
    return lambda model: getattr(pytest.importorskip(package), kind)(base(model), **options)


def sam(**options: Any) -> Make:
    return lambda model: pytest.importorskip("pytorch_optimizer").SAM(
        model.parameters(), torch.optim.AdamW, rho=0.05, lr=0.05, **options
    )


ITERATE = "keep no copy of the parameters"
ESTIMATES = "should not estimate its rate"
ONCE = "once.*: AutoClip acts on one gradient"

SGD, ADAMW = of("SGD", 0.5, momentum=0.9), of("AdamW", 0.05)

ROWS: dict[str, Row] = {
    "sgd": Row(of("SGD", 1.0), share=0.1),
    "sgd momentum": Row(SGD, share=0.1),
    "sgd nesterov": Row(of("SGD", 0.5, momentum=0.9, nesterov=True), share=0.1),
    "sgd dampening": Row(of("SGD", 1.0, momentum=0.9, dampening=0.9, weight_decay=1e-3), share=0.1),
    "sgd foreach": Row(of("SGD", 1.0, momentum=0.5, foreach=True), share=0.1),
    "sgd fused": Row(of("SGD", 1.0, momentum=0.5, fused=True), share=0.1),
    "sgd groups": Row(of("SGD", 1.0, only=groups, momentum=0.5), share=0.1),
    "sgd closure": Row(SGD, "closure", share=0.1),
    "adam": Row(of("Adam")),
    "adam amsgrad": Row(of("Adam", amsgrad=True)),
    "adam fused": Row(of("Adam", fused=True)),
    "adam tensor rate": Row(of("Adam", torch.tensor(0.05))),  # type: ignore[arg-type]
    "adamw": Row(ADAMW),
    "adamw foreach": Row(of("AdamW", foreach=True)),
    "adamw groups": Row(of("AdamW", only=groups)),
    "adamw closure": Row(ADAMW, "closure"),
    "nadam": Row(of("NAdam")),
    "nadam decoupled": Row(of("NAdam", decoupled_weight_decay=True, weight_decay=1e-2)),
    "radam": Row(of("RAdam", 0.1), share=0.012),
    "adamax": Row(of("Adamax")),
    "adagrad": Row(of("Adagrad", 0.1)),
    "adadelta": Row(of("Adadelta", 3.0), share=0.03),
    "rmsprop": Row(of("RMSprop", 0.02)),
    "rmsprop centered": Row(of("RMSprop", 0.02, momentum=0.9, centered=True)),
    "rprop": Row(of("Rprop", 0.01)),
    "adafactor": Row(of("Adafactor", 0.05), share=0.04),
    "muon": Row(of("Muon", 0.1, only=matrices), share=0.1),
    "asgd": Row(of("ASGD", 0.5), refused=ITERATE),
    "lbfgs": Row(of("LBFGS", 0.1), "closure", refused=ONCE),
    "schedulefree sgd": Row(of("schedulefree.SGDScheduleFree", 1.0), refused=ITERATE),
    "schedulefree adamw": Row(of("schedulefree.AdamWScheduleFree"), refused=ITERATE),
    "schedulefree radam": Row(of("schedulefree.RAdamScheduleFree"), refused=ITERATE),
    "schedulefree adamw closure": Row(of("schedulefree.AdamWScheduleFreeClosure"), "closure", refused=ITERATE),
    "schedulefree wrapper": Row(
        around("schedulefree.ScheduleFreeWrapper", ADAMW), unwatched="should be a torch.optim.Optimizer"
    ),
    "prodigy": Row(of("prodigyopt.Prodigy", 1.0), refused=ESTIMATES),
    "prodigy sliced": Row(of("prodigyopt.Prodigy", 1.0, slice_p=3), refused=ESTIMATES),
    "lion": Row(of("lion_pytorch.Lion", 0.03)),
    "kozistr schedulefree": Row(of("pytorch_optimizer.ScheduleFreeAdamW"), refused=ITERATE),
    "kozistr schedulefree sgd": Row(of("pytorch_optimizer.ScheduleFreeSGD", 1.0), refused=ITERATE),
    "kozistr prodigy": Row(of("pytorch_optimizer.Prodigy", 1.0), refused=ESTIMATES),
    "kozistr lookahead": Row(around("pytorch_optimizer.Lookahead", ADAMW), refused=ITERATE),
    "kozistr sam": Row(sam(), "sam"),
    "kozistr sam by hand": Row(sam(), "two steps"),
    "kozistr wsam": Row(
        lambda m: pytest.importorskip("pytorch_optimizer").WSAM(m, m.parameters(), torch.optim.AdamW, lr=0.05),
        "sam",
    ),
    "kozistr bsam": Row(
        lambda m: pytest.importorskip("pytorch_optimizer").BSAM(m.parameters(), num_data=512), "sam", refused=ONCE
    ),
    "kozistr muon": Row(
        lambda m: pytest.importorskip("pytorch_optimizer").Muon(
            [
                {"params": matrices(m), "use_muon": True},
                {"params": [p for p in m.parameters() if p.ndim != 2], "use_muon": False},
            ],
            lr=0.1,
        )
    ),
    "kozistr soap": Row(of("pytorch_optimizer.SOAP", 0.05, precondition_frequency=2)),
    "kozistr stable adamw": Row(of("pytorch_optimizer.StableAdamW")),
    "kozistr ademamix": Row(of("pytorch_optimizer.AdEMAMix", 0.05)),
    "kozistr madgrad": Row(of("pytorch_optimizer.MADGRAD", 0.05), refused=ITERATE),
    "kozistr dadapt adam": Row(of("pytorch_optimizer.DAdaptAdam", 1.0), refused=ESTIMATES),
    "kozistr accsgd": Row(of("pytorch_optimizer.AccSGD", 0.05), refused=ITERATE),
    "kozistr splus": Row(of("pytorch_optimizer.SPlus", 0.05), refused=ITERATE),
    "torch_optimizer lookahead": Row(
        around("torch_optimizer.Lookahead", ADAMW), unwatched="should be a torch.optim.Optimizer"
    ),
    "torch_optimizer lamb": Row(of("torch_optimizer.Lamb", 0.05), share=0.04),
    "torch_optimizer shampoo": Row(of("torch_optimizer.Shampoo", 0.3)),
    "torch_optimizer madgrad": Row(of("torch_optimizer.MADGRAD", 0.05), refused=ITERATE),
    "torch_optimizer ranger": Row(of("torch_optimizer.Ranger", 0.05), refused=ITERATE),
    "bitsandbytes adam": Row(of("bitsandbytes.optim.Adam8bit", 0.05, min_8bit_size=16)),
}
