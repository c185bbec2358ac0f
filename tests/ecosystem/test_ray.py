"""docs/ecosystem.md: the worker's loop of Ray Train on one machine, with one worker and with two."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from places import REPOSITORY
from recipes import assert_rows, mean_of_last, recipe

import smoothdiag as sd

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]
ray = pytest.importorskip("ray")
pytest.importorskip("ray.train.torch")

CODE = recipe("Ray Train")
EACH_STEP = re.sub(r'trace=config\["trace"\]', r'trace=config["trace"], schedule=sd.every(1), data="step"', CODE)
REPORT = re.compile(r"\n.*ray\.train\.report.*")
OFF = REPORT.sub("", re.sub(r"\n.*AutoClip\(.*", "", EACH_STEP))
SHADOW = CODE.replace("AutoClip(optimizer, probe)", 'AutoClip(optimizer, probe, mode="shadow")')
BARE = re.sub(r"probe\.watch(\(.*\)):", r"\1:", re.sub(r"\n.*sd\.Probe\(.*", "", OFF))


@pytest.fixture(scope="module", autouse=True)
def _cluster() -> Iterator[None]:
    paths = f"{REPOSITORY}:{REPOSITORY / 'tests' / 'shared'}"
    environment = {"env_vars": {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=environment)
    yield
    ray.shutdown()


def run(runs: dict[str, tuple[str, float]], folder: Path, workers: int, number: int) -> list[Any]:
    """Trains by variants of the recipe at learning rates; returns what each rank left of them."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray_worker import work

    trainer = TorchTrainer(
        work,
        train_loop_config={"runs": runs, "folder": str(folder), "number": number},
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=False),
        run_config=RunConfig(storage_path=str(folder / "ray"), name="run"),
    )
    trainer.fit()
    ranks = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(workers)]
    assert [rank["size"] for rank in ranks] == [workers] * workers
    return ranks


@pytest.mark.parametrize("workers", [1, 2])
def test_training_is_the_same_and_rows_are_those_of_the_workers(workers: int, tmp_path: Path) -> None:
    from asserts import assert_identical

    runs = {"bare": (BARE, 0.05), "shadow": (SHADOW, 0.05), "probed": (OFF, 0.05)}
    ranks = run(runs, tmp_path, workers, number=6)
    for rank in ranks:
        assert len(rank["bare"]["losses"]) == 12 / workers
        for name in ("shadow", "probed"):
            assert_identical(rank[name]["state"], rank["bare"]["state"])
            assert rank[name]["norms"] == rank["bare"]["norms"]
    assert_rows(sd.Trace.read(tmp_path / "probed.jsonl"), ranks[0]["probed"]["norms"])


def test_auto_clip_helps_at_a_rate_that_is_too_large(tmp_path: Path) -> None:
    runs = {"fair": (BARE, 0.05), "without": (BARE, 10.0), "clipped": (CODE, 10.0)}
    ranks = run(runs, tmp_path, 2, number=60)
    fair, without, clipped = (mean_of_last(ranks[0][name]["losses"]) for name in runs)
    assert clipped < 1.3 * fair
    assert without > 10 * fair
