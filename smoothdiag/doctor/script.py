"""Running a user's script under the doctor, as Python itself would run it."""

from __future__ import annotations

import builtins
import os
import runpy
import sys
from collections.abc import Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType, TracebackType

from smoothdiag.doctor.watching import Report, watch_all


def run_script(path: str | Path, arguments: Sequence[str] = (), *, is_module: bool = False) -> tuple[Report, int]:
    """Runs a script unchanged, as ``python path *arguments`` would, and watches every optimizer that it makes.

    Args:
        path: The script, or the name of a module.
        arguments: What it finds in ``sys.argv`` after its own name.
        is_module: Whether to run a module, as ``python -m`` would.

    Returns:
        The report, and the exit code that the script ends with. A traceback goes to stderr.

    Raises:
        ValueError: If there is no such file.
    """
    if not is_module and not Path(path).is_file():
        raise ValueError(f"Parameter `script` should be a Python file. Found `{path}`.")
    argv, search, hook, main = sys.argv, list(sys.path), sys.excepthook, sys.modules["__main__"]
    sys.argv = [str(path), *arguments]
    try:
        with watch_all() as watcher:
            report = Report(watcher.observer)
            return report, _run(str(path), is_module=is_module)
    finally:
        sys.argv, sys.path[:], sys.excepthook, sys.modules["__main__"] = argv, search, hook, main


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
    except SystemExit as end:
        return _exit_code(end.code)
    except BaseException as error:
        error = error.with_traceback(_within(error.__traceback__))
        sys.excepthook(type(error), error, error.__traceback__)
        return 130 if isinstance(error, KeyboardInterrupt) else 1  # as shells have it for an interrupt
    return 0


def _exit_code(code: object) -> int:
    if code is None or isinstance(code, int):
        return code or 0
    print(code, file=sys.stderr)
    return 1


def _within(trace: TracebackType | None) -> TracebackType | None:
    """Returns the traceback without the frames that only start the script."""
    while trace is not None and trace.tb_frame.f_code.co_filename in (__file__, runpy.__file__, "<frozen runpy>"):
        trace = trace.tb_next
    return trace
