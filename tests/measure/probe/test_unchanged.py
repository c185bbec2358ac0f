"""measure.probe: training with a probe at every step equals training without one, bit for bit."""

import math
import random
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from asserts import assert_identical, state_of
from losses import classification
from networks import Convolutional, Frozen, Gpt, ModuleAttention, Recurrent, Sparse, images, texts
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from smoothdiag import ClippedMomentum, LocalSmoothness, PathSmoothness, Probe, every
from smoothdiag.measure.estimators import Estimate, Step

pytestmark = pytest.mark.thorough

STEPS = 12
MODELS = {
    "cnn": (Convolutional, images),
    "gpt": (Gpt, texts),
    "gpt_module": (partial(Gpt, attention=ModuleAttention), texts),
    "lstm": (Recurrent, texts),
    "frozen": (Frozen, images),
    "sparse": (Sparse, texts),
}
OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "clipped": lambda p: ClippedMomentum(p, lr=0.1, threshold=0.5, momentum=0.9, nu=0.7),
    "sparse_adam": lambda p: torch.optim.SparseAdam(p, lr=1e-2),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
}
AUTOCAST = {"bf16": torch.bfloat16, "scaled_bf16": torch.bfloat16, "scaled_fp16": torch.float16}


@dataclass(frozen=True)
class Case:
    """One way to train."""

    model: str
    optimizer: str
    precision: str = "fp32"
    accumulation: int = 1
    backend: str | None = None
    reentrant: bool | None = None
    clip: float | None = None
    warm_up: bool = False

    def __str__(self) -> str:
        shown = [self.model, self.optimizer, self.precision, f"accumulate{self.accumulation}", self.backend]
        reentrant = {None: None, True: "reentrant", False: "non_reentrant"}[self.reentrant]
        shown += [reentrant, self.clip and "clip", self.warm_up and "warm_up"]
        return "-".join(s for s in shown if s and s not in ("fp32", "accumulate1"))


CASES = [
    Case("cnn", "momentum"),
    Case("cnn", "adamw", "bf16"),
    Case("cnn", "fused", "scaled_bf16"),
    Case("cnn", "momentum", "scaled_fp16", clip=0.5),
    Case("cnn", "fused", accumulation=3),
    Case("cnn", "adamw", backend="aot_eager"),
    Case("cnn", "momentum", reentrant=True),
    Case("cnn", "adamw", reentrant=False),
    Case("cnn", "lbfgs"),
    Case("cnn", "clipped"),
    Case("gpt", "adamw", clip=0.5, warm_up=True),
    Case("gpt", "fused", "bf16"),
    Case("gpt", "momentum", "scaled_bf16"),
    Case("gpt", "fused", "scaled_fp16"),
    Case("gpt", "adamw", accumulation=3),
    Case("gpt", "momentum", backend="aot_eager"),
    Case("gpt", "fused", reentrant=True),
    Case("gpt", "adamw", reentrant=False),
    Case("gpt", "lbfgs"),
    Case("gpt_module", "adamw", "bf16"),
    Case("gpt_module", "momentum"),
    Case("gpt_module", "clipped", accumulation=3),
    Case("lstm", "fused"),
    Case("lstm", "momentum", "bf16"),
    Case("lstm", "adamw", "scaled_bf16"),
    Case("lstm", "momentum", accumulation=3),
    Case("lstm", "adamw", backend="aot_eager"),
    Case("lstm", "fused", reentrant=True),
    Case("lstm", "momentum", reentrant=False),
    Case("lstm", "lbfgs"),
    Case("lstm", "clipped"),
    Case("frozen", "momentum"),
    Case("frozen", "adamw", "half"),
    Case("sparse", "sparse_adam"),
    Case("sparse", "momentum", accumulation=3),
    Case("cnn", "momentum", "half"),
    Case("gpt", "adamw", "half"),
    Case("gpt_module", "momentum", "half", reentrant=False),
]
SLOW = [Case(m, o, backend="inductor") for m, o in (("cnn", "fused"), ("gpt", "adamw"), ("lstm", "momentum"))]
SLOW += [Case(m, "adamw", "bf16", backend="inductor") for m in ("cnn", "gpt")]


@dataclass(frozen=True)
class Again:
    """The local estimate once more, from scratch."""

    inner: LocalSmoothness = field(default_factory=LocalSmoothness)

    def __call__(self, step: Step) -> Estimate:
        fresh = replace(step, known_start=None)  # what the step has evaluated already is not taken over
        return replace(self.inner(fresh), estimator="again", parts=())


@dataclass
class Run:
    """What one training left behind."""

    state: dict[str, Any]
    norms: dict[int, float]
    skipped: int
    graphs: int
    probe: Probe | None
    fixed: Probe | None


def whole_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Returns copies of everything, optimizer states that are nested too."""
    leaves, spec = tree_flatten(optimizer.state_dict())
    leaves = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    state = state_of(model) | {"spec": str(spec)} | {f"optimizer {i}": leaf for i, leaf in enumerate(leaves)}
    return {n: v.to_dense() if isinstance(v, Tensor) and v.is_sparse else v for n, v in state.items()}


def norm_of(parameters: Iterable[nn.Parameter], scale: float) -> float:
    squares = [float(p.grad.to_dense().double().square().sum()) for p in parameters if p.grad is not None]
    return math.sqrt(sum(squares)) / scale


def train(case: Case, *, probed: bool) -> Run:
    """Trains for ``STEPS`` as the case says."""
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    if case.backend:
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
    make, data = MODELS[case.model]
    batches = data(STEPS * case.accumulation, 4)
    model = make(case.reentrant)
    if case.precision == "half":
        model.bfloat16()
        batches = [(x.bfloat16() if x.is_floating_point() else x, y) for x, y in batches]
    optimizer = OPTIMIZERS[case.optimizer]([p for p in model.parameters() if p.requires_grad])
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=10) if case.warm_up else None
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**19, enabled=case.precision.startswith("scaled"))
    forward = torch.compile(model, backend=case.backend) if case.backend else model

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        with torch.autocast("cpu", AUTOCAST[case.precision]) if case.precision in AUTOCAST else nullcontext():
            return classification(model, batch)

    estimators = [PathSmoothness(), LocalSmoothness(), Again()]
    options: dict[str, Any] = {"estimators": estimators, "schedule": every(1), "data": "step"}
    probe = Probe(forward, optimizer, loss_fn, **options) if probed else None
    fixed = Probe(forward, optimizer, loss_fn, schedule=every(3)) if probed else None
    norms: dict[int, float] = {}
    skipped = 0
    for i, batch in enumerate(probe.watch(fixed.watch(batches)) if probe and fixed else batches):
        if case.optimizer == "lbfgs":
            seen: list[float] = []

            def closure(batch: Any = batch, seen: list[float] = seen) -> Tensor:
                optimizer.zero_grad()
                loss = loss_fn(forward, batch)
                loss.backward()
                seen.append(norm_of(model.parameters(), 1.0))
                return loss

            optimizer.step(closure)
            norms[i] = seen[0]
            continue
        overflow = math.inf if case.precision == "scaled_bf16" and i == 4 else 1.0
        scaler.scale(loss_fn(forward, batch) / case.accumulation * overflow).backward()
        random.random(), np.random.rand(), torch.rand(())  # as loops do that augment or shuffle
        if (i + 1) % case.accumulation:
            continue
        before, scale = probe.steps if probe else 0, scaler.get_scale()
        if case.clip:
            scaler.unscale_(optimizer)
            norms[before] = norm_of(model.parameters(), 1.0)
            nn.utils.clip_grad_norm_(model.parameters(), case.clip)
        else:
            norms[before] = norm_of(model.parameters(), scale)
        scaler.step(optimizer)
        scaler.update()
        skipped += scaler.get_scale() < scale
        if warm_up:
            warm_up.step()
        if i < len(batches) - 1:
            optimizer.zero_grad()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"] if case.backend else 0
    return Run(whole_state(model, optimizer), norms, skipped, graphs, probe, fixed)


def assert_sane(case: Case, run: Run) -> None:
    """Every row is usable or says why not, is about the gradient of training, and repeats."""
    assert run.probe is not None
    rows = {name: [r for r in run.probe.trace if r["estimator"] == name] for name in ("path", "local", "again")}
    assert run.probe.steps == len(rows["path"]) == len(rows["local"]) == len(rows["again"])
    precise = {"fp32": 1e-5, "half": 0.05, "scaled_fp16": 1e-3}.get(case.precision, 1e-12)
    for row in rows["path"] + rows["local"]:
        norm = run.norms[row["step"]]
        if math.isfinite(norm):  # not where the scaler overflowed
            assert row["grad_norm"] == pytest.approx(norm, rel=1e-12 if run.probe.self_test.reproduced else precise)
        if row["status"] == "below_noise_floor":
            assert row["smoothness"] <= 2 * row["noise_floor"]
        elif row["status"] == "zero_step":
            assert row["estimator"] == "path"
            assert run.skipped
        else:
            assert row["status"] in ("ok", "saturated", "kink_limited")
            assert row["smoothness"] > 2 * row["noise_floor"]
    assert sum(row["status"] in ("ok", "saturated") for row in rows["local"]) > 0.8 * len(rows["local"])
    assert run.fixed is not None
    assert {(row["data"], row["data_step"]) for row in run.fixed.trace} == {("fixed", 0)}
    assert sorted({row["step"] for row in run.fixed.trace}) == list(range(0, run.probe.steps, 3))
    unusable = {"not_reproduced", "data_changed", "non_finite", "failed"}
    assert not unusable & {row["status"] for row in run.fixed.trace}
    for row, twin in zip(rows["local"], rows["again"], strict=True):
        for name in ("smoothness", "grad_norm", "step_norm", "loss", "two_scale", "status"):
            assert row[name] == twin[name], (row["step"], name)


@pytest.mark.parametrize("case", CASES + [pytest.param(case, marks=pytest.mark.slow) for case in SLOW], ids=str)
def test_training_is_unchanged_and_rows_are_sane(case) -> None:
    bare, probed = train(case, probed=False), train(case, probed=True)
    assert_identical(probed.state, bare.state)
    assert probed.graphs == bare.graphs  # measuring compiles nothing
    assert probed.graphs > 0 or case.backend is None
    assert probed.skipped == bare.skipped
    assert probed.skipped > 0 or not case.precision.startswith("scaled")
    assert_sane(case, probed)


def test_the_table_has_every_way_to_train_with_every_model() -> None:
    for model in ("cnn", "gpt", "lstm"):
        cases = [case for case in CASES if case.model == model]
        assert {case.optimizer for case in cases} >= {"momentum", "adamw", "fused", "lbfgs"}
        assert {case.reentrant for case in cases} == {None, True, False}
        assert {case.backend for case in cases} == {None, "aot_eager"}
        assert {case.accumulation for case in cases} == {1, 3}
        assert {case.precision for case in cases} >= {"fp32", "bf16", "scaled_bf16"}
