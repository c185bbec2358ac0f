"""trace.file: several processes, forks and full disks lose no row, and no row goes into the file of another."""

import multiprocessing
import os
import resource
import signal
import warnings
from pathlib import Path

import pytest
from traces import row

from smoothdiag import SmoothdiagWarning, Trace
from smoothdiag.trace import file as files


def steps(path: Path) -> list[int]:
    return [found["step"] for found in Trace.read(path)]


def in_a_child(action) -> None:
    """Runs in a forked child, and passes on whether it went well."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12, for processes with threads
        child = os.fork()
    if child == 0:
        code = 1
        try:
            action()
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.mark.thorough
@needs_fork
def test_a_forked_child_writes_a_file_of_its_own_and_says_so(tmp_path) -> None:
    path = tmp_path / "t.jsonl"
    trace = Trace(path)
    trace.append(row(0))

    def child() -> None:
        with pytest.warns(SmoothdiagWarning, match="left alone: this process was forked.* go to .*t.1.jsonl"):
            trace.append(row(1))
        trace.append(row(2))
        trace.close()

    in_a_child(child)
    trace.append(row(3))
    trace.close()
    assert steps(path) == [0, 3]
    assert steps(tmp_path / "t.1.jsonl") == [0, 1, 2]


@pytest.mark.thorough
@needs_fork
def test_a_child_that_lives_longer_holds_no_lock(tmp_path) -> None:
    trace = Trace(tmp_path / "t.jsonl")
    trace.append(row(0))
    ready, go = os.pipe(), os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        os.write(ready[1], b"x")
        os.read(go[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    trace.close()
    second = Trace(tmp_path / "t.jsonl")
    second.append(row(1))  # with a warning, if the child held the lock
    second.close()
    os.write(go[1], b"x")
    os.waitpid(child, 0)
    assert steps(tmp_path / "t.jsonl") == [1]
    assert steps(tmp_path / "t.1.jsonl") == [0]


@pytest.mark.skipif(files.fcntl is None, reason="needs locks")
def test_the_second_of_two_that_resume_writes_a_whole_file_of_its_own(tmp_path) -> None:
    path = tmp_path / "t.jsonl"
    with Trace(path, meta={"run": 1}) as trace:
        trace.extend(row(step) for step in range(5))
    first, second = Trace(path), Trace(path)
    first.resume(4)
    with pytest.warns(SmoothdiagWarning, match="another process, or another trace in this process.* go to .*t.1.jsonl"):
        second.resume(3)
    first.append(row(4, loss=1.0))
    second.append(row(3, loss=2.0))
    first.close()
    second.close()
    assert steps(path) == [0, 1, 2, 3, 4]
    assert [found["loss"] == 2.0 for found in Trace.read(tmp_path / "t.1.jsonl")] == [False, False, False, True]
    assert Trace.read(tmp_path / "t.1.jsonl").meta == {"run": 1}


def _write(path: str, start: int, barrier) -> None:
    warnings.simplefilter("ignore")
    trace = Trace(path)
    barrier.wait(60)
    for step in range(start, start + 20):
        trace.append(row(step))
    barrier.wait(60)
    trace.close()


@pytest.mark.thorough
@pytest.mark.skipif(files.fcntl is None, reason="needs locks")
def test_processes_that_begin_at_once_share_no_file(tmp_path) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        children = [
            context.Process(target=_write, args=(str(tmp_path / "t.jsonl"), 100 * number, barrier))
            for number in range(4)
        ]
        for child in children:
            child.start()
    for child in children:
        child.join()
    found = sorted(steps(path) for path in tmp_path.iterdir())
    assert found == [list(range(100 * number, 100 * number + 20)) for number in range(4)]


def test_a_disk_without_locks_is_written_all_the_same(tmp_path, monkeypatch) -> None:
    if files.fcntl is not None:

        def refuse(descriptor: int, how: int) -> None:
            raise OSError("No locks available")

        monkeypatch.setattr(files.fcntl, "flock", refuse)
    for step in (0, 1):
        with Trace(tmp_path / "t.jsonl") as trace:
            trace.append(row(step))
    assert steps(tmp_path / "t.jsonl") == [1]
    assert steps(tmp_path / "t.1.jsonl") == [0]


def refused(*arguments: object) -> None:
    raise OSError("Input/output error")


DISKS = {
    "when the file is opened": (files, "begin", False),
    "when a row is written": (files.TraceFile, "write", True),
    "when the file is closed": (files.TraceFile, "close", True),
}


@pytest.mark.parametrize(("owner", "name", "has_begun"), DISKS.values(), ids=DISKS.keys())
def test_a_disk_that_refuses_costs_the_file_not_the_run(tmp_path, monkeypatch, owner, name, has_begun) -> None:
    trace = Trace(tmp_path / "t.jsonl")
    if has_begun:
        trace.append(row(0))
    monkeypatch.setattr(owner, name, refused)
    with pytest.warns(SmoothdiagWarning, match="could not be .*: Input/output error. Rows are kept") as caught:
        trace.extend(row(step) for step in range(1, 4))
        trace.close()
    assert len([one for one in caught if one.category is SmoothdiagWarning]) == 1
    assert [found["step"] for found in trace] == [*([0] if has_begun else []), 1, 2, 3]
    trace.write(tmp_path / "copy.csv")
    assert len(Trace.read(tmp_path / "copy.csv")) == len(trace)


def test_a_disk_that_refuses_while_resuming(tmp_path, monkeypatch) -> None:
    with Trace(tmp_path / "t.jsonl") as trace:
        trace.append(row(0))
    before = (tmp_path / "t.jsonl").read_bytes()
    trace = Trace(tmp_path / "t.jsonl")
    monkeypatch.setattr(files, "again", refused)
    with pytest.warns(SmoothdiagWarning, match="could not be continued: Input/output error"):
        trace.resume(1)
    trace.append(row(1))
    trace.close()
    assert (tmp_path / "t.jsonl").read_bytes() == before


@pytest.mark.thorough
@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="needs limits for files")
def test_a_full_disk_leaves_whole_rows_and_goes_on_when_there_is_room(tmp_path) -> None:
    path = tmp_path / "t.jsonl"

    def child() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        with warnings.catch_warnings(record=True) as caught, Trace(path) as trace:
            warnings.simplefilter("always")
            trace.extend(row(step) for step in range(20))
        assert len(caught) == 1
        assert len(trace) == 20

    in_a_child(child)
    trace = Trace(path)
    with pytest.warns(SmoothdiagWarning, match="half-written"):
        trace.resume(20)
    trace.append(row(20))
    trace.close()
    with pytest.warns(SmoothdiagWarning, match="left out"):
        found = steps(path)
    assert found == [*range(len(found) - 1), 20]
