"""docs/ecosystem.md: x-transformers return their loss, so a probe needs neither loss_fn nor batches."""

from typing import Any

import pytest
import torch
from recipes import Norms, assert_rows, assert_same_run, bare, each_step, off, recipe, shadow

import smoothdiag as sd

pytestmark = pytest.mark.slow
x_transformers = pytest.importorskip("x_transformers")

CODE = recipe("x-transformers")


def run(code: str, *, lr: float = 1e-2, steps: int = 6) -> Any:
    """Executes the recipe, or a variant of it, and returns its names with the norms of the loop."""
    from tiny import tokens

    torch.manual_seed(0)
    layers = x_transformers.Decoder(dim=16, depth=2, heads=2, attn_dim_head=8, attn_dropout=0.1, rotary_pos_emb=True)
    names: dict[str, Any] = {"torch": torch, "sd": sd, "lr": lr, "layers": layers, "Norms": Norms}
    names["AutoregressiveWrapper"] = x_transformers.AutoregressiveWrapper
    names["TransformerWrapper"] = x_transformers.TransformerWrapper
    names["loader"] = tokens(4 * steps).split(4)
    exec(code.replace("for batch in", "norms = Norms(optimizer)\nfor batch in"), names)
    return names


def test_training_is_the_same_and_rows_are_those_of_the_loop() -> None:
    expected, found = run(bare(CODE)), run(each_step(off(CODE)))
    assert_same_run({"model": found["model"]}, {"model": expected["model"]})
    assert_rows(found["probe"].trace, found["norms"].values)
    assert found["probe"].self_test.reproduced
    assert_same_run({"model": run(shadow(CODE))["model"]}, {"model": expected["model"]})
