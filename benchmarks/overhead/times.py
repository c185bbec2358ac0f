"""Time of due steps over that of the gradients that they count, of products in a search, and of steps not due."""

import statistics
from collections.abc import Iterator
from typing import Any

import torch
from models import LSTM, Task, _flat, labelled_loss
from overhead.clock import clock_of, seconds, take_turns
from overhead.loops import DEFAULT, MANY_TENSORS, NETWORKS, NEVER, PATH, Loop
from overhead.table import Row
from tqdm import tqdm

from smoothdiag import budget, every, objective, vectors
from smoothdiag.measure.curvature import hvp, lanczos
from smoothdiag.measure.probe.schedule import Schedule

FRACTION = 0.05
GOALS = {"LSTM .1M of the demo": 1.1, "ResNet-20": 1.1, "GPT .8M, 1,024 tokens": 1.1}
WORDS = Task(
    lambda: _flat(LSTM()),
    labelled_loss,
    lambda device: (torch.randint(65, (4, 35)).to(device), torch.randint(65, (140,)).to(device)),
    lr=0.1,
)


def num_grads(loop: Loop) -> int:
    """Returns the gradients that the rows of the last due step count."""
    rows = list(loop.probe.trace)
    return sum(row["num_grads"] for row in rows if row["step"] == rows[-1]["step"])


def rows_over_gradients(device: torch.device, quick: bool) -> Iterator[Row]:
    """Measures rows and steps that are not due, on each network."""
    rounds = 5 if quick else 21
    for name, task in tqdm(NETWORKS.items(), "networks", leave=False):
        plain, idle = Loop(task, device), Loop(task, device, PATH, every(NEVER))
        due = {"path row": Loop(task, device, PATH), "default rows": Loop(task, device, DEFAULT)}
        counts: dict[str, list[int]] = {row: [] for row in due}

        def counted(row: str, loops: dict[str, Loop] = due, into: dict[str, list[int]] = counts) -> None:
            loops[row].step()
            into[row].append(num_grads(loops[row]))

        calls: dict[str, Any] = {"gradient": plain.gradient, "plain": plain.step, "idle": idle.step}
        calls |= {row: (lambda row=row: counted(row)) for row in due}
        table = take_turns(calls, rounds, device, warm_up=2)
        for row in due:
            spent = (table[row] - table["plain"]) / table["gradient"] / counts[row][-rounds:]
            yield Row.of(f"time of {row} over the gradients they count: {name}", 1, GOALS.get(name, 1.35), spent)
        if name in GOALS:
            extra = table["idle"] / table["plain"] - 1
            yield Row.of(f"extra time of a step that is not due, in steps: {name}", 0, 0.05, extra)


def many_tensors(device: torch.device, quick: bool) -> Iterator[Row]:
    """Measures a path row of 3,000 short tensors."""
    plain, due = Loop(MANY_TENSORS, device), Loop(MANY_TENSORS, device, PATH)
    table = take_turns({"plain": plain.step, "due": due.step}, 5 if quick else 21, device)
    yield Row.of("time of a due path row in plain steps: 3,000 tensors", 3, 4, table["due"] / table["plain"] - 1)


def products(device: torch.device, quick: bool) -> Iterator[Row]:
    """Measures a product within a search over one outside."""
    loop = Loop(WORDS, device)
    for backend in ("one_sided", "central", "retained"):
        ratios = [over_bare(loop, backend, seed) for seed in tqdm(range(3 if quick else 9), backend, leave=False)]
        yield Row.of(f"a product within Lanczos over a bare one, LSTM 2 x 200, 30 products: {backend}", 1, 1.3, ratios)


def over_bare(loop: Loop, backend: str, seed: int) -> float:
    """Returns the time of a search over that of as many products alone, which follow it."""
    clock = clock_of(loop.device)
    with hvp(objective(loop.model, loop.task.loss_fn, [loop.batch]), backend=backend) as product:
        start, found = vectors.mixed(product.gradient, seed=seed), []
        product(start)
        whole = seconds(lambda: found.append(lanczos(product, start, tol=1e-9, max_products=30)), loop.device, clock)
        return whole / seconds(lambda: [product(start) for _ in range(found[0].num_products)], loop.device, clock)


class Noted:
    """A schedule that wraps another and records the times that the other is told."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule, self.train, self.probe = schedule, 0.0, 0.0

    def __call__(self, step: int) -> bool:
        return self.schedule(step)

    @property
    def next(self) -> int:
        return self.schedule.next

    @next.setter
    def next(self, step: int) -> None:
        self.schedule.next = step

    def interval(self, train_seconds: float, steps: int, probe_seconds: float) -> int:
        self.train, self.probe = self.train + train_seconds, self.probe + probe_seconds
        return self.schedule.interval(train_seconds, steps, probe_seconds)


def shares(device: torch.device, quick: bool) -> Iterator[Row]:
    """Measures the share of time under ``budget``, up to and including the last measurement, where it is highest."""
    if quick:
        return
    for name in GOALS:
        noted = Noted(budget(FRACTION))
        loop = Loop(NETWORKS[name], device, DEFAULT, noted)
        due, other, steps = 0.0, list[float](), 0
        while loop.probe.steps < 1000 and steps < 5:
            is_due = noted(loop.probe.steps)
            spent = seconds(loop.step, device)
            if is_due:
                due, steps = due + spent, steps + 1
            else:
                other.append(spent)
        usual = statistics.mean(other)
        outside, inside = (due - steps * usual) / (due + sum(other)), noted.probe / (noted.probe + noted.train)
        yield Row(f"share of a run under `budget({FRACTION:g})`, from outside: {name}", FRACTION, FRACTION, outside)
        yield Row(f"the same as the probe counts: {name}", FRACTION, FRACTION, inside)
