"""The designed experiment: gradient norm and Hessian norm along lines out of one checkpoint, without training."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

from torch import Tensor, nn
from tqdm import tqdm

from smoothdiag import arguments, vectors
from smoothdiag.measure.curvature.guards import autocast_off
from smoothdiag.measure.estimators import Estimator
from smoothdiag.measure.loss.fixed import objective
from smoothdiag.measure.loss.objective import LossFn, Objective, Reduction
from smoothdiag.measure.scan.arcs import Arcs, Kind, scale_invariant
from smoothdiag.measure.scan.costs import Budget
from smoothdiag.measure.scan.lines import NUM_LINES, Targets, named_vector, names_of
from smoothdiag.measure.scan.scanning import Scanning
from smoothdiag.measure.scan.search import NEAREST, Limits
from smoothdiag.trace import Trace
from smoothdiag.vectors import Vector

__all__ = ["scan"]

TIMES_CHANCE: Final = 3.0
"""Largest loss, relative to chance. Beyond it exponents are 2 to 3: that is another function than the one that is
trained (first look at scans of five small nets)."""

SPACING: Final = 1.0
"""How far log ||g|| moves from one point to the next. A scan rarely has the gradients for more than three points on a
line, and the range of gradient norms decides more than their number (benchmarks/scan_power.py)."""

MAX_DISTANCE: Final = 4.0
"""Largest distance from x, relative to ||x||."""


def scan(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    *,
    directions: Sequence[str] | None = None,
    points: int = 8,
    spacing: float = SPACING,
    estimators: Sequence[Estimator] | None = None,
    trace: Trace | str | Path | None = None,
    seed: int = 0,
    step: int = 0,
    toward: Mapping[str, Mapping[str, Tensor]] | None = None,
    update: Mapping[str, Tensor] | None = None,
    budget: int = 500,
    max_loss: float | None = None,
    max_distance: float = MAX_DISTANCE,
    arcs: Literal["auto"] | bool = "auto",
    reduction: Reduction = "mean",
    progress: bool = True,
) -> Trace:
    """Measures ||g|| and ||H|| along lines out of the model's present parameters x, on fixed data, without training.

    Neither time nor the learning rate nor the batch can be the cause of what the rows show, because none of them
    changes. The next point of a line is where log ||g|| has moved by ``spacing``. The lines advance in turn, so a scan
    that is killed, or that has used up its gradients, has about as many points on every line. Model, buffers, modes,
    gradients and random states are afterwards what they were, bit for bit.

    Args:
        model: The model, in the mode in which the loss is to be measured.
        loss_fn: ``loss_fn(model, batch)`` returns the scalar loss of one batch.
        batches: The batches; the loss is their mean. More batches take more time and no more gradients.
        directions: Names of the lines. ``"gradient up"`` and ``"gradient down"`` follow the gradient at x.
            ``"random 1"``, ``"random 2"``, ... are isotropic. In ``"layers 1"``, ``"layers 2"``, ... the part of each
            tensor is as long as the tensor. ``"gradient in PARAMETER"`` and ``"in PARAMETER"`` move one parameter
            alone, up its gradient or at random. ``"to NAME"`` and ``"from NAME"`` lead towards a checkpoint of
            ``toward`` and away from it, ``"update"`` along ``update``. ``"descent"`` follows gradient descent in short
            steps. ``None`` takes fourteen at a time: both ways along the gradient, what was given to walk towards, one
            random line of both kinds, and lines in the largest parameters. Where one of them ends, a further line
            takes its place.
        points: Most points of a line.
        spacing: How far log ||g|| moves from one point to the next, give or take a quarter.
        estimators: What to measure at each point; ``None`` measures ||H|| by ``HessianNorm``: accurately at x, and
            from there on loosely, beginning with the eigenvectors of the last point.
        trace: Trace, or a path to write to; ``None`` keeps the rows in memory.
        seed: Seed of the random lines, and of the random state that every batch starts from.
        step: Training step of the checkpoint, for the column ``step``. Scans of several checkpoints fit into one trace
            if their steps differ.
        toward: State dicts of other checkpoints, by name.
        update: The optimizer's update, by the names of parameters.
        budget: Most gradients to use. A product with the Hessian by differentiating twice counts as two gradients. x
            is measured however few there are.
        max_loss: Loss [f] at which a line ends; ``None`` for three times chance, where chance is the larger of the
            loss at x and the loss with all parameters at zero.
        max_distance: Distance from x, relative to ||x||, at which a line ends; relative to the norm of the parameter
            on lines that move one alone.
        arcs: Whether lines keep the norm of blocks whose scale does not change the loss, as of weights in front of
            BatchNorm: there ||g|| and ||H|| fall as weights grow, whatever the landscape is. ``"auto"`` finds these
            blocks, ``False`` takes straight lines, and ``True`` raises an error if there are no such blocks.
        reduction: Whether the loss is the ``"mean"`` or the ``"sum"`` of the batches' losses.
        progress: Whether to show a progress bar on the error output.

    Returns:
        The trace. Besides the usual columns its rows have ``scan``, the name of the line; ``point``, which counts from
        1 (x itself is the row "start", point 0); ``distance`` ||y - x|| [x] and ``relative_distance``. A line that
        ended before its last point has a row without smoothness, whose column ``ended`` says why. ``num_grads`` holds
        all that a row has cost, the search for the point included.

    Raises:
        ValueError: If an argument is wrong, if the loss or the gradient at x is not finite, if the trace has rows of a
            scan of this ``step``, or if the model is distributed.

    Source: Zhang, He, Sra, Jadbabaie 2020 (ICLR), definition 1, for the law that the rows are to test.

    Examples:
        >>> model = sd.problems.exponential(L0=1.0, L1=2.0, dim=3).as_module(torch.ones(3, dtype=torch.float64))
        >>> trace = sd.scan(model, lambda model, batch: model(), [None], directions=["random 1"], progress=False)
        >>> row = trace[1]
        >>> print(row["scan"], round(row["smoothness"] / (1 + 2 * row["grad_norm"]), 2))
        random 1 1.0
    """
    arguments.whole("points", points, 1)
    arguments.whole("step", step, 0)
    arguments.whole("budget", budget, 1)
    arguments.flag("progress", progress)
    arguments.positive("spacing", spacing)
    arguments.number("max_distance", max_distance, "positive and finite", lambda v: 0 < v < math.inf)
    if max_loss is not None:
        arguments.number("max_loss", max_loss, "a number or None", lambda v: True)
    if not isinstance(arcs, bool):
        arguments.choice("arcs", arcs, ("auto",))
    if estimators is not None:
        if isinstance(estimators, str) or not isinstance(estimators, Sequence) or not estimators:
            raise arguments.wrong("estimators", "a list of estimators, such as [HessianNorm()]", estimators)
        for estimator in estimators:
            arguments.called("estimators", estimator, "a list of estimators, such as [HessianNorm()]")
    if toward is not None and not isinstance(toward, Mapping):
        raise arguments.wrong("toward", "a mapping from names to state dicts", toward)
    loss = objective(model, loss_fn, batches, reduction=reduction, seed=seed)
    if loss.distributed:
        raise ValueError(
            "Parameter `model` should live in one process. Found a distributed model: scan the module inside it "
            "(`model.module` under DistributedDataParallel) in a process of its own."
        )
    labels = _labels(loss, model)
    targets = Targets(
        {name: place for place, name in enumerate(labels)},
        {
            name: named_vector(f"toward[{name!r}]", state, model, loss.parameters)
            for name, state in (toward or {}).items()
        },
        None if update is None else named_vector("update", update, model, loss.parameters),
    )
    names = names_of(directions, targets, loss.parameters)
    is_own = not isinstance(trace, Trace)
    kept = Trace(trace) if not isinstance(trace, Trace) else trace
    _check_steps(kept, step)
    bar = tqdm(total=budget, desc="scan", unit="gradient", disable=not progress, leave=False)
    devices = {p.device.type for p in loss.parameters}
    try:
        with loss.isolated(), autocast_off(devices), bar:
            limit = Budget(loss, budget)
            start = loss.point()
            first = limit.evaluate(start)
            if not (math.isfinite(first.loss) and math.isfinite(float(vectors.norm(first.gradient)))):
                raise ValueError(
                    f"Parameter `model` should have a finite loss and gradient. Found a loss of {first.loss:.3g} and a "
                    f"gradient norm of {float(vectors.norm(first.gradient)):.3g}."
                )
            largest = _max_loss(loss, start, first.loss) if max_loss is None else float(max_loss)
            kinds: list[Kind] = [""] * len(start)
            if arcs:
                kinds = scale_invariant(start, lambda x: limit.evaluate(x).gradient, first.gradient, seed=seed)
                if arcs is True and not any(kinds):
                    raise ValueError(
                        'Parameter `arcs` should be False or "auto" for this model. Found no block whose scale leaves '
                        "the loss unchanged."
                    )
            kept.meta.setdefault(
                "scan",
                {
                    "directions": "default" if directions is None else names,
                    "points": points,
                    "spacing": spacing,
                    "seed": seed,
                    "budget": budget,
                    "max_loss": largest,
                    "max_distance": max_distance,
                    "arcs": {name: kind for name, kind in zip(labels, kinds, strict=True) if kind},
                },
            )
            Scanning(
                loss,
                start,
                first,
                limit,
                kept,
                step,
                estimators,
                Arcs(kinds, start),
                Limits(largest, max_distance, NEAREST, spacing),
                targets,
                seed,
                bar,
            ).run(names, NUM_LINES if directions is None else len(names), points, {"max_loss": largest})
    finally:
        if is_own:
            kept.close()
    return kept


def _check_steps(trace: Trace, step: int) -> None:
    if any(row["step"] == step and "scan" in row for row in trace):
        raise ValueError(
            f"Parameter `step` should differ from one scan in a trace to the next. Found `step = {step}`, of which the "
            "trace has rows already."
        )


def _max_loss(loss: Objective, start: Vector, here: float) -> float:
    """Returns three times the larger of the loss at x and the loss with all parameters at zero."""
    try:
        nothing = loss.value([0 * x for x in start])
    except Exception:  # nobody has promised that the loss has a value there
        nothing = math.nan
    chance = max(here, nothing) if math.isfinite(nothing) else here
    # A loss may be negative; at a loss of zero there is no scale to tell a limit by.
    return chance + (TIMES_CHANCE - 1) * abs(chance) if chance else math.inf


def _labels(loss: Objective, model: nn.Module) -> list[str]:
    """Returns the names of the coordinates."""
    names = {id(p): name for name, p in model.named_parameters()}
    return [names[id(p)] for p in loss.parameters]
