"""integrations.loggers.mlflow: MLflow itself reads back what the writer leaves in its stores; needs ``mlflow``."""

import re
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from asserts import assert_identical, state_of
from logged_runs import CLIPPING, Numbers, Run, assert_same, expected, law, row
from places import REPOSITORY

from smoothdiag import SmoothdiagWarning, Trace
from smoothdiag.integrations.loggers import MlflowWriter

pytestmark = pytest.mark.slow

mlflow = pytest.importorskip("mlflow")


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty database, which takes MLflow seconds to make."""
    path = tmp_path_factory.mktemp("database") / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(params=["sqlite", "file"], autouse=True)
def store(
    request: pytest.FixtureRequest, database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """A database, which is MLflow's default, or a folder, which it still reads and writes on request."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    shutil.copy(database, tmp_path)
    earlier = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db" if request.param == "sqlite" else f"file:{tmp_path}/runs")
    mlflow.set_experiment("smoothdiag")
    yield request.param
    while mlflow.active_run() is not None:
        mlflow.end_run()
    mlflow.set_tracking_uri(earlier)


def only_run() -> Any:
    (run,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
    return run


def numbers(run: Any) -> Numbers:
    client = mlflow.MlflowClient()
    histories = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
    return {name: [(metric.step, metric.value) for metric in metrics] for name, metrics in histories.items()}


def in_mlflow(name: str) -> str:
    first, *rest = name.split("/")
    return first + "/" + ".".join(rest)


def named(found: Numbers) -> Numbers:
    return {in_mlflow(name): pairs for name, pairs in found.items()}


def test_a_run_holds_every_row_once_and_the_figures() -> None:
    run = Run(autoclip=True)
    with MlflowWriter(run.probe, autoclip=run.clipper, run_name="mine"):
        assert mlflow.active_run() is not None
        run.train(8)
    assert mlflow.active_run() is None
    kept = only_run()
    assert (kept.info.status, kept.info.run_name) == ("FINISHED", "mine")
    found = numbers(kept)
    clipping = [found.pop(name) for name in CLIPPING]
    assert_same(found, named(expected(run.probe.trace)))
    assert [step for step, _ in clipping[0]] == sorted({row["step"] for row in run.probe.trace})
    for name in ("smoothness/figure.png", "clipping/figure.png"):
        path = mlflow.artifacts.download_artifacts(run_id=kept.info.run_id, artifact_path=name)
        assert Path(path).read_bytes().startswith(b"\x89PNG")


def test_the_verdict_is_a_tag_and_its_numbers_are_metrics() -> None:
    trace = Trace()
    trace.extend(law(range(150)))
    MlflowWriter(trace).close()
    kept = only_run()
    assert kept.data.tags["fit/verdict"].startswith("L0L1 after 150 rows. ")
    assert kept.data.metrics["fit/verdict.L0L1"] == 1
    assert kept.data.metrics["fit/L1"] == pytest.approx(2, rel=1e-9)


def test_a_run_of_the_users_stays_open_with_their_values() -> None:
    run = Run()
    with mlflow.start_run() as own:
        with MlflowWriter(run.probe):
            for step in range(8):
                run.train(1)
                mlflow.log_metric("mine", step, step=step)
        assert mlflow.active_run().info.run_id == own.info.run_id
        assert only_run().info.status == "RUNNING"
        with pytest.raises(ValueError, match="Parameter `start` should be empty.*Found run_name, nested"):
            MlflowWriter(Trace(), run_name="r", nested=True)
    found = numbers(only_run())
    assert found.pop("mine") == [(step, step) for step in range(8)]
    assert_same(found, named(expected(run.probe.trace)))


@pytest.mark.parametrize("by_id", [True, False])
def test_a_named_run_is_written_to_while_another_is_active(by_id: bool) -> None:
    named_run = mlflow.MlflowClient().create_run(mlflow.get_experiment_by_name("smoothdiag").experiment_id)
    run = Run()
    with (
        mlflow.start_run() as active,
        MlflowWriter(run.probe, named_run.info.run_id if by_id else named_run),
    ):
        run.train(4)
    kept = mlflow.get_run(named_run.info.run_id)
    assert kept.info.status == "RUNNING"
    assert_same(numbers(kept), named(expected(run.probe.trace)))
    assert mlflow.get_run(active.info.run_id).data.metrics == {}


def test_a_resumed_run_continues_in_the_same_run_and_keeps_both_values(tmp_path) -> None:
    first = Run(trace=tmp_path / "t.jsonl")
    with MlflowWriter(first.probe):
        first.train(5)
        state = first.probe.state_dict()
        first.train(3)
    first.probe.close()
    again = Run(trace=tmp_path / "t.jsonl")
    with MlflowWriter(again.probe, run_id=only_run().info.run_id):
        again.probe.load_state_dict(state)
        again.train(8)
    again.probe.close()
    kept = only_run()
    assert kept.info.status == "FINISHED"
    assert sorted(step for step, _ in numbers(kept)["smoothness/local"]) == [0, 3, 6, 6, 9, 12]


def test_a_block_that_ends_by_an_exception_leaves_a_failed_run() -> None:
    def ends() -> None:
        run = Run()
        with MlflowWriter(run.probe):
            run.train(4)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ends()
    kept = only_run()
    assert kept.info.status == "FAILED"
    assert mlflow.active_run() is None
    assert [step for step, _ in numbers(kept)["smoothness/local"]] == [0, 3]


def test_groups_keep_apart_under_names_that_mlflow_allows() -> None:
    groups = ["a(b)", "a[b]", "x/../y", "x//y", "é", "l" * 300, "l" * 299 + "m", ".", "a_b_"]
    trace = Trace()
    trace.extend([row(0, group=group, smoothness=float(place)) for place, group in enumerate(groups, start=1)])
    MlflowWriter(trace).update()
    metrics = only_run().data.metrics
    assert sorted(value for name, value in metrics.items() if name.startswith("smoothness/")) == list(range(1, 10))
    assert metrics["smoothness/local.é"] == 5
    assert max(map(len, metrics)) <= 250


def test_training_goes_on_bit_for_bit() -> None:
    states = []
    for logged in (False, True):
        run = Run(autoclip=True)
        writer = MlflowWriter(run.probe, autoclip=run.clipper) if logged else None
        run.train(40)
        if writer is not None:
            writer.close()
        states.append(state_of(run.model, run.optimizer))
    assert_identical(states[1], states[0])


def test_where_the_store_breaks_the_run_goes_on(store: str, tmp_path: Path) -> None:
    run = Run()
    writer = MlflowWriter(run.probe)
    run.train(2)
    if store == "sqlite":
        with sqlite3.connect(tmp_path / "mlflow.db") as database:
            database.execute("drop table metrics")
    else:
        (folder,) = (tmp_path / "runs").glob("*/*/metrics")
        for path in [*folder.glob("*/*"), *folder.glob("*"), folder]:
            path.rmdir() if path.is_dir() else path.unlink()
        folder.touch()  # a file where a folder should be
    with pytest.warns(SmoothdiagWarning, match="Logging has stopped: MlflowException") as caught:
        run.train(6)
        writer.close()
    assert len(caught) == 1
    assert run.probe.steps == 8
    assert mlflow.active_run() is None


@pytest.mark.parametrize("store", ["sqlite"], indirect=True)
def test_the_example_of_the_page_runs() -> None:
    run = Run()
    names = {"probe": run.probe, "clipper": None, "train": lambda: run.train(4)}
    page = (REPOSITORY / "docs" / "logs.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(import mlflow\n.*?)```", page, re.DOTALL)
    exec(code, names)
    assert [step for step, _ in numbers(only_run())["smoothness/local"]] == [0, 3]
