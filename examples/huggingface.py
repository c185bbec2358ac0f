"""Trains a tiny Llama in a Hugging Face Trainer and measures it: ``python examples/huggingface.py --auto-clip``.

It reads Shakespeare from tinyshakespeare/input.txt.gz in the folder that SMOOTHDIAG_DATA names; it downloads nothing.
"""

import argparse
import gzip
import os
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

import smoothdiag as sd
from smoothdiag.integrations.huggingface import SmoothnessCallback

LENGTH = 64  # characters per example


def texts():
    path = Path(os.environ.get("SMOOTHDIAG_DATA", "")) / "tinyshakespeare" / "input.txt.gz"
    if not path.is_file():
        source = "github.com/karpathy/char-rnn, file data/tinyshakespeare/input.txt; gzip it"
        sys.exit(f"There is no `{path}`. Set SMOOTHDIAG_DATA to the folder that holds it. Public source: {source}.")
    text = gzip.decompress(path.read_bytes()).decode()
    codes = {character: code for code, character in enumerate(sorted(set(text)))}
    tokens = torch.tensor([codes[character] for character in text])
    return [{"input_ids": part, "labels": part} for part in tokens.split(LENGTH)[:-1]], len(codes)


def trainer_of(folder, *, lr, steps, max_grad_norm, seed=0):
    examples, vocabulary = texts()
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=LENGTH,
    )
    model = LlamaForCausalLM(config)
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=16,
        lr_scheduler_type="constant",
        max_grad_norm=max_grad_norm,
        logging_steps=max(1, steps // 10),
        save_strategy="no",
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        seed=seed,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    return Trainer(model, args, train_dataset=examples, optimizers=(optimizer, None))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lr", type=float, default=0.3)
    parser.add_argument("--auto-clip", action="store_true", help="let AutoClip keep steps short")
    parser.add_argument("--output", default="huggingface-run")
    options = parser.parse_args()
    max_grad_norm = 1e30 if options.auto_clip else 1.0
    trainer = trainer_of(options.output, lr=options.lr, steps=options.steps, max_grad_norm=max_grad_norm)
    callback = SmoothnessCallback(schedule=sd.every(5), auto_clip=options.auto_clip).bind(trainer)  # the added line
    trainer.train()
    print(sd.fit_smoothness(callback.trace).summary())
    if callback.clipper is not None:
        print(callback.clipper.reason)
