"""report.run: traces of probes and of AutoClip hold what a page needs, and callbacks write the page at the end."""

import math
from types import SimpleNamespace

import pytest
import torch
from autoclip_runs import Run, adamw, batches, sgd
from numpy.testing import assert_allclose
from pages import lawful, recorded

from smoothdiag import ClippedMomentum, SmoothdiagWarning, Trace
from smoothdiag.integrations.attached import Attached
from smoothdiag.report.run import Options, read_run
from smoothdiag.report.views import View


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (sgd(0.1, 0.9), {"momentum": 0.9, "gain": pytest.approx(10.0)}),
        (sgd(0.1), {"momentum": 0.0, "gain": 1.0}),
        (
            lambda model: ClippedMomentum(model.parameters(), 0.1, threshold=1.0, momentum=0.9),
            {"momentum": 0.9, "gain": 1},
        ),
        (adamw(), {}),
        (
            lambda model: torch.optim.SGD(
                [{"params": [p], "momentum": 0.1 * k} for k, p in enumerate(model.parameters())], lr=0.1
            ),
            {},
        ),
    ],
)
def test_header_has_momentum_and_gain_where_steps_follow_gradients(make, expected) -> None:
    meta = Run(make, clipped=False).probe.trace.meta
    assert {name: meta[name] for name in ("momentum", "gain") if name in meta} == expected


def test_rows_of_autoclip_hold_its_state() -> None:
    run = Run(sgd(4.0, 0.9)).over(batches(70))
    found = read_run("run", run.probe.trace, Options({"num_boot": 20}))
    held = found.history
    assert len(held) >= 13
    assert_allclose(held["threshold"], held["longest_step"] / (10 * held["lr"]))
    assert (held["lr"] == 4.0).all()
    late = held[held["step"] > 30]["longest_step"]  # from there on the length is held
    assert len(late)
    assert_allclose(late, run.clipper.longest_step)
    assert held["longest_step"].nunique() > 3
    assert found.clipped.acts
    assert found.clipped.longest_step == run.clipper.longest_step
    assert found.answer.headline.startswith("Nothing to set: AutoClip keeps steps within")
    assert f"max_grad_norm={float(f'{run.clipper.threshold:.3g}'):g}" in found.answer.headline


def test_autoclip_in_shadow_mode_says_where_it_would_clip() -> None:
    run = Run(sgd(4.0), mode="shadow").over(batches(70))
    found = read_run("run", run.probe.trace, Options({"num_boot": 20}))
    assert not found.clipped.acts
    assert found.fit.clip_mode == "shadow"
    would = f"would clip at max_grad_norm={float(f'{run.clipper.threshold:.3g}'):g} at this rate."
    assert found.answer.headline.endswith(would)
    assert 'mode="clip"' in found.answer.steps[0]


def test_updates_have_a_longest_step_and_no_threshold() -> None:
    run = Run(adamw(0.5)).over(batches(70))
    found = read_run("run", run.probe.trace, Options({"num_boot": 20}))
    assert View(found, "run-1").history_caption.endswith("so there is no threshold on gradients to list.")
    clipped = found.clipped
    assert math.isnan(clipped.threshold)
    assert clipped.longest_step == run.clipper.longest_step


def attached(report) -> Attached:
    return Attached((), None, None, False, "fixed", report=report)


def test_callbacks_write_the_page_and_survive_when_they_cannot(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("smoothdiag.report.views.figures_of", lambda run, prefix: [])
    callback = attached(tmp_path / "page.html")
    callback._write_report()  # before training there is nothing to write
    callback.probe = SimpleNamespace(trace=Trace())
    with pytest.warns(SmoothdiagWarning, match=r"page\.html could not be written: .*should have rows.*not affected"):
        callback._write_report()
    assert not list(tmp_path.iterdir())
    callback.probe = SimpleNamespace(trace=recorded(lawful()))
    callback._write_report()
    assert "Set max_grad_norm=4.5" in (tmp_path / "page.html").read_text(encoding="utf-8")
    for wrong in ("page.pdf", 3):
        with pytest.raises(ValueError, match=r"Parameter `report` should be the path of a page, which ends in \.html"):
            attached(wrong)


@pytest.mark.thorough
def test_hugging_face_trainer_leaves_a_page(tmp_path) -> None:
    from trainers import settings_of_the_process, trainer_of

    from smoothdiag.integrations.huggingface import SmoothnessCallback

    with settings_of_the_process():
        trainer = trainer_of(tmp_path / "out")
        SmoothnessCallback(report=tmp_path / "page.html").bind(trainer)
        trainer.train()
    assert "<h1>" in (tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.mark.thorough
def test_lightning_trainer_leaves_a_page(tmp_path) -> None:
    from lightning_runs import fit

    from smoothdiag.integrations.lightning import SmoothnessCallback

    fit(SmoothnessCallback(report=tmp_path / "page.html"))
    assert "<h1>" in (tmp_path / "page.html").read_text(encoding="utf-8")
