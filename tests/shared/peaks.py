"""peaks: the memory that a call takes at the most, from the profile of every allocation on a CPU."""

import gc
import json
from collections.abc import Callable
from pathlib import Path

from torch.profiler import ProfilerActivity, profile


def peak_of(action: Callable[[], object], folder: Path) -> int:
    """Returns the bytes allocated at the most, beyond what was before; the same in every run."""
    action()
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        action()
    profiled.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    steps = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]")
    peak = now = 0
    for _, change in steps:
        now += change
        peak = max(peak, now)
    return peak
