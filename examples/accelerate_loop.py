"""An Accelerate loop with a plain probe: ``torchrun --nproc-per-node 2 examples/accelerate_loop.py``.

It trains on the digits that come with scikit-learn, two micro-batches to a step.
"""

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import smoothdiag as sd


def loss_fn(model, batch):
    images, labels = batch
    return F.cross_entropy(model(images), labels)


def main(epochs, lr):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    set_seed(0)
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels))
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    loader = DataLoader(
        data, batch_size=16, shuffle=True, drop_last=True
    )  # 56 batches on each of two ranks, so every step has two
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    # Every rank needs a probe, on the inner optimizer, which takes the steps. Only the first rank writes the file.
    probe = sd.Probe(model, optimizer.optimizer, loss_fn, schedule=sd.every(5), trace="accelerate.jsonl")
    for _ in range(epochs):
        for batch in probe.watch(loader):
            with accelerator.accumulate(model):
                loss = loss_fn(model, batch)
                accelerator.backward(loss)  # divides by the number of micro-batches, as the probe expects
                optimizer.step()
                optimizer.zero_grad()
    probe.close()
    accelerator.print(f"training loss {loss.item():.3f}")
    if accelerator.is_main_process:
        print(sd.fit_smoothness(probe.trace).summary())
    accelerator.wait_for_everyone()  # if one rank ended badly while the first still fits, torchrun would stop both


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--lr", type=float, default=3e-3)
    options = parser.parse_args()
    main(options.epochs, options.lr)
