"""integrations.lightning: the callback sees, clips and resumes what Lightning trains, and changes nothing else."""

import importlib
import math
import sys
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from asserts import assert_identical, state_of
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning_runs import CLASSES, Module, Norms, Reseed, Steps, adamw, data, fit, sgd
from torch import nn
from torch.nn import functional as F

from smoothdiag import AutoClip, LocalSmoothness, Probe, SmoothdiagWarning, StepRule, Trace, every
from smoothdiag.integrations.lightning import SmoothnessCallback
from smoothdiag.integrations.training_step import check_run

pytestmark = pytest.mark.thorough


def books(module: Any, trainer: Any) -> dict[str, Any]:
    """Returns all that a run leaves behind."""
    kept = state_of(module, trainer.optimizers[0])
    kept |= {f"logged {name}": value for name, value in trainer.callback_metrics.items() if "smooth" not in name}
    kept |= {f"metric {name}": value for name, value in module.metrics.compute().items()}
    return kept | {"calls": module.num_calls, "losses": torch.stack(module.losses)}


class Counting(nn.Module):
    """Counts what goes through it, and keeps a reading of it."""

    def __init__(self) -> None:
        super().__init__()
        self.num_calls, self.mean = 0, torch.zeros(())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.num_calls += 1
        self.mean += x.detach().mean()
        return x


class Weighted(Module):
    """Weighs its loss by a tensor and a count, and centers its outputs by a buffer that it writes to."""

    def __init__(self) -> None:
        super().__init__()
        self.net.append(Counting())
        self.weights = torch.linspace(1, 2, CLASSES)
        self.register_buffer("center", torch.zeros(CLASSES))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        predicted = self.net(x)
        self.center.mul_(0.9).add_(predicted.detach().mean(0), alpha=0.1)
        loss = F.cross_entropy((predicted - self.center) * (1 + self.center), y, weight=self.weights)
        loss = loss * min(1, self.net[-1].num_calls / 10)
        self.metrics.update(predicted, y)
        self.losses.append(self.net[-1].mean.clone())
        self.num_calls = self.net[-1].num_calls
        return loss


CONFIGURATIONS = {
    "default": {},
    "accumulation": {"accumulate_grad_batches": 3},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "clipped": {"gradient_clip_val": 0.3, "accumulate_grad_batches": 3},
    "a rest of two": {"accumulate_grad_batches": 3, "limit_train_batches": 11, "max_epochs": 2},
    "adamw": {"make": lambda: Module(adamw)},
    "skipped": {"make": lambda: Module(skipped=(1, 4)), "accumulate_grad_batches": 3},
    "all skipped": {"make": lambda: Module(skipped=(2, 3))},
    "weighted": {"make": Weighted, "accumulate_grad_batches": 2},
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_run_is_unchanged_and_its_gradients_are_those_that_lightning_sees(name) -> None:
    bare = books(*fit(**CONFIGURATIONS[name]))
    callback, norms = SmoothnessCallback(schedule=every(1), data="step"), Norms()
    assert_identical(books(*fit(callback, norms, **CONFIGURATIONS[name])), bare)
    rows = [row for row in callback.trace if row["estimator"] == "local"]
    taken = [step for step, norm in enumerate(norms.found) if norm > 0]
    assert [row["step"] for row in rows] == taken
    assert len(taken) >= 4
    assert [row["grad_norm"] for row in rows] == pytest.approx([norms.found[step] for step in taken], rel=1e-12)
    assert {row["status"] for row in callback.trace} <= {"ok", "saturated", "below_noise_floor"}
    assert callback.probe.self_test.angle == pytest.approx(0, abs=1e-6)
    assert callback.probe.self_test.reproduced  # compared with what backward left, before anything is clipped


class Annealed(Module):
    """Multiplies its loss by a number that grows from step to step."""

    factor = 1.0

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.factor = 1.0 + batch_idx

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": self.factor * super().training_step(batch, batch_idx)["loss"]}


def test_fixed_batches_follow_what_the_module_keeps_and_change_nothing() -> None:
    def make() -> Module:
        return Annealed(lambda module: torch.optim.SGD(module.parameters(), lr=0.0))

    bare, callback = books(*fit(make=make)), SmoothnessCallback(estimators=[LocalSmoothness()], schedule=every(1))
    assert_identical(books(*fit(callback, make=make)), bare)
    rows = list(callback.trace)
    assert [row["loss"] for row in rows] == pytest.approx([rows[0]["loss"] * (1 + i) for i in range(12)], rel=1e-5)
    assert {(row["data"], row["data_step"], row["status"]) for row in rows} == {("fixed", 0, "ok")}


@pytest.mark.parametrize("accumulate_grad_batches", [1, 3])
def test_a_closure_that_is_evaluated_repeatedly_is_measured_at_the_first_point(accumulate_grad_batches) -> None:
    def make() -> Module:
        return Module(lambda module: torch.optim.LBFGS(module.parameters(), lr=0.1, max_iter=3))

    options = {"make": make, "accumulate_grad_batches": accumulate_grad_batches}
    plain, _ = fit(**options)
    callback, norms = SmoothnessCallback(schedule=every(1), data="step"), Norms()
    module, _ = fit(callback, norms, **options)
    assert_identical(state_of(module), state_of(plain))
    assert module.num_calls == plain.num_calls > 12
    rows = [row for row in callback.trace if row["estimator"] == "path"]
    assert [row["grad_norm"] for row in rows] == pytest.approx(norms.found[::3], rel=1e-6)
    assert {row["status"] for row in callback.trace} == {"ok"}


class Wrong(Module):
    """Adds to the loss what training_step does not return."""

    def backward(self, loss: Any, *args: Any, **kwargs: Any) -> None:
        (loss + sum(p.square().sum() for p in self.net.parameters())).backward()


def test_a_loss_that_is_not_that_of_training_step_is_noticed() -> None:
    callback = SmoothnessCallback(estimators=[LocalSmoothness()], schedule=every(6))
    with pytest.warns(SmoothdiagWarning, match="another direction than the gradient of the training loop"):
        fit(callback, make=Wrong)
    assert {row["status"] for row in callback.trace} == {"not_reproduced"}


def plain(make, **options: Any) -> tuple[Module, AutoClip]:
    """Trains as Lightning does, by a loop."""
    torch.manual_seed(3)
    module = Module(make).train()
    (optimizer,), (schedule,) = module.configure_optimizers()

    def loss_fn(net, batch):
        return F.cross_entropy(net(batch[0]), batch[1])

    probe = Probe(module.net, optimizer, loss_fn, estimators=[LocalSmoothness()], schedule=every(5))
    clipper = AutoClip(optimizer, probe, **options)
    for step, batch in enumerate(list(data(shuffle=False)) * 4):
        torch.manual_seed(step)
        optimizer.zero_grad()
        probe.observe(batch)
        loss_fn(module.net, batch).backward()
        optimizer.step()
        schedule["scheduler"].step()
    return module, clipper


@pytest.mark.parametrize(
    ("make", "options"), [(sgd, {}), (adamw, {}), (sgd, {"mode": "shadow", "rule": StepRule(None, 0.01)})]
)
def test_automatic_thresholds_are_those_of_a_plain_loop(make, options) -> None:
    expected, clipper = plain(make, **options)
    callback = SmoothnessCallback(estimators=[LocalSmoothness()], schedule=every(5), auto_clip=options or True)
    module, _ = fit(callback, Reseed(), make=lambda: Module(make), loader=data(shuffle=False), max_epochs=4)
    for found, value in zip(module.parameters(), expected.parameters(), strict=True):
        assert torch.equal(found, value)
    assert callback.clipper.reason == clipper.reason
    pd.testing.assert_frame_equal(callback.clipper.history, clipper.history)
    assert "clipped so far" in clipper.reason
    assert " 0% of steps" not in clipper.reason


@pytest.mark.parametrize(("make", "in_file"), [(sgd, True), (adamw, False)])
def test_a_resumed_run_goes_on_bit_for_bit(make, in_file, tmp_path) -> None:
    def go(name: str, epochs: int, **options: Any):
        trace = tmp_path / f"{name}.jsonl" if in_file else None
        callback = SmoothnessCallback(
            estimators=[LocalSmoothness()], schedule=every(5), trace=trace, auto_clip=True, data="step"
        )
        loader = data(shuffle=False)
        module, trainer = fit(
            callback, Reseed(), make=lambda: Module(make), loader=loader, max_epochs=epochs, **options
        )
        return callback, module, trainer

    whole, module, trainer = go("whole", 3)
    _, _, first = go("parts", 1)
    first.save_checkpoint(tmp_path / "first.ckpt")
    rest, resumed, second = go("parts", 3, ckpt_path=tmp_path / "first.ckpt")
    assert_identical(state_of(resumed, second.optimizers[0]), state_of(module, trainer.optimizers[0]))
    assert rest.clipper.reason == whole.clipper.reason
    pd.testing.assert_frame_equal(rest.clipper.history, whole.clipper.history)
    pd.testing.assert_frame_equal(*(r.trace.to_frame().drop(columns=["seconds", "num_grads"]) for r in (rest, whole)))
    assert len(whole.trace) > 20
    if in_file:
        assert [row["step"] for row in Trace.read(tmp_path / "parts.jsonl")] == [row["step"] for row in whole.trace]


def test_a_checkpoint_without_the_callback_is_gone_on_from_at_its_step(tmp_path) -> None:
    _, first = fit()
    first.save_checkpoint(tmp_path / "first.ckpt")
    callback = SmoothnessCallback(schedule=every(1))
    with pytest.warns(SmoothdiagWarning, match="Measuring begins at step 12"):
        fit(callback, ckpt_path=tmp_path / "first.ckpt", max_epochs=2)
    assert sorted({row["step"] for row in callback.trace}) == list(range(12, 24))


def test_going_on_with_or_without_auto_clip_is_said(tmp_path) -> None:
    for auto_clip, said in (
        (True, "without the AutoClip that its checkpoint has"),
        (False, "AutoClip begins at step 12"),
    ):
        _, first = fit(SmoothnessCallback(auto_clip=auto_clip))
        first.save_checkpoint(tmp_path / "first.ckpt")
        with pytest.warns(SmoothdiagWarning, match=said):
            fit(SmoothnessCallback(auto_clip=not auto_clip), ckpt_path=tmp_path / "first.ckpt", max_epochs=2)


def test_a_second_run_begins_anew() -> None:
    callback = SmoothnessCallback(estimators=[LocalSmoothness()], schedule=every(4))
    with pytest.raises(RuntimeError, match="no trace before training"):
        _ = callback.trace
    fit(callback)
    first = list(callback.trace)
    states: list[Any] = []

    class Searching(Callback):
        """Saves a checkpoint before training, and loads it, as searches for a learning rate do."""

        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            states.append(callback.state_dict())
            callback.load_state_dict(states[-1])

    fit(callback, Searching())
    assert states == [{}]
    assert [row["smoothness"] for row in callback.trace] == [row["smoothness"] for row in first]


def test_rows_outlast_a_test_of_the_model() -> None:
    callback = SmoothnessCallback(schedule=every(4))
    module, trainer = fit(callback)
    num_rows = len(callback.trace)
    module.test_step = lambda batch, batch_idx: None
    trainer.test(module, data(16), verbose=False)
    assert len(callback.trace) == num_rows > 0


def test_batches_that_are_not_trained_on_are_not_kept() -> None:
    callback, kept = SmoothnessCallback(schedule=every(1)), []

    class Looking(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if trainer.fit_loop._skip_backward:
                kept.append(callback.probe._accumulation.has_observed)

    averaging = StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=1)
    with pytest.warns(SmoothdiagWarning, match="probe has seen no batch"):
        fit(callback, averaging, Looking(), max_epochs=2)
    assert kept == [False] * 12


class Kept(Logger):
    """Keeps what is logged."""

    def __init__(self) -> None:
        self.found: list[tuple[int, dict[str, float]]] = []

    name = version = "kept"

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.found.append((step, metrics))


def test_measurements_are_logged_at_their_steps_and_shown() -> None:
    callback, logger = SmoothnessCallback(schedule=every(5), auto_clip=True), Kept()
    _, trainer = fit(callback, logger=logger, log_every_n_steps=1000)
    names = ("path", "local")
    rows = {name: {r["step"]: r for r in callback.trace if r["estimator"] == name} for name in names}
    own = {step: found for step, found in logger.found if "smoothdiag/local_smoothness" in found}
    assert list(own) == [0, 5, 10]
    for step, found in own.items():
        for name in names:
            assert found[f"smoothdiag/{name}_smoothness"] == rows[name][step]["smoothness"]
        assert found["smoothdiag/grad_norm"] == rows["local"][step]["grad_norm"]
        assert found["smoothdiag/longest_step"] > 0
    shown = trainer.progress_bar_metrics
    assert shown["local_smoothness"] == pytest.approx(rows["local"][10]["smoothness"], rel=1e-6)
    assert shown["threshold"] == pytest.approx(callback.clipper.threshold, rel=1e-6)
    _, trainer = fit(SmoothnessCallback(schedule=every(5), progress_bar=False))
    assert not trainer.progress_bar_metrics


class Logging(Module):
    """Writes to its loggers directly."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        for logger in self.loggers:
            logger.log_metrics({"batch": batch_idx}, step=self.global_step)
        with self.logger.run as run:
            run["lr"] = self.optimizers().param_groups[0]["lr"]
        return super().training_step(batch, batch_idx)


class Run(Kept):
    """Has a store to open and write to."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[Any] = []

    run = property(lambda self: nullcontext(self))

    def __setitem__(self, name: str, value: Any) -> None:
        self.writes.append((name, value))


def test_what_a_module_writes_to_its_loggers_is_written_once() -> None:
    plain, watched = Run(), Run()
    fit(make=Logging, logger=plain)
    _, trainer = fit(SmoothnessCallback(schedule=every(1)), make=Logging, logger=watched)
    assert [entry for entry in watched.found if "smoothdiag/grad_norm" not in entry[1]] == plain.found
    assert watched.writes == plain.writes
    assert len(plain.writes) == 12
    assert trainer.loggers == [watched]


class Scaled(Trainer):
    """Scales losses by so much that the first gradients overflow."""

    def __init__(self, **options: Any) -> None:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22)
        super().__init__(plugins=[MixedPrecision("16-mixed", "cpu", scaler)], **options)


def test_steps_that_a_scaler_skips_count_in_the_log_alone() -> None:
    plain, _ = fit(trainer_class=Scaled)
    callback, logger, norms = SmoothnessCallback(schedule=every(1), data="step"), Kept(), Norms()
    module, trainer = fit(callback, norms, logger=logger, log_every_n_steps=1, trainer_class=Scaled)
    assert torch.equal(module.net[0].weight, plain.net[0].weight)
    taken = [step for step, norm in enumerate(norms.found) if math.isfinite(norm)]
    own = [step for step, found in logger.found if "smoothdiag/grad_norm" in found]
    assert taken == own
    assert 0 < len(own) < trainer.global_step == own[-1] + 1
    rows = [row for row in callback.trace if row["estimator"] == "local"]
    assert [row["step"] for row in rows] == list(range(len(own)))
    assert [row["grad_norm"] for row in rows] == pytest.approx([norms.found[step] for step in own], rel=1e-2)


def test_automatic_thresholds_take_the_place_of_gradient_clip_val() -> None:
    rule = StepRule(None, 0.01)
    callback = SmoothnessCallback(auto_clip={"rule": rule})
    with pytest.warns(SmoothdiagWarning, match="takes the place of gradient_clip_val.* = 0.001"):
        module, trainer = fit(callback, gradient_clip_val=0.001)
    alone, _ = fit(SmoothnessCallback(auto_clip={"rule": rule}))
    assert torch.equal(module.net[0].weight, alone.net[0].weight)
    assert trainer.gradient_clip_val == 0.001, "put back"


def test_in_shadow_mode_lightning_clips_as_before() -> None:
    callback = SmoothnessCallback(auto_clip={"mode": "shadow"})
    with pytest.warns(SmoothdiagWarning, match="had the norm 0.1, .* Something else seems to clip first"):
        module, _ = fit(callback, gradient_clip_val=0.1)
    assert torch.equal(module.net[0].weight, fit(gradient_clip_val=0.1)[0].net[0].weight)
    assert not torch.equal(module.net[0].weight, fit()[0].net[0].weight)


class Clipping(Module):
    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        self.clip_gradients(optimizer, gradient_clip_val=0.01, gradient_clip_algorithm="norm")


def test_clipping_of_the_module_s_own_is_pointed_out() -> None:
    with pytest.warns(SmoothdiagWarning, match="had the norm 0.01, .* Something else seems to clip first"):
        fit(SmoothnessCallback(auto_clip=True), make=Clipping, max_steps=2)
    fit(SmoothnessCallback(), make=Clipping, max_steps=1)


class Failing(Callback):
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 3:
            raise KeyError("on purpose")


def test_a_run_that_ends_in_an_error_is_let_go(tmp_path) -> None:
    callback = SmoothnessCallback(schedule=every(1), trace=tmp_path / "trace.jsonl", auto_clip=True)
    seen: list[Any] = []

    class Looking(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            seen.append(trainer)

    with pytest.raises(KeyError, match="on purpose"):
        fit(callback, Looking(), Failing())
    assert "training_step" not in vars(seen[0].strategy)
    assert not seen[0].optimizers[0]._optimizer_step_pre_hooks
    assert [row["step"] for row in Trace.read(tmp_path / "trace.jsonl") if row["estimator"] == "local"] == [0, 1, 2, 3]


class Manual(Module):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Fetching(Module):
    def training_step(self, dataloader_iter):
        raise AssertionError


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Manual, "`automatic_optimization` should be True.*Found False in Manual.*Use smoothdiag.Probe"),
        (Fetching, "should take a batch. Found one that takes `dataloader_iter`"),
    ],
)
def test_runs_that_cannot_be_measured_are_refused(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        fit(SmoothnessCallback(), make=make)


def test_strategies_and_optimizers_that_cannot_be_measured_are_refused() -> None:
    trainer = SimpleNamespace(optimizers=[None], strategy=Trainer(accelerator="cpu", logger=False).strategy)
    check_run(trainer, Module())
    trainer.optimizers = [None, None]
    with pytest.raises(ValueError, match="should return one optimizer.*Found 2"):
        check_run(trainer, Module())
    engine = DeepSpeedStrategy.__new__(DeepSpeedStrategy)  # a subclass of DDPStrategy
    with pytest.raises(ValueError, match="one device or DDP. Found DeepSpeedStrategy"):
        check_run(SimpleNamespace(optimizers=[None], strategy=engine), Module())
    trainer = SimpleNamespace(optimizers=[None], strategy=SimpleNamespace())
    with pytest.raises(ValueError, match="Parameter `strategy` .* one device or DDP. Found SimpleNamespace"):
        check_run(trainer, Module())
    with pytest.raises(ValueError, match="Parameter `auto_clip` should be"):
        SmoothnessCallback(auto_clip="yes")


def test_the_older_name_of_lightning_works_too() -> None:
    older = pytest.importorskip("pytorch_lightning")

    class Older(Steps, older.LightningModule):
        pass

    callback, norms = SmoothnessCallback(schedule=every(3), data="step"), Norms()
    module, _ = fit(callback, norms, make=Older, trainer_class=older.Trainer)
    assert [r["grad_norm"] for r in callback.trace if r["estimator"] == "path"] == pytest.approx(norms.found[::3])
    assert torch.equal(module.net[0].weight, fit()[0].net[0].weight)


def test_what_is_missing_is_named_with_the_command_that_installs_it(monkeypatch) -> None:
    for name in ("lightning", "lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "smoothdiag.integrations.lightning")
    with pytest.raises(ImportError, match=r'pip install "smoothdiag\[lightning\]"'):
        importlib.import_module("smoothdiag.integrations.lightning")
