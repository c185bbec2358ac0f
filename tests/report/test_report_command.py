"""report.command: the subcommand writes the page, and follows a trace that grows until Ctrl-C."""

import re

import pytest
from pages import Page, flat, lawful, recorded

from smoothdiag import Trace
from smoothdiag.cli import main
from smoothdiag.report.paths import named_paths

pytestmark = pytest.mark.usefixtures("no_figures")
FEW = ["--num-boot", "20"]


@pytest.fixture
def no_figures(monkeypatch) -> None:
    monkeypatch.setattr("smoothdiag.report.views.figures_of", lambda run, prefix: [])


def refreshes(path) -> list[str]:
    return re.findall(r'http-equiv="refresh" content="(\d+)"', path.read_text(encoding="utf-8"))


def test_page_is_written_and_named(tmp_path, capsys) -> None:
    recorded(lawful(), tmp_path / "run.jsonl")
    page = tmp_path / "new" / "page.html"
    assert main(["report", str(tmp_path / "run.jsonl"), "-o", str(page), "--lr", "0.05", *FEW]) == 0
    assert capsys.readouterr().out == f"made the folder {page.parent}\n{page}\n"
    assert Page(page.read_text(encoding="utf-8")).inside("h1")[0].startswith("Set max_grad_norm=9.5;")  # (20 - 1) / 2
    assert refreshes(page) == []
    assert [path.name for path in page.parent.iterdir()] == ["page.html"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.jsonl"], "There is no trace at `missing.jsonl`"),
        (["run.jsonl", "-o", "run.jsonl"], "Parameter `--out` should be the path of a page, which ends in .html"),
        (["run.jsonl", "--live", "0"], "Parameter `--live` should be at least 1 second"),
        (["picture.jsonl", "--live"], "`picture.jsonl` should be a smoothdiag trace, whose first line is a header"),
        (["bytes.jsonl", "--live"], "`bytes.jsonl` should be a smoothdiag trace, whose first line is a header"),
        ([".", "--live"], "Parameter `TRACE` should be a file. Found the folder `.`"),
        (["train.py", "--live"], "Parameter `TRACE` should end in .jsonl, .csv, .parquet with --live"),
        (["run.jsonl", "--group", "a", "--group", "b"], "should be given only once here"),
        (["run.jsonl", "--momentum", "1"], "Parameter `momentum` should be in [0, 1)"),
    ],
)
def test_wrong_input_takes_one_line_and_writes_nothing(tmp_path, monkeypatch, capsys, arguments, message) -> None:
    monkeypatch.chdir(tmp_path)
    recorded(flat(30), tmp_path / "run.jsonl")
    (tmp_path / "picture.jsonl").write_bytes(b"\x89PNG\r\n")
    (tmp_path / "bytes.jsonl").write_bytes(bytes(100))
    assert main(["report", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert message in said
    assert not list(tmp_path.glob("*.html"))


def test_live_page_follows_the_trace_and_ends_with_ctrl_c(tmp_path, monkeypatch, capsys) -> None:
    path, page = tmp_path / "run.jsonl", tmp_path / "page.html"
    rows = lawful(60).to_dict("records")
    trace = Trace(path)
    seen: list[tuple[int, list[str]] | None] = []

    def sleep(seconds: float) -> None:
        assert seconds == 7
        seen.append((number_of_rows(page), refreshes(page)) if page.exists() else None)
        if len(seen) == 1:  # the run begins
            trace.extend(rows[:30])
        elif len(seen) == 3:  # it goes on; before that, nothing happened
            trace.extend(rows[30:])
        elif len(seen) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr("smoothdiag.growing.time.sleep", sleep)
    assert main(["report", str(path), "-o", str(page), "--live", "7", *FEW]) == 0
    assert seen == [None, (30, ["7"]), (30, ["7"]), (60, ["7"])]
    assert (number_of_rows(page), refreshes(page)) == (60, [])
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        f"waiting: there is no `{path}` yet; Ctrl-C ends it",
        f"{page}, again whenever a trace grows; Ctrl-C ends it",
        str(page),
    ]
    assert err == ""


def test_live_page_is_not_written_while_nothing_grows(tmp_path, monkeypatch) -> None:
    path = tmp_path / "run.jsonl"
    recorded(lawful(30), path)
    written, slept = [], []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("smoothdiag.growing.time.sleep", sleep)
    monkeypatch.setattr("smoothdiag.report.command._write", lambda arguments, refresh: written.append(refresh))
    assert main(["report", str(path), "-o", str(tmp_path / "page.html"), "--live"]) == 0
    assert written == [10, None]
    assert slept == [10, 10, 10]


def test_live_page_says_what_it_waits_for_and_ends_without_a_page(tmp_path, monkeypatch, capsys) -> None:
    path, page = tmp_path / "run.jsonl", tmp_path / "page.html"
    begun = ["", '{"smoothdiag_', None, None]

    def sleep(seconds: float) -> None:
        if not begun:
            raise KeyboardInterrupt
        if (part := begun.pop(0)) is not None:
            path.write_text(part)
        elif begun:
            with Trace(tmp_path / "other.jsonl") as trace:
                trace.append({"step": 0, "grad_norm": 1.0, "smoothness": 1.0})
            path.write_text((tmp_path / "other.jsonl").read_text().partition("\n")[0] + "\n")

    monkeypatch.setattr("smoothdiag.growing.time.sleep", sleep)
    assert main(["report", str(path), "-o", str(page), "--live", *FEW]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"waiting: there is no `{path}` yet; Ctrl-C ends it",
        f"waiting: `{path}` is empty as yet; Ctrl-C ends it",
        f"waiting: `{path}` has no rows yet; Ctrl-C ends it",
        f"the page was not written now: `{path}` has no rows yet",
    ]
    assert not page.exists()


@pytest.mark.parametrize("live", [[], ["--live"]])
def test_ctrl_c_ends_a_report_in_one_line(tmp_path, monkeypatch, capsys, live) -> None:
    def interrupted(*_, **__) -> None:
        raise KeyboardInterrupt

    recorded(lawful(30), tmp_path / "run.jsonl")
    monkeypatch.setattr("smoothdiag.report.command._write", interrupted)  # under --live the second time, too
    assert main(["report", str(tmp_path / "run.jsonl"), "-o", str(tmp_path / "page.html"), *live, *FEW]) == 130
    assert capsys.readouterr().err == "smoothdiag report: stopped by Ctrl-C\n"


def number_of_rows(page) -> int:
    return int(re.search(r"<caption>(\d+) rows by status", page.read_text(encoding="utf-8"))[1])


def test_names_of_traces_tell_them_apart(tmp_path) -> None:
    paths = [tmp_path / "a" / "trace.jsonl", tmp_path / "b" / "trace.jsonl"]
    assert list(named_paths(paths)) == ["a/trace", "b/trace"]
    assert list(named_paths(paths[:1])) == ["trace"]
    assert len(named_paths([paths[0], paths[0]])) == 2
