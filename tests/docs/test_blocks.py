"""docs: every block of Python on a page runs in a test, by itself or after what the page says comes before."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
import torch
from blocks import blocks_of, pages, run
from networks import mlp
from places import REPOSITORY
from torch import nn
from torch.nn import functional as F

import smoothdiag as sd

ALONE = ("quickstart.md", "first_look.md", "choose.md", "faq.md", "migration.md", "report.md")
ALONE_IN_HOWTO = ("howto/max_norm.md", "howto/measure.md", "howto/compare.md", "howto/spikes.md")
"""Pages whose blocks need nothing but each other."""

ELSEWHERE = {
    "ecosystem.md": "tests/shared/recipes.py",
    "howto/attach.md": "tests/docs/test_attach_page.py",
    "huggingface.md": "tests/docs/test_attach_page.py",
    "lightning.md": "tests/docs/test_attach_page.py",
    "machines.md": "tests/docs/test_agents.py",
    "logs.md": "tests/integrations/loggers/test_loggers.py",
    "measuring.md": "tests/docs/test_measuring.py",
    "rates.md": "tests/docs/test_rates.py",
    "scan.md": "tests/docs/test_scan_page.py",
}
"""Pages whose blocks the named file runs."""


def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
    x, y = batch
    return F.cross_entropy(model(x), y)


def a_loop(**more: Any) -> dict[str, Any]:
    """Returns the names that pages take from the reader's loop."""
    model = mlp(4, 16, 3)
    loader = [(torch.randn(16, 4), torch.randint(3, (16,))) for _ in range(24)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    names = {"sd": sd, "torch": torch, "F": F, "nn": nn, "model": model, "optimizer": optimizer, "loader": loader}
    return names | {"loss_fn": loss_fn, "batch": loader[0]} | more


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.ones(2, 4)).square().sum().backward()
    optimizer.step()


def a_run(folder: Path) -> dict[str, Any]:
    """Returns the names of a loop that has run under a probe, whose rows follow a law, and its file in the folder."""
    names = a_loop()
    trace = sd.Trace(folder / "run.jsonl")
    for step in range(60):
        norm = 10 ** float(torch.sin(torch.tensor(float(step))))
        trace.append({"step": step, "grad_norm": norm, "smoothness": 1 + 2 * norm, "estimator": "local"})
    trace.close()
    probe = type("Watched", (), {"trace": trace})()
    return names | {"probe": probe, "fit_smoothness": sd.fit_smoothness} | dict.fromkeys(RUNS, trace)


RUNS = ("first", "second", "third", "fourth", "fifth")


def a_scion(folder: Path) -> dict[str, Any]:
    return a_run(folder) | {"model": nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))}


AFTER: dict[str, Callable[[Path], dict[str, Any]]] = {
    "autoclip.md": lambda folder: a_loop(),
    "curvature.md": lambda folder: a_loop(),
    "doctor.md": lambda folder: a_loop(train=train),
    "intervals.md": a_run,
    "optimizers.md": a_scion,
    "traces.md": a_run,
}
"""Pages whose blocks go on from a loop or a run of the reader's, and what that leaves."""


def test_every_page_with_code_is_run() -> None:
    with_code = {page for page in pages() if blocks_of(page)}
    assert len(with_code) > 15
    assert with_code - {*ALONE, *ALONE_IN_HOWTO, *ELSEWHERE, *AFTER} == set()
    for page, place in ELSEWHERE.items():
        assert Path(page).name in (REPOSITORY / place).read_text(encoding="utf-8"), place


def test_what_is_not_run_says_why() -> None:
    reasons = [block.reason for page in pages() for block in blocks_of(page) if block.reason]
    assert reasons
    assert [reason for reason in reasons if not any(word in reason for word in ("GPU", "network", "processes"))] == []


@pytest.fixture
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_figure_left_open: None) -> None:
    monkeypatch.chdir(tmp_path)
    mpl.use("agg")


@pytest.mark.slow
@pytest.mark.usefixtures("_here")
@pytest.mark.parametrize("page", [page for page in (*ALONE, *ALONE_IN_HOWTO) if page in pages() and blocks_of(page)])
def test_page_runs_alone(page: str) -> None:
    run(page, {})


@pytest.mark.usefixtures("_here")
@pytest.mark.parametrize("page", sorted(AFTER))
def test_page_runs_after_a_loop(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit = sd.fit_smoothness
    monkeypatch.setattr(sd, "fit_smoothness", lambda data: fit(data, num_boot=20))  # the page is about the call
    run(page, AFTER[page](tmp_path))
