"""What the doctor costs: steps with clip_grad_norm_ under watch, compared with the same steps without.

Plain and watched stretches of steps take turns in one process, in an order that rotates; every figure is a median over
rounds of ratios or differences within a round. Entering and leaving the watch counts.
"""

import argparse
from collections.abc import Callable
from contextlib import nullcontext

import torch
from models import TASKS
from overhead.clock import take_turns
from torch import nn

from smoothdiag.doctor import watch

STRETCH = 10
"""Number of steps from entering the watch to leaving it."""


def variants(model: nn.Module, loss: Callable[[], torch.Tensor]) -> dict[str, Callable[[], None]]:
    """Returns plain and watched stretches of steps of the same model."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def stretch(watched: bool) -> None:
        with watch(model, optimizer) if watched else nullcontext():
            for _ in range(STRETCH):
                optimizer.zero_grad()
                loss().backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()

    return {"plain": lambda: stretch(False), "watched": lambda: stretch(True)}


def tiny(count: int) -> tuple[nn.Module, Callable[[], torch.Tensor]]:
    """Returns a model of many parameters with one entry each, whose steps consist almost only of calls."""
    model = nn.ParameterList(nn.Parameter(torch.ones(1)) for _ in range(count))
    return model, lambda: torch.cat(list(model)).sum()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=21)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    device = torch.device("cpu")
    print(f"torch {torch.__version__}, cpu, 1 thread, float32")
    for name, task in TASKS.items():
        model, batch = task.build().to(device), task.batch(device)
        times = take_turns(variants(model, lambda m=model, b=batch, t=task: t.loss_fn(m, b)), args.rounds, device, 1)
        count = len(list(model.parameters()))
        extra = times["watched"] / times["plain"] - 1
        low, middle, high = extra.quantile([0.25, 0.5, 0.75])
        print(f"{name}, {count} parameters: a step takes {middle:+.2%} [{low:+.2%}, {high:+.2%}]")
    for count in (10, 100, 1000):
        times = take_turns(variants(*tiny(count)), args.rounds, device, 1)
        extra = (times["watched"] - times["plain"]) / STRETCH * 1e6
        low, middle, high = extra.quantile([0.25, 0.5, 0.75])
        print(f"{count} parameters of one entry: a step takes {middle:.0f} us longer [{low:.0f}, {high:.0f}]")


if __name__ == "__main__":
    main()
