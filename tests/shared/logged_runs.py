"""A small run with a probe for loggers, and what they should hold of its trace."""

from collections import Counter, defaultdict
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from smoothdiag import AutoClip, Probe, Trace, by_module, every

Numbers = dict[str, list[tuple[int, float]]]

CLIPPING = ("clipping/longest_step", "clipping/threshold", "clipping/clip_fraction")


def loss_fn(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return F.dropout(model(batch), 0.2).square().mean()


class Run:
    """A small training run with a probe that measures every third step, in two groups."""

    def __init__(self, *, autoclip: bool = False, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2)).double()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.probe = Probe(self.model, self.optimizer, loss_fn, schedule=every(3), group_by=by_module(), **options)
        self.clipper = AutoClip(self.optimizer, self.probe) if autoclip else None

    def train(self, num_steps: int) -> None:
        first = self.probe.steps
        for step in range(first, first + num_steps):
            batch = torch.randn(8, 4, generator=torch.Generator().manual_seed(step)).double()
            self.probe.observe(batch)
            self.optimizer.zero_grad()
            loss_fn(self.model, batch).backward()
            self.optimizer.step()


def row(step: int, **values: Any) -> dict[str, Any]:
    return {"step": step, "grad_norm": 2.0, "smoothness": 3.0, "saturation": 0.5, "estimator": "local", **values}


def expected(trace: Trace) -> Numbers:
    """The numbers of a trace by name, one after the other."""
    found, counts = defaultdict(list), Counter()
    for row in trace:
        counts[row["status"]] += 1
        if (name := f"status/{row['status']}") in found and found[name][-1][0] == row["step"]:
            found[name].pop()
        found[name].append((row["step"], counts[row["status"]]))
        if row["status"] in ("ok", "saturated", "kink_limited", "not_reproduced"):
            end = row["estimator"] + ("/" + row["group"] if row["group"] != "all" else "")
            for name, column in (("smoothness", "smoothness"), ("gradient/norm", "grad_norm")):
                found[f"{name}/{end}"].append((row["step"], row[column]))
            if np.isfinite(row["saturation"]):
                found[f"saturation/{end}"].append((row["step"], row["saturation"]))
    return dict(found)


def assert_same(found: Numbers, wanted: Numbers) -> None:
    """Compares names, steps and values; float32, which TensorBoard keeps, has 24 bits."""
    assert found.keys() == wanted.keys()
    for name, pairs in wanted.items():
        assert [step for step, _ in found[name]] == [step for step, _ in pairs], name
        np.testing.assert_allclose([v for _, v in found[name]], [v for _, v in pairs], rtol=1e-7, err_msg=name)


def law(steps: range, **values: Any) -> list[dict[str, Any]]:
    """Rows on the line 1 + 2 * grad_norm, whose gradient norms cover two powers of ten again and again."""
    norms = {step: 10 ** np.sin(float(step)) for step in steps}
    return [
        row(step, **{"grad_norm": norm, "smoothness": 1 + 2 * norm, "saturation": 0.1, **values})
        for step, norm in norms.items()
    ]


class Recorder:
    """A sink that keeps all that it is given, and fails at the methods that are named, with spaces between them."""

    def __init__(self, failing: str = "") -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.failing = failing

    def _keep(self, *call: Any) -> None:
        self.calls.append(call)
        if call[0] in self.failing.split():
            raise ConnectionError("the server is gone")

    def start(self, steps: int) -> None:
        self._keep("start", steps)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._keep("scalars", step, dict(values))

    def text(self, step: int, name: str, text: str) -> None:
        self._keep("text", step, name, text)

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        self._keep("image", step, name, pixels)

    def close(self) -> None:
        self._keep("close")

    def of(self, kind: str) -> list[tuple[Any, ...]]:
        return [call[1:] for call in self.calls if call[0] == kind]
