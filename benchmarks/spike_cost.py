"""What SpikeGuard costs at a step without a spike: time over a plain step.

A plain step is a forward and a backward pass and a step of the optimizer. Where the loop clips, with a norm that it
shows the guard, so does the plain one. The runs with a guard and without take turns
in one process. Every ratio is a median over rounds of ratios within a round.
"""

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch
from autoclip_cost import MODELS, OPTIMIZERS
from overhead.clock import take_turns

from smoothdiag import SPAM, Probe, SpikeGuard

SHOWN = "gradient norm of a loop that clips, and loss"

GUARDS: dict[str, dict[str, Any]] = {
    "gradient norm and loss": {},
    SHOWN: {},
    "and update norm": {"update_norm": True},
    "clip": {"action": "clip"},
    "skip": {"action": "skip"},
    "and modules": {"modules": True},
    "SPAM, clip": {"rule": SPAM(), "action": "clip"},
    "keep batches": {"keep": "batches"},
    "keep parameters": {"keep": "parameters"},
}


class Run:
    """A model in training, with a guard or without."""

    def __init__(
        self, model: str, optimizer: str, device: torch.device, guard: dict[str, Any] | None, clips: bool
    ) -> None:
        torch.manual_seed(0)
        build, self.loss_fn, batch = MODELS[model]
        self.model, self.batch = build().to(device), batch().to(device)
        self.optimizer = OPTIMIZERS[optimizer](self.model.named_parameters())
        self.probe, self.clips = None, clips
        if guard is not None and "keep" in guard:
            self.probe = Probe(self.model, self.optimizer, self.loss_fn, estimators=(), schedule=lambda step: False)
        self.guard = None if guard is None else SpikeGuard(self.optimizer, self.probe, **guard)

    def step(self) -> None:
        self.optimizer.zero_grad()
        if self.probe is not None:
            self.probe.observe(self.batch)
        loss = self.loss_fn(self.model, self.batch)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0) if self.clips else None
        if self.guard is not None:
            self.guard.observe(loss, grad_norm=norm)
        self.optimizer.step()


def costs(model: str, optimizer: str, device: torch.device, rounds: int) -> dict[str, float]:
    """Measures times of guarded steps over those of plain ones."""
    guards = {name: guard for name, guard in GUARDS.items() if "rule" not in guard or "SGD" not in optimizer}
    kinds: dict[str, dict[str, Any] | None] = {"plain": None, "clips": None, **guards}
    runs = {name: Run(model, optimizer, device, guard, name in ("clips", SHOWN)) for name, guard in kinds.items()}
    table = take_turns({name: run.step for name, run in runs.items()}, rounds, device, warm_up=5)
    assert not any(run.guard.events for run in runs.values() if run.guard is not None)
    found = {"plain step [ms]": 1e3 * float(table["plain"].median())}
    beside = {name: table["clips" if name == SHOWN else "plain"] for name in guards}
    return found | {name: float((table[name] / beside[name]).median()) for name in guards}


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
