"""adapters: with every optimizer a probe and a SpikeGuard change nothing, and AutoClip does no harm or says why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from asserts import assert_identical, state_of
from losses import cross_entropy
from third_party_optimizers import ROWS, Row
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path

from smoothdiag import AutoClip, LocalSmoothness, PathSmoothness, Probe, SpikeGuard, StepRule, every

pytestmark = pytest.mark.thorough

NEVER_BINDS = StepRule(multiple=None, relative=1e6)
SOURCE = torch.Generator().manual_seed(3)
INPUTS = torch.randn(256, 6, generator=SOURCE)
LABELS = (INPUTS @ torch.randn(6, 3, generator=SOURCE) + 0.5 * torch.randn(256, 3, generator=SOURCE)).argmax(1)


class Training:
    """A model, its optimizer, and a loop as the optimizer asks for it."""

    def __init__(self, row: Row, *, probed: bool = False, rule: StepRule | None = None, mode: Any = "clip") -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 16), nn.Tanh(),
            nn.Linear(16, 3),
        )  # fmt: skip
        self.row, self.optimizer = row, row.make(self.model)
        if hasattr(self.optimizer, "train"):
            self.optimizer.train()
        self.batches = torch.Generator().manual_seed(1)
        estimators = (PathSmoothness(), LocalSmoothness()) if probed else ()
        self.probe = (
            Probe(self.model, self.optimizer, cross_entropy, estimators=estimators, schedule=every(1))
            if probed or rule
            else None
        )
        self.clipper = AutoClip(self.optimizer, self.probe, rule=rule, mode=mode) if rule else None

    def over(self, steps: int, max_norm: float | None = None) -> Training:
        """Trains; the rate falls to zero, so that the noise of the last steps is not what is compared."""
        for k in range(steps):
            for group in self.optimizer.param_groups:
                group.setdefault("first_lr", group["lr"])
                group["lr"] = group["first_lr"] * (1 - k / steps)
            chosen = torch.randint(256, (32,), generator=self.batches)
            self.step((INPUTS[chosen], LABELS[chosen]), max_norm)
        return self

    def step(self, batch: tuple[Tensor, Tensor], max_norm: float | None) -> None:
        def closure() -> Tensor:
            self.optimizer.zero_grad()
            if self.probe is not None:
                self.probe.observe(batch)
            loss = cross_entropy(self.model, batch)
            loss.backward()
            if max_norm is not None:
                nn.utils.clip_grad_norm_(self.model.parameters(), max_norm)
            return loss

        optimizer: Any = self.optimizer
        if self.row.loop == "closure":
            optimizer.step(closure)
            return
        closure()
        if self.row.loop == "sam":
            optimizer.step(closure)
        elif self.row.loop == "two steps":
            optimizer.first_step(zero_grad=True)
            closure()
            optimizer.second_step(zero_grad=True)
        else:
            optimizer.step()

    def state(self) -> dict[str, Any]:
        """Returns copies of weights, buffers, gradients, random states, and all that the optimizer keeps."""
        leaves, _ = tree_flatten_with_path(self.optimizer.state_dict())
        kept = {f"optimizer {path}": x.clone() if isinstance(x, Tensor) else x for path, x in leaves}
        return state_of(self.model) | kept

    def evaluated(self) -> float:
        """Returns the loss where the optimizer says that the model is to be evaluated."""
        optimizer: Any = self.optimizer
        if hasattr(optimizer, "eval"):
            optimizer.eval()
        self.model.eval()
        with torch.no_grad():
            return float(cross_entropy(self.model, (INPUTS, LABELS)))


@pytest.fixture(params=ROWS)
def row(request: pytest.FixtureRequest) -> Row:
    return ROWS[request.param]


@pytest.mark.filterwarnings("ignore")
def test_a_probe_changes_no_bit(row: Row) -> None:
    if row.unwatched:
        with pytest.raises(ValueError, match=row.unwatched):
            Training(row, probed=True)
        return
    expected = Training(row).over(10).state()
    probed = Training(row, probed=True).over(10)
    assert_identical(probed.state(), expected)
    assert len(probed.probe.trace) > 0 or row.loop == "two steps"


@pytest.mark.filterwarnings("ignore")
def test_a_cap_that_never_binds_changes_no_bit(row: Row) -> None:
    if row.refused or row.unwatched:
        pytest.skip("refused")
    clipped = Training(row, rule=NEVER_BINDS).over(10)
    assert_identical(clipped.state(), Training(row).over(10).state())
    assert clipped.clipper.clip_fraction == 0 or row.loop == "two steps"


@pytest.mark.filterwarnings("ignore")
def test_a_cap_that_binds_costs_no_loss_or_is_refused(row: Row) -> None:
    if refused := row.refused or row.unwatched:
        with pytest.raises((ValueError, RuntimeError), match=refused) as found:
            Training(row, rule=StepRule(None, row.share)).over(1)
        assert "Found" in str(found.value)
        return
    clipped = Training(row, rule=StepRule(None, row.share)).over(60)
    by_hand = max(Training(row).over(60, max_norm).evaluated() for max_norm in (None, 0.3))
    loss = clipped.evaluated()
    assert loss <= 1.1 * by_hand
    assert clipped.clipper.clip_fraction >= 0.1 or row.loop == "two steps"


MOVES_FIRST = ("schedulefree adamw closure", "kozistr wsam", "kozistr bsam")
"""They move the parameters before they evaluate the closure of a step."""


@pytest.mark.filterwarnings("ignore")
def test_a_spike_guard_changes_no_bit(row: Row) -> None:
    if row.unwatched:
        pytest.skip("refused")
    guarded = Training(row)
    guard = SpikeGuard(guarded.optimizer, update_norm=True)
    assert_identical(guarded.over(8).state(), Training(row).over(8).state())
    assert guard.events == []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in ROWS if name not in MOVES_FIRST])
def test_a_skipped_step_leaves_everything_as_it_was(name: str) -> None:
    guarded = Training(ROWS[name])
    if ROWS[name].unwatched:
        pytest.skip("refused")
    if name == "lbfgs":
        with pytest.raises(ValueError, match="several gradients in a step"):
            SpikeGuard(guarded.optimizer, action="skip")
        return
    guard = SpikeGuard(guarded.optimizer, action="skip")
    before = guarded.over(5).state()
    guarded.step((INPUTS[:32] * torch.inf, LABELS[:32]), None)
    kept = [key for key in before if key.startswith(("optimizer", "parameter"))]
    after = guarded.state()
    assert_identical({key: after[key] for key in kept}, {key: before[key] for key in kept})
    assert [event.done for event in guard.events] == ["skipped"]
