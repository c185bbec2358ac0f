"""measure.probe: several optimizers and several networks are measured and clipped alike by two processes."""

from typing import Any

import pytest
import torch
from asserts import assert_identical
from losses import cross_entropy
from ranks import run_ranks
from several_worker import CASES, STEPS, WORLD, Case, batches, network, play, train, work
from torch.testing import assert_close

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without it"),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict[Any, Any]]:
    return run_ranks(work, tmp_path_factory.mktemp("ranks"), WORLD, weights_only=False)


def gradient_norms(starts: list[list[torch.Tensor]]) -> list[float]:
    """Returns the norm of the gradient of each whole batch, in one process."""
    model = network()
    norms = []
    for start, batch in zip(starts, batches(STEPS, dtype=torch.float64), strict=True):
        with torch.no_grad():
            for p, x in zip(model.parameters(), start, strict=True):
                p.copy_(x)
        grads = torch.autograd.grad(cross_entropy(model, batch), list(model.parameters()))
        norms.append(float(torch.cat([g.flatten() for g in grads]).norm()))
    return norms


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ranks_agree_and_a_run_that_is_only_watched_stays_the_same(found, case: Case) -> None:
    first, second = found
    for rank in found:
        for shows in ("probe", "shadow"):
            assert_identical(rank[case, shows]["state"], rank[case, "nothing"]["state"])
        # Rows beside those of AutoClip change nothing that it does.
        assert_identical(rank[case, "clip"]["state"], rank[case, "clip alone"]["state"])
    for shows in ("probe", "shadow", "clip"):
        assert first[case, shows]["rows"]
        assert str(first[case, shows]["rows"]) == str(second[case, shows]["rows"])
        assert first[case, shows]["longest_step"] == second[case, shows]["longest_step"]
        assert all(map(torch.equal, first[case, shows]["weights"], second[case, shows]["weights"]))
    assert first[case, "clip"]["clip_fraction"] > 0


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("shows", ["probe", "clip"])
def test_gradient_norms_are_those_of_the_whole_batch(found, case: Case, shows: str) -> None:
    run = found[0][case, shows]
    norms = gradient_norms(run["starts"])
    rows = [row for row in run["rows"] if row["estimator"] in ("path", "local")]
    assert {(row["step"], row["estimator"]) for row in rows} == {
        (k, name) for k in range(STEPS) for name in ("path", "local")
    }
    assert {row["status"] for row in rows} <= {"ok", "saturated", "kink_limited"}
    for row in rows:
        assert row["grad_norm"] == pytest.approx(norms[row["step"]], rel=1e-6)


# Newton-Schulz runs in bfloat16, which rounds sums over shards in another order.
@pytest.mark.parametrize("case", [case for case in CASES if case.wrap == "ddp"], ids=str)
@pytest.mark.parametrize("shows", ["shadow", "clip"])
def test_two_processes_step_as_one(found, case: Case, shows: str) -> None:
    run, alone = found[0][case, shows], train(case, None, shows)
    assert_close(run["weights"], alone["weights"], rtol=1e-6, atol=1e-9)
    assert run["longest_step"] == pytest.approx(alone["longest_step"], rel=1e-6)
    assert run["clip_fraction"] == alone["clip_fraction"]


@pytest.mark.parametrize("looks_for_unused", [False, True])
def test_a_list_of_ddp_modules_has_the_rows_of_one_process(found, looks_for_unused: bool) -> None:
    alone = play(None, probed=True)
    for rank in found:
        bare, probed = rank["gan", looks_for_unused]
        for found_state, expected in zip(probed["state"], bare["state"], strict=True):
            assert_identical(found_state, expected)
        assert str(probed["rows"]) == str(found[0]["gan", looks_for_unused][1]["rows"])
        for rows, expected_rows in zip(probed["rows"], alone["rows"], strict=True):
            assert {row["status"] for row in rows} == {"ok"}
            assert len(rows) == len(expected_rows) == 24  # two of Adam's own norm beside the two others
            for row, expected in zip(rows, expected_rows, strict=True):
                for name in ("step", "grad_norm", "step_norm", "smoothness", "loss"):
                    assert row[name] == pytest.approx(expected[name], rel=1e-6)


def test_what_steps_within_backward_is_refused(found) -> None:
    for rank in found:
        assert "Found ZeroRedundancyOptimizer with `overlap_with_ddp=True`: it steps within backward" in rank["refused"]
