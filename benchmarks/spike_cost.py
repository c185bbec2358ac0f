"""What SpikeGuard costs at every step: time over a plain step.

A plain step is a forward and a backward pass and a step of the optimizer. Runs with and without the guard take turns in
one process. Every ratio is a median over rounds of ratios within a round. Nothing spikes.
"""

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch
from autoclip_cost import MODELS, OPTIMIZERS
from overhead.clock import take_turns

from smoothdiag import Probe, SpikeGuard

GUARDS: dict[str, dict[str, Any]] = {
    "norm and loss": {},
    "norm, loss and update": {"update_norm": True},
    "skip": {"action": "skip"},
    "clip": {"action": "clip"},
}

GOALS = {"GPT 10M": {"norm and loss": 1.05, "norm, loss and update": 1.2}, "3,000 tensors": {"norm and loss": 1.15}}


class Run:
    """A model in training, under a guard or not, with a probe for explanations or not."""

    def __init__(
        self,
        model: str,
        optimizer: str,
        device: torch.device,
        guard: dict[str, Any] | None = None,
        *,
        probe: bool = False,
    ) -> None:
        torch.manual_seed(0)
        build, self.loss_fn, batch = MODELS[model]
        self.model, self.batch = build().to(device), batch().to(device)
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.probe = Probe(self.model, self.optimizer, self.loss_fn, estimators=()) if probe else None
        attached = () if self.probe is None else (self.probe,)
        self.guard = None if guard is None else SpikeGuard(self.optimizer, *attached, **guard)

    def step(self) -> None:
        self.optimizer.zero_grad()
        if self.probe:
            self.probe.observe(self.batch)
        loss = self.loss_fn(self.model, self.batch)
        loss.backward()
        if self.guard:
            self.guard.observe(loss)
        self.optimizer.step()


def costs(model: str, optimizer: str, device: torch.device, rounds: int, *, probe: bool) -> dict[str, float | str]:
    """Measures times over those of a plain step."""
    runs = {"plain": Run(model, optimizer, device)}
    runs |= {name: Run(model, optimizer, device, GUARDS[name], probe=probe) for name in GUARDS}
    table = take_turns({name: run.step for name, run in runs.items()}, rounds, device, warm_up=5)
    found: dict[str, float | str] = {"plain step [ms]": 1e3 * float(table["plain"].median())}
    for name in GUARDS:
        ratio = table[name] / table["plain"]
        low, middle, high = (float(ratio.quantile(q)) for q in (0.25, 0.5, 0.75))
        found |= {name: middle, f"{name}, quartiles": f"{low:.3f} to {high:.3f}"}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--optimizers", nargs="*", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--probe", action="store_true", help="with a probe beside the guard, as explanations need it")
    parser.add_argument("--out", type=Path, help="writes the figures as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = {}
    for model in args.models:
        for optimizer in args.optimizers:
            name = f"{optimizer}, {model}"
            found[name] = costs(model, optimizer, args.device, args.rounds, probe=args.probe)
            print(name)
            for key, value in found[name].items():
                goal = f" (goal {GOALS[model][key]})" if key in GOALS[model] else ""
                print(f"  {key}: {value if isinstance(value, str) else f'{value:.3g}'}{goal}", flush=True)
    if args.out:
        environment = {"torch": torch.__version__, "device": str(args.device), "threads": args.threads}
        environment |= {"rounds": args.rounds, "machine": platform.machine(), "probe": args.probe}
        args.out.write_text(json.dumps({"environment": environment, "found": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
