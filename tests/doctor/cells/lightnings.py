"""Lightning, automatic and manual. Everything above the first cell is the beginning of every script."""

import logging
import warnings

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader, TensorDataset

warnings.simplefilter("ignore")
for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
    logging.getLogger(name).setLevel(logging.ERROR)


class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))

    def loss(self, batch):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch, index):
        return self.loss(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Manual(Module):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


def fit(module, **options):
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    data = TensorDataset(torch.randn(64, 6), torch.randint(3, (64,)))
    trainer = Trainer(max_epochs=1, accelerator="cpu", **off, **options)
    trainer.fit(module, DataLoader(data, batch_size=4))


# --- after every backward pass, two micro-batches
class Clips(Module):
    def on_after_backward(self):
        clip_grad_norm_(self.parameters(), 0.05)  # fault: clip-per-micro-batch: configure_gradient_clipping


fit(model := Clips(), accumulate_grad_batches=2)


# --- before the closure of the step
class Clips(Module):
    def optimizer_step(self, epoch, index, optimizer, closure):
        clip_grad_norm_(self.parameters(), 0.05)  # fault: stale-gradients: configure_gradient_clipping
        super().optimizer_step(epoch, index, optimizer, closure)


fit(model := Clips())


# --- at the end of the batch
class Clips(Module):
    def on_train_batch_end(self, outputs, batch, index):
        clip_grad_norm_(self.parameters(), 0.05)  # fault: stale-gradients: configure_gradient_clipping


fit(model := Clips())


# --- manual: clip after the step
class Clips(Manual):
    def training_step(self, batch, index):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()
        clip_grad_norm_(self.parameters(), 0.05)  # fault: clip-after-step: manual_backward


fit(model := Clips())


# --- manual: clip for every micro-batch
class Clips(Manual):
    def training_step(self, batch, index):
        optimizer = self.optimizers()
        self.manual_backward(self.loss(batch) / 2)
        self.clip_gradients(optimizer, gradient_clip_val=0.05)  # fault: clip-per-micro-batch: manual_backward
        if index % 2:
            optimizer.step()
            optimizer.zero_grad()


fit(model := Clips())

# --- the setting of the Trainer
fit(model := Module(), gradient_clip_val=0.05, accumulate_grad_batches=2)


# --- a place of its own
class Clips(Module):
    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        clip_grad_norm_(self.parameters(), 0.05)


fit(model := Clips(), accumulate_grad_batches=2)


# --- a callback right before the step
class Clip(Callback):
    def on_before_optimizer_step(self, trainer, module, optimizer):
        clip_grad_norm_(module.parameters(), 0.05)


fit(model := Module(), callbacks=[Clip()], accumulate_grad_batches=2)


# --- manual: accumulation
class Clips(Manual):
    def training_step(self, batch, index):
        optimizer = self.optimizers()
        self.manual_backward(self.loss(batch) / 2)
        if index % 2:
            self.clip_gradients(optimizer, gradient_clip_val=0.05)
            optimizer.step()
            optimizer.zero_grad()


fit(model := Clips())
