"""docs/ecosystem.md: LoRA by PEFT trains the same with a probe, whose rows are those of the adapters."""

from typing import Any

import pytest
import torch
from recipes import Watch, assert_rows, assert_same_run, bare, each_step, mean_of_last, off, recipe, shadow, watched

import smoothdiag as sd

pytestmark = pytest.mark.slow
peft = pytest.importorskip("peft")

CODE = recipe("PEFT")


def run(
    code: str,
    *,
    lr: float = 1e-2,
    steps: int = 6,
    base: torch.dtype = torch.float32,
    checkpointing: bool = False,
    **lora: Any,
) -> dict[str, Any]:
    """Executes the recipe, or a variant of it, and returns its names."""
    from tiny import llama, tokens

    model = llama().to(base)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    names: dict[str, Any] = {"torch": torch, "sd": sd, "model": model, "lr": lr, "seen": Watch()}
    names |= {"get_peft_model": peft.get_peft_model, "LoraConfig": lambda **given: peft.LoraConfig(**given, **lora)}
    names["loader"] = [{"input_ids": part, "labels": part} for part in tokens(4 * steps).split(4)]

    def watch(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        names["seen"].calls(model)
        names["seen"].steps(optimizer)

    exec(watched(code), names | {"watch": watch}, names)
    return names


VARIANTS: dict[str, dict[str, Any]] = {
    "dropout": {"lora_dropout": 0.1},
    "bfloat16 base": {"base": torch.bfloat16},
    "checkpointing": {"checkpointing": True},
    "dora": {"use_dora": True},
    "saved head": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_is_the_same_and_rows_are_those_of_the_adapters(variant: str) -> None:
    options = VARIANTS[variant]
    expected, found = run(bare(CODE), **options), run(each_step(off(CODE)), **options)
    assert_same_run({"model": found["model"]}, {"model": expected["model"]})
    assert found["seen"].norms == expected["seen"].norms
    # Measurements widen a bfloat16 base, so their gradients are not rounded as those of the loop.
    assert_rows(found["probe"].trace, found["seen"].norms, rel=5e-2 if variant == "bfloat16 base" else 1e-5)
    assert 0 < sum(p.requires_grad for p in found["model"].parameters()) == len(found["probe"]._parameters)
    assert_same_run({"model": run(shadow(CODE), **options)["model"]}, {"model": expected["model"]})


def test_auto_clip_helps_at_a_rate_that_is_too_large() -> None:
    best = min(mean_of_last(run(bare(CODE), lr=lr, steps=100)["seen"].losses) for lr in (1e-2, 3e-2, 1e-1, 3e-1))
    without = mean_of_last(run(bare(CODE), lr=10.0, steps=100)["seen"].losses)
    clipped = run(CODE, lr=10.0, steps=100)
    assert mean_of_last(clipped["seen"].losses) < best + 0.02 < without - 0.05
    assert clipped["clipper"].clip_fraction > 0.9
