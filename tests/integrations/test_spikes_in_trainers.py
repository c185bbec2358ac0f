"""integrations: the callbacks' guard sees spikes under Hugging Face and Lightning, finds causes, and changes no bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from asserts import assert_identical, state_of

from smoothdiag import SpikeRule, every

pytestmark = [pytest.mark.thorough, pytest.mark.filterwarnings("ignore")]

RULE = {"rule": SpikeRule(window=20, fewest=8, deviations=4.0, least_ratio=1.5)}
SPIKE = 30


def spoilt_texts(parts: int) -> Any:
    from trainers import texts

    found = texts(160 * parts)
    for example in found:  # easy to learn, so that the loss is low
        example["input_ids"] = torch.arange(len(example["input_ids"])) % 5
        example["labels"] = example["input_ids"].clone()
    for example in found[4 * parts * SPIKE : 4 * parts * (SPIKE + 1)]:
        example["labels"] = (example["labels"] * 3 + 11) % 32
    return found


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.05}, {"gradient_accumulation_steps": 2}])
def test_a_spike_under_hugging_face(options: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from trainers import Ordered, settings_of_the_process, trainer_of

    from smoothdiag.integrations.huggingface import SmoothnessCallback

    def train(callback: Any = None) -> Any:
        trainer = trainer_of(tmp_path, kind=Ordered, max_steps=40, dropout=0.0, **options)
        trainer.train_dataset = spoilt_texts(options.get("gradient_accumulation_steps", 1))
        if callback is not None:
            callback.bind(trainer)
        trainer.train()
        return trainer

    with settings_of_the_process():
        callback = SmoothnessCallback(estimators=(), schedule=every(10**9), spikes=RULE)
        watched, bare = train(callback), train()
        assert_identical(state_of(watched.model), state_of(bare.model))
        events = callback.guard.events
        assert events, "the spike is seen"
        found = callback.guard.explain(events[-1])
        assert events[0].step == SPIKE
        assert found.cause == "data", found
        assert "clip_grad_norm_" not in vars(watched.accelerator)
        logged = [line for line in watched.state.log_history if "smoothdiag/spike/step" in line]
        assert next(line["smoothdiag/spike/step"] for line in logged) == SPIKE
        assert all(line["step"] > line["smoothdiag/spike/step"] for line in logged)
        assert sum(line["smoothdiag/spike/number"] for line in logged) <= len(events)


@pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 0.05}, {"accumulate_grad_batches": 2}])
def test_a_spike_under_lightning(options: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    from lightning.pytorch.loggers.logger import DummyLogger
    from lightning_runs import Module, adamw, data, fit
    from torch.utils.data import DataLoader, TensorDataset

    from smoothdiag.integrations.lightning import SmoothnessCallback

    parts = options.get("accumulate_grad_batches", 1)
    x, y = data(640 * parts).dataset.tensors
    x, y = x.clone(), (x.clone()[:, 0] > 0).long()
    y[16 * parts * SPIKE : 16 * parts * (SPIKE + 1)] = 39
    loader = DataLoader(TensorDataset(x, y), batch_size=16)
    callback, logged = SmoothnessCallback(estimators=(), schedule=every(10**9), spikes=RULE), {}

    class Logger(DummyLogger):
        def log_metrics(self, metrics: dict[str, float], step: int) -> None:
            logged[step] = metrics | logged.get(step, {})

    runs = [
        fit(*given, make=lambda: Module(adamw), loader=loader, logger=Logger(), **options)
        for given in ((callback,), ())
    ]
    assert_identical(*(state_of(module, trainer.optimizers[0]) for module, trainer in runs))
    events = callback.guard.events
    assert events[0].step == SPIKE
    spikes = {step: values for step, values in logged.items() if "smoothdiag/spike/signals" in values}
    assert list(spikes) == [event.step for event in events]
    name = events[0].spiked[0]
    assert spikes[SPIKE][f"smoothdiag/spike/{name}_deviations"] == events[0].deviations[name]
    assert set(events[0].values) == {"grad_norm", "loss"}
    assert callback.guard.explain(events[0]).cause == "data", callback.guard.explain(events[0])
    state = callback.state_dict()
    assert state["guard"]["journal"]["events"]


def test_wrong_options_of_the_guard_are_refused() -> None:
    pytest.importorskip("lightning")
    from smoothdiag.integrations.lightning import SmoothnessCallback

    with pytest.raises(ValueError, match="Parameter `spikes` should be True, False or options of SpikeGuard"):
        SmoothnessCallback(spikes="yes")
    with pytest.raises(ValueError, match="Parameter `spikes` should hold options of SpikeGuard: action, clip_to"):
        SmoothnessCallback(spikes={"threshold": 1})
