"""What measuring costs: in gradients, as a share of a step and of a run, and in copies of the parameters.

One gradient is a forward and a backward pass of the training loss. The variants take turns in one process, in an order
that rotates. Every ratio is a median over rounds of ratios within a round, so a slow moment of the machine slows both
sides of the ratio.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
import torch
from models import TASKS, Task
from torch.profiler import ProfilerActivity, profile

from smoothdiag import LocalSmoothness, PathSmoothness, Probe, budget, every
from smoothdiag.measure.probe.schedule import Schedule

ESTIMATORS = {"path": [PathSmoothness()], "local": [LocalSmoothness()]}
FRACTION = 0.05
NEVER = 10**9


class Run:
    """A model in training, with a probe or without."""

    def __init__(
        self, task: Task, device: torch.device, estimators: Sequence | None = None, schedule: Schedule | None = None
    ) -> None:
        torch.manual_seed(0)
        self.task, self.device = task, device
        self.model, self.batch = task.build().to(device), task.batch(device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=task.lr)
        self.probe = None
        if estimators:
            self.probe = Probe(self.model, self.optimizer, task.loss_fn, estimators=estimators, schedule=schedule)

    def observe(self) -> None:
        if self.probe:
            self.probe.observe(self.batch)

    def forward(self) -> None:
        self.task.loss_fn(self.model, self.batch)

    def gradient(self) -> None:
        self.task.loss_fn(self.model, self.batch).backward()

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.observe()
        self.gradient()
        self.optimizer.step()

    def hooks(self) -> None:
        """Takes a step without gradients: the optimizer has nothing to do, the probe works as usual."""
        for _ in range(100):
            self.observe()
            self.optimizer.step()


class Noted:
    """A schedule that wraps another and records the times that the other is told."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule, self.train, self.probe = schedule, 0.0, 0.0

    def __call__(self, step: int) -> bool:
        return self.schedule(step)

    @property
    def next(self) -> int:
        return self.schedule.next

    @next.setter
    def next(self, step: int) -> None:
        self.schedule.next = step

    def interval(self, train_seconds: float, steps: int, probe_seconds: float) -> int:
        self.train, self.probe = self.train + train_seconds, self.probe + probe_seconds
        return self.schedule.interval(train_seconds, steps, probe_seconds)


def seconds(call: Callable[[], None], device: torch.device, clock: Callable[[], float] = time.perf_counter) -> float:
    synchronize(device)
    began = clock()
    call()
    synchronize(device)
    return clock() - began


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def take_turns(
    calls: dict[str, Callable[[], None]], rounds: int, device: torch.device, warm_up: int = 3
) -> pd.DataFrame:
    """Returns seconds, one row per round and one column per call, after some calls that do not count."""
    names = list(calls)
    # On a CPU that is shared, the time of this process says more than the time on the wall.
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    for name in names * warm_up:  # the first measured step has a self-test, and kernels warm up
        calls[name]()
    rows = []
    for i in range(rounds):
        turn = i % len(names)
        rows.append({name: seconds(calls[name], device, clock) for name in names[turn:] + names[:turn]})
    return pd.DataFrame(rows)


def costs(task: Task, device: torch.device, rounds: int) -> dict[str, float]:
    """Measures the cost of rows, in gradients, and of steps that are not due, as a share of a step."""
    plain = Run(task, device)
    probed = {name: Run(task, device, estimators, every(1)) for name, estimators in ESTIMATORS.items()}
    idle = Run(task, device, ESTIMATORS["path"], every(NEVER))
    times = {"forward": plain.forward, "gradient": plain.gradient, "plain": plain.step, "idle": idle.step}
    # Cleared between rounds by the step of the same run, so that a gradient is not added to an earlier one.
    times["gradient"] = lambda: (plain.optimizer.zero_grad(), plain.gradient())
    table = take_turns(times | {name: run.step for name, run in probed.items()}, rounds, device)
    forward = float((table["forward"] / table["gradient"]).median())
    result = {"a forward pass [gradients]": forward}
    for name, run in probed.items():
        counted = run.probe.trace.to_frame()["num_grads"].tail(rounds).to_numpy()
        spent = (table[name] - table["plain"]) / table["gradient"]
        result |= {
            f"{name}: needs [gradients]": float(pd.Series(counted).median()),
            f"{name}: takes [gradients]": float(spent.median()),
            f"{name}: takes / needs": float((spent / counted).median()),
        }
    result["step not due, whole: extra [steps]"] = float((table["idle"] / table["plain"]).median()) - 1
    for run in (plain, idle):
        run.optimizer.zero_grad()
    empty = take_turns({"plain": plain.hooks, "idle": idle.hooks}, rounds, device)
    extra = float((empty["idle"] - empty["plain"]).median()) / 100
    result["step not due, hooks alone [steps]"] = extra / float(table["plain"].median())
    return result


def shares(task: Task, device: torch.device, measurements: int, max_steps: int) -> dict[str, float]:
    """Measures the share of time under ``budget``, up to and including the last measurement, where it is highest."""
    noted = Noted(budget(FRACTION))
    run = Run(task, device, [PathSmoothness(), LocalSmoothness()], noted)
    due, other, steps = 0.0, [], 0
    while run.probe.steps < max_steps:
        due_now, before = noted(run.probe.steps), len(run.probe.trace)
        spent = seconds(run.step, device)
        if not due_now:
            other.append(spent)
            continue
        due, steps = due + spent, steps + 1
        assert len(run.probe.trace) == before + 2
        if steps == measurements:
            break
    # Steps that are not due cost nothing extra, as shown elsewhere in the table, and are interleaved with the others.
    total, usual = due + sum(other), statistics.mean(other)
    return {
        f"budget({FRACTION:g}): share, as the probe counts": noted.probe / (noted.probe + noted.train),
        f"budget({FRACTION:g}): share, from outside": (due - steps * usual) / total,
        f"budget({FRACTION:g}): measurements": steps,
        f"budget({FRACTION:g}): steps": run.probe.steps,
    }


def memory(task: Task, device: torch.device) -> dict[str, float]:
    """Measures the extra memory at the peak of a measured step, in copies of the parameters."""
    peaks = {}
    for name, estimators in {"plain": None, **ESTIMATORS}.items():
        run = Run(task, device, estimators, every(1))
        for _ in range(3):
            run.step()
        peaks[name] = peak(run.step, device)
    size = sum(p.numel() * p.element_size() for p in run.model.parameters())
    return {f"{name}: peak memory [copies of x]": (peaks[name] - peaks["plain"]) / size for name in ESTIMATORS}


def peak(call: Callable[[], None], device: torch.device) -> float:
    """Returns the largest number of bytes that tensors made in ``call`` held at once."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - held
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(str(path := Path(folder) / "trace.json"))
        events = json.loads(path.read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    return float(pd.Series([size for _, size in changes]).cumsum().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--threads", type=int, default=1, help="more threads than idle cores blur every ratio")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, no budget: a look in a minute")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    columns = {}
    for name, task in TASKS.items():
        columns[name] = costs(task, args.device, 5 if args.quick else 40) | memory(task, args.device)
        if not args.quick:
            columns[name] |= shares(task, args.device, measurements=5, max_steps=1000)
    print(f"torch {torch.__version__}, {args.device}, {args.threads} threads")
    print(pd.DataFrame(columns).map("{:.4g}".format).to_string())


if __name__ == "__main__":
    main()
