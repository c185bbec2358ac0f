"""Seeded runs whose results a refactor must not change, written as JSON; `compare.py` runs them twice.

    python benchmarks/same/runs.py --out runs.json

The script uses only public names, so the same file runs on two commits. It records a digest of each tensor's bytes, and
numbers as Python writes them, which shows every bit.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import inspect
import itertools
import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import smoothdiag as sd
from smoothdiag.optim import Normalized

STEPS = 36
"""A little more than a calibration of AutoClip."""

CHOOSES_DATA = "data" in inspect.signature(sd.Probe).parameters
"""Whether a probe can measure on fixed batches. Earlier commits measure on the step's own, so these runs ask for it."""

Make = Callable[[nn.Module], torch.optim.Optimizer]


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Returns the loss of a batch."""
    return F.cross_entropy(model(batch[0]).float(), batch[1])


def net(dtype: torch.dtype) -> nn.Module:
    """Returns a small model with buffers and randomness."""
    layers = (nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 8), nn.ReLU())
    return nn.Sequential(*layers, nn.Linear(8, 3)).to(dtype)


@dataclass
class Plan:
    """One way to train.

    Attributes:
        make: Makes the optimizer.
        probe: Options of the probe, made anew for every run; ``None``: no probe.
        clip: Options of AutoClip; ``None``: none.
        dtype: Dtype of parameters and inputs.
        accumulation: Micro-batches per step.
        loop: ``"plain"``, or ``"closure"``: the optimizer evaluates the loss.
        scheduler: Makes a schedule of learning rates.
        resumed: Whether to save all states half way and continue with new objects.
    """

    make: Make
    probe: Callable[[], dict[str, Any]] | None = dict
    clip: Callable[[], dict[str, Any]] | None = None
    dtype: torch.dtype = torch.float32
    accumulation: int = 1
    loop: str = "plain"
    scheduler: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler] | None = None
    resumed: bool = False
    losses: list[float] = field(default_factory=list)

    def run(self) -> dict[str, Any]:
        """Trains and returns everything that was recorded or left behind."""
        torch.manual_seed(0)
        source = torch.Generator().manual_seed(3)
        inputs = torch.randn(256, 6, generator=source)
        labels = (inputs @ torch.randn(6, 3, generator=source)).argmax(1)
        data = [(x.to(self.dtype), y) for x, y in zip(inputs.split(16), labels.split(16), strict=True)]
        batches = itertools.cycle(data)
        training = _Training(self, data)
        for k in range(STEPS):
            if self.resumed and k == STEPS // 2:
                training = training.resumed()
            training.step([next(batches) for _ in range(self.accumulation)])
        return training.results()


class _Training:
    def __init__(self, plan: Plan, data: list[tuple[Tensor, Tensor]]) -> None:
        self.plan, self.data = plan, data
        self.losses: list[float] = []
        self.model = net(plan.dtype)
        self.optimizer: Any = plan.make(self.model)
        if hasattr(self.optimizer, "train"):
            self.optimizer.train()
        options = None if plan.probe is None else plan.probe()
        if options is not None and options.pop("held_out", False):
            options["probe_batches"] = data[-3:]
        elif options is not None and CHOOSES_DATA:
            options.setdefault("data", "step")
        self.probe = None if options is None else sd.Probe(self.model, self.optimizer, loss_fn, **options)
        self.clipper = (
            None if plan.clip is None or not self.probe else sd.AutoClip(self.optimizer, self.probe, **plan.clip())
        )
        self.scheduler = None if plan.scheduler is None else plan.scheduler(self.optimizer)

    def resumed(self) -> _Training:
        """Returns a training that continues from the states of this one."""
        new = _Training(self.plan, self.data)
        for name in ("model", "optimizer", "probe", "clipper", "scheduler"):
            if getattr(self, name) is not None:
                getattr(new, name).load_state_dict(getattr(self, name).state_dict())
        new.losses = self.losses
        return new

    def step(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        """Takes a step of the optimizer."""

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            total = torch.zeros(())
            for batch in batches:
                if self.probe is not None:
                    self.probe.observe(batch)
                loss = loss_fn(self.model, batch) / len(batches)
                loss.backward()
                total = total + loss.detach()
            self.losses.append(float(total))
            return total

        if self.plan.loop == "closure":
            self.optimizer.step(closure)
        else:
            closure()
            self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()

    def results(self) -> dict[str, Any]:
        """Returns what a refactor must not change."""
        found = {"losses": self.losses, "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        found["gradients"] = [p.grad for p in self.model.parameters()]
        found["random state"] = torch.get_rng_state()
        if self.probe is not None:
            found["rows"], found["meta"] = list(self.probe.trace), dict(self.probe.trace.meta)
            found["probe"], found["self test"] = self.probe.state_dict(), self.probe.self_test
        if self.clipper is not None:
            found["clipper"] = self.clipper.state_dict()
            found["events"] = self.clipper.history.to_dict("records")
            found["caps"] = [self.clipper.longest_step, self.clipper.threshold, self.clipper.clip_fraction]
            with suppress(ValueError):
                found["suggested"] = self.clipper.suggest_lr()
        return found


def of(name: str, lr: float = 0.05, *, matrices: bool = False, **options: Any) -> Make:
    """Returns a function that makes an optimizer of torch, of this library or of an installed package."""

    def make(model: nn.Module) -> torch.optim.Optimizer:
        package, _, kind = ("torch.optim." + name if "." not in name else name).rpartition(".")
        held = [p for p in model.parameters() if not matrices or p.ndim == 2]
        return getattr(importlib.import_module(package), kind)(held, lr=lr, **options)  # type: ignore[no-any-return]

    return make


def two_groups(model: nn.Module) -> torch.optim.Optimizer:
    """Returns an optimizer of two groups with different rates."""
    first, *rest = model.parameters()
    return torch.optim.SGD([{"params": [first], "lr": 0.1}, {"params": rest}], lr=0.02, momentum=0.5)


def lookahead(model: nn.Module) -> torch.optim.Optimizer:
    """Returns a wrapper of an optimizer."""
    return importlib.import_module("pytorch_optimizer").Lookahead(of("AdamW")(model))  # type: ignore[no-any-return]


def descent(model: nn.Module) -> torch.optim.Optimizer:
    """Returns gradient descent by a rule."""
    return sd.GradientDescent(model.parameters(), Normalized(lr=0.1, beta=0.1))


SGD, ADAMW = of("SGD", 0.2, momentum=0.9), of("AdamW", 0.02)

OPTIMIZERS: dict[str, tuple[Make, str]] = {
    "sgd": (of("SGD", 0.5), "plain"),
    "sgd momentum": (SGD, "plain"),
    "sgd nesterov": (of("SGD", 0.2, momentum=0.9, nesterov=True), "plain"),
    "sgd dampening": (of("SGD", 0.5, momentum=0.9, dampening=0.9, weight_decay=1e-3), "plain"),
    "sgd groups": (two_groups, "plain"),
    "sgd closure": (SGD, "closure"),
    "sgd tensor rate": (of("SGD", torch.tensor(0.2)), "plain"),  # type: ignore[arg-type]
    "adam": (of("Adam", weight_decay=1e-2), "plain"),
    "adam amsgrad": (of("Adam", amsgrad=True), "plain"),
    "adamw": (ADAMW, "plain"),
    "adamw fused": (of("AdamW", fused=True), "plain"),
    "adamw closure": (ADAMW, "closure"),
    "nadam": (of("NAdam"), "plain"),
    "radam": (of("RAdam"), "plain"),
    "adamax": (of("Adamax"), "plain"),
    "adagrad": (of("Adagrad", 0.1, lr_decay=0.01), "plain"),
    "adadelta": (of("Adadelta", 3.0), "plain"),
    "rmsprop": (of("RMSprop", 0.02), "plain"),
    "rmsprop centered": (of("RMSprop", 0.02, momentum=0.9, centered=True), "plain"),
    "rprop": (of("Rprop", 0.01), "plain"),
    "adafactor": (of("Adafactor"), "plain"),
    "muon": (of("Muon", 0.05, matrices=True), "plain"),
    "asgd": (of("ASGD", 0.5), "plain"),
    "lbfgs": (of("LBFGS", 0.1, max_iter=3), "closure"),
    "schedulefree sgd": (of("schedulefree.SGDScheduleFree", 0.5), "plain"),
    "schedulefree adamw": (of("schedulefree.AdamWScheduleFree"), "plain"),
    "prodigy": (of("prodigyopt.Prodigy", 1.0), "plain"),
    "lion": (of("lion_pytorch.Lion", 0.01), "plain"),
    "lookahead": (lookahead, "plain"),
    "clipped momentum": (of("smoothdiag.ClippedMomentum", 0.5, longest_step=0.1), "plain"),
    "clipped mixture": (of("smoothdiag.ClippedMomentum", 0.5, threshold=0.5, nu=0.7, momentum=0.95), "plain"),
    "normalized": (of("smoothdiag.ClippedMomentum", 0.05, threshold=1.0, clip="normalize"), "plain"),
    "ggnc": (of("smoothdiag.GGNC", 0.5, longest_step=0.1, geometry=sd.Euclidean()), "plain"),
    "gradient descent": (descent, "plain"),
}


def all_estimators(**options: Any) -> dict[str, Any]:
    """Returns options of a probe with every estimator."""
    secants = [sd.PathSmoothness(points=(0.25, 0.5, 1.0)), sd.LocalSmoothness(two_scale=False, radius=1e-2)]
    along = [sd.DirectionalCurvature(), sd.DirectionalCurvature(direction="update"), sd.CriticalStep()]
    others = [sd.HessianNorm(), sd.Sharpness(), sd.DebiasedSmoothness()]
    return {"estimators": [*secants, *along, *others], "schedule": sd.every(12), **options}


def probed(**options: Any) -> Callable[[], dict[str, Any]]:
    """Returns a function that makes options of a probe for every sixth step."""
    return lambda: {"schedule": sd.every(6), **options}


def clipping(**options: Any) -> Callable[[], dict[str, Any]]:
    """Returns a function that makes options of AutoClip."""
    return lambda: dict(options)


def plans() -> Iterator[tuple[str, Plan]]:
    """Yields every run under its name."""
    tight = {"rule": sd.StepRule(multiple=None, relative=0.02)}
    for name, (make, loop) in OPTIMIZERS.items():
        clips_itself = name in ("clipped momentum", "clipped mixture", "normalized", "ggnc")
        mode = {"mode": "set"} if clips_itself else {}
        yield f"{name}, probed", Plan(make, probed(), loop=loop)
        yield f"{name}, every estimator", Plan(make, all_estimators, loop=loop)
        yield f"{name}, clipped", Plan(make, probed(estimators=()), clipping(**mode), loop=loop)
        yield f"{name}, clipped short", Plan(make, probed(estimators=()), clipping(**mode, **tight), loop=loop)
        yield f"{name}, shadow", Plan(make, probed(), clipping(mode="shadow"), loop=loop)
        yield f"{name}, resumed", Plan(make, probed(), clipping(**mode), loop=loop, resumed=True)
    cosine = lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, STEPS)  # noqa: E731
    warm_up = lambda o: torch.optim.lr_scheduler.LinearLR(o, 0.1, 1.0, 20)  # noqa: E731
    for name, make in (("sgd momentum", SGD), ("adamw", ADAMW), ("sgd groups", two_groups)):
        for kind, options in {
            "accumulated": {"accumulation": 3},
            "bfloat16": {"dtype": torch.bfloat16},
            "float64": {"dtype": torch.float64},
            "cosine": {"scheduler": cosine},
            "warm-up": {"scheduler": warm_up},
            "held-out": {"probe": probed(held_out=True)},
            "grouped": {"probe": lambda: all_estimators(group_by=sd.by_module())},
            "log-spaced": {"probe": lambda: {"schedule": sd.log_spaced()}},
        }.items():
            yield f"{name}, {kind}", Plan(make, **{"probe": probed(), "clip": clipping(), **options})
        if CHOOSES_DATA:
            yield f"{name}, fixed", Plan(make, lambda: all_estimators(data="fixed"), clipping(), accumulation=2)
    free = clipping(set_lr=True)
    yield "sgd, rate set", Plan(of("SGD", 1e-4), probed(estimators=()), free)
    yield "adamw, rate set", Plan(ADAMW, probed(estimators=()), free)
    yield (
        "clipped momentum, rate set",
        Plan(of("smoothdiag.ClippedMomentum", 1e-4, longest_step=1.0), probed(), clipping(set_lr=True, mode="set")),
    )
    wrong: dict[str, dict[str, Any]] = {
        "set without cap": {"mode": "set"},
        "shadow rate": {"set_lr": True, "mode": "shadow"},
    }
    for name, options in wrong.items():
        yield f"adamw, {name}", Plan(ADAMW, probed(), clipping(**options))


def fits_of(rows: list[dict[str, Any]], meta: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the results of fits and rules for some rows."""
    found = {}
    trace = sd.Trace(meta=dict(meta))
    trace.extend(rows)
    fit = sd.fit_smoothness(trace, num_boot=50)
    found["fit"] = fit.to_dict()
    for lr, momentum, dampening in ((None, 0.0, 0.0), (0.05, 0.0, 0.0), (0.05, 0.9, 0.0), (0.05, 0.9, 0.9)):
        rule = sd.clip_rule(fit, lr=lr, momentum=momentum, dampening=dampening)
        found[f"rule {lr} {momentum} {dampening}"] = rule
    with suppress(ValueError):
        found["rate"] = [sd.step_rate(fit)(norm) for norm in (0.1, 1.0, 10.0)]
    return found


def landscapes() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yields rows that follow a linear law, a constant law, and no law."""
    draw = np.random.default_rng(0)
    norms = np.exp(draw.uniform(-3, 3, 200))
    scatter = np.exp(0.1 * draw.normal(size=200))
    laws = {"law": 1 + 2 * norms, "constant": np.ones(200), "power": norms**1.7, "noise": np.exp(draw.normal(size=200))}
    for name, smoothness in laws.items():
        usable = {"estimator": "local", "status": "ok", "saturation": 0.1, "noise_floor": 1e-6, "step_norm": 0.01}
        yield (
            name,
            [
                {**usable, "step": 20 * i, "grad_norm": float(g), "smoothness": float(s), "lr": 0.05, "loss": 1.0}
                for i, (g, s) in enumerate(zip(norms, smoothness * scatter, strict=True))
            ],
        )


def plain(value: Any) -> Any:
    """Returns a value as JSON that shows every bit of numbers and tensors."""
    if isinstance(value, Tensor):
        held = value.detach().cpu().contiguous()
        digest = hashlib.sha256(held.flatten().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
        return f"{tuple(held.shape)} {held.dtype} {digest}"
    if isinstance(value, Enum):
        return value.name
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset | np.ndarray):
        return [plain(inner) for inner in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | bool | None) else type(value).__name__


def recorded(make: Callable[[], Mapping[str, Any]]) -> Any:
    """Returns the results of a run, or the class of the error that ended it, and the kinds of its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = dict(make())
        except ImportError:
            raise
        except Exception as error:
            found = {"error": type(error).__name__}
    found["warnings"] = sorted(w.category.__name__ for w in caught if issubclass(w.category, sd.SmoothdiagWarning))
    return plain(found)


def main() -> None:
    """Runs everything and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="file for the results")
    parser.add_argument("--only", default="", help="only runs whose name holds this")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {"package": str(Path(sd.__file__).parent)}
    runs = [(name, plan) for name, plan in plans() if arguments.only in name]
    for name, plan in tqdm(runs, desc=results["package"], unit=" runs", disable=None):
        try:
            results[name] = recorded(plan.run)
        except ImportError as error:
            results[name] = f"not run: {error}"
        if name.endswith("probed") and "rows" in results[name]:
            rows = results[name]["rows"]
            results[f"{name}, fits"] = recorded(lambda rows=rows, of=results[name]: fits_of(rows, of["meta"]))  # type: ignore[misc]
    for name, rows in landscapes():
        results[f"fits of {name}"] = recorded(lambda rows=rows: fits_of(rows, {}))  # type: ignore[misc]
    arguments.out.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
