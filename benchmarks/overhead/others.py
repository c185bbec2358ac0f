"""Rows that other scripts measure: AutoClip's steps that are not due, and fits."""

import importlib
import math
import multiprocessing
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from overhead.table import Row


def autoclip(device: torch.device, quick: bool) -> Iterator[Row]:
    """Measures what AutoClip adds to a plain step, by `autoclip_cost.py`."""
    script, rounds = importlib.import_module("autoclip_cost"), 7 if quick else 31
    time, memory = "kept: time [plain steps]", "kept: memory [copies of x]"
    found = script.costs("3,000 tensors", "SGD", device, rounds)
    yield Row("time of a step of AutoClip that is not due, in plain steps: SGD, 3,000 tensors", 1, 1.15, found[time])
    found = script.costs("GPT 10M", "AdamW", device, rounds)
    yield Row("time of a step of AutoClip that is not due, in plain steps: AdamW, GPT 10M", 1, 1.2, found[time])
    yield Row("copies of x that AutoClip keeps during such a step: AdamW, GPT 10M", 0, 0, found[memory])


def fits(device: torch.device, quick: bool) -> Iterator[Row]:
    """Measures the time and the memory of a fit, by `fits.py`, each in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for rows, goal in ((100_000, 5), (1_000_000, 40)):
            if quick and rows > 100_000:
                return
            spent, held = pool.apply(fit_of, (rows,))
            yield Row(f"seconds of a fit, reading not counted: {rows:,} rows", math.nan, goal, spent)
            yield Row(f"GiB at the peak of the process that fits: {rows:,} rows", math.nan, 1, held)


def fit_of(rows: int) -> tuple[float, float]:
    """Returns the seconds of the processor for a fit, and the GiB that this process has held at the most, on Linux."""
    *_, processor, _ = importlib.import_module("fits").large_fit(rows, "plain").split()
    # What `getrusage` tells begins with the peak of the process that has started this one.
    status = Path("/proc/self/status")
    peaks = re.findall(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.exists() else []
    return float(processor), float(peaks[0]) / 2**20 if peaks else math.nan
