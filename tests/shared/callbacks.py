"""Trainers derived from that of transformers: what a test compares of runs with and without the callback."""

import re
from collections.abc import Callable
from typing import Any

from asserts import assert_identical
from recipes import assert_rows, edited, mean_of_last, states
from transformers import Trainer, TrainerCallback

import smoothdiag as sd

Make = Callable[..., Any]

COMMON: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": True,
    "max_grad_norm": 0.0,
}
"""Options of all of these trainers: they log every step, save nothing and do not clip."""


class Norms(TrainerCallback):
    """Keeps the gradient norm of each step, in float64, over all that the optimizer moves."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_pre_optimizer_step(self, args, state, control, optimizer, **kwargs) -> None:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.values.append(sum(float(g.double().square().sum()) for g in grads) ** 0.5)


def execute(code: str, trainer: Any) -> dict[str, Any]:
    """Executes a recipe, which trains, and returns its names."""
    names: dict[str, Any] = {"trainer": trainer, "sd": sd}
    exec(code, names)
    return names


def modules(trainer: Any) -> dict[str, Any]:
    """Returns all that a trainer may train or change: its model, its reference model and its loss."""
    found = {name: getattr(trainer, name, None) for name in ("model", "ref_model", "loss")}
    return {name: module for name, module in found.items() if hasattr(module, "named_parameters")}


def logged(trainer: Trainer) -> list[dict[str, Any]]:
    """Returns the log without times and without what the callback adds."""
    timed = re.compile("runtime|per_second|step_time|smoothdiag/")
    return [{k: str(v) for k, v in entry.items() if not timed.search(k)} for entry in trainer.state.log_history]


def logs_of(trainer: Trainer, name: str) -> list[float]:
    """Returns what the trainer logged of one quantity, step by step."""
    return [entry[name] for entry in trainer.state.log_history if "loss" in entry]


def assert_only_watches(make: Make, code: str) -> Any:
    """Compares runs without the callback, with it, and with an AutoClip in shadow mode; returns the callback.

    Weights, buffers, gradients, random states and logs are the same bit for bit, and each step's gradient norm is that
    of the trainer.
    """
    plain = make()
    plain.train()
    expected, log = states(modules(plain)), logged(plain)
    found = None
    for options in ('False, schedule=sd.every(1), data="step"', '{"mode": "shadow"}', "False"):
        trainer, norms = make(), Norms()
        trainer.add_callback(norms)
        names = execute(edited(code, auto_clip=options).replace("print(callback.clipper.reason)", ""), trainer)
        assert_identical(states(modules(trainer)), expected)
        assert logged(trainer) == log
        if found is None:
            found = names["callback"]
            assert_rows(found.trace, norms.values)
            assert found.probe.self_test.angle < 1e-6
    return found


def ends(
    make: Make, code: str, rate: float, rates: tuple[float, ...], name: str = "loss"
) -> tuple[list[float], float, float]:
    """Returns a mean of the last steps: at each of ``rates`` without the callback, and at ``rate`` without and with it.

    Args:
        make: Makes a trainer.
        code: The recipe, with AutoClip on.
        rate: A learning rate that is too large.
        rates: Learning rates that are not.
        name: What to read from the log.
    """

    def end(rate: float, code: str) -> float:
        trainer = make(learning_rate=rate)
        execute(code, trainer)
        return mean_of_last(logs_of(trainer, name))

    return [end(rate, "trainer.train()") for rate in rates], end(rate, "trainer.train()"), end(rate, code)
