"""docs/ecosystem.md: the worker's loop of Ray Train on one machine, with one worker and with two."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from places import REPOSITORY
from recipes import assert_rows, mean_of_last, recipe, warned  # noqa: F401

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


def run(code: str, folder: Path, workers: int, *, lr: float = 0.05, number: int = 6) -> list[dict[str, Any]]:
    """Trains by the recipe, or a variant of it, and returns what each rank left."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray_worker import work

    folder.mkdir()
    config = {"code": code, "folder": str(folder), "trace": str(folder / "trace.jsonl"), "lr": lr, "number": number}
    trainer = TorchTrainer(
        work,
        train_loop_config=config,
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=False),
        run_config=RunConfig(storage_path=str(folder / "ray"), name="run"),
    )
    result = trainer.fit()
    ranks = [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(workers)]
    assert {rank["size"] for rank in ranks} == {workers}
    return [rank | {"metrics": result.metrics} for rank in ranks]


@pytest.mark.parametrize("workers", [1, 2])
def test_training_is_the_same_and_rows_are_those_of_the_workers(workers: int, tmp_path: Path) -> None:
    from asserts import assert_identical

    expected = run(BARE, tmp_path / "bare", workers)
    for name, code in (("probed", OFF), ("shadow", SHADOW)):
        for rank, plain in zip(run(code, tmp_path / name, workers), expected, strict=True):
            assert_identical(rank["state"], plain["state"])
            assert rank["norms"] == plain["norms"]
    assert_rows(sd.Trace.read(tmp_path / "probed" / "trace.jsonl"), expected[0]["norms"])


def test_auto_clip_helps_at_a_rate_that_is_too_large(tmp_path: Path) -> None:
    fair = mean_of_last(run(BARE, tmp_path / "fair", 2, lr=0.05, number=60)[0]["losses"])
    without = mean_of_last(run(BARE, tmp_path / "without", 2, lr=10.0, number=60)[0]["losses"])
    found = run(CODE, tmp_path / "clipped", 2, lr=10.0, number=60)[0]
    print("ENDS", fair, without, mean_of_last(found["losses"]), found["metrics"])
    assert math.isfinite(found["metrics"]["longest_step"])
