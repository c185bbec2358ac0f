"""docs/ecosystem.md: LoRA by PEFT trains the same with a probe, whose rows are those of the adapters."""

from typing import Any

import pytest
import torch
from recipes import Norms, assert_rows, assert_same_run, bare, each_step, mean_of_last, off, recipe, shadow, warned

import smoothdiag as sd

pytestmark = pytest.mark.slow
peft = pytest.importorskip("peft")

CODE = recipe("PEFT")


def run(code: str, *, lr: float = 1e-2, steps: int = 6, base: torch.dtype = torch.float32, **options: Any) -> Any:
    """Executes the recipe, or a variant of it, and returns its names with the norms and losses of the loop."""
    from tiny import llama, tokens

    model = llama().to(base)
    if options.get("checkpointing"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    losses: list[float] = []

    def loader() -> Any:
        for part in tokens(4 * steps).split(4):
            yield {"input_ids": part, "labels": part}
            losses.append(float(names["norms"].loss))

    names: dict[str, Any] = {"torch": torch, "sd": sd, "model": model, "lr": lr, "losses": losses}
    names |= {"get_peft_model": peft.get_peft_model, "loader": loader()}

    def config(**given: Any) -> Any:
        return peft.LoraConfig(**given, **options.get("lora", {"lora_dropout": 0.1}))

    names["LoraConfig"] = config
    code = code.replace("for batch in", "norms = watched(model, optimizer)\nfor batch in")
    names["watched"] = _Watched
    exec(code, names)
    return names


class _Watched(Norms):
    """Also keeps the latest loss."""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(optimizer)
        self.loss = float("nan")
        model.register_forward_hook(self._keep)

    def _keep(self, module: Any, args: Any, output: Any) -> None:
        if not sd.measure.loss.objective.Objective.num_isolated:
            self.loss = float(output.loss)


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bfloat16 base": {"base": torch.bfloat16},
    "checkpointing": {"checkpointing": True},
    "dora": {"lora": {"use_dora": True}},
    "saved head": {"lora": {"modules_to_save": ["lm_head"]}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_is_the_same_and_rows_are_those_of_the_adapters(variant: str) -> None:
    options = VARIANTS[variant]
    expected = run(bare(CODE), **options)
    found = run(each_step(off(CODE)), **options)
    assert_same_run({"model": found["model"]}, {"model": expected["model"]})
    assert found["norms"].values == expected["norms"].values
    # Measurements widen a bfloat16 base, so their gradients are not rounded as those of the loop.
    assert_rows(found["probe"].trace, found["norms"].values, rel=5e-2 if variant == "bfloat16 base" else 1e-5)
    held = [p for p in found["model"].parameters() if p.requires_grad]
    assert len(found["probe"]._parameters) == len(held) > 0
    assert_same_run({"model": run(shadow(CODE), **options)["model"]}, {"model": expected["model"]})


def test_auto_clip_helps_at_a_rate_that_is_too_large() -> None:
    best = min(mean_of_last(run(bare(CODE), lr=lr, steps=60)["losses"]) for lr in (3e-3, 1e-2, 3e-2, 1e-1))
    without = mean_of_last(run(bare(CODE), lr=1.0, steps=60)["losses"])
    clipped = run(CODE, lr=1.0, steps=60)
    print(best, without, mean_of_last(clipped["losses"]), clipped["clipper"].reason)
