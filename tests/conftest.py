"""Shared settings: one thread, since models as small as those of the tests only wait on several."""

import gc
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from quick import is_left_out, is_quick, no_frameworks, no_processes


def pytest_configure(config: pytest.Config) -> None:
    if is_quick(config):
        frameworks = no_frameworks()
        frameworks.__enter__()
        config.add_cleanup(lambda: frameworks.__exit__(None, None, None))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    is_test = collection_path.suffix == ".py" and is_quick(config)
    return True if is_test and is_left_out(collection_path) else None


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Names bytes, and texts that are no plain line, by their place: what is in a file makes no name of a test."""
    plain = isinstance(val, str) and val.isprintable() and len(val) <= 100
    return None if plain or not isinstance(val, str | bytes) else argname


@pytest.fixture(autouse=True, scope="session")
def _threads() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _no_processes_if_quick(pytestconfig: pytest.Config) -> Iterator[None]:
    with no_processes() if is_quick(pytestconfig) else nullcontext():
        yield


@pytest.fixture(autouse=True, scope="module")
def _frozen() -> None:
    """Lets collections of garbage pass over what was there before the tests of a file: what frameworks are made of."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def without_collecting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frees nothing where memory runs out on purpose, since that takes a tenth of a second each time."""
    monkeypatch.setattr("smoothdiag.memory.free", lambda: None)


@pytest.fixture(scope="module")
def group_of_one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Makes this process a group of its own for the tests of a file."""
    from ranks import alone  # few tests need it

    with alone(tmp_path_factory.mktemp("meeting")):
        yield


@pytest.fixture
def no_figure_left_open() -> Iterator[None]:
    from matplotlib import pyplot as plt  # most tests draw nothing, and it loads slowly

    plt.close("all")
    yield
    plt.close("all")
