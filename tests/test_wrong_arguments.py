"""smoothdiag: an argument of the wrong kind raises one sentence that begins with the parameter."""

import math
from collections.abc import Callable
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

import smoothdiag as sd
from smoothdiag import geometry, problems
from smoothdiag.clipping import clip_table

matplotlib.use("Agg")


def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
    return model(batch).square().mean()


MODEL = nn.Linear(30, 40)
OPTIMIZER = torch.optim.SGD(MODEL.parameters(), lr=0.1)
TRACE = sd.Trace()
for _step, _norm in enumerate(10 ** np.random.default_rng(0).uniform(-1, 1, 200)):
    _row = {"step": _step, "estimator": "local", "grad_norm": _norm, "smoothness": 1 + _norm, "saturation": 0.1}
    TRACE.append(_row | {"lr": 0.1, "loss": 1.0})
FIT = sd.fit_smoothness(TRACE, num_boot=20)
PROBE = sd.Probe(MODEL, OPTIMIZER, loss_fn)
BATCHES = [torch.ones(2, 30)]
OBJECTIVE = sd.objective(MODEL, loss_fn, BATCHES)

NO_NUMBER = [None, "0.1", math.nan, [0.1], sd.every, int, {}]
NO_WHOLE = [*NO_NUMBER, 1.5, True]
NO_CHOICE = [None, "nonsense", 1, ["gradient"], sd.every]
NO_FLAG = [None, "yes", 2, [True]]
NO_FIT = [None, "run.jsonl", TRACE, sd.SmoothnessFit, sd.fit_smoothness, math.nan, [FIT]]
NO_FITS = [FIT, TRACE, [FIT], {"a": TRACE}, {}, sd.fit_groups, sd.GroupFits, "fits"]
NO_TABLE = [None, "run.jsonl", FIT, sd.Trace, sd.fit_smoothness, [1, 2], math.nan, []]
NO_AXES = [Figure(), Axes, "axes", 1, [1, 2], TRACE]
NO_GEOMETRY = [None, geometry.RMS, geometry.Euclidean, "spectral", 2, geometry.RMS()]
NO_LAYER = [None, geometry.RMS, geometry.Euclidean(), "spectral", 2]
NO_FUNCTION = [None, "loss", nn.Linear, 1]

# (function, what it needs beside, parameter, wrong values). Optional parameters may be None.
CASES: list[tuple[Callable[..., Any], dict[str, Any], str, list[Any]]] = [
    (sd.every, {}, "n", [*NO_WHOLE, 0]),
    (sd.log_spaced, {}, "per_decade", [*NO_WHOLE, 0]),
    (sd.budget, {}, "fraction", [*NO_NUMBER, 0, 1, True]),
    (sd.by_module, {}, "depth", [*NO_WHOLE, 0]),
    (sd.LocalSmoothness, {}, "radius", [*NO_NUMBER[1:], 0, -1]),
    (sd.LocalSmoothness, {}, "direction", NO_CHOICE),
    (sd.LocalSmoothness, {}, "geometry", NO_GEOMETRY[:-1]),
    (sd.LocalSmoothness, {}, "seed", NO_WHOLE),
    (sd.LocalSmoothness, {}, "two_scale", NO_FLAG),
    (sd.PathSmoothness, {}, "points", [None, "1", 1.0, ("1",), (math.nan,), (), (2,), sd.every]),
    (sd.PathSmoothness, {}, "geometry", NO_GEOMETRY[:-1]),
    (sd.HessianNorm, {}, "tol", [*NO_NUMBER, 0, 1]),
    (sd.Sharpness, {}, "max_products", [*NO_WHOLE, 0]),
    (sd.HessianNorm, {}, "backend", NO_CHOICE),
    (sd.HessianNorm, {}, "autocast", NO_FLAG),
    (sd.Sharpness, {}, "by_group", NO_FLAG),
    (sd.DirectionalCurvature, {}, "direction", NO_CHOICE),
    (sd.CriticalStep, {}, "rtol", [*NO_NUMBER, 0, 1]),
    (sd.CriticalStep, {}, "max_values", [*NO_WHOLE, 2]),
    (sd.Probe, {"optimizer": OPTIMIZER, "loss_fn": loss_fn}, "model", [None, OPTIMIZER, nn.Linear, "model", loss_fn]),
    (sd.Probe, {"model": MODEL, "loss_fn": loss_fn}, "optimizer", [None, MODEL, torch.optim.SGD, "SGD", loss_fn]),
    (sd.Probe, {"model": MODEL, "optimizer": OPTIMIZER}, "loss_fn", NO_FUNCTION[1:]),
    (
        sd.Probe,
        {"model": MODEL, "optimizer": OPTIMIZER, "loss_fn": loss_fn},
        "estimators",
        [None, "local", ["local"], sd.LocalSmoothness, [sd.LocalSmoothness], sd.LocalSmoothness(), [1], [MODEL]],
    ),
    (
        sd.Probe,
        {"model": MODEL, "optimizer": OPTIMIZER, "loss_fn": loss_fn},
        "schedule",
        [sd.every, sd.budget, sd.log_spaced, 20, "20", [20], sd.Schedule],
    ),
    (sd.Probe, {"model": MODEL, "optimizer": OPTIMIZER, "loss_fn": loss_fn}, "reduction", NO_CHOICE),
    (sd.objective, {"loss_fn": loss_fn, "batches": BATCHES}, "model", [None, OPTIMIZER, nn.Linear, loss_fn]),
    (sd.objective, {"model": MODEL, "batches": BATCHES}, "loss_fn", NO_FUNCTION),
    (sd.objective, {"model": MODEL, "loss_fn": loss_fn}, "batches", [None, 1, "batches", loss_fn, MODEL]),
    (sd.objective, {"model": MODEL, "loss_fn": loss_fn, "batches": BATCHES}, "reduction", NO_CHOICE),
    (sd.objective, {"model": MODEL, "loss_fn": loss_fn, "batches": BATCHES}, "seed", NO_WHOLE),
    (lambda **a: sd.hvp(**a).__enter__(), {}, "objective", [None, MODEL, loss_fn, sd.Objective]),
    (lambda **a: sd.hvp(**a).__enter__(), {"objective": OBJECTIVE}, "backend", NO_CHOICE),
    (sd.fit_smoothness, {}, "data", NO_TABLE[:3] + NO_TABLE[5:]),
    (sd.fit_smoothness, {"data": TRACE}, "quantile", [*NO_NUMBER, 0, 1]),
    (sd.fit_smoothness, {"data": TRACE}, "num_boot", [None, "400", 1.5, math.nan, 1, sd.every]),
    (sd.fit_smoothness, {"data": TRACE}, "seed", [None, "0", 1.5, math.nan, -1, sd.every]),
    (sd.fit_smoothness, {"data": TRACE}, "group", [None, 1, "nobody", sd.every]),
    (sd.fit_smoothness, {"data": TRACE}, "estimator", [1, "nobody", sd.LocalSmoothness]),
    (sd.clip_rule, {}, "fit", NO_FIT),
    (sd.clip_rule, {"fit": FIT}, "lr", [*NO_NUMBER[1:], 0, math.inf]),
    (sd.clip_rule, {"fit": FIT}, "momentum", [*NO_NUMBER[1:], "", 1]),
    (sd.clip_rule, {"fit": FIT}, "dampening", [*NO_NUMBER[1:], "", 1]),
    (sd.clip_rule, {"fit": FIT}, "kappa", [*NO_NUMBER, 0, 3]),
    (sd.clip_rule, {"fit": FIT}, "noise", [*NO_NUMBER[1:], -1]),
    (sd.step_rate, {}, "fit", NO_FIT),
    (sd.step_rate, {"fit": FIT}, "kappa", [*NO_NUMBER, 0, 3]),
    (sd.StepRate(1.0, 1.0, 1.0, "").scale, {"grad_norm": 1.0}, "lr", [*NO_NUMBER, 0]),
    (clip_table, {}, "fit", NO_FIT),
    (sd.plot_smoothness, {}, "data", NO_TABLE),
    (sd.plot_smoothness, {"data": TRACE}, "fit", NO_FIT[1:]),
    (sd.plot_smoothness, {"data": TRACE}, "ax", NO_AXES),
    (sd.plot_smoothness, {"data": TRACE}, "group", [None, 1, "nobody"]),
    (sd.plot_smoothness, {"data": TRACE}, "estimator", [1, "nobody", sd.LocalSmoothness]),
    (sd.plot_trace, {}, "data", NO_TABLE),
    (sd.plot_trace, {"data": TRACE}, "ax", NO_AXES),
    (sd.plot_sharpness, {}, "data", NO_TABLE),
    (sd.plot_sharpness, {"data": TRACE}, "ax", NO_AXES),
    (sd.plot_fit, {}, "fit", NO_FIT),
    (sd.plot_fit, {"fit": FIT}, "data", NO_TABLE[1:]),
    (sd.plot_fit, {"fit": FIT}, "axes", NO_AXES),
    (sd.plot_groups, {}, "data", NO_TABLE),
    (sd.plot_groups, {"data": TRACE}, "fits", NO_FITS),
    (sd.plot_constants, {}, "fits", [None, *NO_FITS]),
    (sd.plot_constants, {"fits": {"a": FIT}}, "axes", NO_AXES),
    (sd.plot_clipping, {"history": TRACE.to_frame()}, "data", NO_TABLE),
    (sd.plot_clipping, {"data": TRACE}, "history", [None, TRACE, "history", 1]),
    (sd.AutoClip, {"optimizer": OPTIMIZER}, "probe", [None, TRACE, sd.Probe, OPTIMIZER]),
    (sd.AutoClip, {"optimizer": OPTIMIZER, "probe": PROBE}, "mode", NO_CHOICE),
    (sd.AutoClip, {"optimizer": OPTIMIZER, "probe": PROBE}, "rule", [1, sd.StepRule, sd.clip_rule, "rule"]),
    (sd.AutoClip, {"optimizer": OPTIMIZER, "probe": PROBE}, "estimator", [1, sd.LocalSmoothness, "local"]),
    (geometry.Spectral, {}, "steps", [*NO_WHOLE, 0]),
    (geometry.Convolution, {}, "exact", NO_FLAG),
    (geometry.Spectral, {}, "dtype", ["float32", torch.int32, 1]),
    (geometry.ByShape, {}, "matrix", NO_LAYER),
    (geometry.Product, {}, "layers", [*NO_LAYER, (geometry.RMS,), geometry.RMS()]),
    (geometry.Product, {"layers": (geometry.RMS(),)}, "radii", [1.0, "1", ("1",), (math.nan,), (1.0, 2.0)]),
    (geometry.Diagonal, {}, "diagonal", [None, 1.0, "P", (1.0,), torch.ones(2)]),
    (problems.cosh, {}, "L0", [*NO_NUMBER, 0]),
    (problems.power, {}, "exponent", [*NO_NUMBER, 1]),
    (problems.sine, {}, "dim", [1.5, math.nan, 0]),
]  # fmt: skip
CLIPPED = {"params": list(MODEL.parameters()), "lr": 0.1, "threshold": 1.0}
CASES += [
    (optimizer, {**CLIPPED, **more}, name, values)
    for optimizer, more in (
        (sd.ClippedMomentum, {}),
        (sd.GGNC, {"geometry": geometry.RMS()}),
        (sd.ClippedScion, {"radius": 1.0}),
    )
    for name, values in (("lr", [None, "0.1", math.nan, [0.1], -1]), ("momentum", ["0.9", None, 2, math.nan]))
]


def name_of(case: tuple[Callable[..., Any], dict[str, Any], str, list[Any]]) -> str:
    return f"{getattr(case[0], '__qualname__', '').replace('<lambda>', 'hvp')}-{case[2]}"


@pytest.mark.filterwarnings("ignore::smoothdiag.SmoothdiagWarning")
@pytest.mark.usefixtures("no_figure_left_open")
@pytest.mark.parametrize(("function", "beside", "parameter", "values"), CASES, ids=map(name_of, CASES))
def test_a_wrong_argument_is_named(function, beside, parameter, values) -> None:
    for value in values:
        with pytest.raises((ValueError, TypeError)) as caught:
            function(**{**beside, parameter: value})
        message = str(caught.value)
        assert message.startswith(f"Parameter `{parameter}`"), (value, message)
        assert "Found" in message or "Missing" in message, (value, message)
        assert len(message) < 400, (value, message)


def shown() -> dict[str, Any]:
    """Every kind of object that a user meets, as large as they come."""
    steps: list[sd.Step] = []

    def keep(step: sd.Step) -> sd.Estimate:
        steps.append(step)
        return sd.HessianNorm()(step)

    model = nn.Linear(30, 40)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = sd.Probe(model, optimizer, loss_fn, schedule=sd.every(1), estimators=[keep, sd.LocalSmoothness()])
    clipper = sd.AutoClip(optimizer, probe)
    probe.observe(BATCHES[0])
    loss_fn(model, BATCHES[0]).backward()
    optimizer.step()
    step = steps[0]
    with sd.hvp(OBJECTIVE) as hessian:
        spectrum = sd.measure.curvature.lanczos(hessian, step.start)
    many = {f"a group with a long name, {place}": FIT for place in range(200)}
    return {
        "Probe": probe, "AutoClip": clipper, "Watched": probe.watch(BATCHES), "Trace": TRACE, "SmoothnessFit": FIT,
        "GroupFits": sd.GroupFits(many, dict.fromkeys("abc", "no rows")), "ClipRule": sd.clip_rule(FIT, lr=0.1),
        "StepRule": sd.StepRule(), "StepRate": sd.StepRate(1.0, 1.0, 1.0, "because"), "Step": step,
        "Evaluation": step.at_start, "Estimate": sd.LocalSmoothness()(step), "Spectrum": spectrum,
        "Eigenpair": spectrum.pairs[0], "Diagonal": geometry.Diagonal((torch.ones(1000),) * 9),
        "Product": geometry.Product((geometry.RMS(),) * 500), "Euclidean": geometry.Euclidean(),
        "ByShape": geometry.ByShape(), "Problem": problems.quadratic([1.0] * 500), "every": sd.every(3),
        "budget": sd.budget(), "log_spaced": sd.log_spaced(), "HessianNorm": sd.HessianNorm(),
        "SelfTest": probe.self_test, "Objective": OBJECTIVE, "Hessian": hessian,
    }  # fmt: skip


def test_objects_show_a_line_or_two() -> None:
    for name, thing in shown().items():
        text = repr(thing)
        assert len(text) <= 600, (name, len(text))
        assert text.count("\n") <= 1, (name, text)
        assert name in text or not name[0].isupper(), (name, text)


def test_a_fit_shows_its_constants_and_its_verdict() -> None:
    assert repr(FIT) == "<SmoothnessFit L0L1: L0=1, L1=1, 200 rows of estimator 'local', group 'all'; print it for all>"
