"""Smoothness of the GPT of scion.py in the norms in which ClippedScion steps, layer by layer, and after shuffling."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from experiment import Place
from learning import Course, loss_fn, to
from scipy.stats import spearmanr
from torch import nn

import smoothdiag as sd

Make = Callable[[Course, int, torch.device], Callable[[nn.Module], torch.optim.Optimizer]]

OWN, EUCLIDEAN, SCANNED = "local_steepest_own", "local", "local_steepest"
QUANTILE = 0.8
"""Level of the line; .95 would ask for more rows than these runs have."""

EVERY = 6
BUDGET = 200
"""Gradients of the scan. A dry run has one: `sd.scan` measures the last weights however few there are."""

SHUFFLES = 99


@dataclass(frozen=True)
class Norms:
    """Measured runs: what they are measured on, and their seeds."""

    data: Literal["held-out", "step"]
    seeds: tuple[int, ...]

    @property
    def key(self) -> str:
        return f"norms/{self.data}"


def layer(name: str) -> str:
    """Returns the layer of a parameter; biases and gains of all layers are one."""
    if name.startswith(("tokens", "head")):
        return "embedding and head"
    if name == "places":
        return "positions"
    return name.removesuffix(".weight") if name.endswith("weight") and "norm" not in name else "biases and gains"


def local(place: Place, **options: Any) -> sd.LocalSmoothness:
    """Returns an estimator; in a dry run it takes one radius, as exact dual norms of a full size take minutes each."""
    return sd.LocalSmoothness(radius=1e-3 if place.dry else None, two_scale=not place.dry, **options)


def probed(case: Norms, place: Place, found: Course, make: Make) -> Iterator[tuple[nn.Module, Any, Any]]:
    """Trains from every seed under a probe, and yields model, optimizer and trace."""
    data = found.data()
    held_out = to(place.device, data.validation)
    for seed in case.seeds[:1] if place.dry else case.seeds:
        torch.manual_seed(seed)
        model = found.model().to(place.device)
        optimizer = make(found, seed, place.device)(model)
        path = place.traces / f"norms-{case.data}-seed{seed}.jsonl"
        path.unlink(missing_ok=True)
        probe = sd.Probe(
            model,
            optimizer,
            loss_fn,
            estimators=[local(place, direction="steepest", geometry="optimizer"), local(place)],
            schedule=sd.every(EVERY),
            trace=path,
            group_by=layer,
            **({"probe_batches": [held_out]} if case.data == "held-out" else {"data": "step"}),
        )
        for batch in probe.watch(itertools.islice(data.batches(seed + 1), found.steps)):
            optimizer.zero_grad()
            torch.autograd.backward(loss_fn(model, to(place.device, batch)))
            optimizer.step()
        probe.close()
        yield model, optimizer, probe.trace


def shuffled(rows: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Returns rows whose smoothness went to other steps of the same group, so that no law is left."""
    drawn = np.random.default_rng(seed)
    return rows.assign(smoothness=rows.groupby("group")["smoothness"].transform(lambda x: drawn.permutation(x)))


def rank_of_chance(runs: list[pd.DataFrame]) -> float:
    """Returns the rank correlation that shuffling within runs exceeds once in twenty times, in either direction."""
    found = []
    for seed in range(SHUFFLES):
        rows = pd.concat([shuffled(run, seed) for run in runs])
        found.append(abs(spearmanr(rows["grad_norm"], rows["smoothness"]).statistic))
    return float(np.quantile(found, 0.95))


def told(runs: list[pd.DataFrame], estimator: str, group: str) -> dict[str, Any]:
    """Returns what a fit says of one group, and of the same rows after shuffling."""
    own = [run[(run["estimator"] == estimator) & (run["group"] == group)] for run in runs]
    try:
        fit = sd.fit_smoothness(own, group=group, quantile=QUANTILE, num_boot=100)
        null = sd.fit_smoothness([shuffled(run, 0) for run in own], group=group, quantile=QUANTILE, num_boot=100)
    except ValueError as error:
        return {"estimator": estimator, "group": group, "verdict": "no fit", "reason": str(error)}
    return {
        "estimator": estimator,
        "group": group,
        "verdict": fit.verdict.name,
        "flags": [flag.name for flag in fit.flags],
        "decades": fit.decades,
        "slope": fit.loglog_slope,
        "rank": fit.spearman,
        "partial": fit.partial_spearman,
        "chance": rank_of_chance(own),
        "L0": fit.L0,
        "L1": fit.L1,
        "L1_interval": list(fit.L1_interval),
        "skill": next(score.skill for score in fit.comparison if score.name == "affine"),
        "points": fit.num_points,
        "shuffled_verdict": null.verdict.name,
    }


def measure(case: Norms, place: Place, found: Course, make: Make) -> dict[str, Any]:
    """Returns the fits of every layer, the rows of all parameters, and those of a scan of the last weights."""
    runs: list[pd.DataFrame] = []
    for model, optimizer, trace in probed(case, place, found, make):
        runs.append(trace.to_frame())
        last = model, optimizer
    groups = ["all", *dict.fromkeys(layer(name) for name, _ in last[0].named_parameters())]
    fits = [told(runs, estimator, group) for estimator in (OWN, EUCLIDEAN) for group in groups]
    scanned = scan(*last, found, place) if case.data == "held-out" else None
    shown = pd.concat(runs)
    shown = shown[shown["group"] == "all"]
    return {
        "task": "norms",
        "data": case.data,
        "seeds": list(case.seeds),
        "steps": found.steps,
        "fits": fits,
        "rows": {
            name: shown.loc[shown["estimator"] == name, ["grad_norm", "smoothness"]].to_numpy().tolist()
            for name in (OWN, EUCLIDEAN)
        },
        "scan": scanned,
    }


def scan(model: nn.Module, optimizer: Any, found: Course, place: Place) -> dict[str, Any]:
    """Measures along lines out of the last weights, in the optimizer's norm; the fit says what such lines can show."""
    norm = optimizer.product(model.parameters())
    trace = sd.scan(
        model,
        loss_fn,
        [to(place.device, found.data().validation)],
        estimators=[local(place, direction="steepest", geometry=norm)],
        budget=1 if place.dry else BUDGET,
        progress=False,
    )
    rows = trace.to_frame()
    if place.dry:
        return {"points": len(rows)}
    fit = sd.fit_smoothness(rows, estimator=SCANNED, quantile=QUANTILE, num_boot=100)
    kept = rows[rows["estimator"] == SCANNED]
    return {
        "verdict": fit.verdict.name,
        "flags": [flag.name for flag in fit.flags],
        "decades": fit.decades,
        "slope": fit.loglog_slope,
        "rank": fit.spearman,
        "points": fit.num_points,
        "rows": kept[["grad_norm", "smoothness"]].to_numpy().tolist(),
    }
