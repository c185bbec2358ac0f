"""integrations.huggingface: the callback works where two processes train one model."""

import socket

import pytest
import torch
from huggingface_worker import STEPS, work
from ranks import run_ranks

pytestmark = pytest.mark.thorough


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.mark.slow
def test_two_processes_measure_together_and_train_as_without(tmp_path) -> None:
    ranks = run_ranks(work, tmp_path, 2, free_port(), weights_only=False)
    without = ranks[0]["without"]
    for found in ranks:
        plain = found["auto_clip_False"]
        for part in (plain, found["auto_clip_False_resumed"]):
            assert all(torch.equal(a, b) for a, b in zip(part["weights"], without["weights"], strict=True))
        clipped = found["auto_clip_True"]
        assert "; 0% of steps" not in clipped["reason"]
        assert any(not torch.equal(a, b) for a, b in zip(clipped["weights"], without["weights"], strict=True))
        resumed = found["auto_clip_True_resumed"]
        assert resumed["reason"] == clipped["reason"]
        assert all(torch.equal(a, b) for a, b in zip(resumed["weights"], clipped["weights"], strict=True))
        for part in (plain, clipped):
            assert part["steps"] == list(range(STEPS))
            logged = [entry["grad_norm"] for entry in part["logs"]]
            assert part["norms"] == pytest.approx(logged, rel=1e-5)
    for name in ("auto_clip_False", "auto_clip_True"):
        assert ranks[0][name]["rows"] == ranks[1][name]["rows"]
        assert ranks[0][f"{name}_resumed"]["rows"] == ranks[0][name]["rows"]
        # The other rank keeps in memory what it measures, and begins anew when it resumes.
        own = ranks[1][f"{name}_resumed"]["rows"]
        assert own == ranks[0][name]["rows"][-len(own) :]
        assert [path.name for path in (tmp_path / name).glob("*.jsonl")] == ["smoothdiag.jsonl"]
