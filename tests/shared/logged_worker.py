"""What each of two processes does for test_loggers.py: it trains, with a writer of its own."""

import warnings

import torch
from logged_runs import Run

from smoothdiag import SmoothdiagWarning
from smoothdiag.integrations.loggers import TensorBoardWriter


def work(rank: int, folder: str) -> None:
    warnings.simplefilter("error", SmoothdiagWarning)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/sync", rank=rank, world_size=2)
    run = Run()
    with TensorBoardWriter(run.probe, f"{folder}/runs{rank}"):
        run.train(4)
    torch.save({"steps": run.probe.steps}, f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()
