"""What AutoClip costs at a step that is not measured: time over a plain step, and memory in copies of the parameters.

A plain step is a forward and a backward pass and a step of the optimizer. The runs with AutoClip and without it take
turns in one process. Every ratio is a median over rounds of ratios within a round. The longest step is so long that
nothing is shortened, or, in the rows "shortened", so short that every step is.
"""

import argparse
import json
import math
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from models import GPT, VOCABULARY
from overhead.clock import seconds, take_turns
from overhead.counting import peak
from torch import Tensor, nn

from smoothdiag import AutoClip, Probe, StepRule
from smoothdiag.demo import next_character_loss

TOKENS = 32
NUM_TENSORS = 3000
LONG, SHORT = (StepRule(multiple=None, relative=share) for share in (100.0, 1e-6))


class Many(nn.Module):
    """A model of many small tensors, whose loss costs little."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ParameterList(nn.Parameter(torch.randn(32)) for _ in range(NUM_TENSORS))

    def forward(self, x: Tensor) -> Tensor:
        return (torch.stack(list(self.parts)) * x).square().mean()


def gpt() -> nn.Module:
    return GPT(layers=3, width=512, heads=8, length=TOKENS)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Tensor], Tensor], Callable[[], Tensor]]] = {
    "GPT 10M": (gpt, next_character_loss, lambda: torch.randint(VOCABULARY, (1, TOKENS + 1))),
    "3,000 tensors": (Many, lambda model, x: model(x), lambda: torch.randn(32)),
}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-4),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-4),
}


class Run:
    """A model in training, with AutoClip or without."""

    def __init__(self, model: str, optimizer: str, device: torch.device, rule: StepRule | None = None) -> None:
        torch.manual_seed(0)
        build, self.loss_fn, batch = MODELS[model]
        self.model, self.batch = build().to(device), batch().to(device)
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.size = sum(p.numel() * p.element_size() for p in self.model.parameters())
        self.probe = None
        if rule:
            self.probe = Probe(self.model, self.optimizer, self.loss_fn, estimators=())
            self.clipper = AutoClip(self.optimizer, self.probe, rule=rule)

    def backward(self) -> None:
        self.optimizer.zero_grad()
        if self.probe:
            self.probe.observe(self.batch)
        self.loss_fn(self.model, self.batch).backward()

    def step(self) -> None:
        self.backward()
        self.optimizer.step()


def costs(model: str, optimizer: str, device: torch.device, rounds: int) -> dict[str, float]:
    """Measures times over those of a plain step, and the memory of a step of the optimizer in copies of x."""
    runs = {"plain": Run(model, optimizer, device)}
    runs |= {name: Run(model, optimizer, device, rule) for name, rule in (("kept", LONG), ("shortened", SHORT))}
    for run in runs.values():
        run.step()
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    update = []
    for _ in range(5):
        runs["plain"].backward()
        update.append(seconds(runs["plain"].optimizer.step, device, clock))
    table = take_turns({name: run.step for name, run in runs.items()}, rounds, device, warm_up=5)
    peaks = {}
    for name, run in runs.items():
        run.backward()
        found = peak(run.optimizer.step, device)
        peaks[name] = 0.0 if math.isnan(found) else found  # SGD makes no tensors
    found = {
        "plain step [ms]": 1e3 * float(table["plain"].median()),
        "optimizer alone [plain steps]": sorted(update)[2] / float(table["plain"].median()),
    }
    for name in ("kept", "shortened"):
        found[f"{name}: time [plain steps]"] = float((table[name] / table["plain"]).median())
        found[f"{name}: memory [copies of x]"] = (peaks[name] - peaks["plain"]) / runs["plain"].size
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--optimizers", nargs="*", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--out", type=Path, help="writes the figures as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = {}
    for model in args.models:
        for optimizer in args.optimizers:
            name = f"{optimizer}, {model}"
            found[name] = costs(model, optimizer, args.device, args.rounds)
            print(name, *(f"  {key}: {value:.3g}" for key, value in found[name].items()), sep="\n", flush=True)
    if args.out:
        environment = {"torch": torch.__version__, "device": str(args.device), "threads": args.threads}
        environment |= {"rounds": args.rounds, "machine": platform.machine()}
        args.out.write_text(json.dumps({"environment": environment, "found": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
