"""A small run under Lightning, with what real modules do: dropout, batch statistics, metrics, logging, lists."""

import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import ConfusionMatrix, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

CLASSES = 40
"""So many that the confusion matrix is not small."""


def sgd(module: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.3, momentum=0.9)


def adamw(module: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=0.03)


def data(num: int = 192, size: int = 16, *, shuffle: bool = True) -> DataLoader:
    source = torch.Generator().manual_seed(7)
    x = torch.randn(num, 8, generator=source)
    y = (x @ torch.randn(8, CLASSES, generator=source)).argmax(1)
    return DataLoader(TensorDataset(x, y), batch_size=size, shuffle=shuffle)


class Steps:
    """Classifies; keeps books in every way that is common."""

    def __init__(
        self, make: Callable[[nn.Module], torch.optim.Optimizer] = sgd, *, skipped: tuple[int, ...] = ()
    ) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(8, 24), nn.BatchNorm1d(24), nn.Tanh(), nn.Dropout(0.2), nn.Linear(24, CLASSES)
        )
        self.make, self.skipped = make, skipped
        self.metrics = MetricCollection(
            [MulticlassAccuracy(CLASSES), ConfusionMatrix("multiclass", num_classes=CLASSES)]
        )
        self.losses: list[Tensor] = []
        self.num_calls, self.num_logged = 0, 0

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        self.num_calls += 1
        if batch_idx in self.skipped:
            return None
        x, y = batch
        predicted = self.net(x)
        loss = F.cross_entropy(predicted, y)
        self.metrics.update(predicted, y)
        self.losses.append(loss.detach())
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        self.log_dict({"half": loss / 2})
        return {"loss": loss}

    def configure_optimizers(self) -> Any:
        optimizer = self.make(self)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.8), "interval": "step"}]


class Module(Steps, LightningModule):
    """The module."""


class Norms(Callback):
    """Keeps the norms of the gradients that Lightning is about to clip."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        squares = [float(p.grad.double().square().sum()) for p in pl_module.parameters() if p.grad is not None]
        self.found.append(sum(squares) ** 0.5)


class Reseed(Callback):
    """Makes the random numbers of a batch those of its step, also where training goes on in another run."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(trainer.global_step)


def fit(
    *callbacks: Callback,
    make: Callable[..., Any] = Module,
    loader: DataLoader | None = None,
    ckpt_path: Any = None,
    trainer_class: type = Trainer,
    **options: Any,
) -> tuple[Any, Any]:
    """Trains a module from the same start on the same batches, and returns it and its trainer."""
    seed_everything(3, verbose=False)
    module = make()
    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
        "enable_checkpointing": False,
    }
    trainer = trainer_class(accelerator="cpu", callbacks=list(callbacks), **{"max_epochs": 1, **quiet, **options})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="lightning|pytorch_lightning|torch")
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        seed_everything(4, verbose=False)
        trainer.fit(module, data() if loader is None else loader, ckpt_path=ckpt_path)
    return module, trainer
