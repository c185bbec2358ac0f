"""The Trainer of Lightning with automatic optimization, accumulation and clipping; it logs norms before the clip."""

import warnings

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

warnings.simplefilter("ignore")


class Regression(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def training_step(self, batch, index):
        x, y = batch
        return mse_loss(self.layer(x), y)

    def on_before_optimizer_step(self, optimizer):
        self.norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters()]).item()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


loader = DataLoader(TensorDataset(torch.randn(32, 4), torch.randn(32, 1)), batch_size=4)
trainer = Trainer(
    max_epochs=2,
    accelerator="cpu",
    accumulate_grad_batches=2,
    gradient_clip_val=0.5,
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(Regression(), loader)
