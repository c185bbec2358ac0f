"""trace.reading, trace.file: damaged, hostile and doubled files give no wrong number in silence."""

import json
import math
import random
import sys
import warnings
from pathlib import Path

import pandas as pd
import pytest
from places import REPOSITORY
from traces import row

from smoothdiag import SmoothdiagWarning, Trace, fit_smoothness
from smoothdiag.trace import file as files

sys.path.insert(0, str(REPOSITORY / "benchmarks"))
from damaged_traces import mutate

HEADER = '{"smoothdiag_trace": 1}'
GOOD = '{"step": 1, "grad_norm": 1.0, "smoothness": 2.0}'


def written(path: Path, number: int = 6, **values) -> list[str]:
    """Writes a trace and returns its lines."""
    trace = Trace(path if path.suffix == ".jsonl" else None)
    with trace:
        trace.extend(row(step, **values) for step in range(number))
    if path.suffix != ".jsonl":
        trace.write(path)
    return path.read_text().splitlines()


def steps(path: Path, match: str | None = None, **options) -> list[int]:
    """Returns the steps read, with the one warning that is due."""
    if match is None:
        return [found["step"] for found in Trace.read(path, **options)]
    with pytest.warns(SmoothdiagWarning, match=match) as caught:
        trace = Trace.read(path, **options)
    assert len(caught) == 1
    assert trace.problems
    return [found["step"] for found in trace]


@pytest.mark.thorough
@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_no_mutation_goes_unreported(suffix, monkeypatch) -> None:
    source = random.Random(0)
    monkeypatch.setattr(files.secrets, "token_hex", lambda size: source.randbytes(size).hex())
    counts, details = mutate(suffix, 200)
    assert not details
    assert counts["reported"] > 100


def _exchange(lines: list[str]) -> None:
    lines[2], lines[3] = lines[3], lines[2]


def _change(lines: list[str]) -> None:
    lines[3] = lines[3].replace("3.0", "8.0")


def _unseal(lines: list[str]) -> None:
    lines[3] = lines[3][:-20] + lines[3][-2:]


DAMAGES = {
    "a line goes": (lambda lines: lines.pop(3), "1 line is missing", [0, 1, 3, 4, 5]),
    "a line comes twice": (lambda lines: lines.insert(5, lines[3]), "line 6 left out: it comes a second time", None),
    "two lines come twice": (
        lambda lines: lines.__setitem__(slice(5, 5), lines[3:5]),
        "2 lines left out, the first of them line 6: they come a second time",
        None,
    ),
    "two lines change places": (_exchange, "lines are not in the order", None),
    "a digit changes": (_change, "line 4 left out: its check sum fails.*verify=False", [0, 1, 3, 4, 5]),
    "a check sum goes": (_unseal, "line 4 left out", [0, 1, 3, 4, 5]),
    "a line of nonsense": (lambda lines: lines.insert(3, "nonsense"), "line 4 left out", None),
}


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
@pytest.mark.parametrize(("damage", "match", "expected"), DAMAGES.values(), ids=DAMAGES.keys())
def test_each_damage_is_named(tmp_path, suffix, damage, match, expected) -> None:
    path = tmp_path / f"t{suffix}"
    lines = written(path)
    damage(lines)
    path.write_text("\n".join(lines) + "\n")
    assert steps(path, match) == (expected or [0, 1, 2, 3, 4, 5])


def test_what_was_edited_on_purpose_is_read_without_checks(tmp_path) -> None:
    for suffix in (".jsonl", ".csv"):
        path = tmp_path / f"t{suffix}"
        lines = written(path)
        path.write_text("\n".join([lines[0], *lines[2:]]).replace("3.0", "8.0") + "\n")
        assert [found["grad_norm"] for found in Trace.read(path, verify=False)] == [2.0, 8.0, 4.0, 5.0, 6.0]


@pytest.mark.parametrize("ends", ["\r\n", "\r"])
@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_other_line_ends_are_no_damage(tmp_path, suffix, ends) -> None:
    path = tmp_path / f"t{suffix}"
    lines = written(path)
    path.write_bytes((ends.join(lines) + ends).encode())
    assert steps(path) == [0, 1, 2, 3, 4, 5]


def test_rows_of_a_whole_copy_are_counted(tmp_path) -> None:
    for suffix in (".jsonl", ".csv"):
        trace = Trace()
        trace.extend(row(step) for step in range(6))
        trace.write(tmp_path / f"t{suffix}")
        lines = (tmp_path / f"t{suffix}").read_text().splitlines(keepends=True)
        (tmp_path / f"t{suffix}").write_text("".join(lines[:-2]))
        assert steps(tmp_path / f"t{suffix}", "2 lines are missing") == [0, 1, 2, 3]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_a_second_run_in_the_file_is_left_out(tmp_path, suffix) -> None:
    one, other = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    written(one, 3)
    written(other, 9, lr=0.5)
    one.write_bytes(one.read_bytes() + other.read_bytes())
    assert steps(one, "second.*belong to another run") == [0, 1, 2]
    assert len(steps(one, "twice", verify=False)) == 12


def test_a_damaged_header_costs_no_row(tmp_path) -> None:
    path = tmp_path / "t.jsonl"
    lines = written(path)
    for header, match in (
        ("{", "header is damaged or missing"),
        (lines[0].replace("2,", "1,"), "header fails its check"),
    ):
        path.write_text("\n".join([header, *lines[1:]]) + "\n")
        assert steps(path, match) == [0, 1, 2, 3, 4, 5]


def test_resuming_goes_on_after_any_end(tmp_path) -> None:
    path = tmp_path / "t.jsonl"
    written(path)
    for at, end in enumerate((0, -1, -40)):
        path.write_bytes(path.read_bytes()[: end or None])
        trace = Trace(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trace.resume(6 + at)
        with trace:
            trace.append(row(6 + at))
    match = "^[^;]*: line 10 left out: its check sum is missing. [^;]*|half|not JSON"
    assert steps(path, match) == [0, 1, 2, 3, 4, 5, 6, 8]


@pytest.fixture
def old(tmp_path) -> Path:
    """A trace as version 1 wrote it: all columns, no check sums."""
    full = Trace()
    full.extend(row(step, status="failed") for step in range(4))
    path = tmp_path / "old.jsonl"
    path.write_text(
        "\n".join([HEADER, *(json.dumps(value | {"loss": "nan"}) for value in full)]).replace("NaN", '"nan"') + "\n"
    )
    full.to_frame().to_csv(tmp_path / "old.csv", index=False)
    return path


def test_old_files_read_and_go_on(old) -> None:
    assert steps(old) == [0, 1, 2, 3] == steps(old.with_suffix(".csv"))
    trace = Trace(old)
    trace.resume(2)
    with trace:
        trace.extend([row(2), row(3)])
    assert [(found["step"], found["status"]) for found in Trace.read(old)] == [
        (0, "failed"), (1, "failed"), (2, "ok"), (3, "ok")
    ]  # fmt: skip
    old.write_text(old.read_text().replace("4.0", "5.0"))
    assert steps(old, "its check sum fails") == [0, 1, 2]


NAMES = {
    "another letter": '"statu3"',
    "a letter less": '"staus"',
    "a letter more": '"sttatus"',
    "another word": '"sxxxxs"',
    "a column of another kind": '"gruop"',
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES.keys())
def test_damaged_names_of_old_files(old, name) -> None:
    lines = old.read_text().splitlines()
    lines[2] = lines[2].replace('"status"', name)
    old.write_text("\n".join(lines) + "\n")
    assert steps(old, "line 3 left out: Column") == [0, 2, 3]


def test_damaged_names_of_lines_by_hand(tmp_path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(f'{HEADER}\n{GOOD}\n{{"step": 2, "grad_norm": 1, "smoothness": 2, "statu3": "failed", "own": 1}}\n')
    assert steps(path, "`status` is missing, and `statu3` hardly differs") == [1]
    table = tmp_path / "t.csv"
    table.write_text("step,grad_norm,smoothness,grou0\n1,1,2,a\n")
    with pytest.raises(ValueError, match=r"t.csv` should have the column `group`. Found `grou0`.*verify=False"):
        Trace.read(table)
    assert Trace.read(table, verify=False)[0]["grou0"] == "a"


def test_rows_that_come_twice_are_named_and_the_later_counts(tmp_path) -> None:
    path = tmp_path / "t.jsonl"
    with Trace(path) as trace:
        trace.extend(row(step, loss=at) for at, step in enumerate((0, 1, 2, 1, 2)))
        trace.extend(row(2, group="head", loss=9) for _ in range(1))
    with pytest.warns(
        SmoothdiagWarning, match="2 rows come twice.* The first is step 1 of estimator 'local', group 'all'"
    ):
        assert [(found["step"], found["loss"]) for found in Trace.read(path)] == [(0, 0), (1, 3), (2, 4), (2, 9)]


HOSTILE = {
    "a step beyond 64 bits": '{"step": 1' + "0" * 30 + ', "grad_norm": 1, "smoothness": 2}',
    "a count beyond 64 bits": '{"step": 2, "num_grads": 1e30, "grad_norm": 1, "smoothness": 2}',
    "an own number beyond 64 bits": '{"step": 2, "own": 1' + "0" * 30 + ', "grad_norm": 1, "smoothness": 2}',
    "5,000 digits": '{"step": ' + "1" * 5000 + ', "grad_norm": 1, "smoothness": 2}',
    "brackets without end": "[" * 100_000,
    "names without end": '{"step": ' * 100_000,
    "deep values": '{"step": 2, "grad_norm": 1, "smoothness": 2, "own": ' + "[" * 900 + "]" * 900 + "}",
    "a list for a group": '{"step": 2, "grad_norm": 1, "smoothness": 2, "group": [1]}',
    "resumed at null": '{"smoothdiag_resumed_at": null}',
    "resumed at a text": '{"smoothdiag_resumed_at": "abc"}',
    "resumed at NaN": '{"smoothdiag_resumed_at": NaN}',
    "resumed at true": '{"smoothdiag_resumed_at": true}',
    "zero bytes": "\0" * 100,
    "a fraction of a step": '{"step": 2.5, "grad_norm": 1, "smoothness": 2}',
}


@pytest.mark.parametrize("line", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_line_is_left_out(tmp_path, line) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(f"{HEADER}\n{line}\n{GOOD}\n")
    assert steps(path, "t.jsonl: line 2 left out") == [1]


TABLES = {
    "no UTF-8": b"step,grad_norm,smoothness\n1,1,2\n2,\xff\xfe,2\n",
    "ragged": b"step,grad_norm,smoothness\n1,1,2\n1,2,3,4,5\n",
    "a quote that is not closed": b'step,grad_norm,smoothness,group\n2,1,2,"all\n1,1,2,all\n',
    "a last line without its end": b"step,grad_norm,smoothness\n1,1,2\n2,1,2",
    "a field without end": b"step,grad_norm,smoothness,group\n1,1,2,a\n2,1,2," + b"a" * 200_000 + b"\n",
    "digits without end": b"step,grad_norm,smoothness\n1,1,2\n" + b"1" * 5000 + b",1,2\n",
    "underscores": b"step,grad_norm,smoothness\n1,1,2\n2,1_0,2\n",
    "a second line of names": b"step,grad_norm,smoothness\n1,1,2\nstep,grad_norm,smoothness\n2,1,2\n",
}


@pytest.mark.parametrize("content", TABLES.values(), ids=TABLES.keys())
def test_a_hostile_table(tmp_path, content) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(content)
    assert steps(path, "t.csv: ") == [1]


REFUSED = {
    "UTF-16": "step,grad_norm,smoothness\n1,1,2\n".encode("utf-16"),
    "names that are no UTF-8": b"step,grad_norm,smoothness,\xff\n1,1,2,3\n",
    "a column twice": b"step,grad_norm,smoothness,lr,lr\n1,1,2,3,4\n",
    "line ends alone": b"\r\r\r",
}


@pytest.mark.parametrize("content", REFUSED.values(), ids=REFUSED.keys())
def test_a_table_that_is_none_is_refused_by_name(tmp_path, content) -> None:
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(ValueError, match="t.csv` should"):
        Trace.read(tmp_path / "t.csv")


def test_a_folder_is_refused(tmp_path) -> None:
    (tmp_path / "t.csv").mkdir()
    with pytest.raises(ValueError, match=r"should be a file. Found the folder .*t.csv"):
        Trace.read(tmp_path / "t.csv")


def test_broken_parquet_names_its_file(tmp_path) -> None:
    pytest.importorskip("pyarrow")
    trace, path = Trace(), tmp_path / "t.parquet"
    trace.extend(row(step, own=-1.0) for step in range(50))
    trace.write(path)
    assert repr(list(Trace.read(path))) == repr(list(trace))
    whole = path.read_bytes()
    generator = random.Random(0)
    for _ in range(60):
        data = bytearray(whole)
        for at in generator.sample(range(len(data)), 3):
            data[at] ^= 1 << generator.randrange(8)
        path.write_bytes(bytes(data))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                Trace.read(path)
            except ValueError as error:
                assert "t.parquet" in str(error)  # noqa: PT017


def test_several_kinds_in_a_column_are_refused_by_name(tmp_path) -> None:
    pytest.importorskip("pyarrow")
    trace = Trace()
    trace.extend([row(0, own="text"), row(1, own=1.0)])
    with pytest.raises(ValueError, match="t.parquet` could not be written as .parquet: .*own"):
        trace.write(tmp_path / "t.parquet")


def test_half_a_character_is_kept_as_its_escape(tmp_path) -> None:
    with Trace(tmp_path / "t.jsonl") as trace:
        trace.append(row(0, group="\ud800", estimator="a\udfffé"))
    assert [(found["group"], found["estimator"]) for found in trace] == [("\\ud800", "a\\udfffé")]
    assert repr(list(Trace.read(tmp_path / "t.jsonl"))) == repr(list(trace))
    assert trace.to_frame()["group"].tolist() == ["\\ud800"]


NAMED = {
    "a formula": "=HYPERLINK(1)",
    "plus": "+1",
    "minus": "-head",
    "at": "@SUM(A1)",
    "a quote": "'quoted",
    "a tab first": "\t=1",
    "a comma and quotes": 'a, "b"',
    "a line end": "a\nb\r\nc",
    "a terminal's escape": "\x1b[2Ja",
    "half a character": "\ud800",
    "what reads as an escape": "\\u001b \\ud800 \\",
    "other alphabets": "größe 梯度",
    "turned text": "a\u202eb",
    "zero": "\0",
    "a number": "007",
    "nothing missing": "NA",
}


@pytest.mark.parametrize("name", NAMED.values(), ids=NAMED.keys())
def test_any_name_comes_back_and_is_obeyed_by_nobody(tmp_path, name) -> None:
    for suffix in (".jsonl", ".csv"):
        trace = Trace()
        trace.append(row(0, group=name, own=f"{name} x", **{f"{name} column": 1.5}))
        trace.write(tmp_path / f"t{suffix}")
        assert repr(list(Trace.read(tmp_path / f"t{suffix}"))) == repr(list(trace))
    text = (tmp_path / "t.csv").read_text(encoding="utf-8")
    assert text.count("\n") == 2
    assert all(mark.isprintable() or mark in "\n\u202e" for mark in text)
    assert not pd.read_csv(tmp_path / "t.csv", dtype=str, keep_default_na=False)["group"][0].startswith(
        ("=", "+", "-", "@", "\t", "\r")
    )


def test_what_is_shown_of_hostile_names_is_harmless(tmp_path) -> None:
    trace = Trace(tmp_path / "t.jsonl")
    with trace:
        for step in range(30):
            trace.append(row(step, group="\x1b[2J", estimator="\x1b]0;x\a", status="ok"))
        trace.append(row(3, group="\x1b[2J", estimator="\x1b]0;x\a", status="ok"))
    with pytest.warns(SmoothdiagWarning) as caught:
        read = Trace.read(tmp_path / "t.jsonl")
    shown = "".join(
        [str(caught[0].message), *read.problems, fit_smoothness(read, group="\x1b[2J", num_boot=20).summary()]
    )
    assert "\\x1b[2J" in shown
    assert "\x1b" not in shown


def test_many_problems_make_one_short_warning(tmp_path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join([HEADER, *["nonsense"] * 5000, GOOD]) + "\n")
    with pytest.warns(SmoothdiagWarning, match="and 4990 more, see `problems`") as caught:
        assert len(Trace.read(path).problems) == 5000
    assert len(str(caught[0].message)) < 1000


FACTS = {
    "a path": {"folder": Path("x")},
    "a set": {"tags": {1}},
    "a name that is taken": {"smoothdiag_trace": 3},
    "a number for a name": {3: 1},
}


@pytest.mark.parametrize("meta", FACTS.values(), ids=FACTS.keys())
def test_facts_that_are_no_json_are_refused_at_once(meta) -> None:
    with pytest.raises(ValueError, match="`meta` should hold facts that JSON can hold"):
        Trace(meta=meta)


def test_facts_that_come_later_stop_no_run(tmp_path) -> None:
    trace = Trace(tmp_path / "t.jsonl", meta={"own": {"lr": math.nan}})
    trace.meta["folder"] = Path("x")
    trace.append(row(0))
    trace.close()
    assert Trace.read(tmp_path / "t.jsonl").meta == {"own": {"lr": "nan"}, "folder": "x"}
