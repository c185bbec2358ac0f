"""Time of calls that take turns in one process."""

import time
from collections.abc import Callable

import pandas as pd
import torch


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Callable[[], object], device: torch.device, clock: Callable[[], float] = time.perf_counter) -> float:
    synchronize(device)
    began = clock()
    call()
    synchronize(device)
    return clock() - began


def clock_of(device: torch.device) -> Callable[[], float]:
    """Returns the clock to use: on a shared CPU, the time of the process says more than the time on the wall."""
    return time.perf_counter if device.type == "cuda" else time.process_time


def take_turns(
    calls: dict[str, Callable[[], object]], rounds: int, device: torch.device, warm_up: int = 3
) -> pd.DataFrame:
    """Returns seconds, one row per round and one column per call, after some calls that do not count."""
    names = list(calls)
    for name in names * warm_up:  # the first measured step has a self-test, and kernels warm up
        calls[name]()
    rows = []
    for i in range(rounds):
        turn = i % len(names)
        rows.append({name: seconds(calls[name], device, clock_of(device)) for name in names[turn:] + names[:turn]})
    return pd.DataFrame(rows)
