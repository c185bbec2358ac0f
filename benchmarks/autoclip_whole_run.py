"""Time of a whole run under AutoClip over that of the same run under max_norm = 1, measurements included.

The two runs take turns, step by step, in one process, on the same batches. The script prints the ratio of their times
over the whole run and over each tenth of it, because most measurements fall into the first tenth.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from overhead.clock import clock_of, seconds
from overhead.loops import NETWORKS
from torch import nn
from tqdm import tqdm

from smoothdiag import AutoClip, Probe

MODELS = ("GPT .8M, 1,024 tokens", "GPT 10M, 32 tokens")
OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=3e-4),
}
TENTHS = 10


class Run:
    """A model in training, under AutoClip or under max_norm = 1."""

    def __init__(self, network: str, optimizer: str, device: torch.device, *, measured: bool) -> None:
        torch.manual_seed(0)
        self.task = NETWORKS[network]
        self.model = self.task.build().to(device)
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.probe = Probe(self.model, self.optimizer, self.task.loss_fn, estimators=()) if measured else None
        self.clipper = AutoClip(self.optimizer, self.probe) if self.probe else None

    def step(self, batch: torch.Tensor) -> None:
        if self.probe:
            self.probe.observe(batch)
        self.task.loss_fn(self.model, batch).backward()
        if not self.probe:
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def compare(network: str, optimizer: str, device: torch.device, steps: int) -> dict[str, float | str | list[float]]:
    """Trains both ways and returns ratios of times."""
    plain, clipped = (Run(network, optimizer, device, measured=measured) for measured in (False, True))
    clock = clock_of(device)
    spent = torch.zeros(steps, 2, dtype=torch.float64)
    for k in tqdm(range(steps), desc=f"{optimizer}, {network}", unit="step"):
        batch = plain.task.batch(device)
        for arm, run in ((0, plain), (1, clipped)) if k % 2 else ((1, clipped), (0, plain)):
            spent[k, arm] = seconds(lambda run=run, batch=batch: run.step(batch), device, clock)
    tenths = spent.reshape(TENTHS, -1, 2).sum(dim=1)
    rows = clipped.probe.trace.to_frame() if clipped.probe else None
    return {
        "time over max_norm = 1": float(spent[:, 1].sum() / spent[:, 0].sum()),
        "by tenths": [round(float(ratio), 3) for ratio in tenths[:, 1] / tenths[:, 0]],
        "typical step": float((spent[:, 1] / spent[:, 0]).median()),
        "rows": 0 if rows is None else len(rows),
        "clipped": clipped.clipper.clip_fraction if clipped.clipper else 0.0,
        "plain step [ms]": 1e3 * float(spent[:, 0].median()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--steps", type=int, default=1000, help="a multiple of 10")
    parser.add_argument("--models", nargs="*", choices=NETWORKS, default=list(MODELS))
    parser.add_argument("--optimizers", nargs="*", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--out", type=Path, help="writes the figures as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    environment = {"torch": torch.__version__, "device": str(args.device), "date": time.strftime("%Y-%m-%d")}
    found: dict[str, object] = {"environment": {**environment, "steps": args.steps}}
    for model in args.models:
        for optimizer in args.optimizers:
            name = f"{optimizer}, {model}"
            found[name] = compare(model, optimizer, args.device, args.steps)
            print(name, json.dumps(found[name]), flush=True)
    if args.out:
        args.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
