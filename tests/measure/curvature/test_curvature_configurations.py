"""measure.curvature: the Hessian is right to 2% of a float64 twin in every way that models are run."""

import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from asserts import assert_identical, state_of
from curved import (
    SEED,
    Gpt,
    Recurrent,
    Residual,
    Silu,
    as_in_float64,
    coordinates_of,
    data_of,
    dense_hessian,
    forced,
    fused,
    objective_of,
    trained,
    under_autocast,
)
from losses import classification
from torch import Tensor, nn

from smoothdiag import DirectionalCurvature, HessianNorm, Probe, Sharpness, every
from smoothdiag.measure.curvature import hvp
from smoothdiag.measure.curvature.spectrum import lanczos

pytestmark = pytest.mark.thorough

TOLERANCE = 0.02


@contextmanager
def without_mkldnn() -> Iterator[None]:
    before = torch.backends.mkldnn.enabled
    torch._C._set_mkldnn_enabled(False)
    yield
    torch._C._set_mkldnn_enabled(before)


@dataclass(frozen=True)
class Configuration:
    """One way to run a model, and the way to multiply by its Hessian that is expected to be found."""

    name: str
    model: "partial[nn.Module]"
    twin: "partial[nn.Module] | None" = None
    rung: str = "retained"
    loss_fn: Callable[[nn.Module, Any], Tensor] = classification
    surroundings: Callable[[], AbstractContextManager[None]] = nullcontext
    backend: str | None = None
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return self.name

    @property
    def plain(self) -> "partial[nn.Module]":
        return self.twin or self.model

    @property
    def batch(self) -> tuple[Tensor, Tensor]:
        return data_of(self.model.func)

    def trained(self, make: "partial[nn.Module]") -> nn.Module:
        """Returns the model with the weights of its trained twin."""
        with torch.random.fork_rng([]):
            model = make().to(self.dtype)
        model.load_state_dict(trained(self.plain))
        return model


GPT, RNN, CNN = partial(Gpt), partial(Recurrent), partial(Residual)
UNTIED, DROPPED = partial(Gpt, tied=False), partial(Gpt, dropout=0.2)
FROZEN, UNUSED, STILL = partial(Gpt, frozen=True), partial(Gpt, unused=True), partial(Residual, training=False)
CONFIGURATIONS = [
    Configuration("gpt_by_hand_tied", GPT),
    Configuration("gpt_untied", UNTIED),
    Configuration("gpt_fused", partial(Gpt, fused), GPT),
    Configuration("gpt_math", partial(Gpt, forced), GPT),
    Configuration("lstm", RNN),
    Configuration("lstm_without_mkldnn", RNN, surroundings=without_mkldnn),
    Configuration("batch_norm_train", CNN),
    Configuration("batch_norm_eval", STILL),
    Configuration("dropout", DROPPED),
    Configuration("frozen", FROZEN),
    Configuration("unused", UNUSED),
    Configuration("non_reentrant", partial(Gpt, fused, reentrant=False), GPT),
    Configuration("reentrant", partial(Gpt, fused, reentrant=True), GPT, "central"),
    Configuration("bf16_autocast", partial(Gpt, fused), GPT, loss_fn=under_autocast),
    Configuration("bf16_parameters", partial(Gpt, fused), GPT, dtype=torch.bfloat16),
    Configuration("once_differentiable", partial(Gpt, activation=Silu.apply), GPT, "central"),
    Configuration("inductor", partial(Gpt, fused), GPT, backend="inductor"),
    Configuration("aot_eager", partial(Gpt, fused), GPT, backend="aot_eager"),
]
PARAMETERS = [pytest.param(c, marks=pytest.mark.slow if c.backend == "inductor" else ()) for c in CONFIGURATIONS]


@lru_cache
def spectrum_of(make: "partial[nn.Module]", dtype: torch.dtype) -> np.ndarray:
    """Returns the eigenvalues of the dense Hessian of the twin in float64, at weights that ``dtype`` holds."""
    with torch.random.fork_rng([]):
        model = make().to(dtype)
    model.load_state_dict(trained(make))
    inputs, targets = data_of(make.func)
    model = as_in_float64(model, inputs)
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    hessian = dense_hessian(lambda: classification(model, (inputs, targets)), coordinates_of(model))
    return np.linalg.eigvalsh(hessian.numpy())


def wanted(case: Configuration) -> float:
    values = spectrum_of(case.plain, case.dtype)
    return float(np.abs(values).max())


def switches() -> dict[str, Any]:
    """Returns everything global that guards may touch."""
    backends = torch.backends
    return {
        "autocast": torch.is_autocast_enabled("cpu"),
        "autocast dtype": torch.get_autocast_dtype("cpu"),
        "autocast cache": torch.is_autocast_cache_enabled(),
        "autocast enter": torch.autocast.__enter__,
        "autocast exit": torch.autocast.__exit__,
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "attention": [
            getattr(backends.cuda, f"{kind}_sdp_enabled")() for kind in ("flash", "mem_efficient", "math", "cudnn")
        ],
        "attention order": str(torch._C._get_sdp_priority_order()),
        "cudnn": (backends.cudnn.enabled, backends.cudnn.benchmark, backends.cudnn.deterministic),
        "mkldnn": (backends.mkldnn.enabled, backends.mkldnn.deterministic),
        "stance": str(torch._dynamo.eval_frame._stance),
        "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
    }


def everything(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """Returns the state of the model and of what surrounds it, tensors also by identity and memory."""
    named = [*model.named_parameters(), *model.named_buffers()]
    found = state_of(model, optimizer) | switches()
    found |= {f"tensor {n}": (id(t), t.data_ptr(), t.dtype, t.requires_grad, t.is_leaf) for n, t in named}
    found |= {f"grad of {n}": (id(p.grad), p.grad is None or p.grad.data_ptr()) for n, p in model.named_parameters()}
    return found | {f"hooks {n}": str(vars(m).get("_forward_hooks")) for n, m in model.named_modules()}


def started(case: Configuration) -> nn.Module:
    """Returns the model in the middle of training: compiled if it is to be, with gradients, generators moved on."""
    if case.backend:
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
    model = case.trained(case.model)
    model = torch.compile(model, backend=case.backend) if case.backend else model
    case.loss_fn(model, case.batch).backward()
    random.random(), np.random.rand(), torch.rand(3)
    next(model.parameters()).grad = None  # one gradient is missing, as after zero_grad
    return model


@pytest.mark.parametrize("case", PARAMETERS, ids=str)
def test_largest_eigenvalue_is_that_of_the_twin_and_nothing_changes(case, record_property) -> None:
    with case.surroundings():
        model = started(case)
        objective = objective_of(model, case.loss_fn, case.batch)
        before = everything(model)
        loss = objective.evaluate().loss
        with hvp(objective) as hessian:
            found = lanczos(hessian, hessian.gradient)
            objective.value()  # a forward pass is the last thing that happens
        assert_identical(everything(model), before)
    error = found.norm / wanted(case) - 1
    record_property("found", f"{hessian.backend} {error:.1e} in {found.num_products}; {hessian.reason}")
    assert hessian.backend == case.rung, hessian.reason
    assert found.converged
    assert abs(error) < TOLERANCE
    assert loss == pytest.approx(loss_of_twin(case), rel=1e-2 if case.loss_fn is under_autocast else 1e-5)


def loss_of_twin(case: Configuration) -> float:
    """Returns the loss in float64, so that both are seen to be of the same dropout mask and the same rounding."""
    model = as_in_float64(case.trained(case.plain), case.batch[0])
    inputs, targets = case.batch
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    return float(classification(model, (inputs, targets)).detach())


@pytest.mark.parametrize("case", PARAMETERS, ids=str)
def test_rows_are_right_and_training_goes_on_as_without(case, record_property) -> None:
    states = []
    for probed in (False, True):
        with case.surroundings():
            torch.manual_seed(0), np.random.seed(0), random.seed(0)
            model = started(case)
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
            estimators = [HessianNorm(), Sharpness(), DirectionalCurvature()]
            probe = Probe(model, optimizer, case.loss_fn, estimators=estimators, schedule=every(1)) if probed else None
            for _ in range(2):
                optimizer.zero_grad()
                torch.manual_seed(SEED)
                if probe:
                    probe.observe(case.batch)
                case.loss_fn(model, case.batch).backward()
                optimizer.step()
            found = everything(model, optimizer)
            states.append({n: v for n, v in found.items() if not n.startswith(("tensor ", "grad of "))})
    assert_identical(states[1], states[0])
    rows = {(row["estimator"], row["step"]): row for row in probe.trace}
    norm, sharpness, batch = (rows[name, 0] for name in ("hessian_norm", "sharpness", "batch_sharpness"))
    error = norm["smoothness"] / wanted(case) - 1
    record_property("row", f"{norm['hvp']} {error:.1e} {norm['status']}")
    assert (norm["hvp"], norm["status"]) == (case.rung, "ok")
    assert abs(error) < TOLERANCE
    assert sharpness["smoothness"] == pytest.approx(spectrum_of(case.plain, case.dtype)[-1], rel=TOLERANCE)
    assert batch["smoothness"] < sharpness["smoothness"] * 1.001
    assert abs(rows["hessian_norm", 1]["smoothness"] / norm["smoothness"] - 1) < 0.5


def test_the_configurations_do_what_their_names_say() -> None:
    """Otherwise the tests above would hold for models that meet none of the difficulties."""
    assert len(CONFIGURATIONS) == 18
    cases = {case.name: case for case in CONFIGURATIONS}
    for name, missing in (
        ("gpt_fused", "flash_attention"),
        ("reentrant", "use_reentrant"),
        ("aot_eager", "donated buffers|double backward"),
    ):
        model = cases[name].trained(cases[name].model)
        model = torch.compile(model, backend="aot_eager") if name == "aot_eager" else model
        with pytest.raises(RuntimeError, match=missing):
            differentiate_twice(model, cases[name])
    for name in ("gpt_by_hand_tied", "gpt_math", "lstm_without_mkldnn", "non_reentrant"):
        case = cases[name] if name != "non_reentrant" else Configuration("", partial(Gpt, reentrant=False), GPT)
        with case.surroundings():
            differentiate_twice(case.trained(case.model), case)


def differentiate_twice(model: nn.Module, case: Configuration) -> None:
    parameters = coordinates_of(model)
    gradients = torch.autograd.grad(case.loss_fn(model, case.batch), parameters, create_graph=True)
    torch.autograd.grad(sum(g.sum() for g in gradients), parameters, allow_unused=True)
