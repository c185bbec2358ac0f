"""Measures again where curvature settles: full and small batches, with and without momentum, and Muon in its own norm.

    SMOOTHDIAG_DATA=... python benchmarks/reproduce/edge.py             # nine minutes of a CPU
    SMOOTHDIAG_DATA=... python benchmarks/reproduce/edge.py --report    # tables and figure of docs/reproduce/edge.md

A perceptron on images of CIFAR-10 and a transformer on Tiny Shakespeare take the place of the network of
benchmarks/stability.py, whose measurements are used here. A quadratic, whose curvature cannot change, is the control.

Source: Cohen et al. 2021 (ICLR, arXiv 2103.00065) for full batches; Andreyev and Beneventano 2024 (arXiv 2412.20553)
for small ones; Andreyev et al. 2026 (arXiv 2604.14108) for momentum; Islamov et al. 2026 (arXiv 2603.05002) for other
norms.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from edgenets import BOWL, NETS, Batch, Net
from edgetables import draw, tables
from experiment import Experiment, Place, Size, main
from ownnorm import OwnCurvature
from stability import MeanCurvature, weighted
from torch import Tensor, nn

import smoothdiag as sd

LATE = 0.6
"""Share of a run before the window whose level counts."""
WINDOWS = 25
"""Windows of a run of which each gives a point of its curves."""
ALONG = 8
"""Measurements along the gradient in a window; the sharpness is measured once."""
SEEDS = {"MLP": 3, "GPT": 2, "quadratic": 2}

Parameters = Sequence[Tensor]
MakeOptimizer = Callable[[Parameters, float], torch.optim.Optimizer]

SGD: MakeOptimizer = lambda p, lr: torch.optim.SGD(p, lr)  # noqa: E731
MOMENTUM: MakeOptimizer = lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9)  # noqa: E731


def spectral(p: Parameters, lr: float) -> torch.optim.Optimizer:
    """Steepest descent in the spectral norms of the matrices, as long as the dual norm says."""
    return sd.GGNC(p, lr, threshold=math.inf, geometry=sd.geometry.Spectral(exact=True), momentum=0.0)


def muon(p: Parameters, lr: float) -> torch.optim.Optimizer:
    return torch.optim.Muon(p, lr, weight_decay=0.0, momentum=0.0, nesterov=False)


def muon_momentum(p: Parameters, lr: float) -> torch.optim.Optimizer:
    return torch.optim.Muon(p, lr, weight_decay=0.0)


OPTIMIZERS: Mapping[str, tuple[MakeOptimizer, float]] = {
    "SGD": (SGD, 0.0),
    "momentum 0.9": (MOMENTUM, 0.9),
    "spectral descent": (spectral, 0.0),
    "Muon, no momentum": (muon, 0.0),
    "Muon, 0.95": (muon_momentum, 0.95),
}
"""How to make each, and its momentum."""
OWN = ("spectral descent", "Muon, no momentum", "Muon, 0.95")
"""Those whose curvature is measured in a norm of their own."""


@dataclass(frozen=True)
class Run:
    """A run: the net's name, its optimizer and rate, the size of its batches (None: all), its length and its seed."""

    net: str
    optimizer: str
    lr: float
    batch: int | None
    num_steps: int
    seed: int = 0

    @property
    def key(self) -> str:
        return f"{self.net}/{self.optimizer}/{self.lr:g}/{self.batch or 'all'}/{self.seed}"


RUNS = (
    Run("MLP", "SGD", 0.1, None, 3000),
    Run("MLP", "momentum 0.9", 0.1, None, 3000),
    Run("MLP", "SGD", 0.025, None, 12_000),
    Run("MLP", "SGD", 0.2, 8, 30_000),
    Run("MLP", "momentum 0.9", 0.02, 8, 30_000),
    Run("MLP", "momentum 0.9", 0.02, 125, 5000),
    Run("MLP", "SGD", 0.02, 8, 10_000),
    Run("GPT", "SGD", 0.1, None, 1200),
    Run("GPT", "momentum 0.9", 0.1, None, 1200),
    Run("GPT", "SGD", 0.025, None, 1200),
    Run("GPT", "SGD", 0.1, 4, 3000),
    Run("GPT", "momentum 0.9", 0.01, 4, 3000),
    Run("GPT", "SGD", 0.01, 4, 3000),
    Run("MLP", "spectral descent", 0.05, None, 600),
    Run("MLP", "Muon, no momentum", 0.003, None, 1000),
    Run("MLP", "Muon, 0.95", 0.003, None, 1000),
    Run("MLP", "Muon, no momentum", 0.0003, None, 1000),
    Run("GPT", "spectral descent", 0.02, None, 300),
    Run("GPT", "Muon, no momentum", 0.003, None, 600),
    Run("GPT", "Muon, 0.95", 0.003, None, 600),
    Run("GPT", "Muon, no momentum", 0.0003, None, 600),
    Run("quadratic", "SGD", 0.05, None, 500),
    Run("quadratic", "spectral descent", 0.05, None, 500),
    Run("quadratic", "Muon, no momentum", 0.02, None, 1000),
    Run("quadratic", "Muon, 0.95", 0.02, None, 1000),
)
"""The runs of a seed. At a fourth or a tenth of a rate, nothing holds the curvature of a net: these are controls."""


def cases(size: Size) -> Mapping[str, Run]:
    longer = {"quick": 1, "full": 10}[size]
    found = [
        Run(run.net, run.optimizer, run.lr, run.batch, longer * run.num_steps, seed)
        for run in RUNS
        for seed in range(SEEDS[run.net])
    ]
    return {run.key: run for run in found}


def run(case: Run, place: Place) -> Mapping[str, Any]:
    """Trains once and returns levels of curvature in units of the limits, and the curves of the figure."""
    net = BOWL if case.net == "quadratic" else NETS[place.size][case.net]
    torch.manual_seed(case.seed)
    model = net.model().to(place.device)
    data = net.data()[0].to(place.device), net.data()[1].to(place.device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    make, momentum = OPTIMIZERS[case.optimizer]
    optimizer, num_steps = make(parameters, case.lr), place.steps(case.num_steps)
    width = max(1, num_steps // WINDOWS)
    train = train_own if case.optimizer in OWN else train_plain
    frames = train(model, optimizer, net, data, case, num_steps, width)
    for name, frame in frames.items():
        frame["grows"] = case.optimizer == "spectral descent"
        frame["window"] = frame["step"] // width
        if not place.dry:
            frame.to_csv(place.traces / f"{case.key.replace('/', '_')}_{name}.csv", index=False)
    levels = own_levels if case.optimizer in OWN else plain_levels
    return {
        "net": case.net,
        "optimizer": case.optimizer,
        "momentum": momentum,
        "lr": case.lr,
        "batch": case.batch,
        "seed": case.seed,
        "num_steps": num_steps,
        "diverged": not math.isfinite(float(net.loss_fn(model, data).detach())),
        **levels(frames, case.lr, num_steps),
    }


def batches(data: Batch, case: Run, num_steps: int) -> Iterator[Batch]:
    """Yields the batches of a run: all examples, or some that are drawn anew, with replacement."""
    drawn = torch.Generator().manual_seed(case.seed)
    for _ in range(num_steps):
        if case.batch is None:
            yield data
        else:
            chosen = torch.randint(len(data[0]), (case.batch,), generator=drawn).to(data[0].device)
            yield data[0][chosen], data[1][chosen]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, net: Net, batch: Batch) -> None:
    optimizer.zero_grad()
    net.loss_fn(model, batch).backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def train_plain(
    model: nn.Module, optimizer: torch.optim.Optimizer, net: Net, data: Batch, case: Run, num_steps: int, width: int
) -> dict[str, pd.DataFrame]:
    """Trains, and measures the curvature of each step's batch along its gradient, and the sharpness on all data."""
    along: list[sd.Estimator] = [
        sd.DirectionalCurvature(),
        *([MeanCurvature(model, data, net.loss_fn)] if case.batch else []),
    ]
    often = sd.every(max(1, width // ALONG))
    of_batch = sd.Probe(model, optimizer, net.loss_fn, estimators=along, data="step", schedule=often)
    of_data = sd.Probe(
        model, optimizer, net.loss_fn, estimators=[sd.Sharpness()], schedule=sd.every(width), probe_batches=[data]
    )
    with of_batch, of_data:
        for batch in batches(data, case, num_steps):
            of_batch.observe(batch)
            step(model, optimizer, net, batch)
    return {"batch": of_batch.trace.to_frame(), "data": of_data.trace.to_frame()}


def train_own(
    model: nn.Module, optimizer: torch.optim.Optimizer, net: Net, data: Batch, case: Run, num_steps: int, width: int
) -> dict[str, pd.DataFrame]:
    """Trains, and measures curvature in the optimizer's own norm on all data."""
    estimators: list[sd.Estimator] = [OwnCurvature(), sd.CriticalStep()]
    with sd.Probe(
        model, optimizer, net.loss_fn, estimators=estimators, schedule=sd.every(width), probe_batches=[data]
    ) as probe:
        for batch in batches(data, case, num_steps):
            step(model, optimizer, net, batch)
    return {"data": probe.trace.to_frame()}


def plain_levels(frames: Mapping[str, pd.DataFrame], lr: float, num_steps: int) -> Mapping[str, Any]:
    """Returns levels in the late window of a run [1/lr], and curves over all windows."""
    of_batch, of_data = frames["batch"], frames["data"]
    along = of_batch[of_batch["estimator"] == "batch_sharpness"]
    mean = of_batch[of_batch["estimator"] == "mean_curvature"]
    late = along["step"] >= LATE * num_steps
    ends = of_data["step"] >= LATE * num_steps
    half = len(along[late]) // 2
    curve = pd.Series([weighted(part) * lr for _, part in along.groupby("window")])
    return {
        "full_limit": float(along["stability_limit"].iloc[0]) * lr,
        "small_limit": float(along["stability_limit_small_batch"].iloc[0]) * lr,
        "sharpness": float(of_data["smoothness"][ends].median()) * lr,
        "highest": float(of_data["smoothness"].rolling(3).median().max()) * lr,
        "batch_sharpness": weighted(along[late]) * lr,
        "batch_highest": float(curve.rolling(3).median().max()),
        "unweighted": float(along[late]["smoothness"].mean()) * lr,
        "halves": [weighted(part) * lr for part in (along[late][:half], along[late][half:])],
        "mean_curvature": weighted(mean[mean["step"] >= LATE * num_steps]) * lr if len(mean) else math.nan,
        "loss": float(along[late]["loss"].mean()),
        "steps": of_data["step"].tolist(),
        "curve": rounded(of_data["smoothness"] * lr),
        "batch_curve": rounded(curve),
    }


def own_levels(frames: Mapping[str, pd.DataFrame], lr: float, num_steps: int) -> Mapping[str, Any]:
    """Returns what a step gains to second order over what it gains to first order, late in a run, and curves of it.

    Along the steepest direction s a step of the length lr t gains lr t ||g||_* - (lr t)^2 <s, H s> / 2; t is the dual
    norm for spectral descent, whose steps grow with it, and 1 for Muon. A level of 1 is where the loss stops falling.
    ``largest`` has S in place of <s, H s>, and ``update`` the step that was taken.
    """
    rows = frames["data"]
    own = rows[rows["estimator"] == "own"].reset_index(drop=True)
    critical = rows[rows["estimator"] == "critical_step"].reset_index(drop=True)
    dual = own["grad_norm"]
    length = lr * (dual if own["grows"].iloc[0] else dual * 0 + 1)
    first = {"along": length * dual, "largest": length * dual, "update": -own["slope"]}
    second = {
        "along": length**2 * own["smoothness"] / 2,
        "largest": length**2 * own["largest"] / 2,
        "update": own["update"] / 2,
    }
    late, begun = own["step"] >= LATE * num_steps, own["window"].between(1, 3)
    ratios = {name: second[name] / first[name] for name in first}
    return {
        **{name: float(second[name][late].sum() / first[name][late].sum()) for name in first},
        "highest": float(ratios["largest"].rolling(3).median().max()),
        "critical": float((1 / critical["critical_multiple"])[critical["step"] >= LATE * num_steps].median()),
        "length": float((own["step_norm"] / length)[late].median()),
        "curvature_growth": float(own["largest"][late].median() / own["largest"][begun].median()),
        "gradient_growth": float(dual[late].median() / dual[begun].median()),
        "loss": float(own["loss"][late].mean()),
        "steps": own["step"].tolist(),
        "curve": rounded(2 * ratios["largest"]),
        "along_curve": rounded(2 * ratios["along"]),
    }


def rounded(values: pd.Series) -> list[float]:
    return [float(f"{value:.4g}") for value in values]


EXPERIMENT = Experiment("edge", cases, run, tables, "docs/reproduce/edge.md", {"reproduce_edge.png": draw})

if __name__ == "__main__":
    main(EXPERIMENT, __doc__)
