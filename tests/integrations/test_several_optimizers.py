"""integrations: Muon and AdamW are one step under the Trainer of Hugging Face, Lightning, Fabric and Accelerate."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from accelerate import Accelerator
from asserts import assert_identical, state_of
from lightning.fabric import Fabric
from lightning_runs import Module, fit
from losses import cross_entropy
from networks import mlp
from torch import nn
from trainers import llama, settings_of_the_process, texts, trainer_of
from transformers import Trainer

from smoothdiag import AutoClip, Probe, StepRule, every
from smoothdiag.integrations.huggingface import SmoothnessCallback
from smoothdiag.integrations.lightning import SmoothnessCallback as LightningCallback

pytestmark = pytest.mark.thorough


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    with settings_of_the_process():
        yield


class MuonAndAdamW(torch.optim.Optimizer):
    """A container, as people write it for trainers that take one optimizer."""

    def __init__(self, model: nn.Module, lr: float) -> None:
        matrices = [p for p in model.parameters() if p.ndim == 2]
        others = [p for p in model.parameters() if p.ndim != 2]
        self.optimizers = [torch.optim.Muon(matrices, lr=lr), torch.optim.AdamW(others, lr=lr / 10)]
        super().__init__([{"params": matrices}, {"params": others}], {})
        self.param_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"state": {}, "param_groups": [], "each": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for optimizer, each in zip(self.optimizers, state["each"], strict=True):
            optimizer.load_state_dict(each)
        self.param_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]


def hugging_face(folder: Path, lr: float, callback: SmoothnessCallback | None) -> tuple[Trainer, dict[str, Any]]:
    with settings_of_the_process():
        model = llama()
        base = trainer_of(folder, lr_scheduler_type="constant", max_grad_norm=0.0)
        trainer = Trainer(
            model,
            base.args,
            train_dataset=texts(20),
            optimizers=(MuonAndAdamW(model, lr), None),  # type: ignore[arg-type]
        )
        if callback is not None:
            callback.bind(trainer)
        trainer.train()
    return trainer, state_of(model)


def test_a_container_trains_as_one_under_the_trainer(tmp_path: Path) -> None:
    _, expected = hugging_face(tmp_path / "a", 0.02, None)
    callback = SmoothnessCallback(schedule=every(1), data="step")
    trainer, found = hugging_face(tmp_path / "b", 0.02, callback)
    assert_identical(found, expected)
    logged = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    norms = [row["grad_norm"] for row in callback.trace if row["estimator"] == "local"]
    assert norms == pytest.approx(logged, rel=1e-5)
    assert callback.trace.meta["optimizer"] == "Muon + AdamW"
    clipped = SmoothnessCallback(auto_clip={"rule": StepRule(None, 0.01)})
    hugging_face(tmp_path / "c", 2.0, clipped)
    assert clipped.clipper.clip_fraction == 1.0


class Contained(Module):
    def configure_optimizers(self) -> Any:
        return MuonAndAdamW(self, 0.02)


class Manual(Module):
    """Two optimizers on one loss by manual optimization."""

    options: ClassVar[dict[str, Any] | None] = None

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.norms: list[float] = []

    def configure_optimizers(self) -> Any:
        return MuonAndAdamW(self, 0.02).optimizers

    def on_train_start(self) -> None:
        self.probe: Any = None
        if self.options is not None:
            self.probe = Probe(self.net, self.optimizers(), cross_entropy, schedule=every(1), data="step")
            if self.options:
                self.clipper = AutoClip(self.optimizers(), self.probe, **self.options)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        if self.probe is not None:
            self.probe.observe(batch)
        self.manual_backward(cross_entropy(self.net, batch))
        self.norms.append(float(nn.utils.get_total_norm([p.grad for p in self.net.parameters()])))
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()


class Probed(Manual):
    options: ClassVar[dict[str, Any] | None] = {}


class Clipped(Manual):
    options: ClassVar[dict[str, Any] | None] = {"rule": StepRule(None, 1e-3)}


def test_lists_and_containers_are_one_under_lightning() -> None:
    expected, _ = fit(make=Contained)
    callback = LightningCallback(schedule=every(1), data="step")
    contained, _ = fit(callback, make=Contained)
    manual, _ = fit(make=Manual)
    probed, _ = fit(make=Probed)
    clipped, _ = fit(make=Clipped)
    for module in (contained, manual, probed):
        for found, value in zip(module.parameters(), expected.parameters(), strict=True):
            assert torch.equal(found, value)
    rows = probed.probe.trace.to_frame().query("estimator == 'local'")
    assert rows.grad_norm.tolist() == pytest.approx(probed.norms, rel=1e-5)
    assert [r["grad_norm"] for r in callback.trace if r["estimator"] == "local"] == rows.grad_norm.tolist()
    assert clipped.clipper.clip_fraction == 1.0


@pytest.mark.parametrize("kind", ["accelerate", "fabric"])
def test_what_prepare_and_setup_return_is_taken(kind: str) -> None:
    def run(*, probed: bool) -> tuple[dict[str, Any], Any, list[float]]:
        torch.manual_seed(0)
        net = mlp(6, 16, 3)
        optimizers = MuonAndAdamW(net, 0.02).optimizers
        if kind == "accelerate":
            accelerator: Any = Accelerator(cpu=True)
            model, *optimizers = accelerator.prepare(net, *optimizers)
        else:
            accelerator = Fabric(accelerator="cpu", devices=1)
            model, *optimizers = accelerator.setup(net, *optimizers)
        probe = Probe(model, optimizers, cross_entropy, schedule=every(1), data="step") if probed else None
        norms = []
        for _ in range(4):
            batch = torch.randn(16, 6), torch.randint(3, (16,))
            if probe is not None:
                probe.observe(batch)
            accelerator.backward(cross_entropy(model, batch))
            norms.append(float(nn.utils.get_total_norm([p.grad for p in net.parameters()])))
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        return state_of(net), probe, norms

    expected, _, _ = run(probed=False)
    found, probe, norms = run(probed=True)
    assert_identical(found, expected)
    rows = probe.trace.to_frame().query("estimator == 'path'")
    assert rows.grad_norm.tolist() == pytest.approx(norms, rel=1e-5)
    assert set(rows.status) <= {"ok", "saturated"}
