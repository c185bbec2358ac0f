"""Tiny Llamas and the Trainers that train them, the same ones every time."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch.utils.data import SequentialSampler
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

VOCABULARY = 32


class Ordered(Trainer):
    """Takes the examples in their order."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


@contextmanager
def settings_of_the_process() -> Iterator[None]:
    """Forgets afterwards what precision and compilation the trainers within asked for: accelerate keeps them."""
    before = dict(os.environ)
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        torch._dynamo.reset()
        os.environ.clear()
        os.environ.update(before)


def llama(dropout: float = 0.1, **options: Any) -> LlamaForCausalLM:
    """Returns a Llama of 5,000 parameters that draws random numbers in training, with further options of its config."""
    set_seed(1)
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 16,
    }
    return LlamaForCausalLM(LlamaConfig(**(sizes | {"attention_dropout": dropout} | options)))


def texts(number: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Returns examples for a language model; the first token, which nothing predicts, is no label to count."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(VOCABULARY, (number, 12), generator=generator)
    labels = drawn.clone()
    labels[:, 0] = -100
    return [{"input_ids": tokens, "labels": expected} for tokens, expected in zip(drawn, labels, strict=True)]


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    """Returns arguments that log every step and save none."""
    defaults: dict[str, Any] = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return TrainingArguments(output_dir=str(folder), **(defaults | options))


def trainer_of(
    folder: Path,
    *,
    kind: type[Trainer] = Trainer,
    lr: float | None = None,
    dropout: float = 0.1,
    layers: int = 2,
    number: int = 20,
    callbacks: Sequence[TrainerCallback] = (),
    **options: Any,
) -> Trainer:
    """Returns a trainer of a new Llama, under AdamW, or with ``lr`` under SGD with momentum at a constant rate."""
    model = llama(dropout, num_hidden_layers=layers)
    optimizers: tuple[Any, Any] = (None, None)
    if lr is not None:
        optimizers = (torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9), None)
        options = {"lr_scheduler_type": "constant"} | options
    trainer = kind(
        model,
        arguments(folder, **options),
        train_dataset=texts(number),
        eval_dataset=texts(4, seed=1),
        callbacks=list(callbacks),
        optimizers=optimizers,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer
