"""Compares AutoClip with fixed thresholds in a Hugging Face Trainer, on the tiny Llama of examples/huggingface.py.

The script prints one line for each rate and seed under SGD with momentum 0.9: a run for each fixed max_grad_norm, and a
run with AutoClip. The loss is the mean over the last tenth of the steps, in nats per character; nan if it is above the
loss of the first step, or not finite. The script takes a quarter of an hour on one core.

    SMOOTHDIAG_DATA=... python benchmarks/frameworks/trainer_thresholds.py
"""

import argparse
import logging
import math
import sys
import tempfile
import warnings
from pathlib import Path

import torch
import transformers
from transformers.trainer_callback import PrinterCallback, ProgressCallback

import smoothdiag as sd
from smoothdiag.integrations.huggingface import SmoothnessCallback

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from huggingface import trainer_of

THRESHOLDS = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003)


def loss_of(lr: float, seed: int, steps: int, threshold: float | None) -> tuple[float, str]:
    """Returns the final loss of a run (NaN if it diverged) and AutoClip's reason; ``None`` uses AutoClip."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(folder, lr=lr, steps=steps, max_grad_norm=threshold or 0.0, seed=seed)
        for printing in (PrinterCallback, ProgressCallback):  # whichever it has
            trainer.remove_callback(printing)
        trainer.args.logging_steps = trainer.state.logging_steps = 1
        trainer.args.logging_nan_inf_filter = False
        estimators = [sd.LocalSmoothness(radius=1e-2, two_scale=False)]
        callback = SmoothnessCallback(estimators=estimators, schedule=sd.every(steps), auto_clip=True)
        if threshold is None:
            callback.bind(trainer)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    last = losses[-max(1, steps // 10) :]
    end = sum(last) / len(last)
    reason = callback.clipper.reason if callback.clipper is not None else ""
    return (end if end < losses[0] else math.nan), reason


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lr", type=float, nargs="+", default=[3.0, 10.0, 30.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore", FutureWarning)
    print("lr seed " + " ".join(f"{threshold:>8g}" for threshold in THRESHOLDS) + "  AutoClip  over the best")
    for lr in options.lr:
        for seed in options.seeds:
            fixed = [loss_of(lr, seed, options.steps, threshold)[0] for threshold in THRESHOLDS]
            own, reason = loss_of(lr, seed, options.steps, None)
            best = min(loss for loss in fixed if not math.isnan(loss))
            row = " ".join(f"{loss:8.4f}" for loss in fixed)
            print(f"{lr:g} {seed} {row}  {own:.4f}  {own / best - 1:+.1%}  ({reason})", flush=True)
