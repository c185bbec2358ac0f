"""notebooks: what a notebook shows begins with the headline, cannot act as HTML, has no colours, changes nothing."""

import random
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from asserts import assert_identical, state_of
from torch import nn

import smoothdiag as sd
from smoothdiag.fits import headline
from smoothdiag.notebooks import MOST_ROWS, as_html

HOSTILE = "<script>alert('&\"')</script>\x1b[2J"
NORMS = np.logspace(-1, 1, 60)


def table(group: str = "all") -> pd.DataFrame:
    return pd.DataFrame({"grad_norm": NORMS, "smoothness": 1 + 2 * NORMS, "saturation": 0.1, "group": group})


def mean_square(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch).square().mean()


def probed(steps: int = 6) -> tuple[sd.Probe, sd.AutoClip]:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = sd.Probe(model, optimizer, mean_square, schedule=sd.every(2), estimators=[sd.LocalSmoothness()])
    clipper = sd.AutoClip(optimizer, probe)
    for batch in probe.watch(torch.randn(steps, 4, 3)):
        optimizer.zero_grad()
        mean_square(model, batch).backward()
        optimizer.step()
    return probe, clipper


@pytest.fixture(scope="module")
def shown() -> dict[str, str]:
    """What a notebook shows of one object of every kind, with hostile text wherever a user's text may come in."""
    fit = sd.fit_smoothness(table(), num_boot=20)
    groups = sd.fit_groups(pd.concat([table(HOSTILE), table("b").head(0), table("c")]), num_boot=20)
    object.__setattr__(groups, "failed", {HOSTILE + "2": HOSTILE})
    trace = sd.Trace(meta={HOSTILE: HOSTILE})
    trace.append({"step": 0, "grad_norm": 1.0, "smoothness": 2.0, "estimator": HOSTILE, HOSTILE: HOSTILE})
    probe, clipper = probed()
    probe.estimators = (HOSTILE,)  # type: ignore[assignment]
    found = {
        "fit": replace(fit, verdict_reason=HOSTILE, estimator=HOSTILE, group=HOSTILE, optimizer=HOSTILE),
        "groups": groups,
        "plan": replace(fit.plan(), advice=(HOSTILE,), next=HOSTILE),
        "clip rule": replace(sd.clip_rule(fit, lr=0.1), reason=HOSTILE, next=HOSTILE),
        "step rate": sd.StepRate(1.0, 2.0, 1.0, HOSTILE),
        "law rate": sd.LawRate(lambda norm: 1 + norm, reason=HOSTILE),
        "step rule": sd.StepRule(),
        "trace": trace,
        "probe": probe,
        "AutoClip": clipper,
    }
    return {name: value._repr_html_() for name, value in found.items()}


KINDS = ("fit", "groups", "plan", "clip rule", "step rate", "law rate", "step rule", "trace", "probe", "AutoClip")


@pytest.mark.parametrize("kind", KINDS)
def test_html_is_escaped_small_and_fits_any_theme(shown, kind) -> None:
    text = shown[kind]
    assert "<script" not in text
    assert "\x1b" not in text
    assert ("&lt;script&gt;" in text) == (kind not in ("step rule", "AutoClip"))
    assert not re.search(r"colou?r\s*[:=]|background", text, re.IGNORECASE)
    assert len(text) < 40_000
    opened, closed = re.findall(r"<([a-z]+)", text), re.findall(r"</([a-z]+)", text)
    assert sorted(tag for tag in opened if tag != "br") == sorted(closed)


@pytest.mark.parametrize("kind", KINDS)
def test_first_line_is_bold_and_the_rest_is_folded(shown, kind) -> None:
    assert re.match(r"<div><b>[^<\n]+</b><br>NEXT: [^<\n]+<details><summary>more</summary>", shown[kind]), shown[kind]


def test_a_fit_shows_its_headline() -> None:
    fit = sd.fit_smoothness(table(), num_boot=20)
    verdict, todo = headline(fit)
    assert fit._repr_html_().startswith(f"<div><b>{verdict}</b><br>{todo}<details>")


def test_a_trace_of_an_autoclip_alone_asks_for_its_figure_and_a_trace_that_was_read_names_its_file(tmp_path) -> None:
    with sd.Trace(tmp_path / "run.jsonl", meta={"gain": 1 / (1 - 0.9)}) as trace:
        trace.append({"step": 0, "grad_norm": 1.0, "smoothness": 2.0, "estimator": "local_clip"})
    back = sd.Trace.read(tmp_path / "run.jsonl")
    assert f"source={str(tmp_path / 'run.jsonl')!r}" in repr(back)
    assert "NEXT: sd.plot_clipping(trace)" in back._repr_html_()
    assert f"read from {tmp_path / 'run.jsonl'}\ngain: 10.0\n" in back._repr_html_().replace("</pre>", "\n")
    trace.append({"step": 1, "grad_norm": 1.0, "smoothness": 2.0, "estimator": "local"})
    assert "NEXT: sd.fit_smoothness(trace)" in trace._repr_html_()


def test_a_long_table_shows_its_last_rows() -> None:
    frame = pd.DataFrame({"step": range(1000, 1000 + 3 * MOST_ROWS)})
    text = as_html("head\nnext", frame)
    assert f"the last {MOST_ROWS} of {3 * MOST_ROWS} rows" in text
    assert (">1000<" in text, f">{1000 + 3 * MOST_ROWS - 1}<" in text) == (False, True)
    assert "<details>" not in as_html("head\nnext")


def test_looking_at_a_probe_in_a_running_loop_changes_nothing(monkeypatch) -> None:
    def run(*, looks: bool) -> tuple[dict, int, list[float], torch.Tensor, float]:
        torch.manual_seed(0)
        random.seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        probe = sd.Probe(model, optimizer, mean_square, schedule=sd.budget(0.5))
        clipper = sd.AutoClip(optimizer, probe)
        forwards = [0]
        model.register_forward_hook(lambda *_: forwards.__setitem__(0, forwards[0] + 1))
        for batch in probe.watch(torch.randn(6, 4, 3)):
            for value in (probe, clipper, probe.trace) if looks else ():
                before = forwards[0], torch.get_rng_state(), random.getstate()
                assert repr(value)
                assert value._repr_html_()
                assert forwards[0] == before[0]
                assert torch.equal(torch.get_rng_state(), before[1])
                assert random.getstate() == before[2]
            optimizer.zero_grad()
            mean_square(model, batch).backward()
            for value in (probe, clipper) if looks else ():
                value._repr_html_()
            optimizer.step()
        rows = [row["smoothness"] for row in probe.trace if row["estimator"] == "local_clip"]
        return state_of(model, optimizer), probe.steps, rows, torch.get_rng_state(), clipper.longest_step

    looked, plain = run(looks=True), run(looks=False)
    assert_identical(looked[0], plain[0])
    assert looked[1:3] == plain[1:3]
    assert torch.equal(looked[3], plain[3])
    assert looked[4] == plain[4]
