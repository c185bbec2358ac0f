"""spikes: two processes, replicated or sharded, decide alike, although a batch is broken on one of them alone."""

import pytest
import torch
from ranks import run_ranks
from spikes_worker import GUARDS, HARD, LOST, WORLD, train, work
from torch.testing import assert_close

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without it"),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run_ranks(work, tmp_path_factory.mktemp("ranks"), WORLD)


@pytest.mark.parametrize("wrap", ["ddp", "fsdp2"])
@pytest.mark.parametrize("kind", GUARDS)
def test_ranks_decide_alike(found, kind, wrap) -> None:
    first, second = (rank[kind, wrap] for rank in found)
    assert repr(first["events"]) == repr(second["events"]), "as text, where NaN equals NaN"
    assert first["causes"] == second["causes"]
    for a, b in zip(first["weights"], second["weights"], strict=True):
        assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    steps = [step for step, *_ in first["events"]]
    assert steps[0] == HARD
    assert LOST in steps
    assert first["causes"][0] == "data"


@pytest.mark.parametrize("wrap", ["ddp", "fsdp2"])
@pytest.mark.parametrize("kind", ["skip", "the loop clips", "SPAM"])
def test_ranks_do_what_one_process_does(found, kind, wrap) -> None:
    ranks, alone = found[0][kind, wrap], train(kind)
    assert [event[:3] for event in ranks["events"]] == [event[:3] for event in alone["events"]]
    assert_close(ranks["weights"], alone["weights"], rtol=1e-6, atol=1e-9, equal_nan=True)
    if kind == "SPAM":
        numbers = [[event[3]["elements"] for event in one["events"]] for one in (ranks, alone)]
        assert numbers[0] == numbers[1]
        assert numbers[0][0] > 0
