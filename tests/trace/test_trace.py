"""trace: rows come back from a file as they were written, and a damaged line costs no other row."""

import json
import math

import pytest
from traces import row

from smoothdiag import SmoothdiagWarning, Trace
from smoothdiag.trace import COLUMNS


def test_frame_has_all_columns_in_order_with_types() -> None:
    trace = Trace()
    trace.append(row(0, curvature=3.0))
    frame = trace.to_frame()
    assert list(frame.columns) == [*COLUMNS, "curvature"]
    assert frame["step"].dtype.kind == "i"
    assert frame["lr"].dtype.kind == "f"
    assert frame.loc[0, ["group", "status", "data"]].tolist() == ["all", "ok", "unspecified"]


def test_an_empty_trace_has_a_typed_frame() -> None:
    frame = Trace().to_frame()
    assert list(frame.columns) == list(COLUMNS)
    assert frame["grad_norm"].dtype.kind == "f"


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_write_and_read_return_the_same_values(tmp_path, suffix) -> None:
    trace = Trace(meta={"model": "x"})
    trace.append(row(0, smoothness=1 / 3, loss=math.inf, saturation=-math.inf, lr=math.nan, extra=math.nan))
    trace.append(row(1, group="NA", extra=0.1))
    trace.write(tmp_path / f"t{suffix}")
    back = Trace.read(tmp_path / f"t{suffix}")
    assert back.to_frame().equals(trace.to_frame())
    if suffix == ".jsonl":
        assert back.meta == {"model": "x"}


def test_every_line_is_strict_json(tmp_path) -> None:
    with Trace(tmp_path / "t.jsonl") as trace:
        trace.append(row(0, loss=math.nan, extra=math.inf))
    for line in (tmp_path / "t.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_rows_are_on_disk_before_the_file_is_closed(tmp_path) -> None:
    trace = Trace(tmp_path / "t.jsonl")
    trace.append(row(0))
    assert len(Trace.read(tmp_path / "t.jsonl")) == 1


def test_half_written_last_line_is_left_out_and_reported(tmp_path) -> None:
    path = tmp_path / "t.jsonl"
    with Trace(path) as trace:
        trace.extend(row(s) for s in range(3))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.warns(SmoothdiagWarning, match="line 4 left out: half-written"):
        back = Trace.read(path)
    assert [r["step"] for r in back] == [0, 1]
    assert back.problems == ["line 4 left out: half-written"]


def test_a_spoilt_line_hides_no_other(tmp_path) -> None:
    path = tmp_path / "t.jsonl"
    lines = [json.dumps(value).encode() for value in ({"smoothdiag_trace": 1}, row(0), row(1), row(2))]
    lines[1] = b'{"step": 0, "grad_norm": "much", "smoothness": 1}'
    lines[2] = b"\xff\xfe"
    path.write_bytes(b"\n".join(lines))
    with pytest.warns(SmoothdiagWarning, match="line 2 left out: Column `grad_norm` should be float.*line 3 left out"):
        assert [r["step"] for r in Trace.read(path)] == [2]


def test_a_new_run_keeps_the_trace_of_an_earlier_one(tmp_path) -> None:
    path = tmp_path / "t.jsonl"
    for step in (0, 10, 20):
        with Trace(path) as trace:
            trace.append(row(step))
    assert [r["step"] for r in Trace.read(path)] == [20]
    assert [r["step"] for r in Trace.read(tmp_path / "t.1.jsonl")] == [0]
    assert [r["step"] for r in Trace.read(tmp_path / "t.2.jsonl")] == [10]


def test_a_trace_that_records_nothing_touches_no_file(tmp_path) -> None:
    path = tmp_path / "t.jsonl"
    with Trace(path) as trace:
        trace.append(row(0))
    Trace(path).close()
    assert [r["step"] for r in Trace.read(path)] == [0]
    assert len(list(tmp_path.iterdir())) == 1


def test_a_resumed_run_continues_its_trace_and_takes_steps_again(tmp_path) -> None:
    path = tmp_path / "t.jsonl"
    with Trace(path, meta={"run": 1}) as trace:
        trace.extend(row(s) for s in (0, 5, 10, 15))
    path.write_bytes(path.read_bytes()[:-5])
    trace = Trace(path)
    with pytest.warns(SmoothdiagWarning, match="half-written"):
        trace.resume(7)
    with trace:
        trace.append(row(10, loss=3.0))
        assert [r["step"] for r in trace] == [0, 5, 10]
        assert trace.meta == {"run": 1}
        with pytest.raises(ValueError, match="resumed before its first row"):
            trace.resume(3)
    with pytest.warns(SmoothdiagWarning, match="line 5 left out"):
        back = Trace.read(path)
    assert [(r["step"], r["loss"] == 3.0) for r in back] == [(0, False), (5, False), (10, True)]
    assert path.read_text().count('"step": 10') == 2  # nothing is lost


def test_resuming_without_a_file_begins_one(tmp_path) -> None:
    trace = Trace(tmp_path / "t.jsonl")
    trace.resume(7)
    trace.append(row(7))
    assert len(Trace.read(tmp_path / "t.jsonl")) == 1


def test_two_traces_on_one_path_lose_no_row(tmp_path) -> None:
    path = tmp_path / "t.jsonl"
    first, second = Trace(path), Trace(path)
    first.append(row(0))
    with pytest.warns(SmoothdiagWarning, match="t.jsonl is left alone: another process.* go to .*t.1.jsonl"):
        second.append(row(100))
    for step in range(1, 5):
        first.append(row(step))
        second.append(row(100 + step))
    assert second.path == tmp_path / "t.1.jsonl"
    steps = [r["step"] for p in tmp_path.iterdir() for r in Trace.read(p)]
    assert sorted(steps) == [*range(5), *range(100, 105)]


def test_a_full_disk_costs_the_file_not_the_run(tmp_path, monkeypatch) -> None:
    trace = Trace(tmp_path / "t.jsonl")
    trace.append(row(0))

    def full(value: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(trace._file, "write", full)
    with pytest.warns(SmoothdiagWarning, match="could not be written: No space left.*kept in memory"):
        trace.append(row(1))
    trace.append(row(2))
    assert [r["step"] for r in trace] == [0, 1, 2]


def test_only_jsonl_is_appended_to(tmp_path) -> None:
    with pytest.raises(ValueError, match="should end in .jsonl. Found"):
        Trace(tmp_path / "t.csv")


def test_tables_keep_labels_and_leave_out_what_is_no_row(tmp_path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("step,grad_norm,smoothness,group,note\n0,1,2,007,0.5\n1.0,1,2,NA,x\n0.5,1,2,a,\n3,oops,2,a,\n4,1\n")
    with pytest.warns(SmoothdiagWarning, match="line 4 left out: Column `step` should be int. Found `'0.5'`"):
        back = Trace.read(path)
    assert [(r["step"], r["group"], r.get("note")) for r in back] == [(0, "007", 0.5), (1, "NA", "x")]
    assert len(back.problems) == 3


@pytest.mark.parametrize("text", ["", "\n\n", "hello\n", '{"a": 1}\n', "[1, 2]\n"])
def test_empty_and_foreign_files_are_refused_and_kept(tmp_path, text) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match="should be a smoothdiag trace.*Found"):
        Trace.read(path)
    if text:
        with pytest.raises(ValueError, match="should be a smoothdiag trace.*Found"):
            Trace(path)
        assert path.read_text() == text


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n"])
def test_foreign_tables_are_refused(tmp_path, text) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ValueError, match="with the columns step, grad_norm, smoothness, separated by commas. Found"):
        Trace.read(tmp_path / "t.csv")


def test_other_format_versions_are_refused(tmp_path) -> None:
    (tmp_path / "t.jsonl").write_text('{"smoothdiag_trace": 99}\n')
    with pytest.raises(ValueError, match="format version 1 or 2. Found 99"):
        Trace.read(tmp_path / "t.jsonl")


def test_a_bad_row_is_refused_and_costs_no_other(tmp_path) -> None:
    with Trace(tmp_path / "t.jsonl") as trace:
        trace.append(row(0))
        with pytest.raises(ValueError, match="Missing: smoothness"):
            trace.append({"step": 1, "grad_norm": 1.0})
        with pytest.raises(ValueError, match="Column `grad_norm` should be float. Found `'much'`"):
            trace.append(row(1, grad_norm="much"))
        with pytest.raises(ValueError, match="Column `extra` should hold a number"):
            trace.append(row(1, extra=object()))
        trace.append(row(2))
    assert [r["step"] for r in Trace.read(tmp_path / "t.jsonl")] == [0, 2]


def test_write_refuses_other_suffixes_and_its_own_file(tmp_path) -> None:
    trace = Trace(tmp_path / "t.jsonl")
    with pytest.raises(ValueError, match="should end in .jsonl, .csv or .parquet"):
        trace.write(tmp_path / "t.xls")
    with pytest.raises(ValueError, match="another file than the trace's own"):
        trace.write(tmp_path / "t.jsonl")


def test_missing_file() -> None:
    with pytest.raises(FileNotFoundError, match="no trace at `nowhere.jsonl`"):
        Trace.read("nowhere.jsonl")
