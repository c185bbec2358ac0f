"""Measures smoothness under DistributedDataParallel: ``torchrun --nproc-per-node 2 examples/ddp.py``."""

import argparse
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import smoothdiag as sd


def loss_fn(model, batch):
    inputs, labels = batch
    return F.cross_entropy(model(inputs), labels)


def main(steps, device):
    torch.manual_seed(0)  # all ranks share the task and the initial weights
    centers = torch.randn(10, 32, device=device)
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10)).to(device)
    model = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    torch.manual_seed(1 + dist.get_rank())  # but each rank draws data of its own

    # Every rank needs a probe, because the ranks measure together. All get the same rows; the first rank writes them.
    with sd.Probe(model, optimizer, loss_fn, schedule=sd.every(2), trace="ddp.jsonl") as probe:
        for _ in range(steps):
            labels = torch.randint(10, (32,), device=device)
            batch = (centers[labels] + 2 * torch.randn(32, 32, device=device), labels)
            probe.observe(batch)
            loss_fn(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
    if dist.get_rank() == 0:
        print(sd.fit_smoothness(probe.trace).summary())
    dist.barrier()  # if one rank ended badly while the first still fits, torchrun would stop both


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo")
    main(parser.parse_args().steps, torch.device("cuda" if cuda else "cpu"))
    dist.destroy_process_group()
