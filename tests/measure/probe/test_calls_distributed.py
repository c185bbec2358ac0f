"""measure.probe.calls: models that return their loss are measured alike under DDP and FSDP2."""

import pytest
from asserts import assert_identical
from calls_worker import CASES, work
from distributed_runs import WORLD
from ranks import run_ranks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run_ranks(work, tmp_path_factory.mktemp("ranks"), WORLD, weights_only=False)


@pytest.mark.parametrize("wrap", [case.wrap for case in CASES])
def test_calls_give_the_rows_of_batches_and_leave_the_run_alone(found, wrap) -> None:
    for rank in found:
        bare, calls, batches = (rank[wrap][shows] for shows in ("nothing", "calls", "batches"))
        assert_identical(calls[0], bare[0])
        assert calls[1]
        assert {row["status"] for row in calls[1]} == {"ok"}
        assert str(calls[1]) == str(batches[1])  # NaN differs from itself, but not its text


def test_the_module_within_ddp_is_refused(found) -> None:
    for rank in found:
        assert "should be the DistributedDataParallel module that the loop calls" in rank["within"]
        assert "Found the Returning within it" in rank["within"]


def test_an_abandoned_pass_does_not_count_under_fsdp2(found) -> None:
    for rank in found:
        ((status, measured, norm),) = rank["abandoned"]
        assert status == "ok"
        assert measured == pytest.approx(norm, rel=1e-5)
