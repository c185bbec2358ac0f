"""Trains a LightningModule on digits and measures it: ``python examples/lightning_module.py --auto-clip``.

The digits come with scikit-learn. At the default rate gradients must be clipped: with ``--gradient-clip-val 1`` the run
diverges. The script also runs under ``torchrun --nproc-per-node 2``.
"""

import argparse
import os

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import smoothdiag as sd
from smoothdiag.integrations.lightning import SmoothnessCallback


def digits():
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels))
    return torch.utils.data.random_split(data, [1400, 397], torch.Generator().manual_seed(0))


class Classifier(LightningModule):
    def __init__(self, lr):
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))

    def training_step(self, batch, batch_idx):
        images, labels = batch
        loss = F.cross_entropy(self.net(images), labels, label_smoothing=0.1)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        self.log("val_loss", F.cross_entropy(self.net(images), labels, label_smoothing=0.1), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


def train(lr=4.0, epochs=9, gradient_clip_val=None, seed=0, **options):
    """Trains and returns the trainer and the callback; ``options`` go to the callback."""
    seed_everything(seed, verbose=False)
    training, held_out = digits()
    callback = SmoothnessCallback(schedule=sd.every(5), **options)  # the added line
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=int(os.environ.get("WORLD_SIZE", "1")),
        gradient_clip_val=gradient_clip_val,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(Classifier(lr), DataLoader(training, 32, shuffle=True), DataLoader(held_out, 397))
    return trainer, callback


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lr", type=float, default=4.0)
    parser.add_argument("--epochs", type=int, default=9)
    parser.add_argument("--gradient-clip-val", type=float)
    parser.add_argument("--auto-clip", action="store_true", help="let AutoClip keep steps short")
    given = vars(parser.parse_args())
    trainer, callback = train(trace="lightning.jsonl", **given)
    if trainer.is_global_zero:
        print(f"held-out loss {float(trainer.callback_metrics['val_loss']):.3f}")
        if callback.clipper is not None:
            print(callback.clipper.reason)
        print(sd.fit_smoothness(callback.trace).summary())
