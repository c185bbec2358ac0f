"""Compares AutoClip with fixed thresholds in a Lightning Trainer: ``python benchmarks/frameworks/lightning_run.py``.

The script prints two lines for each task, rate and seed: training and held-out loss, as means over the last quarter of
the epochs, for each ``gradient_clip_val`` and for ``SmoothnessCallback(auto_clip=True)``. The figures are in
docs/lightning.md.
"""

import argparse
import itertools
import logging
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import smoothdiag as sd
from smoothdiag.demo import CharacterLSTM, Corpus, next_character_loss, standard_library_text
from smoothdiag.integrations.lightning import SmoothnessCallback

THRESHOLDS = tuple(3.0**-k for k in range(8))
LENGTH = 32
KINDS = ("training", "held-out")


@dataclass(frozen=True)
class Task:
    net: Callable[[], nn.Module]
    loss_fn: Callable[[nn.Module, Any], Tensor]
    training: Any
    held_out: Any
    epochs: int


def classification(smoothing: float) -> Task:
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels))
    training, held_out = torch.utils.data.random_split(data, [1400, 397], torch.Generator().manual_seed(0))

    def net() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], label_smoothing=smoothing)

    return Task(net, loss_fn, training, held_out, epochs=12)


def characters() -> Task:
    corpus = Corpus.from_text(standard_library_text()[:140_000])
    windows = corpus.codes.unfold(0, LENGTH + 1, LENGTH)
    split = len(windows) * 9 // 10
    return Task(
        lambda: CharacterLSTM(corpus.vocabulary, width=48, dropout=0.0),
        next_character_loss,
        windows[:split],
        windows[split:],
        epochs=4,
    )


TASKS = {
    "digits, smoothed labels": lambda: classification(0.1),
    "digits": lambda: classification(0.0),
    "characters": characters,
}


class Module(LightningModule):
    def __init__(self, task: Task, lr: float) -> None:
        super().__init__()
        self.net, self.loss_fn, self.lr = task.net(), task.loss_fn, lr

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss_fn(self.net, batch)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        name = KINDS[dataloader_idx]
        self.log(name, self.loss_fn(self.net, batch), batch_size=len(batch), add_dataloader_idx=False)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


class Losses(Callback):
    def __init__(self) -> None:
        self.found: list[list[float]] = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.found.append([float(trainer.callback_metrics[kind]) for kind in KINDS])


def train(task: Task, lr: float, clip: float | None, seed: int = 0) -> list[float]:
    """Returns training and held-out loss, as means over the last quarter of the epochs; None uses AutoClip."""
    seed_everything(seed, verbose=False)
    losses = Losses()
    callbacks: list[Callback] = [losses]
    if clip is None:
        callbacks.append(SmoothnessCallback(schedule=sd.every(100), auto_clip=True))
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=task.epochs,
        callbacks=callbacks,
        gradient_clip_val=clip,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    judged = [DataLoader(part, 2048) for part in (task.training, task.held_out)]
    trainer.fit(Module(task, lr), DataLoader(task.training, 32, shuffle=True), judged)
    last = losses.found[-max(1, task.epochs // 4) :]
    return [sum(values) / len(values) for values in zip(*last, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--rates", nargs="+", type=float, default=[16.0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    head = " ".join(f"{threshold:8.4f}" for threshold in THRESHOLDS)
    print(f"{'task':24} {'lr':>4} seed {'loss':8} {head}     auto  over the best")
    for name, lr, seed in itertools.product(options.tasks, options.rates, options.seeds):
        task = TASKS[name]()
        fixed = [train(task, lr, threshold, seed) for threshold in THRESHOLDS]
        automatic = train(task, lr, None, seed)
        for i, kind in enumerate(KINDS):
            best = min(losses[i] for losses in fixed if math.isfinite(losses[i]))
            shown = " ".join(f"{losses[i]:8.3f}" for losses in fixed)
            more = automatic[i] / best - 1
            print(f"{name:24} {lr:4g} {seed:4} {kind:8} {shown} {automatic[i]:8.3f} {more:+13.1%}", flush=True)


if __name__ == "__main__":
    main()
