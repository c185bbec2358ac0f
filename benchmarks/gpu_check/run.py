"""All checks that need a GPU, in one command of under eight minutes.

    python benchmarks/gpu_check/run.py --out gpu_check.json          # on one data-centre GPU
    python benchmarks/gpu_check/run.py --device cpu --tiny           # without one: shows that every part runs

Each part runs in a process of its own, under a time limit of its own. What a part has found is in the file as soon as
it is found, so whatever ends a part or the whole command, the file holds the rest.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
TOTAL, TOTAL_TINY = 460.0, 900.0
"""Most seconds that the whole command takes on a GPU, and where it is only tried out on a CPU."""

FOUND = "FOUND "
KEPT_LINES = 40


@dataclass(frozen=True)
class Part:
    """A process with a time limit.

    Attributes:
        name: Name of the part.
        command: What to run, without the interpreter.
        limit: Most seconds on a GPU; ten times as many where the command is only tried out.
    """

    name: str
    command: Sequence[str]
    limit: float


def gpu_tests() -> list[str]:
    """Returns the test files that have tests for a GPU."""
    files = sorted((REPOSITORY / "tests").rglob("test_*.py"))
    return [str(f.relative_to(REPOSITORY)) for f in files if "pytest.mark.gpu" in f.read_text(encoding="utf-8")]


def parts(device: str, tiny: bool) -> list[Part]:
    """Returns all parts, the most telling first, since time may run out."""
    options = ["--device", device, *(["--tiny"] if tiny else [])]

    def own(name: str, limit: float) -> Part:
        return Part(name, [str(HERE / "parts.py"), name, *options], limit)

    tests = ["-m", "pytest", "-n", "0", "-m", "gpu", "-p", "no:cacheprovider", "--tb=line", *gpu_tests()]
    optimizers = [str(REPOSITORY / "benchmarks" / "optimizers.py"), "--device", device]
    return [
        own("environment", 30),
        own("waits", 50),
        own("rows_1k", 60),
        own("rows_8k", 60),
        own("memory", 45),
        Part("tests", tests, 100),
        own("curvature_resnet", 55),
        own("curvature_gpt", 55),
        Part("optimizers", [*optimizers, *(["--quick", "--rounds", "1"] if tiny else ["--rounds", "21"])], 45),
    ]


def run(part: Part, limit: float, say: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Runs a part, hands on each finding as it comes, and returns how the part ended, with its last lines."""
    began, lines = time.monotonic(), list[str]()
    paths = [str(REPOSITORY), str(REPOSITORY / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    settings = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1", "MPLBACKEND": "Agg"}
    process = subprocess.Popen(
        [sys.executable, *part.command],
        cwd=REPOSITORY,
        env={"OMP_NUM_THREADS": "1", **os.environ, **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that what the part has started ends with it
    )

    def follow() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(FOUND):
                say(json.loads(line[len(FOUND) :]))
            else:
                lines.append(line.rstrip())

    reader = threading.Thread(target=follow, daemon=True)
    reader.start()
    try:
        code = process.wait(limit)
        status = "ok" if code in (0, 5) else f"exit status {code}"  # 5: pytest found no test to run
    except subprocess.TimeoutExpired:
        status = f"stopped after {limit:.0f} s"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    reader.join(5)
    return {"status": status, "seconds": round(time.monotonic() - began, 1), "last_lines": lines[-KEPT_LINES:]}


def tests_counted(lines: Sequence[str]) -> dict[str, Any]:
    """Returns how many tests passed and failed, and the names of those that failed."""
    counts = {word: int(n) for line in lines[-3:] for n, word in re.findall(r"(\d+) (passed|failed|skipped)", line)}
    return counts | {"failures": [line.split(" ", 1)[1] for line in lines if line.startswith(("FAILED", "ERROR"))]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu_check.json"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="dwarfs of all models, to try the command out on a CPU")
    parser.add_argument("--parts", nargs="+", help="some parts only")
    args = parser.parse_args()
    chosen = [p for p in parts(args.device, args.tiny) if not args.parts or p.name in args.parts]
    began, total = time.monotonic(), TOTAL_TINY if args.tiny else TOTAL
    summary: dict[str, Any] = {"device": args.device, "tiny": args.tiny, "parts": {}}

    def write() -> None:
        summary["seconds"] = round(time.monotonic() - began, 1)
        args.out.write_text(json.dumps(summary, indent=1) + "\n")

    for part in chosen:
        entry: dict[str, Any] = {"status": "running", "found": []}
        summary["parts"][part.name] = entry

        def say(finding: dict[str, Any], entry: dict[str, Any] = entry) -> None:
            entry["found"].append(finding)
            write()

        limit = min(part.limit * (10 if args.tiny else 1), total - (time.monotonic() - began))
        if limit < 10:
            entry["status"] = "no time left"
        else:
            entry |= run(part, limit, say)
            if part.name == "tests":
                entry["found"] = [tests_counted(entry["last_lines"])]
        write()
        print(f"{part.name}: {entry['status']}, {len(entry['found'])} findings", flush=True)
    print(f"{summary['seconds']} s in all; {args.out}")
    sys.exit(any(entry["status"] != "ok" for entry in summary["parts"].values()))


if __name__ == "__main__":
    main()
