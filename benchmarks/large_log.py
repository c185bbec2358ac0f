"""Large logs: processor time and peak memory to read and review ten million lines of each kind.

    python benchmarks/large_log.py                 # console, megatron, json, csv
    python benchmarks/large_log.py --lines 1000000 console

Each log is written to a temporary folder and read by a process of its own, so that its peak memory is its own. Reading
is done by one thread, so processor time is the time on a machine with nothing else to do.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path


def console(number: int, rng: random.Random) -> str:
    """Lines of nanoGPT: eight of training in ten, one of evaluation, one of text."""
    block, place = divmod(number, 10)
    if place == 0:
        return f"step {8 * block}: train loss {rng.uniform(2, 3):.4f}, val loss 9.9000"
    if place == 9:
        return "saving checkpoint to out-shakespeare-char"
    return f"iter {8 * block + place}: loss {rng.uniform(2, 3):.4f}, time {rng.uniform(90, 99):.2f}ms, mfu 30.10%"


def megatron(number: int, rng: random.Random) -> str:
    """Lines of Megatron-LM, each with a loss and a norm."""
    return (
        f" [2026-01-01 00:00:00] iteration {number + 1:8d}/10000000 | consumed samples: {64 * number:12d} | "
        f"learning rate: {rng.uniform(1, 2):.6E} | lm loss: {rng.uniform(2, 3):.6E} | loss scale: 1.0 | "
        f"grad norm: {rng.lognormvariate(0, 0.4):.3f} | number of skipped iterations:   0 |"
    )


def json_line(number: int, rng: random.Random) -> str:
    """JSON lines."""
    return json.dumps({"step": number, "loss": rng.uniform(2, 3), "grad_norm": rng.lognormvariate(0, 0.4)})


def row(number: int, rng: random.Random) -> str:
    """Rows of a table."""
    return f"{number},{rng.uniform(2, 3):.4f},{rng.lognormvariate(0, 0.4):.4f}" if number else "step,loss,grad_norm"


KINDS: dict[str, tuple[str, Callable[[int, random.Random], str]]] = {
    "console": ("train.log", console),
    "megatron": ("slurm.out", megatron),
    "json": ("log.jsonl", json_line),
    "csv": ("log.csv", row),
}


def measure(path: str) -> None:
    """Reads and reviews a log, and prints what it took as JSON."""
    from smoothdiag.logs import read_log, review_log

    warnings.simplefilter("ignore")
    start = time.process_time()
    trace = read_log(path)
    read = time.process_time()
    review_log(trace).summary()
    end = time.process_time()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"rows": len(trace), "read_s": read - start, "review_s": end - read, "peak_mb": peak}))


def lines(kind: str, number: int) -> Iterator[str]:
    """Yields the lines of a log."""
    rng = random.Random(0)
    make = KINDS[kind][1]
    return (f"{make(k, rng)}\n" for k in range(number))


def main() -> None:
    """Writes, reads and reviews logs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", default=list(KINDS), metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--lines", type=int, default=10_000_000)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure)
        return
    for kind in arguments.kinds:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / KINDS[kind][0]
            with path.open("w", encoding="utf-8") as file:
                file.writelines(lines(kind, arguments.lines))
            done = subprocess.run(
                [sys.executable, __file__, "--measure", str(path)], check=True, capture_output=True, text=True
            )
            found = json.loads(done.stdout)
            print(
                f"{kind:>9}: {arguments.lines} lines, {path.stat().st_size >> 20} MB, {found['rows']} rows: read "
                f"{found['read_s']:.1f} s, reviewed {found['review_s']:.1f} s, peak {found['peak_mb']:.0f} MB",
                flush=True,
            )


if __name__ == "__main__":
    main()
