"""A Lightning Fabric loop with a plain probe and AutoClip: ``torchrun --nproc-per-node 2 examples/fabric.py``.

It trains on the digits that come with scikit-learn, at a rate where gradients must be clipped.
"""

import argparse
import os

import torch
from lightning.fabric import Fabric
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import smoothdiag as sd


def loss_fn(model, batch):
    images, labels = batch
    return F.cross_entropy(model(images), labels, label_smoothing=0.1)


def main(epochs, lr, devices):
    fabric = Fabric(accelerator="cpu", devices=devices)
    fabric.launch()
    fabric.seed_everything(0, verbose=False)
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels))
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    model, optimizer = fabric.setup(model, optimizer)
    loader = fabric.setup_dataloaders(DataLoader(data, batch_size=16, shuffle=True))

    # Every rank gives its probe what setup returned. All ranks get the same rows; the first rank writes the file.
    with sd.Probe(model, optimizer, loss_fn, schedule=sd.every(5), trace="fabric.jsonl") as probe:
        clipper = sd.AutoClip(optimizer, probe)  # instead of fabric.clip_gradients
        for epoch in range(epochs):
            if devices > 1:
                loader.sampler.set_epoch(epoch)
            for batch in probe.watch(loader):
                loss = loss_fn(model, batch)
                fabric.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
    fabric.print(f"training loss {loss.item():.3f}")
    fabric.print(clipper.reason)
    if fabric.global_rank == 0:
        print(sd.fit_smoothness(probe.trace).summary())
    fabric.barrier()  # if one rank ended badly while the first still fits, torchrun would stop both


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--lr", type=float, default=4.0)
    options = parser.parse_args()
    main(options.epochs, options.lr, devices=int(os.environ.get("WORLD_SIZE", "1")))
