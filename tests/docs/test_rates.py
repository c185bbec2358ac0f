"""docs/rates.md: the page has a rule for every verdict, and says of each what is known; its code runs."""

import re

import pytest
import torch
from places import REPOSITORY
from torch import nn

import smoothdiag as sd
from smoothdiag.fits import Verdict

PAGE = (REPOSITORY / "docs" / "rates.md").read_text(encoding="utf-8")
ROWS = [line.split(" | ") for line in PAGE.split("|---|---|---|")[1].split("\n\n")[0].strip().splitlines()]


def test_every_verdict_has_its_rule():
    named = " ".join(row[0] for row in ROWS)
    assert [verdict.name for verdict in Verdict if f"`{verdict.name}`" not in named] == []


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[1][:40])
def test_every_rule_has_its_theorem_or_says_that_it_has_none(row):
    known = ("proof A", "proof B", "et al.", "Tyurin", "measured, not proved", "textbook", "no step length", "nothing")
    assert any(word in row[2] for word in known)


def test_code_of_the_page_runs(monkeypatch):
    law, warmup = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    model = nn.Linear(3, 1)
    batches = [torch.randn(8, 3) for _ in range(5)]
    fit, made = object(), []
    monkeypatch.setattr(sd, "step_rate", lambda fit: None)
    monkeypatch.setattr(sd, "LossGapWarmup", lambda optimizer, fit: made.append(WARMUP(optimizer, H1=4.0)) or made[-1])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    names = {"sd": sd, "model": model, "fit": fit, "loader": batches, "loss_fn": lambda m, b: m(b).square().mean()}
    exec(law, names)
    assert isinstance(names["optimizer"], sd.GradientDescent)
    names["loss_fn"](model, batches[0]).backward()
    names["optimizer"].step()
    exec(warmup, names | {"optimizer": optimizer})
    assert made[0].last_epoch == 5
    assert 0 < made[0].get_last_lr()[0] < 0.1


WARMUP = sd.LossGapWarmup
