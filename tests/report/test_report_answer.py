"""report.answer: the report gives the advice that the summary of the fit gives, for every kind of fit."""

import itertools
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from places import REPOSITORY

from smoothdiag.clipping import clip_rule
from smoothdiag.fits import Flag, Verdict, fit_smoothness, headline
from smoothdiag.fits.base import HessianCheck
from smoothdiag.fits.decision import Do
from smoothdiag.report.answer import Clipped, answer, no_answer
from smoothdiag.report.snippets import snippets

NORMS = np.logspace(-1.0, 1.0, 60)
TABLE = pd.DataFrame({"grad_norm": NORMS, "smoothness": 1 + 2 * NORMS, "saturation": 0.1}).sample(
    frac=1, random_state=0
)
FIT = replace(fit_smoothness(TABLE, num_boot=20), estimator="local", flags=(), row_cost=(3.0, 1.5))
STEEP = tuple(replace(score, exponent=1.6) if score.name == "power" else score for score in FIT.comparison)
CLIPPED = Clipped(0.3, 0.7, 0.1, acts=True)

SAID = {
    Do.THRESHOLD: (r"sd\.clip_rule\(fit", r"Set max_grad_norm=|clip_rule\(fit"),
    Do.RATE: (r"sd\.step_rate\(fit\)", r"`sd\.step_rate"),
    Do.WARMUP: (r"sd\.LossGapWarmup", r"`sd\.LossGapWarmup"),
    Do.AUTOCLIP: (r"let sd\.AutoClip", r"; let `AutoClip` keep"),
    Do.KEEP: (r"keep AutoClip in the loop", r"Nothing to set: AutoClip keeps"),
    Do.ACT: (r'AutoClip of this run act \(mode="clip"\)', r"in shadow mode, and would clip at max_grad_norm=0\.7"),
    Do.PROBE: (r"record rows with sd\.Probe", r"record rows with `sd\.Probe`"),
    Do.REMEDY: (r"^NEXT: use the same data", r"; first use the same data"),
    Do.LINES: (r"scan again along lines", r"scan this checkpoint again along lines"),
    Do.ROWS: (r"record (\d+ )?more rows like these", r"record (\d+ )?more rows like these"),
    Do.SCAN: (r"scan (this|another) checkpoint: sd\.scan", r"scan (this|another) checkpoint with `sd\.scan`"),
}
"""How the next step of a fit and the headline of the report say each kind."""

FLAGS = {
    "none": (),
    "fatal": (Flag("saturation", "", "", "use the same data at both points. More.", fatal=True),),
    "range": (Flag("range", "", "", "use the same data, and so on", blocking=True),),
    "few": (Flag("few points", "", "", "probe for longer", blocking=True),),
    "both": (
        Flag("few points", "", "", "probe for longer", blocking=True),
        Flag("time trend", "", "", "use the same data twice", blocking=True),
    ),
    "unchecked": (Flag("saturation unknown", "", "", "record it"),),
}
OPTIMIZERS = {
    "nobody": {},
    "SGD": {"optimizer": "SGD", "follows_gradients": True},
    "AdamW": {"optimizer": "AdamW", "follows_gradients": False},
    "old": {"optimizer": "SGD", "follows_gradients": None},
}
TRACES = {
    "run": {},
    "loud": {"spread": 1.1, "quantile": 0.8, "num_points": 30, "num_effective": 10.0},
    "steep": {"comparison": STEEP},
    "confirmed": {"hessian": HessianCheck(60, 0.9, (1.0, 3.0), agrees=True)},
    "scan": {"num_scans": 9, "estimator": "hessian_norm", "exponent_interval": (0.4, 1.6)},
    "acting": {"clip_mode": "clip"},
    "shadow": {"clip_mode": "shadow"},
    "AutoClip alone": {"clip_mode": "clip", "estimator": "local_clip"},
}
ANYWHERE = ("run", "scan", "acting", "shadow")
"""Traces that are tried with every optimizer; the others with SGD alone."""


def kinds(text: str, place: int) -> set[Do]:
    return {do for do, patterns in SAID.items() if re.search(patterns[place], text)}


def table():
    pairs = [(o, t) for o, t in itertools.product(OPTIMIZERS, TRACES) if o == "SGD" or t in ANYWHERE]
    for verdict, (optimizer, trace) in itertools.product(Verdict, pairs):
        possible = {Verdict.ARTEFACT: ("fatal",), Verdict.NOT_IDENTIFIED: ("none", "range", "few", "both")}
        for flags in possible.get(verdict, ("none", "unchecked")):
            fit = replace(FIT, verdict=verdict, flags=FLAGS[flags], **OPTIMIZERS[optimizer] | TRACES[trace])
            yield f"{verdict.name}, {flags}, {optimizer}, {trace}", fit


@pytest.mark.filterwarnings("ignore::smoothdiag.SmoothdiagWarning")
def test_summary_and_report_give_the_same_advice_for_every_kind_of_fit(monkeypatch) -> None:
    monkeypatch.setattr("smoothdiag.fits.plan.spread_allowed", lambda *_: 0.5)  # it takes most of the time of a plan
    seen = set()
    for name, fit in table():
        acts = {"clip": CLIPPED, "shadow": replace(CLIPPED, acts=False)}.get(fit.clip_mode)
        try:
            rule = clip_rule(fit, lr=0.1)
        except ValueError:  # a scan without constants to use
            rule = None
        plan, todo, found = fit.plan(), headline(fit).next, answer(fit, rule, acts, 0.1)
        assert kinds(todo, 0) == {plan.decision.do}, (name, todo)
        assert kinds(found.headline, 1) == {plan.decision.do}, (name, found.headline)
        assert (rule is not None and rule.source == "fit") == (plan.decision.do is Do.THRESHOLD), name
        assert todo in str(plan), name
        seen.add(plan.decision.do)
        said = " ".join(plan.advice)
        if plan.decision.do is Do.ROWS:
            assert "do not help" not in said, name
            assert "do not change that" not in said, name
        elif "few points" in {flag.name for flag in fit.flags} and "do not help" in said:
            assert "The rows are too few, too, but more rows of the same" in said, name
    assert seen == set(Do)


def test_headlines_without_numbers_are_whole_sentences() -> None:
    fit = replace(FIT, verdict=Verdict.L0L1)
    assert "give it with `--lr`" in answer(fit, None, None, 0.1).headline
    kept = replace(FIT, verdict=Verdict.NOT_IDENTIFIED, clip_mode="clip")
    assert answer(kept, None, None, 0.1).headline == "Nothing to set: AutoClip keeps the steps of this run short."
    shadow = answer(replace(kept, clip_mode="shadow"), None, replace(CLIPPED, acts=False, threshold=np.nan), 0.1)
    assert shadow.headline.endswith("would keep steps within 0.3.")


def test_pastes_agree_with_the_page_about_attaching() -> None:
    code = {snippet.framework: snippet.code for snippet in snippets(np.nan)}
    page = (REPOSITORY / "docs" / "howto" / "attach.md").read_text(encoding="utf-8")
    for said in ("sd.Probe(model, optimizer.optimizer, loss_fn", "sd.AutoClip(optimizer.optimizer, probe)"):
        assert said in code["Accelerate"]
        assert said in page
    for said in ("SmoothnessCallback(auto_clip=True).bind(trainer)", "max_grad_norm=1e30"):
        assert said in code["Hugging Face"]
        assert said in page


def test_rows_of_an_autoclip_alone_are_not_asked_for_a_default_that_they_had() -> None:
    table = TABLE.assign(estimator="local_clip", data="step")
    fit = fit_smoothness(table, num_boot=20)
    (flag,) = [flag for flag in fit.flags if flag.name == "step batch"]
    assert flag.remedy.startswith("let the probe measure by a schedule of its own")
    assert 'data="fixed"' not in fit.summary() + str(fit.plan())
    other = fit_smoothness(table.assign(estimator="local"), num_boot=20)
    assert 'Probe(data="fixed")' in other.summary()


@pytest.mark.parametrize("first", [0, 100])
def test_nobody_who_began_at_the_first_step_is_told_to(first) -> None:
    table = pd.DataFrame({"step": first + np.arange(60), "grad_norm": 1 + NORMS / 100, "smoothness": 1 + NORMS / 100})
    fit = fit_smoothness(table, num_boot=20)
    assert fit.first_step == first
    said = f"{fit.summary()} {fit.plan()}"
    assert ("from the first" in " ".join(said.split())) == (first > 0)
    assert ("sd.log_spaced()" in said) == (first == 0)


@pytest.mark.parametrize("optimizer", ["AdamW", ""])
def test_plan_of_an_optimizer_that_rescales_gradients_is_about_the_law(optimizer) -> None:
    fit = replace(FIT, verdict=Verdict.NOT_IDENTIFIED, optimizer=optimizer, follows_gradients=False)
    assert fit.plan().advice[0].startswith(f"L0 and L1 make no threshold under {optimizer or 'this optimizer'};")


@pytest.mark.parametrize(("minutes", "said"), [(1.0 / 60, "about 1 second."), (0.3 / 60, "less than a second.")])
def test_short_times_are_said_in_plain_words(minutes, said) -> None:
    fit = replace(FIT, verdict=Verdict.NOT_IDENTIFIED, flags=FLAGS["range"], row_cost=(500.0, 60 * minutes))
    assert answer(fit, None, None, 0.1).headline.endswith(said)


@pytest.mark.parametrize(("saturated", "number"), [(0.9, 2), (0.5, 1)])
def test_a_longest_step_of_saturated_measurements_is_called_a_guess(saturated, number) -> None:
    found = no_answer("too few rows", {"ok": 3}, "", replace(CLIPPED, saturated=saturated))
    assert len(found.steps) == number
    assert ("90% of AutoClip's measurements are saturated" in found.steps[-1]) == (number == 2)
