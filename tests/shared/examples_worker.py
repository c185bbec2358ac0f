"""What each of two processes does for the tests of the examples: it runs them in turn, as under torchrun."""

import os
import runpy
import socket
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

import torch
import torch.distributed as dist
from places import REPOSITORY

WORLD = 2


def work(rank: int, folder: str, examples: dict[str, Sequence[str]]) -> None:
    """Runs every example with its options, in a folder of its name, and leaves what it printed in a file."""
    torch.set_num_threads(1)
    for example, options in examples.items():
        place = Path(folder) / example
        place.mkdir(exist_ok=True)
        os.chdir(place)
        os.environ |= settings(rank, place)
        sys.argv = [f"{example}.py", *options]
        with open(f"printed{rank}.txt", "w", encoding="utf-8") as printed, redirect_stdout(printed):
            runpy.run_path(str(REPOSITORY / "examples" / f"{example}.py"), run_name="__main__")
        if dist.is_initialized():
            dist.destroy_process_group()
    torch.save(None, f"{folder}/rank{rank}.pt")


def settings(rank: int, place: Path) -> dict[str, str]:
    """Returns what torchrun tells its processes; the ranks meet at a port that the first one has found to be free."""
    meeting = dist.FileStore(str(place / "port"), WORLD)
    if rank == 0:
        with socket.socket() as found:
            found.bind(("localhost", 0))
            meeting.set("port", str(found.getsockname()[1]))
    torchrun = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": WORLD, "LOCAL_WORLD_SIZE": WORLD}
    torchrun |= {"MASTER_ADDR": "localhost", "MASTER_PORT": meeting.get("port").decode(), "OMP_NUM_THREADS": 1}
    torchrun |= {"TORCHELASTIC_RUN_ID": "examples", "CUDA_VISIBLE_DEVICES": ""}
    return {name: str(value) for name, value in torchrun.items()}
