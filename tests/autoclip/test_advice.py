"""autoclip.advice: the reason says what hinders AutoClip, and gives no number of a run that went wrong."""

import math
import warnings

import pytest
import torch
from autoclip_runs import Run, adamw, batches, network, sgd
from losses import cross_entropy

from smoothdiag import AutoClip, ClippedMomentum, Probe, SmoothdiagWarning
from smoothdiag.autoclip.advice import Facts, kept, next_step
from smoothdiag.autoclip.calibration import Calibration, Measurement, StepRule
from smoothdiag.autoclip.history import explained
from smoothdiag.report.run import Options, read_run


def diverged(make=None, **options) -> Run:
    run = Run(make or sgd(500.0, 0.9), mode="shadow", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SmoothdiagWarning)
        return run.over(batches(35))


def test_a_shadow_of_a_run_that_went_wrong_gives_no_number() -> None:
    run = diverged()
    head, todo, reason = run.clipper.reason.split("\n")
    assert "where to clip does not follow, because the loss rose from" in head
    assert todo.startswith('NEXT: begin again with mode="clip"')
    assert "max_norm" not in head + todo + reason
    assert "no step is longer" not in head
    assert f"{run.clipper.longest_step:.3g}" not in head + todo + reason
    found = read_run("run", run.probe.trace, Options({"num_boot": 20})).answer
    assert "The run went wrong while AutoClip was in shadow mode: the loss rose from" in found.headline
    assert math.isnan(run.clipper.threshold)
    assert "max_grad_norm" not in found.headline
    assert len(found.steps) == 1
    assert 'Begin again with AutoClip(mode="clip")' in found.steps[0]


def test_a_shadow_says_of_a_gradient_that_is_not_finite_that_it_stays() -> None:
    run = Run(adamw(), mode="shadow").over(batches(32))
    ((x, y),) = batches(1)
    with pytest.warns(SmoothdiagWarning, match="AutoClip leaves such a gradient as it is in shadow mode"):
        run.step((x * torch.inf, y))
        run.step((x, y))
    assert "does not follow, because" in run.clipper.reason
    assert "not finite (inf or NaN)" in run.clipper.reason.split("\n")[0]
    assert "the optimizer stepped with it" in set(run.clipper.history["note"].str.slice(0, 29))


def test_a_shadow_that_trains_says_what_acting_would_do() -> None:
    run = Run(sgd(0.1), mode="shadow").over(batches(35))
    head, todo, _ = run.clipper.reason.split("\n")
    said = (
        f'nothing is clipped in shadow mode; mode="clip" would keep steps within {run.clipper.longest_step:.3g}, which'
    )
    assert said in head
    assert todo.startswith('NEXT: mode="clip" makes it act')
    caps = Run(lambda m: ClippedMomentum(m.parameters(), lr=0.1, threshold=9.0), mode="shadow").over(batches(35))
    assert 'NEXT: mode="set" makes it act' in caps.clipper.reason


def test_a_shadow_of_a_run_that_is_nan_says_so_without_a_length() -> None:
    assert "because X" in kept(math.nan, math.nan, 1.0, FACTS._replace(diverged="X"), acts_by="clip")


FACTS = Facts("clip", 40, stopped=False, diverged="", clipped_at=-1)


def test_next_names_what_hinders_first() -> None:
    held = Calibration(StepRule(), [Measurement(k, 1.0, 1.0, saturated=k > 2) for k in range(9)], held_at=30)
    assert "6 of 9 measurements are saturated" in next_step(held, FACTS, acts_by="clip")
    clipped = next_step(held, FACTS._replace(clipped_at=7), acts_by="clip")
    assert clipped.startswith("clip nowhere else: the gradient of step 7")
    assert "clip nowhere" not in next_step(held, FACTS._replace(clipped_at=7, mode="shadow"), acts_by="clip")
    unseen = Calibration(StepRule())
    assert "show the probe the batches: it has measured none of 40" in next_step(unseen, FACTS, acts_by="clip")
    assert next_step(unseen, FACTS._replace(steps=2), acts_by="clip").startswith("train on")
    assert "docs/statuses.md" in next_step(Calibration(StepRule(), invalid={"x": 9}), FACTS, acts_by="clip")
    few = Calibration(StepRule(), [Measurement(k, 1.0, 1.0, saturated=k > 6) for k in range(9)], held_at=30)
    assert next_step(few, FACTS, acts_by="clip").startswith("nothing to do")


def test_a_forgotten_clip_stays_in_the_reason() -> None:
    run = Run(sgd(0.1))
    for batch in batches(40):
        run.optimizer.zero_grad()
        run.probe.observe(batch)
        cross_entropy(run.model, batch).backward()
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1e-3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SmoothdiagWarning)
            run.optimizer.step()
            _ = run.clipper.longest_step
    assert "NEXT: clip nowhere else: the gradient of step 0" in run.clipper.reason


def test_a_second_autoclip_of_an_optimizer_is_told_at_once_and_blames_nobody_else() -> None:
    model = network()
    optimizer = sgd(4.0)(model)
    probes = [Probe(model, optimizer, cross_entropy, estimators=()) for _ in range(2)]
    AutoClip(optimizer, probes[0])
    with pytest.warns(SmoothdiagWarning, match="Another AutoClip follows this optimizer already, as after a notebook"):
        second = AutoClip(optimizer, probes[1])
    for batch in batches(5):
        optimizer.zero_grad()
        for probe in probes:
            probe.observe(batch)
        cross_entropy(model, batch).backward()
        optimizer.step()
    assert "clip nowhere else" not in second.reason


@pytest.mark.parametrize("make", [sgd(0.1, 0.9), sgd(0.1)], ids=["momentum", "plain"])
def test_a_resumed_run_that_loads_neither_state_is_told(make, tmp_path) -> None:
    path = tmp_path / "run.jsonl"
    first = Run(make, trace=path).over(batches(3))
    state = first.optimizer.state_dict()
    first.probe.close()
    assert "earlier run" not in first.clipper.reason
    second = Run(make, trace=path)
    second.optimizer.load_state_dict(state)
    second.over(batches(3))
    said = f"{path} holds an earlier run; it is kept under another name, and AutoClip measures anew, because neither"
    assert said in second.clipper.reason.split("\n")[2]
    assert len(list(tmp_path.glob("run*.jsonl"))) == 2
    second.probe.close()


@pytest.mark.parametrize(
    ("signal", "said"),
    [
        (0.4, "and (0.4 / 0.5)^0.5, because halves of a batch share 0.4 of the squared gradient"),
        (
            0.1,
            "and (0.2 / 0.5)^0.5, because halves of a batch share 0.1 of the squared gradient, and at least 0.2 is "
            "counted",
        ),
        (-0.0066, "share nothing (-0.0066) of the squared gradient, and at least 0.2 is counted"),
    ],
)
def test_the_least_share_of_signal_is_named(signal, said) -> None:
    found = Calibration(StepRule(), [Measurement(k, 1.0, 1.0, signal=signal) for k in range(9)], held_at=30)
    assert explained(found).endswith(said)
