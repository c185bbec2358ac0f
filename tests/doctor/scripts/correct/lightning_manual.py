"""Manual optimization of Lightning; then automatic optimization, with norms read in a hook inside the closure."""

import warnings

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.nn.utils import clip_grad_norm_, get_total_norm
from torch.utils.data import DataLoader, TensorDataset

warnings.simplefilter("ignore")


class Manual(LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.layer = torch.nn.Linear(4, 1)

    def training_step(self, batch, index):
        optimizer = self.optimizers()
        if index:
            self.norm = get_total_norm([p.grad for p in self.parameters()]).item()  # of the step before
        optimizer.zero_grad()
        self.manual_backward(self.layer(batch[0]).square().mean())
        self.before = clip_grad_norm_(self.parameters(), 0.1)
        self.clip_gradients(optimizer, gradient_clip_val=0.05, gradient_clip_algorithm="value")
        optimizer.step()

    def configure_optimizers(self):
        return torch.optim.SGD(self.layer.parameters(), lr=0.1)


class Automatic(Manual):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = True

    def training_step(self, batch, index):
        return self.layer(batch[0]).square().mean()

    def on_before_zero_grad(self, optimizer):
        self.norm = [p.grad.norm() for p in self.parameters() if p.grad is not None]


for module in (Manual(), Automatic()):
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(TensorDataset(torch.randn(32, 4)), batch_size=4))
