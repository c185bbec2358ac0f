"""launch: a script that nobody changes is measured as if by hand and trains the same bits; refusals are said."""

import math
import re
import runpy
import sys
from statistics import median

import pytest
import torch
from launched import HEAD, MEASURED, REFUSED, SGD, STEP, check
from torch import nn
from torch.nn import functional as F

import smoothdiag as sd
from smoothdiag.autoclip.progression import is_in_progression
from smoothdiag.cli import main

QUICK = ("plain", "accumulation under a scaler", "main guarded by its name")


def measured(tmp_path, monkeypatch, kind) -> None:
    watched, alone = tmp_path / "watched.pt", tmp_path / "alone.pt"
    found = check(tmp_path, MEASURED[kind], arguments=[watched])
    assert (found["steps"], found["check"]["not_measured"]) == (30, [])
    assert found["check"]["measurements"] >= 12
    assert found["check"]["longest_step"] > 0
    assert found["check"]["critical_multiple"] > 0
    assert (found["check"]["critical_lr"] is None) == (found["check"]["optimizer"] == "SGD + Adam"), "rates differ"
    assert ("swallowed" in found["printed"], "tidied" in found["printed"]) == (False, "tidied" in MEASURED[kind])
    steps = {"range(40)": "range(29)"}  # the 30th step ends the run before its last line
    script = tmp_path / "alone.py"
    script.write_text(HEAD + MEASURED[kind].replace(*steps.popitem()))
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [str(script), str(alone)])
        runpy.run_path(str(script), run_name="__main__")
    for p, q in zip(torch.load(watched), torch.load(alone), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("kind", QUICK[:1])
def test_loop_is_measured_and_trains_the_same_bits(tmp_path, monkeypatch, kind) -> None:
    measured(tmp_path, monkeypatch, kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in MEASURED if kind not in QUICK[:1]])
def test_further_loop_is_measured_and_trains_the_same_bits(tmp_path, monkeypatch, kind) -> None:
    measured(tmp_path, monkeypatch, kind)


@pytest.mark.parametrize("kind", REFUSED)
def test_loss_that_cannot_be_computed_again_makes_no_threshold(tmp_path, kind) -> None:
    code, reason = REFUSED[kind]
    found = check(tmp_path, code, "--steps", "8")["check"]
    assert reason in " ".join(found["not_measured"])
    names = ("longest_step", "threshold", "suggested_lr", "critical_lr", "step_lengths", "over")
    assert [found[name] for name in names] == [None] * len(names)
    assert all(habit["longest_steps"] is None for habit in found["habits"])
    assert len(found["norms"]) == (0 if "no optimizer" in kind else 8), "what can be counted is counted"


def test_numbers_are_those_of_an_autoclip_attached_by_hand(tmp_path) -> None:
    loop = "for k in range(40):\n    x, y = batch(k)\n    loss = F.cross_entropy(model(x), y)\n" + STEP
    found = check(tmp_path, SGD + loop)["check"]
    names: dict = {}
    exec(HEAD + SGD, names)
    model, optimizer, batch = names["model"], names["optimizer"], names["batch"]
    options = {"estimators": (sd.CriticalStep(),), "schedule": is_in_progression, "data": "step"}
    probe = sd.Probe(model, optimizer, lambda model, b: F.cross_entropy(model(b[0]), b[1]), **options)
    clipper = sd.AutoClip(optimizer, probe, mode="shadow")
    for k in range(30):
        probe.observe(batch(k))
        optimizer.zero_grad()
        F.cross_entropy(model(batch(k)[0]), batch(k)[1]).backward()
        optimizer.step()
    rows = [row for row in probe.trace if row["estimator"] == "critical_step"]
    assert found["longest_step"] == clipper.longest_step
    assert found["threshold"] == clipper.threshold
    assert found["suggested_lr"] == clipper.suggest_lr()
    assert found["critical_lr"] == median(row["critical_lr"] for row in rows)


QUADRATIC = """
model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
with torch.no_grad(): model.weight.fill_(5.0)
optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
one = torch.ones(1, 1, dtype=torch.float64)
for k in range(40):
    optimizer.zero_grad()
    (2 * model(one).pow(2).sum()).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 28.0)
    optimizer.step()
"""


def test_a_quadratic_without_noise_gives_the_closed_form(tmp_path) -> None:
    found = check(tmp_path, QUADRATIC)["check"]
    w, lr, curvature, lengths = 5.0, 0.02, 4.0, []
    measured = [k for k in range(30) if is_in_progression(k)]
    for k in range(30):
        if k in measured:
            lengths.append(w)  # ||g|| / L = 4 w / 4
        w -= lr * curvature * w
    longest = 1.2 * median(lengths)
    assert found["measurements"] == len(measured) == 13
    assert found["longest_step"] == pytest.approx(longest, rel=1e-6)
    assert found["threshold"] == pytest.approx(longest / lr, rel=1e-6)
    assert found["suggested_lr"] == pytest.approx(1 / curvature, rel=1e-6)
    assert found["critical_lr"] == pytest.approx(2 / curvature, rel=0.06)  # CriticalStep's own accuracy
    (clip,) = found["clips"]
    assert (clip["line"], clip["number"], clip["clipped"]) == (HEAD.count("\n") + 9, 30, 0)
    assert clip["longest_steps"] == pytest.approx(28 / (longest / lr), rel=1e-6)
    low, high = found["threshold_interval"]
    assert low < found["threshold"] < high


def test_script_that_ends_early_or_fails_is_said(tmp_path) -> None:
    loop = SGD + "for k in range({}):\n    x, y = batch(k)\n    loss = F.cross_entropy(model(x), y)\n" + STEP
    found = check(tmp_path, loop.format(3))
    assert (found["steps"], found["script"]["is_ended_early"], found["code"]) == (3, False, 0)
    assert "it needs 5 measurements, and there are 3" in found["check"]["not_measured"][0]
    assert found["check"]["threshold"] is None
    found = check(tmp_path, loop.format(6) + "raise ValueError\n", "--fail-on", "note")
    assert (found["code"], found["script"]["exit_code"]) == (1, 1)
    assert "the script ended with exit code 1" in found["printed"]


def test_run_that_goes_wrong_tells_no_threshold(tmp_path) -> None:
    loop = "for k in range(40):\n    x, y = batch(k)\n    loss = F.cross_entropy(model(x), y)\n" + STEP
    found = check(tmp_path, SGD.replace("lr=0.5", "lr=500.0") + loop)["check"]
    assert (found["threshold"], found["longest_step"]) == (None, None)
    assert "The run itself went wrong: the loss rose from" in found["not_measured"][0]


def test_clip_after_the_step_is_one_fault_and_gives_no_norms(tmp_path) -> None:
    loop = SGD + "for k in range(40):\n    x, y = batch(k)\n    loss = F.cross_entropy(model(x), y)\n" + STEP
    clip = "nn.utils.clip_grad_norm_(model.parameters(), 0.2)\n"
    right = loop.replace("    optimizer.step()\n", f"    {clip}    optimizer.step()\n")
    found = check(tmp_path, right.replace("    optimizer.step()\n", f"    optimizer.step()\n    {clip}"))
    assert [each["name"] for each in found["findings"] if each["severity"] == "error"] == ["clip-after-step"]
    assert found["check"]["norms"] == pytest.approx(check(tmp_path, right)["check"]["norms"], rel=1e-6)


def test_norms_of_steps_are_not_those_of_a_clip_that_was_given_nothing_or_one_part(tmp_path) -> None:
    loop = SGD + "for k in range(6):\n    x, y = batch(k)\n    loss = F.cross_entropy(model(x), y)\n" + STEP
    plain = check(tmp_path, loop)["check"]["norms"]
    for given in ("iter(())", "model[2].parameters()"):
        clip = f"    nn.utils.clip_grad_norm_({given}, 1e6)\n    optimizer.step()\n"
        assert check(tmp_path, loop.replace("    optimizer.step()\n", clip))["check"]["norms"] == pytest.approx(
            plain, rel=1e-6
        )


def test_text_says_what_the_numbers_say(tmp_path, capsys) -> None:
    script = tmp_path / "train.py"
    script.write_text(HEAD + QUADRATIC)
    assert main(["launch-check", str(script)]) == 0
    text = capsys.readouterr().out
    assert "The run was stopped after step 30" in text
    assert "shortened 0 of 30 gradients (0%)" in text
    assert "Your max_norm=28 is" in text
    assert "LONGEST STEP: " in text
    assert re.search(r"\bnan\b", text) is None


@pytest.mark.parametrize(("code", "asks"), [
    (REFUSED["part kept in the model"][0], True),
    (MEASURED["closure"].replace("SGD(model.parameters(), lr=0.5, momentum=0.9)", "LBFGS(model.parameters())"), False),
    (MEASURED["plain"].replace("range(40)", "range(2)"), False),
])  # fmt: skip
def test_a_loss_fn_is_asked_for_where_it_helps(tmp_path, capsys, code, asks) -> None:
    script = tmp_path / "train.py"
    script.write_text(HEAD + code)
    assert main(["launch-check", "--steps", "3", str(script)]) == 0
    text = capsys.readouterr().out
    assert "NOT MEASURED: " in text
    assert ("with a loss_fn(model, batch)" in text) is asks


def test_nothing_is_left_behind(tmp_path) -> None:
    before = nn.Module.__call__, torch.autograd.backward, torch.amp.GradScaler.scale, torch.optim.Optimizer.__init__
    check(tmp_path, MEASURED["plain"], "--steps", "2")
    now = nn.Module.__call__, torch.autograd.backward, torch.amp.GradScaler.scale, torch.optim.Optimizer.__init__
    assert now == before
    assert torch._C._len_torch_function_stack() == 0
    assert math.isfinite(float(torch.ones(2).sum()))
