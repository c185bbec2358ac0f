"""docs/ecosystem.md: x-transformers return their loss, so a probe needs neither loss_fn nor batches."""

from typing import Any

import pytest
import torch
from recipes import Watch, assert_rows, assert_same_run, bare, each_step, mean_of_last, off, recipe, shadow, watched

import smoothdiag as sd

pytestmark = pytest.mark.slow
x_transformers = pytest.importorskip("x_transformers")

CODE = recipe("x-transformers")


def run(code: str, *, lr: float = 1e-2, steps: int = 6) -> dict[str, Any]:
    """Executes the recipe, or a variant of it, and returns its names."""
    from tiny import tokens

    torch.manual_seed(0)
    layers = x_transformers.Decoder(dim=16, depth=2, heads=2, attn_dim_head=8, attn_dropout=0.1)
    names: dict[str, Any] = {"torch": torch, "sd": sd, "lr": lr, "layers": layers, "seen": Watch()}
    names["AutoregressiveWrapper"] = x_transformers.AutoregressiveWrapper
    names["TransformerWrapper"] = x_transformers.TransformerWrapper
    names["loader"] = tokens(4 * steps).split(4)

    def watch(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        names["seen"].calls(model)
        names["seen"].steps(optimizer)

    exec(watched(code), names | {"watch": watch}, names)
    return names


def test_training_is_the_same_and_rows_are_those_of_the_loop() -> None:
    expected, found = run(bare(CODE)), run(each_step(off(CODE)))
    assert_same_run({"model": found["model"]}, {"model": expected["model"]})
    assert_rows(found["probe"].trace, found["seen"].norms)
    assert found["probe"].self_test.reproduced
    assert_same_run({"model": run(shadow(CODE))["model"]}, {"model": expected["model"]})


def test_auto_clip_helps_at_a_rate_that_is_too_large() -> None:
    best = min(mean_of_last(run(bare(CODE), lr=lr, steps=100)["seen"].losses) for lr in (3e-3, 1e-2, 3e-2))
    without = mean_of_last(run(bare(CODE), lr=3.0, steps=100)["seen"].losses)
    clipped = run(CODE, lr=3.0, steps=100)
    assert mean_of_last(clipped["seen"].losses) < 1.1 * best
    assert without > 2 * best
    assert clipped["clipper"].clip_fraction > 0.9
