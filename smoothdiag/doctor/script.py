"""Running a user's script under the doctor, as Python itself would run it."""

from __future__ import annotations

import builtins
import os
import runpy
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import FrameType, ModuleType, TracebackType

from smoothdiag import console
from smoothdiag.doctor.report import Report
from smoothdiag.doctor.watching import StepsDone, watch_all


def run_script(
    path: str | Path,
    arguments: Sequence[str] = (),
    *,
    is_module: bool = False,
    steps: int | None = None,
    before_termination: Callable[[Report], None] | None = None,
) -> tuple[Report, int]:
    """Runs a script unchanged, as ``python path *arguments`` would, and watches every optimizer that it makes.

    Args:
        path: The script, or the name of a module.
        arguments: What the script finds in ``sys.argv`` after its own name.
        is_module: Whether to run a module, as ``python -m`` would.
        steps: After how many optimizer steps to end the script; ``None`` lets it end by itself.
        before_termination: Called with the report before SIGTERM ends the process, unless the script handles SIGTERM.

    Returns:
        The report, and the exit code that the script ends with. A traceback goes to stderr.

    Raises:
        ValueError: If there is no such file, or ``steps`` is not positive.
    """
    if steps is not None and steps < 1:
        raise ValueError(f"Parameter `steps` should be at least 1. Found {steps}.")
    if not is_module and not Path(path).is_file():
        raise ValueError(f"Parameter `script` should be a Python file. Found `{path}`.")
    argv, search, hook, main = sys.argv, list(sys.path), sys.excepthook, sys.modules["__main__"]
    sys.argv = [str(path), *arguments]
    try:
        with watch_all(steps=steps) as watcher:
            report = Report(watcher.observer)
            with nullcontext() if before_termination is None else _at_termination(before_termination, report):
                report.exit_code = _run(str(path), is_module=is_module)
        return report, report.exit_code
    finally:
        sys.argv, sys.path[:], sys.excepthook, sys.modules["__main__"] = argv, search, hook, main


@contextmanager
def _at_termination(tell: Callable[[Report], None], report: Report) -> Iterator[None]:
    """Calls ``tell`` before SIGTERM ends the process, unless the script has a handler of its own."""

    def handle(number: int, frame: FrameType | None) -> None:
        if signal.getsignal(number) is not handle:  # the script's own handler called this one
            return
        signal.signal(number, signal.SIG_DFL)
        try:
            tell(report)
        finally:
            os.kill(os.getpid(), number)

    def release() -> None:
        if signal.getsignal(signal.SIGTERM) is handle:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    is_free = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if not is_free or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGTERM, handle)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=release)  # forked processes end at once, as without the doctor
    try:
        yield
    finally:
        release()


def _run(path: str, *, is_module: bool) -> int:
    """Runs a script or a module as the main program and returns its exit code."""
    file = os.path.abspath(path)
    if not sys.flags.safe_path:
        sys.path[0] = os.getcwd() if is_module else str(Path(path).resolve().parent)
    try:
        if is_module:
            runpy.run_module(path, run_name="__main__", alter_sys=True)
        else:
            main = sys.modules["__main__"] = ModuleType("__main__")
            names = {"__file__": file, "__loader__": SourceFileLoader("__main__", file), "__builtins__": builtins}
            vars(main).update(names, __annotations__={}, __cached__=None)
            exec(compile(Path(file).read_bytes(), file, "exec", dont_inherit=True), vars(main))
    except StepsDone:
        return 0
    except SystemExit as end:
        return _exit_code(end.code)
    except BaseException as error:
        if isinstance(error, BrokenPipeError) and console.nobody_reads():
            console.let_go()
            return console.BROKEN_PIPE
        error = error.with_traceback(_within(error.__traceback__))
        sys.excepthook(type(error), error, error.__traceback__)
        return 130 if isinstance(error, KeyboardInterrupt) else 1  # 130: the exit code of shells for an interrupt
    return 0


def _exit_code(code: object) -> int:
    if code is None or isinstance(code, int):
        return code or 0
    print(code, file=sys.stderr)
    return 1


def _within(trace: TracebackType | None) -> TracebackType | None:
    """Returns the traceback without the frames that start the script."""
    while trace is not None and trace.tb_frame.f_code.co_filename in (__file__, runpy.__file__, "<frozen runpy>"):
        trace = trace.tb_next
    return trace
