"""Which limit of stability applies: where curvature settles with and without momentum, for full and for small batches.

    OMP_NUM_THREADS=1 python benchmarks/stability.py --out benchmarks/stability.json    # a quarter of an hour
    python benchmarks/stability.py --quick --out quick.json                             # two minutes, one seed
    python benchmarks/stability.py --from benchmarks/stability.json --page docs/curvature.md   # the table alone

Every run trains the same small tanh network on scikit-learn's digits. In the last two fifths of a run it measures,
again and again, the sharpness on all data and, on the batch of the step, the batch sharpness. The batch sharpness of a
run is sum g'Hg / sum g'g. The mean curvature h is the same quotient with the Hessian of all data. Needs scikit-learn.

Source: Andreyev et al. 2026 (arXiv 2604.14108) for the question and the two levels.
"""

import argparse
import json
import math
import platform
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import smoothdiag as sd

WIDTH = 32
LATE = 0.6
"""Share of a run before the first measurement."""
NUM_MEASURED = 200
BEGIN, END = "<!-- begin: table by stability.py -->", "<!-- end: table by stability.py -->"
Batch = tuple[Tensor, Tensor]
LossFn = Callable[[nn.Module, Batch], Tensor]
SGD, Adam = torch.optim.SGD, torch.optim.Adam


@dataclass(frozen=True)
class Setting:
    """An optimizer, and the size of its batches; None is the whole data set."""

    name: str
    make: Callable[[Iterable[Tensor]], torch.optim.Optimizer]
    batch: int | None
    momentum: float
    num_steps: int = 20_000


SETTINGS = (
    Setting("SGD, lr 0.5", lambda p: SGD(p, 0.5), None, 0.0, 5000),
    Setting("SGD, momentum 0.9, lr 0.5", lambda p: SGD(p, 0.5, momentum=0.9), None, 0.9, 5000),
    Setting("SGD, lr 0.05", lambda p: SGD(p, 0.05), 16, 0.0),
    Setting("SGD, lr 0.25", lambda p: SGD(p, 0.25), 16, 0.0),
    Setting("SGD, lr 0.5", lambda p: SGD(p, 0.5), 16, 0.0),
    Setting("SGD, lr 1", lambda p: SGD(p, 1.0), 16, 0.0),
    Setting("SGD, momentum 0.5, lr 0.25", lambda p: SGD(p, 0.25, momentum=0.5), 16, 0.5),
    Setting("SGD, momentum 0.9, lr 0.005", lambda p: SGD(p, 0.005, momentum=0.9), 16, 0.9),
    Setting("SGD, momentum 0.9, lr 0.05", lambda p: SGD(p, 0.05, momentum=0.9), 4, 0.9),
    Setting("SGD, momentum 0.9, lr 0.05", lambda p: SGD(p, 0.05, momentum=0.9), 16, 0.9),
    Setting("SGD, momentum 0.9, lr 0.05", lambda p: SGD(p, 0.05, momentum=0.9), 64, 0.9),
    Setting("SGD, momentum 0.9, lr 0.05", lambda p: SGD(p, 0.05, momentum=0.9), 256, 0.9),
    Setting("SGD, momentum 0.9, lr 0.1", lambda p: SGD(p, 0.1, momentum=0.9), 4, 0.9),
    Setting("SGD, momentum 0.9, lr 0.1", lambda p: SGD(p, 0.1, momentum=0.9), 16, 0.9),
    Setting("SGD, momentum 0.9, lr 0.15", lambda p: SGD(p, 0.15, momentum=0.9), 16, 0.9),
    Setting("SGD, Nesterov 0.9, lr 0.05", lambda p: SGD(p, 0.05, momentum=0.9, nesterov=True), 16, 0.9),
    Setting("Adam, lr 0.01", lambda p: Adam(p, 0.01), 16, 0.9),
    Setting("Adam, lr 0.003", lambda p: Adam(p, 0.003), 16, 0.9),
)


def squared_error(model: nn.Module, batch: Batch) -> Tensor:
    """Returns half the squared distance to the one-hot target, mean over the batch."""
    return 0.5 * F.mse_loss(model(batch[0]), batch[1], reduction="sum") / len(batch[0])


class MeanCurvature:
    """Curvature of the loss on all data along the gradient of the step's batch, in the optimizer's norm if it has P."""

    of_step: ClassVar[bool] = True

    def __init__(self, model: nn.Module, data: Batch, loss_fn: LossFn = squared_error) -> None:
        self._loss = sd.objective(model, loss_fn, [data])

    def __call__(self, step: sd.Step) -> sd.Estimate:
        """Returns the estimate."""
        g = [x.clone() for x in step.at_start.gradient]
        u = g if step.preconditioner is None else [x / p for x, p in zip(g, step.preconditioner, strict=True)]
        with sd.hvp(self._loss, step.start, backend="retained") as hessian:
            product = hessian(u)
        square, curved = (sum(float((a * b).sum()) for a, b in zip(u, v, strict=True)) for v in (g, product))
        return sd.Estimate("mean_curvature", curved / square, math.sqrt(square), math.nan, step.at_start.loss)


def run(setting: Setting, seed: int, num_steps: int) -> dict[str, Any]:
    """Trains once and returns one row: levels of curvature, both limits, and the loss."""
    data = _digits()
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 10))
    optimizer, drawn = setting.make(model.parameters()), torch.Generator().manual_seed(seed)
    first, every = int(LATE * num_steps), max(1, int((1 - LATE) * num_steps) // NUM_MEASURED)

    def late(spacing: int) -> Callable[[int], bool]:
        return lambda step: step >= first and (step - first) % spacing == 0

    along = [sd.DirectionalCurvature(), MeanCurvature(model, data)]
    of_batch = sd.Probe(model, optimizer, squared_error, estimators=along, data="step", schedule=late(every))
    of_data = sd.Probe(
        model, optimizer, squared_error, estimators=[sd.Sharpness()], schedule=late(8 * every), probe_batches=[data]
    )
    with of_batch, of_data:
        for _ in range(num_steps):
            chosen = (
                slice(None) if setting.batch is None else torch.randint(len(data[0]), (setting.batch,), generator=drawn)
            )
            batch = data[0][chosen], data[1][chosen]
            of_batch.observe(batch)
            optimizer.zero_grad()
            squared_error(model, batch).backward()
            optimizer.step()
    rows, sharpness = of_batch.trace.to_frame(), of_data.trace.to_frame()
    suffix = "_preconditioned" if isinstance(optimizer, Adam) else ""
    found = rows[rows["estimator"] == "batch_sharpness" + suffix]
    mean = rows[rows["estimator"] == "mean_curvature"]
    return {
        "setting": setting.name,
        "batch": setting.batch,
        "momentum": setting.momentum,
        "seed": seed,
        "num_steps": num_steps,
        "lr": float(found["lr"].iloc[0]),
        "full_limit": float(found["stability_limit"].iloc[0]),
        "small_limit": float(found["stability_limit_small_batch"].iloc[0]),
        "batch_sharpness": weighted(found),
        "batch_sharpness_halves": [weighted(half) for half in (found[: len(found) // 2], found[len(found) // 2 :])],
        "mean_curvature": weighted(mean),
        "sharpness": float(sharpness[sharpness["estimator"] == "sharpness" + suffix]["smoothness"].median()),
        "loss": float(found["loss"].mean()),
    }


def _digits() -> Batch:
    digits = load_digits()
    inputs = torch.tensor(digits.data / 16, dtype=torch.float32)
    return inputs - inputs.mean(0), F.one_hot(torch.tensor(digits.target)).float()


def weighted(rows: pd.DataFrame) -> float:
    """Returns sum g'Hg / sum g'g of rows with quotients and gradient norms."""
    weight = rows["grad_norm"].to_numpy() ** 2
    return float((rows["smoothness"].to_numpy() * weight).sum() / weight.sum())


def table(runs: list[dict[str, Any]]) -> str:
    """Returns the table: each level is the mean over seeds, with the range over seeds."""
    lines = [
        "| optimizer | batch | full-batch limit | small-batch limit | sharpness / full | batch sharpness / small |"
        " batch sharpness / line | loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    levels = ["batch_sharpness", "mean_curvature", "sharpness", "loss"]
    frame = pd.DataFrame(runs).astype(dict.fromkeys(levels, float))
    for _, of_setting in frame.groupby(["setting", "batch"], sort=False, dropna=False):
        row = of_setting.iloc[0]
        full, small, b = row["full_limit"], row["small_limit"], row["momentum"]
        # The line between the limits was derived for heavy ball; averages have the rate (1 - b) lr there.
        line = small + 2 * b / (1 + b) * of_setting["mean_curvature"]
        is_known = "Nesterov" not in row["setting"]
        cells = [
            row["setting"],
            "all" if pd.isna(row["batch"]) else f"{row['batch']:.0f}",
            *(f"{limit:.3g}" for limit in (full, small)),
            _cell(of_setting["sharpness"] / full),
            _cell(of_setting["batch_sharpness"] / small),
            _cell(of_setting["batch_sharpness"] / line) if is_known else "",
            "" if of_setting["loss"].isna().any() else f"{of_setting['loss'].mean():.2g}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(values: pd.Series) -> str:
    if values.isna().any():
        return f"{values.isna().sum()} of {len(values)} diverged"
    low, middle, high = (f"{v:.2g}" for v in (values.min(), values.mean(), values.max()))
    return middle if len(values) == 1 else f"{middle} ({low} to {high})"


def write_table(page: Path, text: str) -> None:
    """Puts the table between its marks on a page."""
    before, rest = page.read_text().split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}")


def _runs(settings: Iterable[Setting], seeds: int, steps: float) -> Iterator[dict[str, Any]]:
    for setting, seed in tqdm([(setting, seed) for setting in settings for seed in range(seeds)]):
        yield run(setting, seed, int(setting.num_steps * steps))


def main() -> None:
    """Runs, writes the raw results and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="where the raw results go, as JSON")
    parser.add_argument("--from", type=Path, dest="known", help="raw results to make the table from, without running")
    parser.add_argument("--page", type=Path, help="page to put the table into")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one seed and runs of a quarter of the length")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.known:
        runs = json.loads(args.known.read_text())["runs"]
    else:
        runs = list(_runs(SETTINGS, 1 if args.quick else args.seeds, 0.25 if args.quick else 1.0))
    if args.out:
        environment = {"torch": torch.__version__, "python": platform.python_version(), "threads": 1}
        # JSON has no NaN: what diverged is null.
        known = {"environment": environment, "runs": runs}
        args.out.write_text(json.dumps(known, indent=1).replace("NaN", "null") + "\n")
    print(table(runs))
    if args.page:
        write_table(args.page, table(runs))


if __name__ == "__main__":
    main()
