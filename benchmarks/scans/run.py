"""Scans networks on real data at three stages of training; skips scans that are on disk already.

SMOOTHDIAG_DATA=... python benchmarks/scans/run.py --out scans            # 108 scans, 20 minutes
SMOOTHDIAG_DATA=... python benchmarks/scans/run.py --out scans --descent  # down the gradient on one batch
SMOOTHDIAG_DATA=... python benchmarks/scans/run.py --out scans --quick    # one network, a minute
"""

import argparse
import sys
from pathlib import Path

import torch
from checkpoints import NETS, STAGES, Checkpoint, cases, data_of, restored
from tqdm import tqdm

import smoothdiag as sd


def path_of(folder: Path, kind: str, checkpoint: Checkpoint) -> Path:
    name = f"{kind}-{checkpoint.net}-{checkpoint.stage}-{checkpoint.seed}-{checkpoint.batch}.jsonl"
    return folder / name


def scan(
    folder: Path, kind: str, checkpoint: Checkpoint, budget: int, spacing: float, directions: list[str] | None
) -> None:
    """Writes the trace under another name until it is whole, so that a killed scan is done again."""
    path = path_of(folder, kind, checkpoint)
    if path.exists():
        return
    model, batch = restored(checkpoint)
    unfinished = path.with_suffix(".part.jsonl")
    unfinished.unlink(missing_ok=True)
    sd.scan(
        model,
        NETS[checkpoint.net].loss_fn,
        [batch],
        trace=unfinished,
        seed=checkpoint.seed,
        step=checkpoint.stage,
        budget=budget,
        spacing=spacing,
        directions=directions,
        progress=False,
    )
    unfinished.rename(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder that the traces go to")
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=list(NETS))
    parser.add_argument("--stages", nargs="+", type=int, default=list(STAGES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--batches", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--budget", type=int, help="gradients per scan; default 500, down the gradient 1500")
    parser.add_argument("--spacing", type=float, help="move of log gradient norm between two points; 1, or .15 down")
    parser.add_argument("--directions", nargs="+", help="lines, instead of the default ones")
    parser.add_argument("--descent", action="store_true", help="down the gradient instead of along lines")
    parser.add_argument("--quick", action="store_true", help="one network, one seed, one batch")
    args = parser.parse_args()
    if args.quick:
        args.nets, args.seeds, args.batches = ["MLP"], [0], [0]
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        for net in args.nets:
            data_of(net)
    except FileNotFoundError as error:
        sys.exit(f"error: {error}")
    kind, directions = ("descent", ["descent"]) if args.descent else ("scan", args.directions)
    budget = args.budget or (1500 if args.descent else 500)
    spacing = args.spacing or (0.15 if args.descent else 1.0)
    for checkpoint in tqdm(list(cases(args.nets, args.stages, args.seeds, args.batches)), unit="scan"):
        scan(args.out, kind, checkpoint, budget, spacing, directions)


if __name__ == "__main__":
    main()
