"""docs/ecosystem.md: a loop in the style of diffusers, whose noise is drawn in the loss or in the loop."""

from typing import Any

import pytest
import torch
from recipes import (
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
from torch.nn import functional as F

import smoothdiag as sd

pytestmark = pytest.mark.slow
diffusers = pytest.importorskip("diffusers")

CODE = recipe("diffusers")


def parts(lr: float, steps: int) -> dict[str, Any]:
    from diffusers.training_utils import EMAModel

    torch.manual_seed(0)
    model = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        dropout=0.1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).train()
    seen = Watch()
    names: dict[str, Any] = {"torch": torch, "sd": sd, "model": model, "seen": seen}
    names["optimizer"] = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    names["scheduler"] = diffusers.DDPMScheduler(num_train_timesteps=100)
    names["average"] = EMAModel(model.parameters(), decay=0.9)
    waves = torch.sin(torch.arange(8.0) + torch.rand(steps, 8, 1, 1, 1) * 6)
    names["loader"] = list(waves.expand(-1, -1, 1, 8, 8).clone())
    return names


class Functional:
    """The functions of a recipe; keeps the losses."""

    def __init__(self, seen: Watch) -> None:
        self._seen = seen

    def mse_loss(self, found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return self._seen.loss(F.mse_loss(found, wanted))


def run(code: str, *, lr: float = 0.03, steps: int = 6) -> dict[str, Any]:
    """Executes the recipe, or a variant of it, and returns its names."""
    names = parts(lr, steps)

    def watch(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.register_step_post_hook(lambda *_: names["average"].step(model.parameters()))
        names["seen"].steps(optimizer)

    exec(watched(code), names | {"watch": watch, "F": Functional(names["seen"])}, names)
    return names


def test_training_is_the_same_and_rows_are_those_of_the_loop() -> None:
    expected, found = run(bare(CODE)), run(each_step(off(CODE)))
    assert_same_run({"model": found["model"]}, {"model": expected["model"]})
    for one, other in zip(found["average"].shadow_params, expected["average"].shadow_params, strict=True):
        assert torch.equal(one, other)
    assert_rows(found["probe"].trace, found["seen"].norms)
    assert found["probe"].self_test.reproduced
    assert_same_run({"model": run(shadow(CODE))["model"]}, {"model": expected["model"]})


def in_the_loop(*, shown: bool, generator: bool) -> dict[str, Any]:
    """Trains with noise drawn in the loop, from a generator of its own or not, and with it in the batch or not."""
    names = parts(0.03, 3)
    model, optimizer, scheduler, seen = (names[name] for name in ("model", "optimizer", "scheduler", "seen"))
    own = torch.Generator().manual_seed(1) if generator else None

    def draw(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(images.shape, generator=own), torch.randint(100, (len(images),), generator=own)

    def loss_of(unet: torch.nn.Module, batch: Any) -> torch.Tensor:
        images, noise, times = batch if shown else (batch, *draw(batch))
        return F.mse_loss(unet(scheduler.add_noise(images, noise, times), times).sample, noise)

    probe = sd.Probe(model, optimizer, loss_of, schedule=sd.every(1), data="step")
    seen.steps(optimizer)
    for images in names["loader"]:
        batch = (images, *draw(images)) if shown else images
        probe.observe(batch)
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return names | {"probe": probe}


def test_noise_of_the_loop_belongs_to_the_batch() -> None:
    found = in_the_loop(shown=True, generator=True)
    assert_rows(found["probe"].trace, found["seen"].norms)


def test_noise_that_a_measurement_cannot_draw_again_is_noticed() -> None:
    with warned("so loss_fn does not repeat itself"):
        found = in_the_loop(shown=False, generator=True)
    assert {row["status"] for row in found["probe"].trace} <= {"below_noise_floor", "not_reproduced"}


def test_auto_clip_helps_at_a_rate_that_is_too_large() -> None:
    fair = [mean_of_last(run(bare(CODE), lr=lr, steps=150)["seen"].losses) for lr in (3e-2, 1e-1)]
    without = mean_of_last(run(bare(CODE), lr=3.0, steps=150)["seen"].losses)
    clipped = run(CODE, lr=3.0, steps=150)
    assert mean_of_last(clipped["seen"].losses) < 1.1 * min(fair)
    assert without > 5 * max(fair)
