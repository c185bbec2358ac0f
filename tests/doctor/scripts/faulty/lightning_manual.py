"""Clips after the step in manual optimization of Lightning, which hands every step a closure that does nothing."""

import warnings

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

warnings.simplefilter("ignore")


class Regression(LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.layer = torch.nn.Linear(4, 1)

    def training_step(self, batch, index):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.layer(batch[0]).square().mean())
        optimizer.step()
        self.clip_gradients(optimizer, gradient_clip_val=0.1)  # fault: clip-after-step 8/8

    def configure_optimizers(self):
        return torch.optim.SGD(self.layer.parameters(), lr=0.1)


trainer = Trainer(
    max_epochs=1,
    accelerator="cpu",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(Regression(), DataLoader(TensorDataset(torch.randn(32, 4)), batch_size=4))
