"""autoclip: two processes, replicated or sharded, take the steps of one process."""

import math

import pytest
import torch
from autoclip_worker import BAD, CASES, WORLD, train, work
from ranks import run_ranks
from torch.testing import assert_close

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:The gradient of step"),
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without it"),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run_ranks(work, tmp_path_factory.mktemp("ranks"), WORLD)


@pytest.mark.parametrize("wrap", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", CASES)
def test_ranks_agree_with_each_other_and_with_one_process(found, name, wrap) -> None:
    first, second = (rank[name, wrap] for rank in found)
    alone = train(name)
    assert first["longest_step"] == second["longest_step"]
    assert repr(first["state"]) == repr(second["state"]), "as text, where NaN equals NaN"
    for a, b in zip(first["weights"], second["weights"], strict=True):
        assert torch.equal(a, b)
    assert first["longest_step"] == pytest.approx(alone["longest_step"], rel=1e-6)
    assert_close(first["weights"], alone["weights"], rtol=1e-6, atol=1e-9)
    assert first["history"]["event"] == alone["history"]["event"]
    assert first["history"]["step"] == alone["history"]["step"]
    assert first["history"]["clipped"] == second["history"]["clipped"] == alone["history"]["clipped"]
    assert first["history"]["step"][-1] == BAD
    assert math.isfinite(sum(float(w.sum()) for w in first["weights"]))


@pytest.mark.filterwarnings("ignore")
def test_a_rank_that_cannot_halve_its_batch_keeps_the_others_in_step(found) -> None:
    first, second = (rank["sgd", "halves fail"] for rank in found)
    assert first["longest_step"] == second["longest_step"] > 0
    for a, b in zip(first["weights"], second["weights"], strict=True):
        assert torch.equal(a, b)
    measured = first["state"]["calibration"]["measurements"]
    assert len(measured) == 13, "no row is lost"
    assert all(math.isnan(signal) for *_, signal, _ in measured)
