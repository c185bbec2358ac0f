"""Snippets: the lines to paste into a training script, for four ways to train."""

from __future__ import annotations

import math
from typing import Final, NamedTuple

from smoothdiag.report.answer import short


class Snippet(NamedTuple):
    """Lines of code, and the framework that they are for."""

    framework: str
    code: str


_WITH_THRESHOLD: Final = (
    Snippet("Hugging Face", "args = TrainingArguments(..., max_grad_norm={value})"),
    Snippet("Lightning", "trainer = Trainer(..., gradient_clip_val={value})"),
    Snippet(
        "PyTorch",
        "loss.backward()\ntorch.nn.utils.clip_grad_norm_(model.parameters(), {value})\noptimizer.step()",
    ),
    Snippet(
        "Accelerate",
        "accelerator.backward(loss)\n"
        "if accelerator.sync_gradients:\n"
        "    accelerator.clip_grad_norm_(model.parameters(), {value})\n"
        "optimizer.step()",
    ),
)

_PROBE: Final = (
    'probe = sd.Probe(model, {optimizer}, loss_fn, trace="run.jsonl")\n'
    "clipper = sd.AutoClip({optimizer}, probe)\n"
    "for batch in probe.watch(loader):\n"
    "    ...  # your loop, without its own clipping"
)

_WITH_AUTOCLIP: Final = (
    Snippet(
        "Hugging Face",
        "from smoothdiag.integrations.huggingface import SmoothnessCallback\n\n"
        "args = TrainingArguments(..., max_grad_norm=1e30)  # never clips: AutoClip does\n"
        "SmoothnessCallback(auto_clip=True).bind(trainer)  # before trainer.train()",
    ),
    Snippet(
        "Lightning",
        "from smoothdiag.integrations.lightning import SmoothnessCallback\n\n"
        "# without gradient_clip_val: AutoClip clips instead\n"
        "trainer = Trainer(..., callbacks=[SmoothnessCallback(auto_clip=True)])",
    ),
    Snippet("PyTorch", "import smoothdiag as sd\n\n" + _PROBE.format(optimizer="optimizer")),
    Snippet(
        "Accelerate",
        "import smoothdiag as sd\n\n# after accelerator.prepare(...)\n"
        + _PROBE.format(optimizer="optimizer.optimizer"),
    ),
)


def snippets(threshold: float) -> tuple[Snippet, ...]:
    """Returns the lines that set a threshold; for NaN the lines that attach an AutoClip."""
    if math.isnan(threshold):
        return _WITH_AUTOCLIP
    return tuple(Snippet(name, code.format(value=short(threshold))) for name, code in _WITH_THRESHOLD)
