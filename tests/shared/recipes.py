"""Recipes of docs/ecosystem.md, as the page prints them, and what their tests compare."""

import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from asserts import assert_identical, state_of
from places import REPOSITORY
from torch import nn

import smoothdiag as sd

PAGE = (REPOSITORY / "docs" / "ecosystem.md").read_text(encoding="utf-8")
LONGEST = 10
"""Most lines of a recipe."""

USABLE = {"ok", "saturated", "kink_limited"}
"""Statuses of rows that may be used as they are."""


def recipe(title: str) -> str:
    """Returns the one block of code under a heading of the page."""
    section = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    (found,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(found.splitlines()) <= LONGEST
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
    found, number = re.subn(r"Probe\((model, optimizer[^)\n]*)\)", r'Probe(\1, schedule=sd.every(1), data="step")', code)
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


class Norms:
    """Gradient norms that an optimizer gets, in float64, before anything that runs in its step hooks."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.values: list[float] = []
        optimizer.register_step_pre_hook(self._take)

    def _take(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.values.append(sum(float(g.double().square().sum()) for g in grads) ** 0.5)


def assert_same_run(one: Mapping[str, nn.Module], other: Mapping[str, nn.Module]) -> None:
    """Compares weights, buffers, gradients and modes of modules by name, and the random states, bit for bit."""
    assert_identical(states(one), states(other))


def states(modules: Mapping[str, nn.Module]) -> dict[str, Any]:
    """Returns copies of weights, buffers, gradients and modes of modules, and the random states."""
    return {f"{name}: {key}": value for name, module in modules.items() for key, value in state_of(module).items()}


def assert_rows(trace: sd.Trace, norms: Sequence[float], statuses: set[str] = USABLE, rel: float = 1e-5) -> None:
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
    return mean if mean == mean else float("inf")


Run = Callable[[str], dict[str, Any]]
