"""What each of two processes does for test_huggingface_distributed.py; it leaves what it found in a file."""

import os
from pathlib import Path

import torch
import torch.distributed as dist
from trainers import trainer_of

from smoothdiag import every
from smoothdiag.integrations.huggingface import SmoothnessCallback

STEPS = 8


def work(rank: int, folder: str, port: int) -> None:
    """Trains with the callback and without; stops, and resumes from a checkpoint."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # or accelerate takes all cores for each of the processes
    addresses = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": 2, "RANK": rank, "LOCAL_RANK": rank}
    os.environ.update({name: str(value) for name, value in addresses.items()})
    found = {"without": _train(rank, Path(folder) / "without", "none")}
    for auto_clip in (False, True):
        name = f"auto_clip_{auto_clip}"
        found[name] = _train(rank, Path(folder) / name, "whole", auto_clip=auto_clip)
        found[f"{name}_resumed"] = _train(rank, Path(folder) / name, "resumed", auto_clip=auto_clip)
    torch.save(found, Path(folder) / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def _train(rank: int, folder: Path, part: str, *, auto_clip: bool = False) -> dict[str, object]:
    options = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 4, "max_grad_norm": 0.0, "lr": 0.5}
    trainer = trainer_of(folder, number=40, gradient_accumulation_steps=2, ddp_backend="gloo", **options)
    callback = SmoothnessCallback(schedule=every(1), auto_clip=auto_clip, data="step")
    if part != "none":
        callback.bind(trainer)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4") if part == "resumed" else None)
    rows = [] if part == "none" else [{**row, "seconds": 0.0, "num_grads": 0} for row in callback.trace]
    return {
        "weights": [p.detach().clone() for p in trainer.model.parameters()],
        "logs": [entry for entry in trainer.state.log_history if "loss" in entry],
        "rows": [str(row) for row in rows],
        "steps": [row["step"] for row in rows if row["estimator"] == "path"],
        "norms": [row["grad_norm"] for row in rows if row["estimator"] == "path"],
        "reason": "" if callback.clipper is None else callback.clipper.reason,
    }
