"""logs.counting: counters per epoch are unrolled, resumed runs go on, and several runs are told apart."""

import json

import pytest

from smoothdiag import SmoothdiagWarning, read_log


def write(path, rows) -> None:
    path.write_text("".join(json.dumps({"loss": 1.0 + k, **row}) + "\n" for k, row in enumerate(rows)))


def epochs(lengths, every=1, **more):
    return [
        {"epoch": e, "iter": i, **more} for e, length in enumerate(lengths) for i in range(every, length + 1, every)
    ]


def steps(path, **options) -> list[int]:
    return [row["step"] for row in read_log(path, **options)]


@pytest.fixture
def log(tmp_path):
    return tmp_path / "log.jsonl"


pytestmark = pytest.mark.filterwarnings("ignore:.*only losses are read")


def test_epochs_are_added_up(log) -> None:
    write(log, epochs([20, 20, 13]))
    with pytest.warns(
        SmoothdiagWarning, match="the counter `iter` starts anew 2 times, as in every epoch, so 20 steps"
    ):
        assert steps(log) == list(range(1, 54))


def test_the_length_of_an_epoch_is_taken_from_the_counter(tmp_path) -> None:
    lines = [f"Epoch(train)  [{e}][{i:3d}/27]  loss: {e + i}" for e in (1, 2, 3) for i in range(5, 26, 5)]
    (tmp_path / "a.log").write_text("\n".join(lines) + "\n")
    with pytest.warns(SmoothdiagWarning, match="so 27 steps are added"):
        assert steps(tmp_path / "a.log") == [27 * e + i for e in (0, 1, 2) for i in range(5, 26, 5)]


def test_a_run_resumed_within_an_epoch_goes_on_where_it_left_off(log) -> None:
    rows = epochs([20, 20])
    write(log, rows[:33] + rows[20:])
    with pytest.warns(SmoothdiagWarning, match="resumed 1 time: 13 rows of steps that it took again no longer count"):
        assert steps(log) == list(range(1, 41))


def test_rows_beyond_the_step_where_a_run_was_resumed_no_longer_count(log) -> None:
    write(log, [{"step": k} for k in [*range(1, 41), *range(30, 37)]])
    with pytest.warns(SmoothdiagWarning, match="resumed 1 time: 11 rows"):
        assert steps(log) == list(range(1, 37))


def test_without_epochs_three_equal_stretches_are_epochs_and_said(log) -> None:
    write(log, [{"step": k} for _ in range(4) for k in range(10, 110, 10)])
    with pytest.warns(SmoothdiagWarning, match="if these are 4 runs, read one of them with `run`"):
        assert steps(log) == list(range(10, 410, 10))


def test_two_runs_are_never_one(log) -> None:
    write(log, [{"step": k} for k in [*range(30), *range(20)]])
    with pytest.raises(
        ValueError, match=r"`run` \(`--run`\) should name one of the 2 runs.*1: steps 0 to 29; 2: steps 0 to 19"
    ):
        read_log(log)
    with pytest.warns(SmoothdiagWarning):
        assert len(read_log(log, run="2")) == 20
    with pytest.raises(ValueError, match="Found `run = '3'`"):
        read_log(log, run="3")


def test_of_two_runs_the_last_is_read_if_it_reaches_further(log) -> None:
    write(log, [{"step": k} for k in [*range(20), *range(30)]])
    with pytest.warns(SmoothdiagWarning, match="the file holds 2 runs, and the last is read; `run`"):
        assert next(iter(read_log(log)))["loss"] == 21.0
    with pytest.warns(SmoothdiagWarning):
        assert next(iter(read_log(log, run="1")))["loss"] == 1.0


CHART = '"Step","a-b-1 - grad_norm","a-b-1 - grad_norm__MIN","a-b-1 - grad_norm__MAX","c - grad_norm"\n'
NAMED = {
    "chart": ("chart.csv", CHART + "".join(f'"{k}","{k + 1}","{k + 1}","{k + 1}","9"\n' for k in range(30)), "a-b-1"),
    "long table": (
        "long.csv",
        "run_id,key,value,step\n" + "".join(f"{r},grad_norm,{k + 1},{k}\n" for r in "xy" for k in range(30)),
        "x",
    ),
    "JSON": (
        "a.jsonl",
        "".join(f'{{"run": "{r}", "step": {k}, "grad_norm": {k + 1}}}\n' for k in range(30) for r in "xy"),
        "x",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "text", "run"), NAMED.values(), ids=NAMED.keys())
def test_runs_with_names_are_read_by_name(tmp_path, name, text, run) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"should name one of the 2 runs in .*: {run}, "):
        read_log(tmp_path / name)
    assert [row["grad_norm"] for row in read_log(tmp_path / name, run=run)] == list(range(1, 31))


def test_means_in_a_chart_are_said(tmp_path) -> None:
    (tmp_path / "a.csv").write_text(CHART + '"0","2","1","3","4"\n"1","2","2","2","4"\n')
    with pytest.warns(SmoothdiagWarning, match="1 value of the chart is a mean of several steps"):
        read_log(tmp_path / "a.csv", run="a-b-1")


def test_a_table_with_one_row_for_each_run_is_refused(tmp_path) -> None:
    (tmp_path / "a.csv").write_text("Name,State,loss\n" + "".join(f"run-{k},done,{k}\n" for k in range(9)))
    with pytest.warns(SmoothdiagWarning):
        read_log(tmp_path / "a.csv")  # nothing but the names says that these are runs, and names may be those of rows
    (tmp_path / "a.csv").write_text("Name,_step,loss\n" + "".join(f"run-{k},{90 - k},{k}\n" for k in range(9)))
    with pytest.raises(ValueError, match="Found 9 runs with one row for each"):
        read_log(tmp_path / "a.csv")


def test_a_store_of_mlflow_with_two_runs_needs_a_name(tmp_path) -> None:
    for run in ("r1", "r2"):
        folder = tmp_path / "mlruns" / "0" / run / "metrics"
        folder.mkdir(parents=True)
        (folder / "loss").write_text("".join(f"17000 {k} {k}\n" for k in range(9)))
    with pytest.raises(ValueError, match="one of the 2 runs in .*: r1, r2"):
        read_log(tmp_path / "mlruns")
    with pytest.warns(SmoothdiagWarning):
        assert len(read_log(tmp_path / "mlruns", run="r2")) == 9
