"""docs/doctor.md: in TRL's loops, a clip in the wrong place is named with the place that TRL has for it."""

from typing import Any

import pytest
import torch

from smoothdiag.doctor.watching import watch_all

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]
pytest.importorskip("trl")

norms = []


def clip(arguments: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
    norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01))


@pytest.mark.parametrize(("event", "expected"), [
    ("", []),
    ("on_pre_optimizer_step", []),
    ("on_optimizer_step", ["clip-after-step"]),
    ("on_substep_end", ["clip-per-micro-batch"]),
])  # fmt: skip
def test_clip_in_a_callback_of_sft(tmp_path, event, expected) -> None:
    from test_trl import sft
    from transformers import TrainerCallback

    options = {"max_grad_norm": 1.0, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "max_steps": 6}
    with watch_all() as watcher:
        trainer = sft(tmp_path, **options)
        if event:
            trainer.add_callback(type("Clips", (TrainerCallback,), {event: staticmethod(clip)})())
        trainer.train()
    found = [each for each in watcher.observer.findings() if each.severity != "note"]
    assert watcher.observer.steps == 6
    assert [each.name for each in found] == expected
    for each in found:
        assert (each.file, each.site.function) == (__file__, "clip")
        assert "max_grad_norm of TrainingArguments" in each.change
