"""docs/howto/attach.md, docs/huggingface.md, docs/lightning.md: the blocks attach to the real frameworks."""

import re
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from blocks import Block, blocks_of, run, text_of
from lightning.pytorch import LightningModule, Trainer
from lightning_runs import Module, data
from networks import mlp
from torch import nn
from torch.nn import functional as F
from trainers import settings_of_the_process, trainer_of

import smoothdiag as sd

pytestmark = pytest.mark.thorough

PAGE = "howto/attach.md"
QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "logger": False}


def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
    x, y = batch
    return F.cross_entropy(model(x), y)


def under(title: str) -> list[Block]:
    """Returns the blocks of a section of the page."""
    section = re.split(rf"^## {title}$", text_of(PAGE), flags=re.MULTILINE)[1].split("\n## ")[0]
    return [block for block in blocks_of(PAGE) if block.code in section and not block.reason]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with settings_of_the_process(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="lightning|torch")
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        yield


@pytest.mark.slow
def test_hugging_face(tmp_path, capsys) -> None:
    run(PAGE, {"trainer": trainer_of(tmp_path, max_grad_norm=0.0)}, under("Hugging Face"))
    assert "longest step" in capsys.readouterr().out
    names = run("huggingface.md", {"trainer": trainer_of(tmp_path)})
    assert names["callback"].probe is None  # it is made when training begins


@pytest.mark.slow
def test_lightning(tmp_path) -> None:
    options = QUIET | {"default_root_dir": tmp_path, "enable_checkpointing": False}
    names = run(PAGE, {"options": options, "module": Module(), "loader": data()}, under("Lightning"))
    assert names["trainer"].callbacks[0].clipper.longest_step > 0


def test_several_optimizers_under_lightning(tmp_path) -> None:
    attaching, methods = blocks_of("lightning.md")
    names: dict[str, Any] = run("lightning.md", {"Trainer": Trainer}, [attaching])
    names = run("lightning.md", {"sd": sd}, [methods])

    class Manual(LightningModule):
        on_train_start, training_step = names["on_train_start"], names["training_step"]

        def __init__(self) -> None:
            super().__init__()
            self.net, self.automatic_optimization = mlp(8, 16, 40), False
            self.loss = loss_fn

        def configure_optimizers(self) -> Any:
            sides: list[list[nn.Parameter]] = [[], []]
            for p in self.net.parameters():
                sides[p.ndim == 2].append(p)
            return [torch.optim.SGD(sides[0], lr=0.1), torch.optim.AdamW(sides[1], lr=0.01)]

    module = Manual()
    Trainer(max_steps=8, default_root_dir=tmp_path, enable_checkpointing=False, **QUIET).fit(module, data())
    assert len(module.probe.trace) > 0


@pytest.mark.parametrize("title", ["accelerate and Fabric", "Muon"])
def test_loops_of_ones_own(title: str, capsys) -> None:
    model = mlp(4, 16, 3)
    loader = [(torch.randn(16, 4), torch.randint(3, (16,))) for _ in range(12)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    names = {"sd": sd, "torch": torch, "model": model, "optimizer": optimizer, "loader": loader, "loss_fn": loss_fn}
    names = run(PAGE, names, under(title))
    assert "measurements in steps 0-10" in names["clipper"].reason
