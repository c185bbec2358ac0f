"""optim: two processes with sharded parameters take the steps of one process, because norms are global."""

import pytest
import torch
from optim_worker import OPTIMIZERS, WORLD, train_model, train_tensors, work
from ranks import run_ranks
from torch.testing import assert_close

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without it"),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run_ranks(work, tmp_path_factory.mktemp("ranks"), WORLD)


@pytest.mark.parametrize("layout", ["sharded", "replicated", "hybrid", "gradient elsewhere"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_sharded_parameters_move_like_whole_ones(found, name, layout):
    for rank in found:
        assert_close(rank[name, layout], train_tensors(name), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fully_sharded_models_train_like_whole_ones(found, name):
    for rank in found:
        assert_close(rank[name, "fsdp2"], train_model(name, sharded=False), rtol=1e-12, atol=1e-12)
