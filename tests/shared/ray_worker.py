"""What a worker of Ray Train runs: executes variants of the recipe of docs/ecosystem.md."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from asserts import state_of
from recipes import Watch, watched
from torch import nn
from torch.nn import functional as F

import smoothdiag as sd


def loss_of(seen: Watch) -> Any:
    def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
        return seen.loss(F.cross_entropy(model(batch[0]), batch[1]))

    return loss_fn


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 3))


def make_loader(number: int) -> torch.utils.data.DataLoader[Any]:
    draw = torch.Generator().manual_seed(1)
    inputs = torch.randn(16 * number, 6, generator=draw)
    labels = (inputs @ torch.randn(6, 3, generator=draw)).argmax(1)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(inputs, labels), batch_size=8)


def work(config: dict[str, Any]) -> None:
    """Trains by each of the codes in ``config``, one after the other, and saves what they left for each rank.

    Starting the workers takes much longer than training.
    """
    import ray.train
    import ray.train.torch

    torch.set_num_threads(1)
    context = ray.train.get_context()
    folder, results = Path(config["folder"]), dict[str, Any]()
    for name, (code, lr) in config["runs"].items():
        results[name] = train(code, ray, config | {"lr": lr, "trace": str(folder / f"{name}.jsonl")})
    torch.save(results | {"size": context.get_world_size()}, folder / f"{context.get_world_rank()}.pt")


def train(code: str, ray: Any, config: dict[str, Any]) -> dict[str, Any]:
    """Executes a code and calls the function that it defines; returns the state of the model, norms and losses."""
    random.seed(0)
    np.random.seed(0)
    seen, kept = Watch(), dict[str, Any]()

    def watch(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        kept.update(model=model)
        seen.steps(optimizer)

    names: dict[str, Any] = {"torch": torch, "sd": sd, "ray": ray, "loss_fn": loss_of(seen), "watch": watch}
    names |= {"make_model": make_model, "make_loader": lambda: make_loader(config["number"])}
    exec(watched(code), names)
    names["train_loop_per_worker"](config)
    return {"state": state_of(kept["model"]), "norms": seen.norms, "losses": seen.losses}
