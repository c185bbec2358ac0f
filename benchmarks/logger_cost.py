"""What do loggers cost? Seconds in each writer, as a share of a run with the default schedule.

    OMP_NUM_THREADS=1 python benchmarks/logger_cost.py    # some minutes; --steps 200: seconds

One run of the small GPT has a probe with default rows at every 20th step and an AutoClip. All writers follow this run;
those whose package is not installed are left out. A column is the time on the clock over the time of the run without
the writers:

    rows       numbers of measured steps, without verdicts
    verdicts   fits after 64, 128, ... measured steps
    row [ms]   median time for the numbers of one measured step
    closing    seconds for the last fit, the figures and the end of the logger's own run
"""

import argparse
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from models import TASKS

import smoothdiag as sd
from smoothdiag.integrations import loggers


def makers(folder: Path) -> dict[str, Callable[..., loggers.TraceWriter]]:
    """Returns a function that makes each writer whose package is installed."""
    found: dict[str, Callable[..., loggers.TraceWriter]] = {
        "function": lambda probe, **options: loggers.CallbackWriter(probe, lambda values, step: None, **options)
    }
    if find_spec("tensorboard"):
        found["TensorBoard"] = lambda probe, **options: loggers.TensorBoardWriter(probe, folder / "runs", **options)
    if find_spec("wandb"):
        found["wandb, offline"] = lambda probe, **options: loggers.WandbWriter(probe, dir=str(folder), **options)
    if find_spec("mlflow"):
        import mlflow

        mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
        found["MLflow, sqlite"] = loggers.MlflowWriter
    if find_spec("trackio"):
        os.environ["TRACKIO_DIR"] = str(folder)
        found["trackio, local"] = lambda probe, **options: loggers.TrackioWriter(probe, project="p", **options)
    return found


class Clock:
    """Adds up the seconds in methods."""

    def __init__(self) -> None:
        self.calls = defaultdict[str, list[float]](list)

    def watch(self, owner: Any, method: str, name: str) -> None:
        """Replaces a method of one object by the same, timed."""
        inner = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                self.calls[name].append(time.perf_counter() - begin)

        setattr(owner, method, timed)


def main(steps: int) -> None:
    """Trains, and prints one line for each writer."""
    torch.manual_seed(0)
    task = TASKS["GPT"]
    model = task.build()
    optimizer = torch.optim.SGD(model.parameters(), lr=task.lr, momentum=0.9)
    probe = sd.Probe(model, optimizer, task.loss_fn)
    clipper = sd.AutoClip(optimizer, probe)
    folder = Path(tempfile.mkdtemp())
    writers = {name: make(probe, autoclip=clipper) for name, make in makers(folder).items()}
    clocks = {name: Clock() for name in writers}
    for name, writer in writers.items():
        clocks[name].watch(writer._verdicts, "update", "verdicts")
        clocks[name].watch(writer, "update", "updates")
        clocks[name].watch(writer, "close", "closing")
    begin = time.perf_counter()
    for _ in range(steps):
        batch = task.batch(torch.device("cpu"))
        probe.observe(batch)
        optimizer.zero_grad()
        task.loss_fn(model, batch).backward()
        optimizer.step()
    run = time.perf_counter() - begin
    run -= sum(sum(clock.calls["updates"]) for clock in clocks.values())
    spent = {name: {part: list(calls) for part, calls in clock.calls.items()} for name, clock in clocks.items()}
    print(f"{steps} steps, {len(probe.trace)} rows, {1000 * run / steps:.1f} ms a step without the writers")
    print(f"{'writer':16}{'rows':>9}{'verdicts':>10}{'row [ms]':>10}{'closing [s]':>13}")
    for name, writer in writers.items():
        verdicts = sum(spent[name]["verdicts"])
        rows = sum(spent[name]["updates"]) - verdicts
        writer.close()
        closing, each = clocks[name].calls["closing"][0], 1000 * median(spent[name]["updates"])
        print(f"{name:16}{rows / run:9.2%}{verdicts / run:10.2%}{each:10.1f}{closing:13.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2561)
    main(parser.parse_args().steps)
