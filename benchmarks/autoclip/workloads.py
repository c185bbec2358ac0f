"""Workloads: a task with an optimizer and a schedule, at rates around one that is safe without clipping."""

import json
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from tasks import TASKS, Task
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

Kind = Literal["sgd", "adamw", "muon"]

RATES = (1, 4, 16, 64)
"""Rates of a workload, in safe ones."""

SAFE_RATES = Path(__file__).with_name("safe_rates.json")

ADAMW_SHARE = 0.2
"""Rate of AdamW beside Muon, as a share of Muon's."""


OPTIMIZERS: dict[str, tuple[Kind, float]] = {
    "momentum": ("sgd", 0.9),
    "plain": ("sgd", 0.0),
    "adamw": ("adamw", 0.0),
    "muon": ("muon", 0.0),
}


def cosine(share: float) -> float:
    """A straight line up for a tenth of the run, then half a cosine down to zero."""
    return share / 0.1 if share < 0.1 else 0.5 * (1 + math.cos(math.pi * (share - 0.1) / 0.9))


SCHEDULES = ("constant", "cosine", "onecycle")


@dataclass(frozen=True)
class Workload:
    """One task with one optimizer and one schedule.

    Attributes:
        name: Task, optimizer and schedule, with strokes between.
        task: What is to be learnt.
        optimizer_name: Key of ``OPTIMIZERS``.
        schedule: Key of ``SCHEDULES``.
        published_step: The longest step that MixClip was published with [x].
    """

    name: str
    task: Task
    optimizer_name: str
    schedule: str
    published_step: float = 1.0

    @property
    def kind(self) -> Kind:
        return OPTIMIZERS[self.optimizer_name][0]

    @property
    def momentum(self) -> float:
        return OPTIMIZERS[self.optimizer_name][1]

    def schedulers(self, optimizers: list[torch.optim.Optimizer], steps: int) -> list[LRScheduler]:
        """Returns torch's own schedules, one for each optimizer."""
        if self.schedule == "cosine":
            return [LambdaLR(optimizer, lambda taken: cosine((taken + 1) / steps)) for optimizer in optimizers]
        if self.schedule == "onecycle":
            peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
            return [
                OneCycleLR(optimizer, peak, total_steps=steps, cycle_momentum=False)
                for optimizer, peak in zip(optimizers, peaks, strict=True)
            ]
        return []

    @property
    def safe_rate(self) -> float:
        """A quarter of the constant rate that ended best without clipping, from ``rates.py``."""
        return safe_rates()[f"{self.task.name}/{self.optimizer_name}"]

    @property
    def gain(self) -> float:
        """Length of a step under a constant gradient [steps of SGD without momentum]; 1 where updates are averages."""
        return 1 / (1 - self.momentum)

    def optimizers(self, model: torch.nn.Module, lr: float) -> list[torch.optim.Optimizer]:
        """Returns the optimizers that step in turn."""
        if self.kind == "sgd":
            return [torch.optim.SGD(model.parameters(), lr=lr, momentum=self.momentum)]
        if self.kind == "adamw":
            return [torch.optim.AdamW(model.parameters(), lr=lr)]
        outer = {id(p) for m in model.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()}
        matrices = [p for p in model.parameters() if p.ndim == 2 and id(p) not in outer]
        others = [p for p in model.parameters() if p.ndim != 2 or id(p) in outer]
        found: list[torch.optim.Optimizer] = [torch.optim.Muon(matrices, lr=lr, weight_decay=0.0)]
        return [*found, torch.optim.AdamW(others, lr=ADAMW_SHARE * lr)] if others else found


@cache
def safe_rates() -> dict[str, float]:
    return dict(json.loads(SAFE_RATES.read_text(encoding="utf-8")))


def workload(name: str) -> Workload:
    """Returns the workload of a name such as ``"lstm-ptb/adamw/cosine"``.

    Raises:
        ValueError: If a part of the name is unknown.
    """
    parts = name.split("/")
    if len(parts) != 3 or parts[0] not in TASKS or parts[1] not in OPTIMIZERS or parts[2] not in SCHEDULES:
        raise ValueError(
            f"Workloads are named task/optimizer/schedule, of {', '.join(TASKS)}; {', '.join(OPTIMIZERS)}; "
            f"{', '.join(SCHEDULES)}. Found `{name}`."
        )
    return Workload(name, TASKS[parts[0]], parts[1], parts[2])


CELLS = (
    ("momentum/constant", "adamw/cosine", "muon/constant"),
    ("plain/constant", "momentum/cosine", "adamw/constant"),
    ("momentum/onecycle", "adamw/constant", "plain/cosine"),
    ("adamw/onecycle", "muon/cosine", "momentum/constant"),
)
"""Three cells of a task; tasks take them in turn."""

CELL_RATES = ((1, 16), (4, 64), (16, 64))
"""Two rates for each of the three cells [safe rates]; every next task begins with the next pair."""

HAS_MATRICES = {
    name for name in TASKS if name not in ("logistic-a9a", "skipgram-ptb", "factors-ratings", "outline-discs")
}
"""Tasks that Muon is for."""


def pool(part: str) -> list[tuple[str, int]]:
    """Returns the workloads of a part with their rates [safe rates]."""
    found = []
    for number, task in enumerate(task for task in TASKS.values() if task.part == part):
        for k, cell in enumerate(CELLS[number % len(CELLS)]):
            if cell.startswith("muon") and task.name not in HAS_MATRICES:
                cell = cell.replace("muon", "plain")
            found += [(f"{task.name}/{cell}", rate) for rate in CELL_RATES[(k + number) % len(CELL_RATES)]]
    return found
