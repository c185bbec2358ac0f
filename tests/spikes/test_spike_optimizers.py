"""spikes: with every optimizer of one table a guard changes no bit, and a skipped step leaves everything as it was."""

from __future__ import annotations

import pytest
import torch
from asserts import assert_identical
from test_optimizer_contract import INPUTS, LABELS, Training
from third_party_optimizers import ROWS, Row

import smoothdiag as sd

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

MOVES_FIRST = ("schedulefree adamw closure", "kozistr wsam", "kozistr bsam")
"""They move the parameters before they evaluate the closure of a step."""


@pytest.fixture(params=[name for name, row in ROWS.items() if not row.unwatched])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_a_guard_changes_no_bit(name: str) -> None:
    row: Row = ROWS[name]
    expected = Training(row).over(8).state()
    training = Training(row)
    guard = sd.SpikeGuard(training.optimizer, update_norm=True)
    assert_identical(training.over(8).state(), expected)
    assert guard.events == []


def test_a_skipped_step_leaves_everything_as_it_was(name: str) -> None:
    if name in MOVES_FIRST:
        pytest.skip("moves the parameters before the gradient is known")
    training = Training(ROWS[name])
    if name == "lbfgs":
        with pytest.raises(ValueError, match="several gradients in a step"):
            sd.SpikeGuard(training.optimizer, action="skip")
        return
    guard = sd.SpikeGuard(training.optimizer, action="skip")
    before = training.over(5).state()
    kept = [key for key in before if key.startswith(("optimizer", "parameter"))]
    training.step((INPUTS[:32] * torch.inf, LABELS[:32]), None)
    after = training.state()
    assert_identical({key: after[key] for key in kept}, {key: before[key] for key in kept})
    assert [event.done for event in guard.events] == ["skipped"]
