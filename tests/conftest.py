"""Shared settings: one thread, since models as small as those of the tests only wait on several."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _threads() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def no_figure_left_open() -> Iterator[None]:
    from matplotlib import pyplot as plt  # most tests draw nothing, and it loads slowly

    plt.close("all")
    yield
    plt.close("all")
