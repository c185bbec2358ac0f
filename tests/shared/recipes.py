"""Recipes of docs/ecosystem.md, as the page prints them, and what their tests compare."""

import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from typing import Any

import torch
from asserts import assert_identical, state_of
from places import REPOSITORY
from torch import Tensor, nn

import smoothdiag as sd
from smoothdiag.measure.loss.objective import Objective

PAGE = (REPOSITORY / "docs" / "ecosystem.md").read_text(encoding="utf-8")
LONGEST = 10
"""Most lines of a recipe, without empty ones."""

FINE = frozenset({"ok", "saturated", "kink_limited", "rounding_limited"})
"""Statuses of a loss that is the loop's; at a kink of a tiny network, rounding may hide the value."""


def recipe(title: str) -> str:
    """Returns the one block of code under a heading of the page."""
    section = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    (found,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert sum(bool(line.strip()) for line in found.splitlines()) <= LONGEST
    return found


def edited(code: str, **replaced: str) -> str:
    """Returns a recipe with other values of arguments, which stand in it as ``name=value``."""
    for name, value in replaced.items():
        code, number = re.subn(rf"\b{name}=\w+", f"{name}={value}", code)
        assert number == 1, name
    return code


def off(code: str) -> str:
    """Returns a recipe without the line that makes an AutoClip."""
    lines = [line for line in code.splitlines() if "AutoClip(" not in line]
    assert len(lines) == len(code.splitlines()) - 1
    return "\n".join(lines)


def shadow(code: str) -> str:
    """Returns a recipe whose AutoClip only watches."""
    found, number = re.subn(r"AutoClip\(optimizer, probe", 'AutoClip(optimizer, probe, mode="shadow"', code)
    assert number == 1
    return found


def each_step(code: str) -> str:
    """Returns a recipe that measures every step on its own batch."""
    found, number = re.subn(
        r"Probe\((model, optimizer[^)\n]*)\)", r'Probe(\1, schedule=sd.every(1), data="step")', code
    )
    assert number == 1
    return found


def bare(code: str) -> str:
    """Returns the loop of a recipe, without smoothdiag."""
    code = re.sub(r"^.*sd\.(Probe|AutoClip)\(.*\n", "", code, flags=re.MULTILINE)
    code = re.sub(r"^.*probe\.observe\(.*\n", "", code, flags=re.MULTILINE)
    code = re.sub(r"probe\.watch(\(.*\)):", r"\1:", code)
    assert "probe" not in code
    assert "sd." not in code
    return code


class Watch:
    """Keeps what a loop computed, step by step, without the measurements in between.

    Attributes:
        norms: Gradient norms that the optimizer got, in float64.
        losses: The latest loss before each step.
    """

    def __init__(self) -> None:
        self.norms: list[float] = []
        self.losses: list[float] = []
        self._loss, self._norm = float("nan"), None

    def steps(self, optimizer: torch.optim.Optimizer) -> None:
        """Follows an optimizer; call it after everything that acts in the hooks of its steps was made."""
        optimizer.register_step_pre_hook(self._take)

    def calls(self, model: nn.Module) -> None:
        """Follows a model that returns its loss."""
        model.register_forward_hook(lambda module, args, found: self.loss(getattr(found, "loss", found)) and None)

    def loss(self, loss: Tensor) -> Tensor:
        """Keeps a loss, unless it was computed to measure, and returns it."""
        if not Objective.num_isolated:
            self._loss = float(loss.detach())
        return loss

    def left(self, optimizer: torch.optim.Optimizer) -> None:
        """Keeps the gradient norm of a step right after backward, if something clips before the optimizer steps."""
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self._norm = sum(float(g.double().square().sum()) for g in grads) ** 0.5

    def _take(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._norm is None:
            self.left(optimizer)
        assert self._norm is not None
        self.norms.append(self._norm)
        self.losses.append(self._loss)
        self._norm = None


def watched(code: str) -> str:
    """Returns a recipe that begins its loop with ``watch(model, optimizer)``."""
    found, number = re.subn(r"^( *)for ", r"\1watch(model, optimizer)\n\1for ", code, flags=re.MULTILINE)
    assert number == 1
    return found


def assert_same_run(one: Mapping[str, nn.Module], other: Mapping[str, nn.Module]) -> None:
    """Compares weights, buffers, gradients and modes of modules by name, and the random states, bit for bit."""
    assert_identical(states(one), states(other))


def states(modules: Mapping[str, nn.Module]) -> dict[str, Any]:
    """Returns copies of weights, buffers, gradients and modes of modules, and the random states."""
    return {f"{name}: {key}": value for name, module in modules.items() for key, value in state_of(module).items()}


def assert_rows(trace: sd.Trace, norms: Sequence[float], statuses: Set[str] = FINE, rel: float = 1e-5) -> None:
    """Compares the rows of every step on its own batch with the gradient norms of the loop."""
    rows = [row for row in trace if row["estimator"] == "local"]
    assert [row["step"] for row in rows] == list(range(len(norms)))
    assert {row["data"] for row in rows} == {"step"}
    for row, norm in zip(rows, norms, strict=True):
        assert abs(row["grad_norm"] / norm - 1) < rel, (row["step"], row["grad_norm"], norm)
    assert {row["status"] for row in trace} <= statuses, [(row["estimator"], row["status"]) for row in trace]


@contextmanager
def warned(said: str) -> Iterator[None]:
    """Expects exactly one of our warnings, with these words."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        yield
    ours = [str(w.message) for w in found if isinstance(w.message, sd.SmoothdiagWarning)]
    assert len(ours) == 1, ours
    assert said in ours[0]


def mean_of_last(losses: Sequence[float], share: float = 0.25) -> float:
    """Returns the mean of the last losses; infinite if one is not finite."""
    last = losses[-max(1, int(share * len(losses))) :]
    mean = sum(last) / len(last)
    return mean if math.isfinite(mean) else math.inf
