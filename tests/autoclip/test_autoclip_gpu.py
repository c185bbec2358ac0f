"""autoclip: on a GPU no unmeasured step waits for the device, and the run equals the run on the CPU."""

import pytest
import torch
from autoclip_runs import Run, adamw, batches, never, sgd
from losses import cross_entropy
from torch.testing import assert_close

from smoothdiag import ClippedMomentum, StepRule
from smoothdiag.autoclip.progression import is_in_progression

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

OPTIMIZERS = {
    "sgd": (sgd(4.0, 0.9), {}),
    # Fused, because the others of torch read a tensor rate themselves.
    "tensor": (lambda m: torch.optim.SGD(m.parameters(), lr=torch.tensor(4.0, device="cuda"), fused=True), {}),
    "adamw": (adamw(0.1), {}),
    "set": (lambda m: ClippedMomentum(m.parameters(), lr=9.0, longest_step=1.0), {"mode": "set"}),
    "bounded": (sgd(4.0), {"rule": StepRule(bounded=True)}),
    "shadow": (sgd(4.0), {"mode": "shadow"}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_that_are_not_measured_do_not_wait(name) -> None:
    make, options = OPTIMIZERS[name]
    run = Run(lambda model: make(model.cuda()), schedule=never, **options)
    loader = [(x.cuda(), y.cuda()) for x, y in batches(45)]
    loader[40] = (loader[40][0] * torch.inf, loader[40][1])
    for k, batch in enumerate(loader):
        run.probe.observe(batch)
        run.optimizer.zero_grad()
        cross_entropy(run.model, batch).backward()
        measured = run.clipper._calibration.due(k)
        # The row of a measured step is taken up before the next one.
        after_measured = k > 0 and is_in_progression(k - 1)
        torch.cuda.set_sync_debug_mode("default" if measured or after_measured else "error")
        try:
            run.optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    with pytest.warns(UserWarning, match="The gradient of step 40"):
        assert run.clipper.history["skipped"].iloc[-1] == 1


@pytest.mark.parametrize("name", ["sgd", "adamw", "set"])
def test_the_run_is_that_of_the_cpu(name) -> None:
    make, options = OPTIMIZERS[name]
    here = Run(make, dtype=torch.float64, **options).over(batches(40, dtype=torch.float64))
    there = Run(lambda model: make(model.cuda()), dtype=torch.float64, **options)
    there.over([(x.cuda(), y.cuda()) for x, y in batches(40, dtype=torch.float64)])
    assert there.clipper.longest_step == pytest.approx(here.clipper.longest_step, rel=1e-5)
    assert_close(there.weights().cpu(), here.weights(), rtol=1e-5, atol=1e-7)
