"""integrations.huggingface: the callback leaves training in a Trainer as it is, and reports what the Trainer did."""

import importlib
import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from asserts import assert_identical, state_of
from torch import nn
from torch.testing import assert_close
from trainers import VOCABULARY, Ordered, llama, settings_of_the_process, texts, trainer_of
from transformers import Trainer, TrainerCallback

from smoothdiag import AutoClip, LocalSmoothness, PathSmoothness, Probe, SmoothdiagWarning, StepRule, Trace, every
from smoothdiag.integrations.huggingface import STATE_FILE, SmoothnessCallback
from smoothdiag.measure.loss.factors import Factor

pytestmark = pytest.mark.thorough

OLD = transformers.__version__.startswith("4.")  # whose trainer rounds losses, and may log the next step's rate

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "accumulation": {"gradient_accumulation_steps": 3},  # of 5 micro-batches in an epoch: 3 and 2
    "bf16": {"bf16": True},
    "label_smoothing": {"label_smoothing_factor": 0.1},
    "label_smoothing_accumulation": {"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 3},
    "gradient_checkpointing": {"gradient_checkpointing": True},
    "torch_compile": {"torch_compile_backend": "aot_eager", "layers": 1},  # compiled twice
    "clipped": {"max_grad_norm": 0.1},
    "not_clipped": {"max_grad_norm": 0.0},
    "momentum": {"lr": 0.05, "gradient_accumulation_steps": 3},
}


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    with settings_of_the_process():
        yield


class States(TrainerCallback):
    """Keeps what there is after each step, with the gradients still there."""

    def __init__(self) -> None:
        self.states: list[dict[str, Any]] = []

    def on_optimizer_step(self, args, state, control, model, optimizer, **kwargs) -> None:
        self.states.append(state_of(model, optimizer.optimizer))


def logged(trainer: Trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def column(callback: SmoothnessCallback, name: str, estimator: str = "path") -> list[float]:
    return [row[name] for row in callback.trace if row["estimator"] == estimator]


def assert_as_logged(callback: SmoothnessCallback, trainer: Trainer, scale: float = 1.0) -> None:
    """Compares losses and gradient norms with those that the trainer logged, the norms ``scale`` times as large."""
    norms = [norm / scale for norm in logged(trainer, "grad_norm")]
    if norms or trainer.args.max_grad_norm:  # older trainers log no norm where they do not clip
        assert_close(column(callback, "grad_norm"), norms, rtol=1e-6, atol=0)
    rounding = 5e-5 if OLD else 0
    assert_close(column(callback, "loss"), logged(trainer, "loss"), rtol=1e-6, atol=rounding)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name == "label_smoothing" else ()) for name in CONFIGURATIONS],
)
def test_training_is_the_same_and_gradient_norms_are_those_of_the_trainer(name, tmp_path) -> None:
    options = CONFIGURATIONS[name]
    plain, watched = States(), States()
    with settings_of_the_process():
        without = trainer_of(tmp_path / "without", callbacks=[plain], **options)
        without.train()
    trainer = trainer_of(tmp_path / "with", callbacks=[watched], **options)
    callback = SmoothnessCallback(schedule=every(1), data="step").bind(trainer)
    trainer.train()

    assert len(watched.states) == len(plain.states) == 6
    for found, expected in zip(watched.states, plain.states, strict=True):
        assert_identical(found, expected)
    for key in ("loss", "grad_norm", "learning_rate", "epoch"):
        assert logged(trainer, key) == logged(without, key)

    assert callback.probe is not None
    test = callback.probe.self_test
    assert test is not None
    assert name == "clipped" or test.reproduced, "bit for bit"
    assert test.angle < 1e-6
    allowed = {"ok", "saturated"} | ({"kink_limited"} if name == "bf16" else set())
    assert {row["status"] for row in callback.trace} <= allowed
    assert_as_logged(callback, trainer)
    if not OLD or options.get("lr"):
        assert_close(column(callback, "lr"), logged(trainer, "learning_rate"), rtol=1e-12, atol=0)


def test_smoothness_is_that_of_the_batches(tmp_path) -> None:
    trainer = trainer_of(
        tmp_path, kind=Ordered, lr=0.5, dropout=0.0, max_steps=2, gradient_accumulation_steps=2, max_grad_norm=0.0
    )
    trainer.model.double()
    callback = SmoothnessCallback(schedule=every(1), estimators=[PathSmoothness()], data="step").bind(trainer)
    trainer.train()

    model = llama(0.0).double()
    buffers = [torch.zeros_like(p) for p in model.parameters()]
    for step, smoothness in enumerate(column(callback, "smoothness")):
        tokens = torch.stack([text["input_ids"] for text in texts(20)[8 * step : 8 * step + 8]])

        def gradient(tokens=tokens) -> list[torch.Tensor]:
            loss = nn.functional.cross_entropy(model(tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
            return list(torch.autograd.grad(loss, list(model.parameters())))

        before, start = gradient(), [p.detach().clone() for p in model.parameters()]
        for p, g, v in zip(model.parameters(), before, buffers, strict=True):
            v.mul_(0.9).add_(g)
            p.data.sub_(0.5 * v)
        turned = math.hypot(*(float((a - b).norm()) for a, b in zip(gradient(), before, strict=True)))
        length = math.hypot(*(float((p.detach() - x).norm()) for p, x in zip(model.parameters(), start, strict=True)))
        assert smoothness == pytest.approx(turned / length, rel=1e-6)  # the model itself computes some of it in float32
    assert step == 1


def test_metrics_join_the_logs_of_training(tmp_path) -> None:
    trainer = trainer_of(tmp_path, max_steps=8, logging_steps=2, eval_strategy="steps", eval_steps=2)
    callback = SmoothnessCallback(schedule=every(4), group_by=lambda name: name.split(".")[0]).bind(trainer)
    trainer.train()
    rows = {(row["step"], row["estimator"]): row for row in callback.trace if row["group"] == "all"}
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in entries] == [2, 4, 6, 8]
    for entry, step in zip(entries, [0, None, 4, None], strict=True):
        found = {name: value for name, value in entry.items() if name.startswith("smoothdiag/")}
        if step is None:
            assert not found, "nothing was measured since the last entry"
            continue
        assert found.pop("smoothdiag/grad_norm") == rows[step, "path"]["grad_norm"]
        names = ("path", "local", "path_preconditioned", "local_preconditioned")
        assert found == {f"smoothdiag/{name}_smoothness": rows[step, name]["smoothness"] for name in names}
    others = [entry for entry in trainer.state.log_history if "loss" not in entry]
    assert len(others) == 5
    assert not any("smoothdiag" in name for entry in others for name in entry)


def test_trace_is_written_to_the_output_directory(tmp_path) -> None:
    trainer = trainer_of(tmp_path)
    callback = SmoothnessCallback(schedule=every(2)).bind(trainer)
    with pytest.raises(RuntimeError, match="before training"):
        _ = callback.trace
    trainer.train()
    assert [*map(str, Trace.read(tmp_path / "smoothdiag.jsonl"))] == [*map(str, callback.trace)]
    assert sorted({row["step"] for row in callback.trace}) == [0, 2, 4]


class Recording(Trainer):
    """Keeps metrics of its own in compute_loss and training_step, as trainers of language models do."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.metrics: dict[str, Any] = {"train": defaultdict(list), "eval": defaultdict(list)}
        self.tokens, self.total = 0, torch.zeros(())

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs["use_cache"] = False
        labels = inputs["labels"]
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        self.tokens += labels.numel()
        self.total += loss.detach()
        self.metrics["train"]["logits"].append(float(outputs.logits.detach().norm()))
        self.metrics["train"]["tokens"] = [self.tokens]
        self.log({"logits_in_between": float(outputs.logits.detach().norm())})
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args, **kwargs):
        with torch.autograd.graph.save_on_cpu():
            return super().training_step(*args, **kwargs)

    def log(self, logs, start_time=None):
        means = {name: sum(values) / len(values) for name, values in self.metrics["train"].items()}
        super().log({**logs, **means, "total": float(self.total)}, start_time)
        self.metrics["train"].clear()


class Weighted(Trainer):
    """Weighs its loss by what it keeps, a tensor, a running mean and a count, and keeps what the model returned."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.weights, self.scale, self.outputs = torch.linspace(1, 2, VOCABULARY), torch.ones(()), None
        self.num_calls = 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        self.outputs = model(**inputs)
        logits, expected = self.outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        loss = nn.functional.cross_entropy(logits, expected, weight=self.weights) / (num_items_in_batch or 1)
        if model.training:
            self.num_calls += 1
            self.scale.mul_(0.9).add_(0.1 * loss.detach())
            loss = min(1, self.num_calls / 10) * loss / self.scale
        return (loss, self.outputs) if return_outputs else loss


class Halving(Trainer):
    """Scales the loss in a way of its own."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        loss, _ = self.compute_loss(model, self._prepare_inputs(inputs), return_outputs=True)
        (loss / 2).backward()
        return loss.detach() / 2


class Narrow(Trainer):
    """Computes its loss in a context of its own."""

    def compute_loss_context_manager(self):
        stack = ExitStack()
        stack.enter_context(super().compute_loss_context_manager())
        stack.enter_context(torch.autocast("cpu", dtype=torch.bfloat16))
        return stack


class Elsewhere(Trainer):
    """Computes its loss where nobody sees it."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        loss = model(**self._prepare_inputs(inputs)).loss
        loss.backward()
        return loss.detach()


@pytest.mark.parametrize("kind", [Recording, Halving, Weighted, Narrow])
def test_subclasses_that_keep_compute_loss_log_the_same(kind, tmp_path) -> None:
    options = {"kind": kind, "gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    without = trainer_of(tmp_path / "without", **options)
    without.train()
    trainer = trainer_of(tmp_path / "with", **options)
    callback = SmoothnessCallback(schedule=every(1), data="step").bind(trainer)
    trainer.train()
    assert_identical(state_of(trainer.model), state_of(without.model))
    timed = ("runtime", "per_second")
    for found, expected in zip(trainer.state.log_history, without.state.log_history, strict=True):
        shown = {k: v for k, v in found.items() if not k.startswith("smoothdiag/") and not k.endswith(timed)}
        assert shown == {k: v for k, v in expected.items() if not k.endswith(timed)}
    assert_as_logged(callback, trainer)
    assert {row["status"] for row in callback.trace} <= {"ok", "saturated"}


def test_fixed_batches_follow_what_the_trainer_keeps_and_change_nothing(tmp_path) -> None:
    options = {"kind": Weighted, "gradient_accumulation_steps": 2, "lr": 0.0, "dropout": 0.0, "max_steps": 12}
    without = trainer_of(tmp_path / "without", **options)
    without.train()
    trainer = trainer_of(tmp_path / "with", **options)
    callback = SmoothnessCallback(schedule=every(1)).bind(trainer)
    trainer.train()
    assert_identical(state_of(trainer.model), state_of(without.model))
    assert trainer.num_calls == without.num_calls
    assert {row["data"] for row in callback.trace} == {"fixed"}
    assert "not_reproduced" not in {row["status"] for row in callback.trace}
    # The weights stay, but the trainer multiplies the loss by min(1, its calls / 10).
    losses = column(callback, "loss", "local")
    assert losses[3] > 2 * losses[0]
    assert losses[-1] > losses[3]


def test_a_trainer_without_compute_loss_is_told_what_is_missing(tmp_path) -> None:
    # its evaluation does call compute_loss
    trainer = trainer_of(tmp_path, kind=Elsewhere, eval_strategy="steps", eval_on_start=True)
    SmoothnessCallback().bind(trainer)
    with pytest.raises(RuntimeError, match=r"self.compute_loss.*Found a step without that call in Elsewhere"):
        trainer.train()


def test_wrong_use_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="`auto_clip` should be True, False or options of AutoClip. Found.*0.5"):
        SmoothnessCallback(auto_clip=0.5)
    with pytest.raises(ValueError, match="should hold options of AutoClip: estimator, mode, rule, set_lr. Found 'lr'"):
        SmoothnessCallback(auto_clip={"lr": 1.0})
    with pytest.raises(ValueError, match="should be a transformers.Trainer. Found Linear"):
        SmoothnessCallback().bind(nn.Linear(1, 1))
    trainer = trainer_of(tmp_path, callbacks=[SmoothnessCallback()])
    with pytest.raises(RuntimeError, match=r"Call callback.bind\(trainer\)"):
        trainer.train()
    (callback,) = (c for c in trainer.callback_handler.callbacks if isinstance(c, SmoothnessCallback))
    assert callback.bind(trainer) is callback
    assert trainer.callback_handler.callbacks.count(callback) == 1
    with pytest.raises(ValueError, match="Found a callback that is bound to a trainer already"):
        callback.bind(trainer)
    with pytest.raises(ValueError, match="`trainer` should have one SmoothnessCallback. Found another"):
        SmoothnessCallback().bind(trainer)
    late = trainer_of(tmp_path)
    late.state.global_step = 7  # as after train()
    with pytest.warns(SmoothdiagWarning, match=r"trained already \(7 steps\).*Call bind\(trainer\) before"):
        SmoothnessCallback().bind(late)


def test_a_run_that_ended_or_failed_leaves_nothing_behind(tmp_path) -> None:
    class Once(TrainerCallback):
        raised = False

        def on_step_end(self, args, state, control, **kwargs) -> None:
            if state.global_step == 2 and not Once.raised:
                Once.raised = True
                raise MemoryError

    trainer = trainer_of(tmp_path, lr=0.1, callbacks=[Once()])
    callback = SmoothnessCallback(schedule=every(1), auto_clip=True).bind(trainer)
    for expected in (nullcontext() if run else pytest.raises(MemoryError) for run in range(3)):
        with expected, pytest.warns(SmoothdiagWarning, match="takes the place of max_grad_norm.*`max_grad_norm = 1`"):
            trainer.train()
        assert trainer.args.max_grad_norm == 1.0
        optimizer = trainer.optimizer.optimizer
        assert not optimizer._optimizer_step_pre_hooks
        assert not optimizer._optimizer_step_post_hooks
    assert column(callback, "step") == list(range(6))
    assert len(list(tmp_path.glob("smoothdiag*.jsonl"))) == 3


def test_training_that_begins_again_with_smaller_batches_is_measured_from_there(tmp_path) -> None:
    class Full(Trainer):
        num_steps = 0

        def training_step(self, *args, **kwargs):
            Full.num_steps += 1
            if Full.num_steps == 3:
                raise RuntimeError("CUDA out of memory. Tried to allocate")
            return super().training_step(*args, **kwargs)

    trainer = trainer_of(tmp_path, kind=Full, auto_find_batch_size=True, max_grad_norm=0.7)
    callback = SmoothnessCallback(schedule=every(1), auto_clip=True).bind(trainer)
    with pytest.warns(SmoothdiagWarning, match="takes the place of max_grad_norm.*`max_grad_norm = 0.7`"):
        trainer.train()
    assert trainer._train_batch_size < 4
    assert column(callback, "step") == list(range(6))
    assert trainer.args.max_grad_norm == 0.7
    assert not trainer.optimizer.optimizer._optimizer_step_pre_hooks


def weights(model: nn.Module) -> dict[str, Any]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def auto_clipped(folder: Path, **options: Any) -> tuple[Trainer, SmoothnessCallback]:
    trainer = trainer_of(folder, lr=2.0, max_grad_norm=1e30, **options)
    return trainer, SmoothnessCallback(schedule=every(3), auto_clip=True).bind(trainer)


def test_auto_clip_is_that_of_a_plain_loop(tmp_path) -> None:
    trainer, callback = auto_clipped(tmp_path, kind=Ordered, dropout=0.0, max_steps=10, number=40)
    trainer.train()
    assert callback.clipper is not None

    model = llama(0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0, momentum=0.9)

    def loss_fn(model, tokens):
        return model(input_ids=tokens, labels=tokens, num_items_in_batch=tokens[:, 1:].numel()).loss

    probe = Probe(model, optimizer, loss_fn, schedule=every(3))
    clipper = AutoClip(optimizer, probe)
    for first in range(0, 40, 4):
        tokens = torch.stack([text["input_ids"] for text in texts(40)[first : first + 4]])
        probe.observe(tokens)
        loss_fn(model, tokens).backward()
        optimizer.step()
        optimizer.zero_grad()

    assert "of steps clipped so far" in clipper.reason
    assert "; 0% of steps" not in clipper.reason
    assert callback.clipper.reason == clipper.reason
    assert_identical(weights(trainer.model), weights(model))


def test_auto_clip_takes_the_place_of_max_grad_norm(tmp_path) -> None:
    alone, _ = auto_clipped(tmp_path / "alone")
    alone.train()
    trainer = trainer_of(tmp_path / "instead", lr=2.0, max_grad_norm=1e-6)
    SmoothnessCallback(schedule=every(3), auto_clip=True).bind(trainer)
    used = []

    class Used(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs) -> None:
            used.append(args.max_grad_norm)

    trainer.add_callback(Used())
    with pytest.warns(SmoothdiagWarning, match="takes the place of max_grad_norm.*`max_grad_norm = 1e-06`"):
        trainer.train()
    assert set(used) == {1e30}, "a finite one, which makes no gradient NaN"
    assert_identical(weights(trainer.model), weights(alone.model))
    assert trainer.args.max_grad_norm == 1e-6


def test_threshold_in_use_is_logged(tmp_path) -> None:
    trainer, callback = auto_clipped(tmp_path)
    trainer.train()
    assert callback.clipper is not None
    (*_, last) = (entry for entry in trainer.state.log_history if "loss" in entry)
    assert last["smoothdiag/threshold"] == callback.clipper.threshold
    assert last["smoothdiag/longest_step"] == callback.clipper.longest_step
    assert last["smoothdiag/threshold"] == pytest.approx(last["smoothdiag/longest_step"] / (2.0 / (1 - 0.9)))
    assert last["smoothdiag/clip_fraction"] == callback.clipper.clip_fraction
    assert len(logged(trainer, "smoothdiag/threshold")) == 6
    trainer.log({"loss": 1.0})
    assert len(logged(trainer, "smoothdiag/threshold")) == 6, "of a run that is over"


def test_auto_clip_takes_options_and_shortens_updates_of_adamw(tmp_path) -> None:
    trainer = trainer_of(tmp_path, max_grad_norm=0.0)
    rule = StepRule(multiple=None, relative=1e-3)
    callback = SmoothnessCallback(estimators=[LocalSmoothness()], auto_clip={"rule": rule}).bind(trainer)
    lengths = []

    class Length(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs) -> None:
            self.start = nn.utils.parameters_to_vector(model.parameters()).detach().clone()

        def on_optimizer_step(self, args, state, control, model, **kwargs) -> None:
            moved = nn.utils.parameters_to_vector(model.parameters()).detach() - self.start
            lengths.append(float(moved.norm() / self.start.norm()))

    trainer.add_callback(Length())
    trainer.train()
    assert lengths[0] == pytest.approx(1e-3, rel=1e-3)
    assert callback.clipper is not None
    assert logged(trainer, "smoothdiag/longest_step")[-1] == callback.clipper.longest_step
    assert not logged(trainer, "smoothdiag/threshold"), "no gradient norm says how long an update is"


def test_shadow_mode_leaves_clipping_to_the_trainer(tmp_path) -> None:
    without = trainer_of(tmp_path / "without", lr=2.0, max_grad_norm=0.5)
    without.train()
    trainer = trainer_of(tmp_path / "with", lr=2.0, max_grad_norm=0.5)
    SmoothnessCallback(auto_clip={"mode": "shadow"}).bind(trainer)
    with pytest.warns(SmoothdiagWarning, match="Something else seems to clip first"):
        trainer.train()
    assert_identical(weights(trainer.model), weights(without.model))
    assert len(logged(trainer, "smoothdiag/threshold")) == 6


@pytest.mark.parametrize("auto_clip", [False, True])
def test_resuming_from_a_checkpoint_continues_exactly(auto_clip, tmp_path) -> None:
    def begin(name: str) -> tuple[Trainer, SmoothnessCallback]:
        options: dict[str, Any] = {"max_steps": 33 if auto_clip else 20, "save_strategy": "steps", "save_steps": 7}
        trainer = trainer_of(tmp_path / name, lr=1.0, max_grad_norm=0.0, save_total_limit=2, number=48, **options)
        return trainer, SmoothnessCallback(schedule=every(3), auto_clip=auto_clip, data="step").bind(trainer)

    whole, expected = begin("whole")
    whole.train()
    halved, _ = begin("halved")

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:
            control.should_training_stop = state.global_step == 17  # three steps after a checkpoint

    halved.add_callback(Stop())
    halved.train()
    resumed, found = begin("halved")
    resumed.train(resume_from_checkpoint=True)

    assert_identical(weights(resumed.model), weights(whole.model))
    assert_identical(resumed.optimizer.state_dict()["param_groups"][0], whole.optimizer.state_dict()["param_groups"][0])
    for trace in (found.trace, Trace.read(tmp_path / "halved" / "smoothdiag.jsonl")):
        assert [measured(row) for row in trace] == [measured(row) for row in expected.trace]
    assert logged(resumed, "smoothdiag/local_smoothness") == logged(whole, "smoothdiag/local_smoothness")
    assert logged(resumed, "smoothdiag/longest_step") == logged(whole, "smoothdiag/longest_step")
    if auto_clip:
        assert found.clipper is not None
        assert expected.clipper is not None
        assert json.dumps(found.clipper.state_dict()) == json.dumps(expected.clipper.state_dict())
        assert "held since step 30" in found.clipper.reason


def measured(row: dict[str, Any]) -> str:
    """Returns a row without its costs: the self-test of the first measured step has that of the start already."""
    return str(row | {"seconds": None, "num_grads": None})  # NaN is not equal to itself


def test_a_checkpoint_without_the_state_is_joined_late(tmp_path) -> None:
    options = {"save_strategy": "steps", "save_steps": 4, "lr": 0.5, "max_grad_norm": 0.0}
    trainer_of(tmp_path, **options).train()
    assert not (tmp_path / "checkpoint-4" / STATE_FILE).exists()
    trainer = trainer_of(tmp_path, **options)
    callback = SmoothnessCallback(schedule=every(1), auto_clip=True).bind(trainer)
    said = pytest.warns(SmoothdiagWarning, match="checkpoint-4` has no smoothdiag.json.*begins at step 4")
    with said, pytest.warns(SmoothdiagWarning, match="without an AutoClip in it. AutoClip begins at step 4"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert column(callback, "step") == [4, 5]


def test_going_on_without_auto_clip_or_a_whole_state_is_said(tmp_path) -> None:
    options = {"save_strategy": "steps", "save_steps": 4, "lr": 0.5, "max_grad_norm": 0.0}
    trainer = trainer_of(tmp_path, **options)
    SmoothnessCallback(auto_clip=True).bind(trainer)
    trainer.train()
    checkpoint = tmp_path / "checkpoint-4"
    trainer = trainer_of(tmp_path, **options)
    SmoothnessCallback().bind(trainer)
    with pytest.warns(SmoothdiagWarning, match="without the AutoClip that its checkpoint has"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    whole = (checkpoint / STATE_FILE).read_text()
    for damaged in (whole[: len(whole) // 2], "[]", '{"clipper": null}'):
        (checkpoint / STATE_FILE).write_text(damaged)
        trainer = trainer_of(tmp_path, **options)
        SmoothnessCallback().bind(trainer)
        with pytest.raises(ValueError, match=r"smoothdiag.json` should hold the state .*. Delete the file to measure"):
            trainer.train(resume_from_checkpoint=str(checkpoint))


def test_the_factor_of_a_grad_scaler_is_taken_out() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    x = torch.ones((), requires_grad=True)
    loss = 5 * x
    factor = Factor(scaler)
    factor.watch(loss)
    with pytest.raises(RuntimeError, match="did not call backward on the loss"):
        _ = factor.value
    scaler.scale(loss / 3).backward()
    assert_close(x.grad, 2.0**16 * torch.tensor(5 / 3))
    assert factor.value == torch.tensor(1 / 3)


def test_gradients_are_measured_as_if_no_scaler_were_there(tmp_path) -> None:
    trainer = trainer_of(tmp_path, max_grad_norm=0.0)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    callback = SmoothnessCallback(schedule=every(1), data="step").bind(trainer)
    trainer.train()
    assert_as_logged(callback, trainer, scale=16.0)
    assert {row["status"] for row in callback.trace} <= {"ok", "saturated"}


def test_without_transformers_the_installation_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "smoothdiag.integrations.huggingface")
    with pytest.raises(ImportError, match=r'pip install "smoothdiag\[hf\]"'):
        importlib.import_module("smoothdiag.integrations.huggingface")
