"""fits.wording: verdict and next step stand first, in plain words, and the next step follows from the fit."""

import ast
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from places import REPOSITORY

from smoothdiag.clipping import clip_rule
from smoothdiag.fits import Flag, GroupFits, Verdict, fit_smoothness, headline
from smoothdiag.fits.base import HessianCheck

JARGON = re.compile(
    r"\(null\)|skill|\[f/|quantile|decade|isotonic|affine|pinball|bootstrap|saturation|effective|spread|surrogate|"
    r"block|fatal|rho|kappa|\beta\b|\|\||noise floor|correlation|log-log|\bhvp\b|percentile"
)
NORMS = np.logspace(-1.0, 1.0, 60)
TABLE = pd.DataFrame({"grad_norm": NORMS, "smoothness": 1 + 2 * NORMS, "saturation": 0.1}).sample(
    frac=1, random_state=0
)
FIT = replace(
    fit_smoothness(TABLE, num_boot=20), verdict=Verdict.L0L1, estimator="local", flags=(), row_cost=(3.0, 1.5)
)
FATAL = Flag("saturation", "", "", "use the same data at both points. More.", fatal=True)
RANGE = Flag("range", "", "", "scan one checkpoint (sd.scan), and so on", blocking=True)


def flagged(*flags: Flag, **changes):
    return replace(FIT, flags=flags, verdict=Verdict.NOT_IDENTIFIED, **changes)


@pytest.mark.parametrize("verdict", Verdict)
def test_summary_and_plan_begin_with_the_verdict_and_the_next_step(verdict) -> None:
    fit = replace(FIT, verdict=verdict, flags=(FATAL,) if verdict is Verdict.ARTEFACT else ())
    said, todo = headline(fit)
    assert fit.summary().splitlines()[:2] == [said, todo]
    assert said.startswith(f"VERDICT {verdict.name}: ")
    assert todo.startswith("NEXT: ")
    assert str(fit.plan()).splitlines()[1] == todo
    assert max(len(said), len(todo)) <= 100
    assert fit.summary().count("VERDICT") == 1
    assert "docs/glossary.md" in fit.summary()


@pytest.mark.parametrize("verdict", Verdict)
@pytest.mark.parametrize("changes", [{}, {"num_scans": 9, "estimator": "hessian_norm"}, {"optimizer": "AdamW"}])
def test_first_two_lines_hold_no_jargon(verdict, changes) -> None:
    for flags in ((), (FATAL,), (RANGE,)):
        fit = replace(FIT, verdict=verdict, flags=flags, **changes)
        for text in (fit.summary(), str(fit.plan())):
            first = "\n".join(text.splitlines()[:2])
            assert not JARGON.search(first), first


def remedies() -> list[str]:
    """The remedies of all flags that stand against a law, as far as they are plain strings."""
    found = []
    for path in sorted((REPOSITORY / "smoothdiag" / "fits").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Flag":
                weights = {keyword.arg for keyword in node.keywords}
                if len(node.args) == 4 and isinstance(node.args[3], ast.Constant) and weights:
                    found.append(str(node.args[3].value))
    return found


@pytest.mark.parametrize("remedy", [pytest.param(text, id=str(number)) for number, text in enumerate(remedies())])
def test_remedies_make_plain_next_steps(remedy) -> None:
    todo = headline(flagged(Flag("some", "", "", remedy, blocking=True))).next
    if "quantile" not in remedy:  # that of "few points", which the number of rows answers instead
        assert not JARGON.search(todo), todo


def test_there_are_remedies_to_look_at() -> None:
    assert len(remedies()) > 9


@pytest.mark.parametrize(
    ("changes", "todo"),
    [
        ({}, "clip_rule(fit, lr=...) makes a threshold; sd.HessianNorm() or sd.scan would confirm it"),
        ({"hessian": HessianCheck(60, 0.9, (1.0, 3.0), agrees=True)}, "clip_rule(fit, lr=...) makes a threshold."),
        ({"optimizer": "AdamW"}, "let sd.AutoClip keep the updates of AdamW short"),
        ({"flags": (Flag("saturation unknown", "", "", ""),)}, "record rows with sd.Probe"),
        ({"verdict": Verdict.CONSTANT}, "do not clip; sd.step_rate(fit)"),
        ({"verdict": Verdict.LOSS_GAP}, "sd.LossGapWarmup(optimizer, fit)"),
        ({"verdict": Verdict.POWER}, "clip_rule(fit, lr=...) makes a threshold"),
    ],
)
def test_a_law_says_what_makes_use_of_it(changes, todo) -> None:
    assert todo in headline(replace(FIT, **changes)).next


def test_a_power_above_one_asks_for_a_rate() -> None:
    scores = tuple(replace(score, exponent=1.6) if score.name == "power" else score for score in FIT.comparison)
    said, todo = headline(replace(FIT, verdict=Verdict.POWER, comparison=scores))
    assert "as the power 1.60 of the gradient norm" in said
    assert "sd.step_rate(fit) makes a rate" in todo


def test_an_open_law_says_what_to_measure() -> None:
    assert (
        "scan this checkpoint: sd.scan(model, loss_fn, batches), about 500 gradients, here 4"
        in headline(flagged(RANGE)).next
    )
    assert headline(flagged(FATAL, RANGE)).next == "NEXT: use the same data at both points."
    few = flagged(Flag("few points", "", "", "", blocking=True), num_points=30, num_effective=10.0, spread=0.5)
    assert re.match(r"NEXT: record \d+ more rows like these, about \d+ gradients and ", headline(few).next)
    lines = flagged(num_scans=14, estimator="hessian_norm", exponent_interval=(0.4, 1.6))
    asks = "NEXT: scan again along lines of other kinds (toward=, update=), about 2000 gradients and 17 minutes."
    assert headline(lines).next == asks
    assert "14 points of a scan" in headline(replace(lines, num_points=14)).verdict


def test_groups_begin_with_their_verdicts() -> None:
    found = {name: replace(FIT, group=name) for name in ("all", "a", "b", "c")}
    fits = GroupFits({**found, "d": replace(FIT, verdict=Verdict.CONSTANT)})
    said, todo = headline(fits)
    assert fits.summary().splitlines()[:2] == [said, todo]
    assert said == "VERDICTS: L0L1 4 of 5; CONSTANT 1 of 5 (d)."
    assert not JARGON.search(said + todo)


@pytest.mark.parametrize("verdict", [Verdict.L0L1, Verdict.CONSTANT, Verdict.NOT_IDENTIFIED])
def test_a_rule_begins_with_the_threshold_and_where_it_goes(verdict) -> None:
    fit = replace(FIT, verdict=verdict)
    said, todo = str(clip_rule(fit, lr=0.1)).splitlines()[:2]
    assert not JARGON.search(said + todo)
    if verdict is Verdict.L0L1:
        assert said.startswith("clip gradients at norm ")
        assert "max_norm=" in todo
    else:
        assert said.startswith("no threshold from this fit")
        assert todo == headline(fit).next
    averaged = str(clip_rule(FIT, lr=0.1, momentum=0.9, dampening=0.9)).splitlines()[1]
    assert "threshold=" in averaged
    assert "lower the learning rate to 0." in str(clip_rule(FIT, lr=3.0)).splitlines()[1]
