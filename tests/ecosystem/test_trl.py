"""docs/ecosystem.md: TRL's trainers train and log the same with the callback, and AutoClip keeps their steps short."""

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
from recipes import recipe

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]
trl = pytest.importorskip("trl")

CODE = recipe("TRL")


def sft(folder: Path, **options: Any) -> Any:
    from callbacks import COMMON
    from datasets import Dataset
    from tiny import llama, text, tokenizer

    draw = random.Random(0)
    data = Dataset.from_list([{"text": text(draw, 10)} for _ in range(96)])
    return trl.SFTTrainer(
        llama(), args=trl.SFTConfig(str(folder), **COMMON | options), train_dataset=data, processing_class=tokenizer()
    )


def dpo(folder: Path, *, lora: bool = False, **options: Any) -> Any:
    from callbacks import COMMON
    from datasets import Dataset
    from tiny import llama, text, tokenizer

    draw = random.Random(0)
    rows = [
        {"prompt": text(draw, 4), "chosen": " " + text(draw, 5), "rejected": " " + text(draw, 6)} for _ in range(96)
    ]
    if lora:
        from peft import LoraConfig

        given: dict[str, Any] = {"peft_config": LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.1)}
    else:
        given = {"ref_model": llama()}
    arguments = trl.DPOConfig(str(folder), **COMMON | options)
    return trl.DPOTrainer(
        llama(), args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer(), **given
    )


def reward(completions: list[str], **_: Any) -> list[float]:
    """Rewards words that follow from the one before."""
    numbers = [[int(word[1:]) for word in completion.split() if word[1:].isdigit()] for completion in completions]
    return [sum(b == (a + 1) % 29 for a, b in itertools.pairwise(n)) + 0.1 * len(set(n)) for n in numbers]


def grpo(folder: Path, **options: Any) -> Any:
    from callbacks import COMMON
    from datasets import Dataset
    from tiny import llama, text, tokenizer
    from transformers import LlamaForCausalLM

    draw = random.Random(0)
    data = Dataset.from_list([{"prompt": text(draw, 4)} for _ in range(96)])
    llama().save_pretrained(folder / "begun")  # TRL reads the reference model from where the model came from
    tokenizer().save_pretrained(folder / "begun")
    sizes = {"num_generations": 4, "max_completion_length": 6}
    return trl.GRPOTrainer(
        LlamaForCausalLM.from_pretrained(folder / "begun"),
        reward,
        args=trl.GRPOConfig(str(folder), **COMMON | sizes | options),
        train_dataset=data,
        processing_class=tokenizer(),
    )


RUNS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sft": (sft, {}),
    "sft accumulated": (sft, {"gradient_accumulation_steps": 2}),
    "dpo": (dpo, {}),
    "dpo with lora": (dpo, {"lora": True, "gradient_accumulation_steps": 2}),
    "grpo": (grpo, {}),
    "grpo accumulated": (grpo, {"gradient_accumulation_steps": 2}),
    "grpo with reference": (grpo, {"num_iterations": 2, "beta": 0.05}),
    "grpo off policy": (grpo, {"steps_per_generation": 4, "loss_type": "grpo"}),
}


@pytest.mark.parametrize("name", RUNS)
def test_training_and_logs_are_the_same_and_rows_are_those_of_the_trainer(name: str, tmp_path: Path) -> None:
    from callbacks import assert_only_watches

    make, options = RUNS[name]
    assert_only_watches(lambda: make(tmp_path, max_steps=6, learning_rate=1e-3, bf16=False, **options), CODE)


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_auto_clip_helps_at_a_rate_that_is_too_large(name: str, tmp_path: Path) -> None:
    from callbacks import ends

    def make(**options: Any) -> Any:
        return RUNS[name][0](tmp_path, max_steps=60, bf16=False, lr_scheduler_type="constant", **options)

    fair, without, clipped = ends(make, CODE, 3.0, (1e-2, 3e-2))
    assert without > 2 * max(fair)
    assert clipped < {"sft": 1.1 * min(fair), "dpo": 0.6}[name]  # a model that prefers nothing has a loss of 0.69


def test_auto_clip_keeps_a_policy_at_a_rate_that_ruins_it(tmp_path: Path) -> None:
    from callbacks import ends

    def make(**options: Any) -> Any:
        return grpo(tmp_path, max_steps=60, bf16=False, lr_scheduler_type="constant", **options)

    fair, without, clipped = ends(make, CODE, 1.0, (3e-3, 1e-2), "reward")
    assert without < 0.5 * min(fair)
    assert clipped > 0.8 * max(fair)
