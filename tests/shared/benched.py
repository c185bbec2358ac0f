"""The modules of benchmarks/autoclip, which are scripts beside each other and no package, and a small task for them."""

import importlib
import sys
from types import SimpleNamespace

import torch
from places import REPOSITORY
from torch import nn

FOLDER = REPOSITORY / "benchmarks" / "autoclip"

MODULES = (
    "arms",
    "clippers",
    "law",
    "measured",
    "results",
    "rivals",
    "run",
    "sources",
    "tasks",
    "training",
    "workloads",
)


def modules(*names: str) -> SimpleNamespace:
    """Returns modules of the benchmark, without leaving its folder on the path."""
    sys.path.insert(0, str(FOLDER))
    found = {name: importlib.import_module(name) for name in names or MODULES}
    sys.path.remove(str(FOLDER))
    return SimpleNamespace(**found)


def quadratic(bench, optimizer="momentum", schedule="constant", weight=(3.0, 4.0)):
    """f(x) = mean(a) ||x||^2 / 2 over batches a of four; the validation loss is that of a = 2. The safe rate is 0.1."""

    class Point(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x = nn.Parameter(torch.tensor(weight))

    def batches(seed):
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield 1 + torch.rand(4, generator=generator)

    data = bench.tasks.Data(batches, torch.full((4,), 2.0))
    task = bench.tasks.Task(
        "quadratic", "point", "think", Point, lambda: data, lambda model, a: a.mean() * model.x.square().sum() / 2
    )
    bench.workloads.safe_rates()[f"quadratic/{optimizer}"] = 0.1
    return bench.workloads.Workload(f"quadratic/{optimizer}/{schedule}", task, optimizer, schedule)


def set_up(bench, workload, lr=0.1, arm="none", steps=5, seed=0):
    """Returns a run of an arm, and its clipper."""
    loop = bench.training.set_up(workload, lr, seed, bench.arms.ARMS[arm], steps)
    return loop, bench.arms.ARMS[arm].attach(loop)


def give(loop, *values) -> None:
    """Sets the gradients."""
    for p, value in zip(loop.parameters, values, strict=True):
        p.grad = torch.tensor(value)
