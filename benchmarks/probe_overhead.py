"""What measuring costs: copies of the parameters, time over gradients, gradients, waits, collectives.

    OMP_NUM_THREADS=1 python benchmarks/probe_overhead.py --out results.json   # --quick: fewer rounds, no budget

The variants of a time take turns in one process, in an order that rotates. Every ratio is a median over rounds of
ratios within a round, so a slow moment of the machine slows both sides of the ratio. Memory comes from the profiler's
events on a CPU. Rows are written as soon as they are there, with limit, goal and figure side by side. The rows of fits
and of AutoClip's plain steps are those of `fits.py` and `autoclip_cost.py`.
"""

import argparse
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from overhead import counts, memory, others, times
from overhead.paper import seven_billion
from overhead.table import Row, cells, environment, filled, markdown, read, text, write

import smoothdiag as sd

PARTS = {
    "copies": memory.copies,
    "hessian": memory.hessian,
    "products": times.products,
    "rows": times.rows_over_gradients,
    "tensors": times.many_tensors,
    "gradients": counts.gradients,
    "waits": counts.waits,
    "collectives": counts.sums_over_ranks,
    "autoclip": others.autoclip,
    "fits": others.fits,
    "budget": times.shares,
}


def measured(parts: list[str], device: torch.device, quick: bool, out: Path | None) -> list[Row]:
    """Measures part after part, and writes the rows so far after each row; rows of other parts stay in the file."""
    about, kept = environment(device) | {"quick": quick}, list[Row]()
    if out is not None and out.exists():
        found, before = read(out)
        if {**before, "date": ""} != {**about, "date": ""}:
            raise SystemExit(f"{out} was measured elsewhere, at {before['commit']}; give another name, or remove it.")
        kept = [row for row in found if row.part not in parts]
    rows = list[Row]()
    for part in parts:
        for row in PARTS[part](device, quick):
            rows.append(replace(row, part=part))
            print("  ".join(filter(None, cells(row))), file=sys.stderr, flush=True)
            if out is not None:
                write(out, sorted(kept + rows, key=lambda row: list(PARTS).index(row.part)), about)
    return rows


def blocks(results: Path) -> dict[str, str]:
    """Returns the blocks of pages, by name, from a file of results."""
    rows, about = read(results)
    return {"table": markdown(rows, about), "7B": seven_billion(rows)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--threads", type=int, default=1, help="more threads than idle cores blur every ratio")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, no budget: a look in some minutes")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, help="file for the rows and the environment")
    parser.add_argument("--page", type=Path, nargs="+", help="pages to write the table of --out into, unmeasured")
    args = parser.parse_args()
    if args.page:
        for page in args.page:
            page.write_text(filled(page.read_text(encoding="utf-8"), blocks(args.out)), encoding="utf-8")
        return
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore", sd.SmoothdiagWarning)
    print(text(measured(args.parts, args.device, args.quick, args.out)))


if __name__ == "__main__":
    main()
