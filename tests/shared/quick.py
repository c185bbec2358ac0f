"""What `make quick` leaves out, and what its tests must not do: start a process, or import a framework."""

import multiprocessing.process
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

import pytest

FRAMEWORKS = frozenset(
    {"accelerate", "lightning", "mlflow", "pytorch_lightning", "tensorboard", "trackio", "transformers", "wandb"}
)
PROCESSES: tuple[tuple[Any, str], ...] = (
    (subprocess.Popen, "__init__"),
    (multiprocessing.process.BaseProcess, "start"),
    (os, "fork"),
    (os, "system"),
    (os, "posix_spawn"),
)
LEFT_OUT = re.compile(r"^pytestmark = \[?\s*pytest\.mark\.(thorough|slow|gpu)\b", re.MULTILINE)


def is_quick(config: pytest.Config) -> bool:
    return "not thorough" in config.option.markexpr


def is_left_out(path: Path) -> bool:
    """Returns whether the file is marked as a whole; its imports are not even read then."""
    return bool(LEFT_OUT.search(path.read_text(encoding="utf-8")))


def refused(what: str) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        pytest.fail(f"A quick test must not {what}. Mark the test, or its file, with `pytest.mark.thorough`.")

    return refuse


class NoFrameworks(MetaPathFinder):
    """Fails where a framework is imported."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name in FRAMEWORKS:
            refused(f"import `{name}`")()


@contextmanager
def no_frameworks() -> Iterator[None]:
    finder = NoFrameworks()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


@contextmanager
def no_processes() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in PROCESSES:
            patch.setattr(owner, name, refused("start a process"))
        yield
