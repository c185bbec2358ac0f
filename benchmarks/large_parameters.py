"""What a measurement costs if parameters outweigh activations, as in fine-tuning: time, and copies of x.

    OMP_NUM_THREADS=1 python benchmarks/large_parameters.py

Plain and measured steps take turns. A row needs the gradients that it counts; ratios are medians over the rounds.
Memory comes from the profiler's events on a CPU. The script needs only the library, and a minute.
"""

import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

import smoothdiag as sd
from smoothdiag import vectors
from smoothdiag.measure.curvature import hvp, lanczos

WIDTH, DEPTH, EXAMPLES, ROUNDS = 512, 12, 64, 15


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Returns the loss of a batch."""
    return F.cross_entropy(model(batch[0]), batch[1])


class Training:
    """A training loop on one batch, measured at every step or not at all."""

    def __init__(self, estimators: Sequence[Any]) -> None:
        torch.manual_seed(0)
        layers = [layer for _ in range(DEPTH) for layer in (nn.Linear(WIDTH, WIDTH), nn.Tanh())]
        self.model = nn.Sequential(*layers, nn.Linear(WIDTH, 10))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)
        self.batch = torch.randn(EXAMPLES, WIDTH), torch.randint(10, (EXAMPLES,))
        self.probe = None
        if estimators:
            self.probe = sd.Probe(self.model, self.optimizer, loss_fn, estimators=estimators, schedule=sd.every(1))

    def gradient(self) -> None:
        """Computes a gradient and takes no step."""
        self.optimizer.zero_grad()
        loss_fn(self.model, self.batch).backward()

    def step(self) -> None:
        """Takes a step."""
        if self.probe is not None:
            self.probe.observe(self.batch)
        self.gradient()
        self.optimizer.step()


def seconds(action: Callable[[], object]) -> float:
    """Returns how long ``action`` takes."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def peak(action: Callable[[], object]) -> int:
    """Returns the largest number of bytes held during ``action``, beyond the bytes held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        action()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    held = most = 0
    for _, size in sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]"):
        held += size
        most = max(most, held)
    return most


def main() -> None:
    """Measures and prints."""
    warnings.simplefilter("ignore", sd.SmoothdiagWarning)
    kinds = {"path": [sd.PathSmoothness()], "local": [sd.LocalSmoothness()]}
    plain, measured = Training(()), {name: Training(estimators) for name, estimators in kinds.items()}
    for training in (plain, *measured.values()):
        training.step()
    ratios: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in tqdm(range(ROUNDS), desc="steps"):
        gradient, step = seconds(plain.gradient), seconds(plain.step)
        for name, training in measured.items():
            took = seconds(training.step) - step
            assert training.probe is not None
            ratios[name].append(took / gradient / training.probe.trace[-1]["num_grads"])
    size = sum(p.nbytes for p in plain.model.parameters())
    base = peak(plain.step)
    for name, training in measured.items():
        print(f"{name} row: time over that of its gradients        {statistics.median(ratios[name]):6.2f}")
        print(f"{name} row: peak memory beyond a plain step [x]     {(peak(training.step) - base) / size:6.2f}")
    with hvp(sd.objective(plain.model, loss_fn, [plain.batch]), backend="central") as product:
        start = vectors.mixed(product.gradient, seed=0)
        product(start)
        held, made = [], []
        for most in (6, 12):
            before = product.num_hvps
            held.append(peak(lambda most=most: lanczos(product, start, tol=1e-9, max_products=most)) / size)
            made.append(product.num_hvps - before)
    # A search may end before the limit, so the products that were made count.
    print(f"Lanczos: vectors kept for each product          {(held[1] - held[0]) / (made[1] - made[0]):6.2f}")
    print(f"Lanczos: vectors at the peak of {made[0]:2} and {made[1]:2} products {held[0]:6.1f} and {held[1]:.1f}")


if __name__ == "__main__":
    main()
