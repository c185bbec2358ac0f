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
        clip_grad_norm_(self.parameters(), 0.05)  # fault: stale-gradients: on_before_optimizer_step
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


# --- from memory: clip in the training step
class Clips(Module):
    def training_step(self, batch, index):
        loss = self.loss(batch)
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 0.05)  # fault: stale-gradients: gradient_clip_val
        return loss


fit(model := Clips())


# --- from memory: clip in on_before_zero_grad
class Clips(Module):
    def on_before_zero_grad(self, optimizer):
        torch.nn.utils.clip_grad_norm_(self.parameters(), 0.05)  # fault: stale-gradients: gradient_clip_val


fit(model := Clips())


# --- from memory: adversarial, by hand, the other optimizer's gradients are clipped
class Clips(Manual):
    def __init__(self):
        super().__init__()
        self.critic = nn.Linear(3, 1)

    def training_step(self, batch, index):
        opt_g, opt_d = self.optimizers()
        opt_d.zero_grad()
        self.manual_backward(self.critic(self.net(batch[0]).detach()).square().mean())
        self.clip_gradients(opt_d, gradient_clip_val=0.05, gradient_clip_algorithm="norm")
        opt_d.step()
        opt_g.zero_grad()
        self.manual_backward(-self.critic(self.net(batch[0])).mean())
        self.clip_gradients(opt_d, gradient_clip_val=0.05)  # fault: clip-of-unused-gradients: manual_backward
        opt_g.step()

    def configure_optimizers(self):
        return torch.optim.Adam(self.net.parameters(), 1e-3), torch.optim.Adam(self.critic.parameters(), 1e-3)


fit(model := Clips())

# --- from memory: Fabric, a clip for every micro-batch
from lightning import Fabric  # noqa: E402

fabric = Fabric(accelerator="cpu", devices=1)
model = nn.Linear(6, 3)
model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
for _ in range(6):
    optimizer.zero_grad()
    for _micro in range(2):
        fabric.backward(F.cross_entropy(model(torch.randn(8, 6)), torch.randint(3, (8,))))
        fabric.clip_gradients(model, optimizer, max_norm=0.05)  # fault: clip-per-micro-batch: fabric.clip_gradients
    optimizer.step()


# --- from memory: adversarial, by hand, with toggles
class Clips(Manual):
    def __init__(self):
        super().__init__()
        self.critic = nn.Linear(3, 1)

    def training_step(self, batch, index):
        opt_g, opt_d = self.optimizers()
        for opt, loss in (
            (opt_g, lambda: -self.critic(self.net(batch[0])).mean()),
            (opt_d, lambda: self.critic(self.net(batch[0]).detach()).square().mean()),
        ):
            self.toggle_optimizer(opt)
            opt.zero_grad()
            self.manual_backward(loss())
            self.clip_gradients(opt, gradient_clip_val=0.05, gradient_clip_algorithm="norm")
            opt.step()
            self.untoggle_optimizer(opt)

    def configure_optimizers(self):
        return torch.optim.Adam(self.net.parameters(), 1e-3), torch.optim.Adam(self.critic.parameters(), 1e-3)


fit(model := Clips())


# --- from memory: a step of its own that calls the closure first
class Warms(Module):
    def optimizer_step(self, epoch, index, optimizer, closure):
        optimizer.step(closure=closure)
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * min(1.0, (index + 1) / 8)


fit(model := Warms(), gradient_clip_val=0.05, gradient_clip_algorithm="value")

# --- from memory: Fabric
from lightning import Fabric  # noqa: E402

fabric = Fabric(accelerator="cpu", devices=1)
model = nn.Linear(6, 3)
model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
for _ in range(6):
    optimizer.zero_grad()
    for _micro in range(2):
        fabric.backward(F.cross_entropy(model(torch.randn(8, 6)), torch.randint(3, (8,))))
    fabric.clip_gradients(model, optimizer, max_norm=0.05)
    optimizer.step()


# --- third round: callback on_after_backward accumulate 4
class Clip(Callback):
    def on_after_backward(self, trainer, module):
        clip_grad_norm_(module.parameters(), 0.05)  # fault: clip-per-micro-batch: gradient_clip_val


fit(model := Module(), callbacks=[Clip()], accumulate_grad_batches=4)


# --- third round: backward override
class Clips(Module):
    def backward(self, loss):
        loss.backward()
        clip_grad_norm_(self.parameters(), 0.05)  # fault: clip-per-micro-batch: gradient_clip_val


fit(model := Clips(), accumulate_grad_batches=2)


# --- third round: optimizer_step with accumulate 2
class Clips(Module):
    def optimizer_step(self, epoch, index, optimizer, closure):
        clip_grad_norm_(self.parameters(), 0.05)  # fault: clip-per-micro-batch: gradient_clip_val
        super().optimizer_step(epoch, index, optimizer, closure)


fit(model := Clips(), accumulate_grad_batches=2)


# --- third round: after the step in optimizer_step
class Clips(Module):
    def optimizer_step(self, epoch, index, optimizer, closure):
        optimizer.step(closure=closure)
        clip_grad_norm_(self.parameters(), 0.05)  # fault: stale-gradients: gradient_clip_val


fit(model := Clips())


# --- third round: a negative threshold in configure_gradient_clipping
class Clips(Module):
    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        clip_grad_norm_(self.parameters(), -1.0)  # fault: threshold-without-meaning


fit(model := Clips())


# --- third round: on_train_batch_start
class Clips(Module):
    def on_train_batch_start(self, batch, index):
        clip_grad_norm_(self.parameters(), 0.05)  # fault: stale-gradients: gradient_clip_val


fit(model := Clips())


# --- third round: optimizer_step calls the closure, clips, steps
class Clips(Module):
    def optimizer_step(self, epoch, index, optimizer, closure):
        closure()
        clip_grad_norm_(self.parameters(), 0.05)
        optimizer.optimizer.step() if hasattr(optimizer, "optimizer") else optimizer.step()


fit(model := Clips())


# --- third round: on_after_backward with one micro-batch
class Clips(Module):
    def on_after_backward(self):
        clip_grad_norm_(self.parameters(), 0.05)


fit(model := Clips())


# --- a generator that serves once
class Clips(Module):
    def on_train_start(self):
        self.all = self.net.parameters()

    def on_before_optimizer_step(self, optimizer):
        clip_grad_norm_(self.all, 0.05)  # fault: clip-of-nothing: gradient_clip_val


fit(model := Clips())


# --- manual: clip above a step with a closure
class Clips(Manual):
    def training_step(self, batch, index):
        def closure():
            optimizer.zero_grad()
            self.manual_backward(loss := self.loss(batch))
            return loss

        optimizer = self.optimizers()
        clip_grad_norm_(self.parameters(), 0.05)  # fault: stale-gradients: into the closure
        optimizer.step(closure=closure)


fit(model := Clips())

# --- Fabric, gradients thrown away between the clip and the step
from lightning import Fabric  # noqa: E402

fabric = Fabric(accelerator="cpu", devices=1)
model = nn.Linear(6, 3)
model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
for _ in range(6):
    fabric.backward(F.cross_entropy(model(torch.randn(8, 6)), torch.randint(3, (8,))))
    fabric.clip_gradients(model, optimizer, max_norm=0.05)  # fault: clip-of-unused-gradients: fabric.clip_gradients
    optimizer.zero_grad()
    optimizer.step()
