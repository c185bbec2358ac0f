"""Compares seeded runs of this tree and of another commit bit for bit; text for people may differ.

    make same REV=HEAD~3        or        python benchmarks/same/compare.py HEAD~3

Needs git, and about a minute for each side. Both sides run `runs.py` of this tree. A run that exists on only one side
is named, but does not count as a difference.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Set
from io import BytesIO
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
FREE = {
    "seconds",
    "package",
    "hvp_reason",
    "note",
    "reason",
    "verdict_reason",
    "cause",
    "remedy",
    "evidence",
    "message",
    "torch",
}
"""Entries that may differ: time, places, and text meant for people."""


def exported(revision: str, folder: Path) -> Path:
    """Returns a folder that holds the package as it was at a revision."""
    packed = subprocess.run(
        ["git", "archive", revision, "smoothdiag"], cwd=REPOSITORY, check=True, capture_output=True
    ).stdout
    with tarfile.open(fileobj=BytesIO(packed)) as archive:
        archive.extractall(folder, filter="data")
    return folder


def results(root: Path, out: Path, only: str) -> dict[str, Any]:
    """Returns the results of all runs with the package under ``root``."""
    runs = Path(__file__).with_name("runs.py")
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(runs), "--out", str(out), "--only", only]
    subprocess.run(command, cwd=out.parent, env=environment, check=True)
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    if not Path(found["package"]).samefile(root / "smoothdiag"):
        raise RuntimeError(f"The runs used {found['package']} instead of the package under {root}.")
    return found


def differences(before: Any, after: Any, where: str = "", free: Set[str] = FREE) -> Iterator[str]:
    """Yields a line for every entry that differs and must not."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in [*before, *(key for key in after if key not in before)]:
            if key in free:
                continue
            if key not in before or key not in after:
                yield f"{where}/{key}: only {'after' if key in after else 'before'}"
            else:
                yield from differences(before[key], after[key], f"{where}/{key}", free)
    elif isinstance(before, list) and isinstance(after, list):
        if len(before) != len(after):
            yield f"{where}: {len(before)} entries before, {len(after)} after"
        for i, pair in enumerate(zip(before, after, strict=False)):
            yield from differences(*pair, f"{where}[{i}]", free)
    elif type(before) is not type(after) or before != after:
        yield f"{where}: {before!r} before, {after!r} after"


def num_entries(found: Any) -> int:
    """Returns the number of numbers and digests."""
    if isinstance(found, dict):
        return sum(num_entries(inner) for key, inner in found.items() if key not in FREE)
    return sum(map(num_entries, found)) if isinstance(found, list) else 1


def main() -> int:
    """Returns 0 if nothing differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision", help="commit to compare with, as HEAD~3 or a branch")
    parser.add_argument("--only", default="", help="only runs whose name holds this")
    parser.add_argument("--new", nargs="*", default=[], help="entries that only one side has, on purpose")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        before = results(exported(arguments.revision, folder / "before"), folder / "before.json", arguments.only)
        after = results(REPOSITORY, folder / "after.json", arguments.only)
    found = list(differences(before, after, free=FREE | set(arguments.new)))
    errors = sum(isinstance(run, dict) and "error" in run for run in after.values())
    left_out = [name for name, run in after.items() if str(run).startswith("not run")]
    for line in found[:40]:
        print(line)
    print(
        f"{len(after) - 1} runs, {num_entries(after)} numbers, digests and names compared, {errors} runs refused by "
        f"the library: {len(found)} differences to {arguments.revision}."
    )
    if left_out:
        print(f"{len(left_out)} runs need packages that are not installed: {', '.join(left_out[:5])}, ...")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
