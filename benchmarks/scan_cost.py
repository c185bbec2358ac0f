"""Costs and errors of ||H|| along the lines of a scan, by backend and tolerance, against float64.

Each small net is scanned at initialisation and after some steps of training. At the points that the scan finds, ||H||
is measured in float32 by each way, beginning with the eigenvectors of the last point of the line, and compared with the
exact ||H|| in float64. Costs are gradients for one point without the search for it; a product by differentiating twice
counts as two. Run it with

    python benchmarks/scan_cost.py [--steps 0 100] [--points 4] [--spacing 1] [--nets LSTM] [--only-scans] [--out FILE]
"""

import argparse
import copy
import itertools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from models import GPT, LSTM, Residual, Task, _flat, _learnable_images, _learnable_tokens, labelled_loss
from torch import Tensor, nn

import smoothdiag as sd
from smoothdiag.measure.curvature import Choice
from smoothdiag.measure.scan import SPACING

LINES = ["gradient up", "gradient down", "random 1", "layers 1", "layers 2"]
BACKENDS = ("one_sided", "central", "retained")
TOLERANCES = (0.03, 0.1)


def conv() -> nn.Module:
    """Returns a small residual net with BatchNorm and ReLU."""
    stem = [nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(
        *stem, Residual(8, 8, 1), Residual(8, 16, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)
    )


def mlp() -> nn.Module:
    """Returns an MLP with GELU for images of 8 x 8."""
    widths = (192, 64, 64, 10)
    layers = [layer for a, b in itertools.pairwise(widths) for layer in (nn.Linear(a, b), nn.GELU())]
    return nn.Sequential(nn.Flatten(), *layers[:-1])


NETS = {
    "MLP, GELU": Task(mlp, labelled_loss, _learnable_images(64, 8), lr=0.05),
    "GPT": Task(lambda: _flat(GPT(2, 32, 4, 32)), labelled_loss, _learnable_tokens(8, 32), lr=0.05),
    "LSTM": Task(lambda: _flat(LSTM(32)), labelled_loss, _learnable_tokens(16, 20), lr=0.5),
    "conv, BatchNorm, ReLU": Task(conv, labelled_loss, _learnable_images(64, 12), lr=0.05),
}


def trained(task: Task, steps: int) -> nn.Module:
    """Returns a net after some steps of SGD with momentum."""
    torch.manual_seed(0)
    model, device = task.build(), torch.device("cpu")
    optimizer = torch.optim.SGD(model.parameters(), lr=task.lr, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        task.loss_fn(model, task.batch(device)).backward()
        optimizer.step()
    return model


def points_of(
    model: nn.Module, task: Task, batch: Any, points: int, spacing: float
) -> dict[str, list[tuple[float, list[Tensor]]]]:
    """Returns the points of each line, with their distances relative to ||x||; the first of each line is x itself."""
    found: list[list[Tensor]] = []

    def capture(step: sd.Step) -> sd.Estimate:
        found.append([x.clone() for x in step.start])
        return sd.Estimate("points", 1.0, 1.0, math.nan, step.at_start.loss)

    trace = sd.scan(
        model,
        task.loss_fn,
        [batch],
        directions=LINES,
        points=points,
        spacing=spacing,
        estimators=[capture],
        budget=10**6,
        progress=False,
    )
    measured = [row for row in trace if row["status"] == "ok"]
    lines: dict[str, list[tuple[float, list[Tensor]]]] = {}
    for row, point in zip(measured, found, strict=True):
        lines.setdefault(row["scan"], []).append((row["relative_distance"], point))
    start = lines.pop("start")
    return {name: start + further for name, further in lines.items()}


def exact(model: nn.Module, task: Task, batch: tuple[Tensor, Tensor]) -> Callable[[list[Tensor]], float]:
    """Returns ||H|| in float64 as a function of the point."""
    wide = tuple(t.double() if t.is_floating_point() else t for t in batch)
    loss = sd.objective(copy.deepcopy(model).double(), task.loss_fn, [wide])
    norm = sd.HessianNorm(tol=1e-4, max_products=300, backend="retained")

    def at(point: list[Tensor]) -> float:
        x = [p.double() for p in point]
        estimate = norm(sd.Step(0, loss, x, x, math.nan))
        assert estimate.status is sd.Status.OK
        return estimate.smoothness

    return at


def measured(model: nn.Module, task: Task, batch: Any, points: int, spacing: float) -> list[dict[str, Any]]:
    """Returns one row for each point and way of measuring."""
    truth, rows = exact(model, task, batch), []
    for name, line in points_of(model, task, batch, points, spacing).items():
        norms = [truth(point) for _, point in line]
        for backend in BACKENDS:
            for tol in TOLERANCES:
                loss, memory = sd.objective(model, task.loss_fn, [batch]), dict[Any, Any]()
                for number, ((distance, point), norm) in enumerate(zip(line, norms, strict=True)):
                    known = loss.evaluate(point)
                    # The start is measured from nothing and accurately, as in a scan.
                    how = sd.HessianNorm(tol=tol if number else 1e-3, backend=Choice(backend, "", None))
                    before, began = loss.num_grads + loss.num_reverse, time.perf_counter()
                    step = sd.Step(
                        0, loss, point, point, math.nan, known_start=known, memory=memory, full_precision=True
                    )
                    found = how(step)
                    rows.append(
                        {
                            "line": name,
                            "point": number,
                            "distance": distance,
                            "backend": backend,
                            "tol": tol,
                            "gradients": loss.num_grads + loss.num_reverse - before,
                            "seconds": time.perf_counter() - began,
                            "error": abs(math.log(found.smoothness / norm)),
                            "status": found.status.name.lower(),
                        }
                    )
    return rows


def usual(model: nn.Module, task: Task, batch: Any) -> dict[str, Any]:
    """Returns what a scan with its defaults measures, and at what cost."""
    trace = sd.scan(model, task.loss_fn, [batch], progress=False)
    frame = trace.to_frame()
    points = frame[(frame["status"] == "ok") & (frame["scan"] != "start")]
    norms = frame.loc[frame["status"] == "ok", "grad_norm"]
    return {
        "points": len(points),
        "unusable": int((~frame["status"].isin(["ok", "end_of_line"])).sum()),
        "ends": int((frame["status"] == "end_of_line").sum()),
        "start": frame.loc[frame["scan"] == "start", "num_grads"].sum(),
        "a point": points["num_grads"].median(),
        "with ends": (frame["num_grads"].sum() - frame["num_grads"][0]) / max(len(points), 1),
        "one-sided": (points["hvp"] == "one_sided").mean(),
        "decades": math.log10(norms.max() / norms.min()),
        "spent": frame["num_grads"].sum(),
        "seconds": frame["seconds"].sum(),
        "on arcs": len(trace.meta["scan"]["arcs"]),
    }


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 100])
    parser.add_argument("--points", type=int, default=4)
    parser.add_argument("--spacing", type=float, default=SPACING)
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=list(NETS))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only-scans", action="store_true", help="run the usual scans alone")
    arguments = parser.parse_args()
    rows, scans = [], []
    for name in arguments.nets:
        task = NETS[name]
        for steps in arguments.steps:
            model = trained(task, steps)
            torch.manual_seed(1)
            batch = task.batch(torch.device("cpu"))
            scans.append({"net": name, "steps": steps} | usual(model, task, batch))
            if arguments.only_scans:
                continue
            found = measured(model, task, batch, arguments.points, arguments.spacing)
            rows += [{"net": name, "steps": steps} | row for row in found]
            print(name, steps, len(rows), flush=True)
    print(pd.DataFrame(scans).to_string(float_format=lambda v: f"{v:.3g}"))
    if arguments.only_scans:
        return
    frame = pd.DataFrame(rows)
    if arguments.out:
        frame.to_csv(arguments.out, index=False)
    frame["where"] = pd.cut(frame["distance"], [-1, 0, 0.5, 1.5, 99], labels=["start", "near", "middle", "far"])
    groups = frame.groupby(["net", "backend", "tol", "where"], observed=True)
    table = groups.agg(
        points=("error", "size"),
        gradients=("gradients", "median"),
        median=("error", "median"),
        q95=("error", lambda e: e.quantile(0.95)),
        largest=("error", "max"),
        usable=("status", lambda s: (s == "ok").mean()),
        ms=("seconds", lambda s: 1e3 * s.median()),
    )
    print(table.to_string(float_format=lambda v: f"{v:.3g}"))


if __name__ == "__main__":
    main()
