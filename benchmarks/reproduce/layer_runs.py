"""Runs of unconstrained Scion whose layers are measured: on other batches, without a move, and on the same examples.

A run is measured at one step in a few. Between the weights x before that step and y after it, for each layer,

- "other": ||g(y; b') - g(x; b)||_* / ||y - x||, where b and b' are the batches that the run trains on at x and at y;
- "null": ||g(y; b'') - g(y; b')||_* / ||y - x|| with a fresh batch b'': the same without a move, so noise alone;
- "same": ||g(y; h) - g(x; h)||_* / ||y - x|| on held-out examples h;
- "short": the same from x to a point on the way to y, whose distance does not depend on the length of the step.

The gradient norm beside them is ||g(y; b')||_* for "other" and "null", ||g(y; h)||_* for "same" and ||g(x; h)||_* for
"short". In the Euclidean norm, "short" comes from two halves of h, without the bias of their noise.
"""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import smoothdiag as sd
from smoothdiag.geometry import Frobenius, LayerGeometry
from smoothdiag.optim.scion import Kind

sys.path.insert(1, str(Path(__file__).parents[1] / "autoclip"))

from batching import Data, text
from nets import GPT
from sources import tiny_shakespeare

Rows = list[dict[str, Any]]

LONGEST_STEP = 0.00036
"""Rate of Scion that NanoGPT was published with (Pethick et al. 2025, NeurIPS, appendix C)."""

RADII: dict[Kind, float] = {"hidden": 50.0, "tied": 3000.0, "vector": 50.0}
"""Published radii of hidden matrices and of the tied embedding. Biases and gains, which NanoGPT lacks, have ours."""

UNCLIPPED = 1e6
"""A rate at which every step is as long as it may be, so that clipped Scion is Scion."""

SHORT = 1 / 64
"""Length of the displacement of "short", as a share of the step at a factor of 1."""


@dataclass(frozen=True)
class Run:
    """A run whose layers are measured.

    Attributes:
        name: What is trained.
        model: Makes the model; weights come from torch's global generator.
        data: Makes the data from a batch size.
        loss_fn: Mean loss of a batch.
        optimizer: Makes the optimizer from the model and a factor for the length of its steps.
        batch: Examples of a training batch.
        factor: Length of a step, in published ones.
        seed: Of weights and batches.
        steps: Steps of the run.
        every: Steps from one measured step to the next.
    """

    name: str
    model: Callable[[], nn.Module]
    data: Callable[[int], Data]
    loss_fn: Callable[[nn.Module, Any], Tensor]
    optimizer: Callable[[nn.Module, float], sd.ClippedScion]
    batch: int
    factor: float
    seed: int
    steps: int
    every: int


def gpt() -> nn.Module:
    """A character GPT of two blocks with one matrix at both ends, as NanoGPT has."""
    model = GPT(65, 32)
    model.head.weight = model.tokens.weight
    return model


def scion(model: nn.Module, factor: float) -> sd.ClippedScion:
    """Unconstrained Scion with the published radii and momentum."""
    groups = sd.optim.scion_groups(model, radii=RADII, kinds={"places.weight": "tied"})
    return sd.ClippedScion(groups, UNCLIPPED, longest_step=factor * LONGEST_STEP, radius=1.0, momentum=0.9)


def shakespeare(batch: int) -> Data:
    return text(tiny_shakespeare, length=32, size=batch, held_out=64)


class Noisy(nn.Module):
    """Four layers whose losses add up, each with one law, under gradients with additive noise."""

    def __init__(self, problem: sd.problems.Problem, radius: float) -> None:
        super().__init__()
        start = torch.randn(problem.dim, 4, dtype=torch.float64)
        self.problem = problem
        self.layers = nn.ParameterList((radius * start / start.norm(dim=0)).unbind(1))

    def forward(self, noise: Tensor) -> Tensor:
        """Returns the mean loss of examples whose gradients are ``noise`` off, shape (examples, layers, dim)."""
        values: list[Tensor] = [self.problem.value(x) + noise[:, k].mean(0) @ x for k, x in enumerate(self.layers)]
        return torch.stack(values).sum()


def noise(deviation: float, dim: int) -> Callable[[int], Data]:
    def make(batch: int) -> Data:
        def drawn(number: int, generator: torch.Generator) -> Tensor:
            return deviation * torch.randn(number, 4, dim, generator=generator, dtype=torch.float64)

        def batches(seed: int) -> Iterator[Tensor]:
            generator = torch.Generator().manual_seed(seed)
            while True:
                yield drawn(batch, generator)

        return Data(batches, drawn(64 * batch, torch.Generator().manual_seed(-1)))

    return make


def own_loss(model: nn.Module, batch: Tensor) -> Tensor:
    loss: Tensor = model(batch)
    return loss


def normalised(step: float) -> Callable[[nn.Module, float], sd.ClippedScion]:
    """Steps of one length for each layer, in its Euclidean norm."""

    def make(model: nn.Module, factor: float) -> sd.ClippedScion:
        group = {"params": list(model.parameters()), "geometry": Frobenius()}
        return sd.ClippedScion([group], UNCLIPPED, longest_step=factor * step, radius=1.0, momentum=0.0)

    return make


def layers_of(model: nn.Module, optimizer: sd.ClippedScion) -> dict[str, tuple[Tensor, LayerGeometry]]:
    """Returns tensor and own geometry of each layer by name; biases and gains are left out where there are matrices."""
    geometry = {id(p): group["geometry"] for group in optimizer.param_groups for p in group["params"]}
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = {name: p for name, p in named.items() if p.ndim > 1} or named
    return {name: (p, geometry[id(p)]) for name, p in matrices.items()}


def halves(batch: Any) -> list[Any]:
    """Cuts examples into two halves; held-out windows of a text are in its order, so they go to the halves in turn."""
    if isinstance(batch, Tensor):
        return [batch[0::2], batch[1::2]]
    return [tuple(part[k::2] for part in batch) for k in range(2)]


def moved(batch: Any, device: torch.device) -> Any:
    return batch.to(device) if isinstance(batch, Tensor) else tuple(part.to(device) for part in batch)


class Layers:
    """Positions and gradients of the layers of a run."""

    def __init__(self, run: Run, model: nn.Module, optimizer: sd.ClippedScion, held_out: Sequence[Any]) -> None:
        self.run, self.model, self.held_out = run, model, held_out
        found = layers_of(model, optimizer)
        self.names, self.tensors = list(found), [p for p, _ in found.values()]
        self.geometries: dict[str, Sequence[LayerGeometry]] = {
            "own": [g for _, g in found.values()],
            "Euclidean": [Frobenius()] * len(found),
        }
        self.everything = [p for p in model.parameters() if p.requires_grad]

    def gradient(self, batch: Any) -> list[Tensor]:
        return list(torch.autograd.grad(self.run.loss_fn(self.model, batch), self.tensors))

    def on_halves(self) -> list[list[Tensor]]:
        """Returns the gradients on both halves of the held-out examples."""
        return [self.gradient(half) for half in self.held_out]

    def between(self, x: Sequence[Tensor], share: float) -> list[list[Tensor]]:
        """Returns the gradients on both halves at x + share (y - x), from y, where the model is, and goes back to y."""
        y = [p.detach().clone() for p in self.everything]
        self.put([here + share * (there - here) for here, there in zip(x, y, strict=True)])
        found = self.on_halves()
        self.put(y)
        return found

    @torch.no_grad()
    def put(self, point: Sequence[Tensor]) -> None:
        for p, value in zip(self.everything, point, strict=True):
            p.copy_(value)


def measured(run: Run, device: torch.device) -> tuple[Rows, list[float]]:
    """Trains, and returns a row for each layer, norm and measured step, and held-out losses over the run."""
    torch.manual_seed(run.seed)
    model = run.model().to(device)
    optimizer, data = run.optimizer(model, run.factor), run.data(run.batch)
    held_out = [moved(half, device) for half in halves(data.validation)]
    layers = Layers(run, model, optimizer, held_out)
    batches, fresh = data.batches(run.seed), data.batches(10_000 + run.seed)
    rows: Rows = []
    losses: list[float] = []
    before: Before | None = None
    for step in range(run.steps + 1):
        batch = moved(next(batches), device)
        optimizer.zero_grad()
        torch.autograd.backward(run.loss_fn(model, batch))
        gradients = [g.clone() for p in layers.tensors if (g := p.grad) is not None]
        if before is not None:
            rows += before.rows(step, gradients, layers.gradient(moved(next(fresh), device)))
            before = None
        if step % run.every == 0:
            before = Before(layers, gradients)
            with torch.no_grad():
                losses.append(sum(float(run.loss_fn(model, half)) for half in held_out) / len(held_out))
        optimizer.step()
    return rows, losses


class Before:
    """What is known at x until the gradients at y are there."""

    def __init__(self, layers: Layers, trained: list[Tensor]) -> None:
        self.layers, self.trained = layers, trained
        self.x = [p.detach().clone() for p in layers.everything]
        self.start = [p.detach().clone() for p in layers.tensors]
        self.here = layers.on_halves()

    def rows(self, step: int, trained: list[Tensor], fresh: list[Tensor]) -> Rows:
        """Returns the rows of a step; ``trained`` and ``fresh`` are gradients at y, on b' and on b''."""
        layers, factor = self.layers, self.layers.run.factor
        there = layers.on_halves()
        short = layers.between(self.x, SHORT / factor)
        found: Rows = []
        for k, name in enumerate(layers.names):
            d = layers.tensors[k].detach() - self.start[k]
            here = mean(self.here, k)
            for norm, geometries in layers.geometries.items():
                of = Secants(geometries[k], float(geometries[k].norm(d)))
                row: dict[str, Any] = {"step": step, "layer": name, "norm": norm, "length": of.length}
                row |= of.columns("other", trained[k], self.trained[k], of_end=True)
                row |= of.columns("null", trained[k], fresh[k], of_end=True)
                row |= of.columns("same", mean(there, k), here, of_end=True)
                of = Secants(geometries[k], of.length * SHORT / factor)
                row |= of.columns("short", mean(short, k), here, of_end=False)
                if norm == "Euclidean":
                    plain = row["short"]
                    a, b = (short[half][k] - self.here[half][k] for half in range(2))
                    row["short"] = root(float((a * b).sum())) / of.length
                    row["short norm"] = root(float((self.here[0][k] * self.here[1][k]).sum()))
                    row["bias"] = plain / row["short"]
                found.append(row)
        return found


@dataclass(frozen=True)
class Secants:
    """Changes of a layer's gradient over a displacement of some length, in one geometry."""

    geometry: LayerGeometry
    length: float

    def secant(self, change: Tensor) -> float:
        return float(self.geometry.dual_norm(change)) / self.length

    def columns(self, kind: str, there: Tensor, here: Tensor, *, of_end: bool) -> dict[str, float]:
        """Returns smoothness, the gradient norm beside it, at the end or at the start, and the saturation."""
        ends = [float(self.geometry.dual_norm(g)) for g in (here, there)]
        smoothness = self.secant(there - here)
        saturation = smoothness * self.length / sum(ends) if sum(ends) else math.nan
        return {kind: smoothness, f"{kind} norm": ends[of_end], f"{kind} saturation": saturation}


def mean(on_halves: Sequence[Sequence[Tensor]], k: int) -> Tensor:
    return (on_halves[0][k] + on_halves[1][k]) / 2


def root(squared: float) -> float:
    return math.sqrt(squared) if squared > 0 else math.nan
