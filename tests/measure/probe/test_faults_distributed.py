"""measure.probe: a fault under data parallelism leaves the run as it was, or ends it with the true cause."""

from typing import Any

import pytest
import torch
from asserts import assert_identical
from distributed_runs import WORLD
from faults_worker import FAULT_STEP, REPLICAS, SETUPS, SHARDS, work
from ranks import run_ranks

BOTH, SECOND = (0, 1), (1,)
NUM_PLACES = 20

# Ranks cannot tell each other of a fault while they may be waiting in collectives of the loss itself.
SILENT = ("collectives within",)

HARDER = {  # setups that another one contains
    "plain": "many buckets",
    "bucket views": "branches in turn, views",
    "static graph": "static graph, views",
    "buffers fetched": "buffers fetched, micro-batches",
}
QUICK = [
    *(("unchanged", "ddp", name) for name in REPLICAS if name not in HARDER),
    ("faulty", "ddp", "plain", BOTH, 4),
    ("faulty", "ddp", "branches in turn, views", SECOND, 6),
    ("faulty", "fsdp2", "root alone", BOTH, 7),
    ("faulty", "fsdp2", "half precision", BOTH, 3),
    ("ended", "fsdp2", "nested", 2),
]
SLOW = [
    *(("unchanged", "ddp", name) for name in HARDER),
    *(("unchanged", "fsdp2", name) for name in SHARDS),
    *(("faulty", kind, name, BOTH, NUM_PLACES) for kind, setups in SETUPS.items() for name in setups),
    *(("faulty", "ddp", name, SECOND, NUM_PLACES) for name in REPLICAS if name not in SILENT),
    *(("ended", "ddp", name, NUM_PLACES) for name in SILENT),
    ("ended", "fsdp2", "nested", NUM_PLACES),
    ("ended", "fsdp2", "checkpoints", NUM_PLACES),
]

# PowerSGD hands the optimizer something else than the gradient, and so does torch 2.13 where some gradients are sparse:
# it divides all others by the number of ranks twice. Two bfloat16 gradients may differ by rounding alone.
ALLOWED = {
    "PowerSGD": {"ok", "not_reproduced"},
    "sparse": {"ok", "not_reproduced"},
    "bfloat16": {"ok", "below_noise_floor"},
}

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without it"),
]


def name_of(job: tuple[Any, ...]) -> str:
    return ", ".join(map(str, job))


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> list[dict[Any, Any]]:
    return run_ranks(work, tmp_path_factory.mktemp("ranks"), WORLD, QUICK, weights_only=False)


@pytest.fixture(scope="module")
def slow(tmp_path_factory) -> list[dict[Any, Any]]:
    return run_ranks(work, tmp_path_factory.mktemp("ranks"), WORLD, SLOW, timeout=1800, weights_only=False)


@pytest.mark.parametrize("job", QUICK, ids=name_of)
def test_quick_selection(quick, job) -> None:
    check(job, [rank[job] for rank in quick])


@pytest.mark.slow
@pytest.mark.parametrize("job", SLOW, ids=name_of)
def test_every_setup(slow, job) -> None:
    check(job, [rank[job] for rank in slow])


def check(job: tuple[Any, ...], ranks: list[dict[Any, Any]]) -> None:
    what, _, name, *rest = job
    if what == "unchanged":
        assert_unchanged(name, ranks)
    elif what == "faulty":
        assert_goes_on(ranks, rest[0])
    else:
        assert_ended(ranks)


def assert_unchanged(name: str, ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert_identical(rank["probed"]["state"], rank["bare"]["state"])
        statuses = [row["status"] for row in rank["probed"]["rows"]]
        assert statuses
        assert set(statuses) <= ALLOWED.get(name, {"ok", "saturated"})
    assert ranks[0]["probed"]["rows"] == ranks[1]["probed"]["rows"] or name == "some parameters left out"


def assert_goes_on(ranks: list[dict[Any, Any]], failing: tuple[int, ...]) -> None:
    """Checks weights, rows and warnings of runs in which a measurement failed."""
    for number, rank in enumerate(ranks):
        places = [key for key in rank if isinstance(key, int)]
        assert places
        for place in places:
            run = rank[place]
            assert_identical(run["state"], rank["bare"]["state"])
            failed = [row for row in run["rows"] if row["status"] == "failed"]
            assert [row["step"] for row in failed] == [str(FAULT_STEP)], place
            assert [row for row in ranks[0][place]["rows"] if row["status"] == "failed"] == failed
            (warning,) = (text for text in run["warnings"] if "was not measured" in text)
            assert ("out of memory (made up)" if number in failing else "PeerFailed") in warning
            # What is measured beside the fault is what is measured without it.
            assert all(row in rank["whole"]["rows"] for row in run["rows"] if row["status"] != "failed"), place


def assert_ended(ranks: list[dict[Any, Any]]) -> None:
    first, second = ranks
    assert first.keys() == second.keys()
    for place in first:
        kind, cause, message = second[place]
        assert (kind, cause) == ("NotPutBack", "OutOfMemoryError"), (place, message)
        assert first[place] is not None
