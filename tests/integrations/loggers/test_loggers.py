"""integrations.loggers: TensorBoard and wandb themselves read back what the writers leave on disk."""

import json
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import wandb
from asserts import assert_identical, state_of
from logged_runs import CLIPPING, Numbers, Run, assert_same, expected, law, loss_fn, row
from logged_worker import work
from places import REPOSITORY
from ranks import run_ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from smoothdiag import SmoothdiagWarning, Trace
from smoothdiag.integrations.loggers import (
    MlflowWriter,
    TensorBoardWriter,
    TraceWriter,
    TrackioWriter,
    WandbWriter,
)

pytestmark = pytest.mark.thorough


def events(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0}).Reload()


def numbers(folder: Path) -> Numbers:
    read = events(folder)
    return {tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def history(folder: Path) -> list[dict[str, Any]]:
    """The rows of the only offline run below a folder, as wandb's own reader prints them."""
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    records = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    return [record["history"]["item"] for record in records if record["type"] == "history"]


def numbers_of(rows: list[dict[str, Any]]) -> Numbers:
    found = defaultdict(list)
    for item in rows:
        for name, value in item.items():
            if not name.startswith("_") and "/figure" not in name and name != "optimizer_step":
                found[name].append((item["optimizer_step"], value))
    return dict(found)


def test_tensorboard_holds_every_row_once_under_grouped_names(tmp_path) -> None:
    run = Run()
    with TensorBoardWriter(run.probe, tmp_path) as writer:
        run.train(8)
        writer.update()
        writer.update()
    found = numbers(tmp_path)
    assert [step for step, _ in found["smoothness/local"]] == [0, 3, 6]
    assert {"smoothness/path/0", "gradient/norm/local/3", "saturation/local", "status/ok"} <= found.keys()
    assert_same(found, expected(run.probe.trace))


def test_rows_are_on_disk_before_the_next_step_ends(tmp_path) -> None:
    run = Run()
    writer = TensorBoardWriter(run.probe, tmp_path)
    run.train(5)
    assert [step for step, _ in numbers(tmp_path)["smoothness/local"]] == [0, 3]
    writer.close()


def test_the_figure_comes_at_the_end_as_an_image(tmp_path) -> None:
    run = Run()
    with TensorBoardWriter(run.probe, tmp_path):
        run.train(8)
        assert events(tmp_path).Tags()["images"] == []
    (image,) = events(tmp_path).Images("smoothness/figure")
    assert image.step == 6
    assert (image.width, image.height) == (960, 720)
    assert image.encoded_image_string.startswith(b"\x89PNG")


def test_of_failed_rows_only_their_number_is_written(tmp_path) -> None:
    trace = Trace()
    writer = TensorBoardWriter(trace, tmp_path)
    trace.extend([row(0), row(1, status="failed"), row(2, status="below_noise_floor"), row(3, status="failed")])
    trace.append(row(4, status="saturated", saturation=float("nan"), grad_norm=float("inf")))
    writer.close()
    assert numbers(tmp_path) == {
        "smoothness/local": [(0, 3.0), (4, 3.0)],
        "gradient/norm/local": [(0, 2.0)],
        "saturation/local": [(0, 0.5)],
        "status/ok": [(0, 1.0)],
        "status/failed": [(1, 1.0), (3, 2.0)],
        "status/below_noise_floor": [(2, 1.0)],
        "status/saturated": [(4, 1.0)],
    }


def test_tensorboard_and_wandb_show_the_verdict_as_text(tmp_path, own) -> None:
    trace = Trace()
    trace.extend(law(range(20)))
    TensorBoardWriter(trace, tmp_path / "runs").close()
    WandbWriter(trace).close()
    (event,) = events(tmp_path / "runs").Tensors("fit/verdict/text_summary")
    (text,) = event.tensor_proto.string_val
    assert text.decode().startswith("NOT_IDENTIFIED after 20 rows. These rows do not determine L0 and L1")
    assert own.summary["fit/verdict"] == text.decode()


def test_a_trace_without_a_drawable_row_gets_no_figure(tmp_path) -> None:
    trace = Trace()
    trace.append(row(0, smoothness=float("nan"), status="failed"))
    with (
        pytest.warns(SmoothdiagWarning, match="gets no figure.*positive and finite"),
        TensorBoardWriter(trace, tmp_path),
    ):
        pass
    assert events(tmp_path).Tags()["images"] == []


def test_a_run_that_measured_nothing_ends_quietly(tmp_path) -> None:
    with TensorBoardWriter(Run().probe, tmp_path):
        pass
    assert numbers(tmp_path) == {}


def resumed(folder: Path, trace: Path) -> None:
    """Takes eight steps, of which the second process knows five, and eight more."""
    first = Run(trace=trace)
    writer = TensorBoardWriter(first.probe, folder)
    first.train(5)
    state = first.probe.state_dict()
    first.train(3)
    writer.close()
    first.probe.close()
    again = Run(trace=trace)
    with TensorBoardWriter(again.probe, folder):
        again.probe.load_state_dict(state)
        again.train(8)
    again.probe.close()


def test_a_resumed_run_shows_every_step_once(tmp_path) -> None:
    resumed(tmp_path / "runs", tmp_path / "t.jsonl")
    found = numbers(tmp_path / "runs")
    wanted = expected(Trace.read(tmp_path / "t.jsonl"))
    statuses = {name for name in wanted if name.startswith("status/")}  # which each process counts by itself
    assert [step for step, _ in found["smoothness/local"]] == [0, 3, 6, 9, 12]
    assert_same(
        {name: pairs for name, pairs in found.items() if name not in statuses},
        {name: pairs for name, pairs in wanted.items() if name not in statuses},
    )


def test_a_writer_of_the_users_stays_open_and_hides_nothing(tmp_path) -> None:
    run = Run()
    run.train(3)
    with SummaryWriter(str(tmp_path)) as own:
        own.add_scalar("mine", 1.0, 7)
        with TensorBoardWriter(run.probe, own):
            run.train(4)
        own.add_scalar("mine", 2.0, 8)
    found = numbers(tmp_path)
    assert found["mine"] == [(7, 1.0), (8, 2.0)]
    assert [step for step, _ in found["smoothness/local"]] == [3, 6]


def test_a_trace_is_written_from_its_beginning(tmp_path) -> None:
    run = Run()
    run.train(4)
    writer = TensorBoardWriter(run.probe.trace, tmp_path)
    writer.update()
    run.train(4)
    writer.close()
    assert_same(numbers(tmp_path), expected(run.probe.trace))


def test_autoclip_is_written_as_the_next_step_meets_it(tmp_path) -> None:
    run, wanted, seen = Run(autoclip=True), [], [0]

    def read(*args: object) -> None:
        if len(run.probe.trace) > seen[0]:
            state = (run.clipper.longest_step, run.clipper.threshold, run.clipper.clip_fraction)
            wanted.append((run.probe.steps - 1, *state))
            seen[0] = len(run.probe.trace)

    writer = TensorBoardWriter(run.probe, tmp_path, autoclip=run.clipper)
    run.optimizer.register_step_pre_hook(read)
    run.train(40)  # the last of which is measured
    read()
    writer.close()
    found = numbers(tmp_path)
    assert len({longest for _, longest, _, _ in wanted}) > 1
    for column, name in enumerate(CLIPPING, start=1):
        assert_same({name: found[name]}, {name: [(row[0], row[column]) for row in wanted]})
    assert "smoothness/local_clip" in found


@pytest.mark.parametrize("made", [TensorBoardWriter, WandbWriter])
def test_training_goes_on_bit_for_bit(tmp_path, made) -> None:
    states, histories = [], []
    for logged in (False, True):
        run = Run(autoclip=True)
        target = {"log_dir": tmp_path} if made is TensorBoardWriter else in_folder(tmp_path)
        writer = made(run.probe, autoclip=run.clipper, **target) if logged else None
        run.train(40)
        if writer is not None:
            writer.close()
        states.append(state_of(run.model, run.optimizer))
        histories.append(run.clipper.state_dict())
    assert_identical(states[1], states[0])
    assert str(histories[1]) == str(histories[0])


def test_steps_that_are_not_measured_write_nothing() -> None:
    calls = []

    class Sink:
        def start(self, steps: int) -> None:
            calls.append(("start", steps))

        def scalars(self, step: int, values: dict[str, float]) -> None:
            calls.append(("scalars", step))

        def image(self, step: int, name: str, pixels: np.ndarray) -> None:
            calls.append((name, pixels.shape, str(pixels.dtype)))

        def close(self) -> None:
            calls.append(("close",))

    run = Run()
    with TraceWriter(run.probe, Sink) as writer:
        run.train(5)
    writer.close()
    run.train(5)
    image = ("smoothness/figure", (720, 960, 4), "uint8")
    assert calls == [("start", 0), ("scalars", 0), ("scalars", 3), image, ("close",)]


def test_where_writing_fails_the_run_goes_on(tmp_path, monkeypatch) -> None:
    run = Run()
    writer = TensorBoardWriter(run.probe, tmp_path)

    def full(*args: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(SummaryWriter, "add_scalar", full)
    with pytest.warns(SmoothdiagWarning, match="Logging has stopped: OSError.*No space left") as caught:
        run.train(8)
    assert len(caught) == 1
    writer.close()
    assert run.probe.steps == 8
    run.probe.close()
    assert not run.optimizer._optimizer_step_pre_hooks


def in_folder(folder: Path) -> dict[str, Any]:
    """What a quiet run in this folder is made with; variables would count only for the first run of a process."""
    return {"dir": str(folder), "settings": wandb.Settings(silent=True)}


@pytest.fixture
def own(tmp_path) -> Iterator[wandb.Run]:
    with wandb.init(mode="offline", **in_folder(tmp_path)) as run:
        yield run


def test_wandb_holds_every_row_once_and_the_figure_offline(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    run = Run(autoclip=True)
    with WandbWriter(run.probe, autoclip=run.clipper, **in_folder(tmp_path)):
        assert wandb.run.offline
        run.train(8)
    assert wandb.run is None
    rows = history(tmp_path)
    found = numbers_of(rows)
    clipping = [found.pop(name) for name in CLIPPING]
    assert_same(found, expected(run.probe.trace))
    assert [step for step, _ in clipping[0]] == sorted({row["step"] for row in run.probe.trace})
    for drawn, name in zip(rows[-2:], ("smoothness/figure", "clipping/figure"), strict=True):
        assert (drawn[f"{name}._type"], drawn["optimizer_step"]) == ("image-file", rows[-3]["optimizer_step"])
        (image,) = tmp_path.glob("wandb/offline-run-*/files/" + drawn[f"{name}.path"])
        assert image.read_bytes().startswith(b"\x89PNG")


def test_wandb_keeps_a_run_of_the_users_open_and_their_values(tmp_path, own) -> None:
    run = Run()
    with WandbWriter(run.probe):
        for step in range(7):
            run.train(1)
            own.log({"mine": float(step)}, step=step)
    assert wandb.run is own
    own.log({"mine": 7.0})
    own.finish()
    rows = history(tmp_path)
    assert [row["mine"] for row in rows if "mine" in row] == [0, 1, 2, 3, 4, 5, 6, 7]
    found = numbers_of([row for row in rows if "optimizer_step" in row])
    del found["mine"]
    assert_same(found, expected(run.probe.trace))


def test_a_run_that_the_user_finishes_early_ends_the_logging_alone(own) -> None:
    run = Run()
    writer = WandbWriter(run.probe)
    run.train(4)
    own.finish()
    with pytest.warns(SmoothdiagWarning, match="Logging has stopped: .*is finished") as caught:
        run.train(4)
        writer.close()
    assert len([one for one in caught if one.category is SmoothdiagWarning]) == 1
    assert run.probe.steps == 8


def test_a_block_that_ends_by_an_exception_leaves_a_failed_run(tmp_path, monkeypatch) -> None:
    codes = []
    finish = wandb.Run.finish
    monkeypatch.setattr(wandb, "finish", lambda exit_code=None: codes.append(exit_code) or finish(wandb.run, exit_code))
    with pytest.raises(KeyboardInterrupt), WandbWriter(Trace(), **in_folder(tmp_path)):
        raise KeyboardInterrupt
    with WandbWriter(Trace(), **in_folder(tmp_path)):
        pass
    assert codes == [1, None]


def test_wandb_refuses_options_of_a_run_that_exists(own) -> None:
    with pytest.raises(ValueError, match="Parameter `init` should be empty.*Found project, name"):
        WandbWriter(Trace(), project="p", name="n")
    with pytest.raises(ValueError, match="should be empty"):
        WandbWriter(Trace(), own, project="p")


@pytest.mark.parametrize(("made", "extra", "module"), [
    (TensorBoardWriter, "tensorboard", "torch.utils.tensorboard"),
    (WandbWriter, "wandb", "wandb"),
    (MlflowWriter, "mlflow", "mlflow"),
    (TrackioWriter, "trackio", "trackio"),
])  # fmt: skip
def test_what_is_not_installed_is_named_with_its_command(tmp_path, monkeypatch, made, extra, module) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf'pip install "smoothdiag\[{extra}\]"'):
        made(Trace(), str(tmp_path))


def test_what_is_no_source_is_refused_before_anything_is_made(tmp_path) -> None:
    with pytest.raises(ValueError, match="Parameter `source` should be a Probe or a Trace. Found `source = 'x'`"):
        TensorBoardWriter("x", tmp_path / "runs")
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        TensorBoardWriter(Trace(), tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without it")
def test_only_the_first_rank_writes(tmp_path) -> None:
    assert run_ranks(work, tmp_path, 2) == [{"steps": 4}] * 2
    assert [path.name for path in tmp_path.glob("runs*")] == ["runs0"]
    assert [step for step, _ in numbers(tmp_path / "runs0")["smoothness/local"]] == [0, 3]


def test_the_examples_of_the_page_run(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("metrics.csv").write_text("step,grad_norm\n0,1.0\n1,3.0\n")
    run = Run(autoclip=True)
    names = {"probe": run.probe, "clipper": run.clipper, "model": run.model, "optimizer": run.optimizer}
    names |= {"loss_fn": loss_fn, "loader": torch.randn(5, 8, 4).double()}
    page = (REPOSITORY / "docs" / "logs.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    writing, _mlflow, _trackio, calling, reading = blocks  # those of the packages are run by the tests of their writers
    exec(writing, names)
    assert [step for step, _ in numbers(Path("runs/1"))["smoothness/local"]] == [0, 3]
    exec(calling, names | {"train": lambda: run.train(4)})
    assert [step for step, _ in numbers(Path("logs/mine"))["smoothness/local"]] == [6]
    exec(reading, names)
    assert "2 gradient norms in steps 0 to 1" in capsys.readouterr().out
