"""docs/ecosystem.md: a loop in the style of timm's training script, with EMA, AGC, Mixup and mixed precision."""

import contextlib
import random
from typing import Any

import numpy as np
import pytest
import torch
from recipes import (
    FINE,
    Watch,
    assert_rows,
    assert_same_run,
    bare,
    each_step,
    mean_of_last,
    off,
    recipe,
    shadow,
    warned,
    watched,
)

import smoothdiag as sd

pytestmark = pytest.mark.slow
timm = pytest.importorskip("timm", exc_type=ImportError)

CODE = recipe("timm")


def run(
    code: str,
    *,
    name: str = "test_resnet",
    opt: str = "sgd",
    lr: float = 0.05,
    steps: int = 6,
    clip: tuple[float, str] | None = None,
    amp: torch.dtype | None = None,
    scales: bool = False,
) -> dict[str, Any]:
    """Executes the recipe, or a variant of it, and returns its names."""
    import timm.optim
    from timm.data import Mixup
    from timm.loss import SoftTargetCrossEntropy
    from timm.models import model_parameters
    from timm.utils import ModelEmaV3, NativeScaler, dispatch_clip_grad

    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    sizes = {"img_size": 32} if "vit" in name else {}
    model = timm.create_model(name, num_classes=10, drop_rate=0.1, **sizes).train()
    optimizer = timm.optim.create_optimizer_v2(model, opt=opt, lr=lr, weight_decay=2e-5, momentum=0.9)
    seen, criterion, scaler = Watch(), SoftTargetCrossEntropy(), NativeScaler("cpu")
    means = torch.randn(10, 3, 1, 1)

    def native(loss: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
        # As in timm's script: the head is not clipped under AGC.
        value, mode = clip or (None, "norm")
        held = list(model_parameters(model, exclude_head="agc" in mode))
        if scales:
            scaler(loss, optimizer, clip_grad=value, clip_mode=mode, parameters=held)
            return
        loss.backward()
        seen.left(optimizer)
        if value is not None:
            dispatch_clip_grad(held, value=value, mode=mode)
        optimizer.step()

    def loader() -> Any:
        for _ in range(steps):
            labels = torch.randint(10, (16,))
            yield means[labels] + torch.randn(16, 3, 32, 32), labels

    names: dict[str, Any] = {"sd": sd, "model": model, "optimizer": optimizer, "loader": loader(), "seen": seen}
    names |= {"loss_scaler": native, "mixup_fn": Mixup(mixup_alpha=0.2, cutmix_alpha=1.0, num_classes=10)}
    names |= {"loss_fn": lambda found, wanted: seen.loss(criterion(found, wanted))}
    names |= {"model_ema": ModelEmaV3(model, decay=0.9), "watch": lambda model, optimizer: seen.steps(optimizer)}
    cast = (lambda: torch.autocast("cpu", amp)) if amp else contextlib.nullcontext
    exec(watched(code), names | {"amp_autocast": cast}, names)
    return names


def trained(names: dict[str, Any]) -> dict[str, Any]:
    return {"model": names["model"], "average": names["model_ema"]}


VARIANTS: dict[str, dict[str, Any]] = {
    "not clipped": {},
    "agc": {"clip": (0.01, "agc")},
    "norm": {"clip": (1.0, "norm")},
    "value": {"clip": (0.01, "value")},
    "bfloat16": {"amp": torch.bfloat16, "name": "test_vit", "opt": "adamw", "lr": 1e-3},
    "bfloat16, scaler, agc": {"amp": torch.bfloat16, "name": "test_vit", "scales": True, "clip": (0.01, "agc")},
    "bfloat16 with batch statistics, agc": {"amp": torch.bfloat16, "scales": True, "clip": (0.01, "agc")},
    "float16, scaler": {"amp": torch.float16, "name": "test_vit", "scales": True},
    "lamb": {"opt": "lamb"},
    "muon": {"opt": "muon"},
    "nadamw": {"opt": "nadamw", "lr": 1e-3},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_is_the_same_and_rows_are_those_before_clipping(variant: str) -> None:
    options = VARIANTS[variant]
    expected, found = run(bare(CODE), **options), run(each_step(off(CODE)), **options)
    assert_same_run(trained(found), trained(expected))
    norms = found["seen"].norms
    if options.get("scales"):  # under a scaler the unclipped gradient is nowhere to be seen
        norms = [row["grad_norm"] for row in found["probe"].trace if row["estimator"] == "local"]
    # With batch statistics of sixteen images, bfloat16 rounds away what a short secant shows.
    noisy = {"below_noise_floor"} if "batch statistics" in variant else set()
    assert_rows(found["probe"].trace, norms, FINE | noisy)
    assert found["probe"].self_test.angle == 0
    if not options.get("clip"):
        assert_same_run(trained(run(shadow(CODE), **options)), trained(expected))


@pytest.mark.parametrize("variant", [name for name in VARIANTS if VARIANTS[name].get("clip")])
def test_auto_clip_notices_that_something_else_clips(variant: str) -> None:
    with warned("Something else seems to clip first"):
        run(CODE, **VARIANTS[variant])
    with warned("Something else seems to clip first"):
        found = run(shadow(CODE), **VARIANTS[variant])
    assert_same_run(trained(found), trained(run(bare(CODE), **VARIANTS[variant])))


def test_auto_clip_helps_at_rates_that_are_too_large_and_agc_does_not_at_all_of_them() -> None:
    fair = [mean_of_last(run(bare(CODE), lr=lr, steps=80)["seen"].losses) for lr in (1e-2, 1e-1)]
    for lr in (1.0, 10.0):
        without = mean_of_last(run(bare(CODE), lr=lr, steps=80)["seen"].losses)
        clipped = run(CODE, lr=lr, steps=80)
        assert mean_of_last(clipped["seen"].losses) < 1.1 * min(fair)
        assert without > 1.5 * max(fair)
    agc = mean_of_last(run(bare(CODE), lr=10.0, steps=80, clip=(0.01, "agc"))["seen"].losses)
    assert agc > 5 * max(fair)
