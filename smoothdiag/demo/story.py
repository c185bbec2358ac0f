"""The demo's story: does a law hold, what does clipping do for a rate that is too large, which threshold to paste."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from smoothdiag.clipping import clip_rule
from smoothdiag.console import one_line
from smoothdiag.demo.figures import save_curves, save_smoothness
from smoothdiag.demo.language import Corpus, standard_library_text
from smoothdiag.demo.law import L0, L1, scanned_landscape, scanned_regression, what_follows
from smoothdiag.demo.training import AUTO, NOTHING, TAIL, USUAL, Run, train
from smoothdiag.fits import fit_smoothness, headline
from smoothdiag.report.page import write_report
from smoothdiag.trace import Trace


def run_demo(text: str | None, steps: int, out: Path, device: torch.device, *, lr: float) -> None:
    """Runs the demo and leaves traces, figures, summary.txt and, where reports can be made, report.html in ``out``."""
    began = time.perf_counter()
    if device.type == "cpu":
        torch.set_num_threads(1)  # no slower at this size, and the losses do not depend on the number of cores
    out.mkdir(parents=True, exist_ok=True)
    corpus = Corpus.from_text(standard_library_text() if text is None else text)
    told: list[str] = []

    def tell(*lines: str) -> None:
        told.extend(lines)
        print("\n".join(lines), flush=True)

    tell(
        "Three parts: two scans, three training runs, a threshold. About a minute on two idle cores.",
        f"Text: {len(corpus.codes):,} characters, {corpus.vocabulary} different ones. Device: {device}.",
        "",
        "1. DOES SMOOTHNESS GROW WITH THE GRADIENT NORM? A scan measures around the weights and trains nothing.",
        f"First where the answer is known: on the landscape of `problems.exponential`, L0 is {L0:g} and L1 is {L1:g}.",
    )
    with Trace(out / "landscape.jsonl", meta={"demo": "landscape"}) as known:
        law = scanned_landscape(known)
    save_smoothness(known, law, f"{law.verdict.name}: a landscape with the law", out / "landscape.png")
    tell(
        *headline(law),
        what_follows(law),
        "Then where it is not known: softmax regression.",
    )
    with Trace(out / "regression.jsonl", meta={"demo": "regression"}) as scanned:
        other = scanned_regression(corpus, scanned)
    save_smoothness(scanned, other, f"{other.verdict.name}: softmax regression", out / "regression.png")
    tell(*headline(other), f"WHY: {other.verdict_reason}", what_follows(other), "")
    tell(
        f"2. A RATE THAT IS TOO LARGE. A character LSTM, plain SGD at lr = {lr:g}, {steps} steps from one seed, three "
        "ways to clip.",
        "AutoClip gets no setting: it measures in the first thirty steps how long a step may be.",
    )
    runs = {arm: train(corpus, steps, device, lr=lr, arm=arm) for arm in (NOTHING, USUAL)}
    meta = {"demo": "training", "lr": lr, "momentum": 0.0, "steps": steps, "torch": torch.__version__}
    with Trace(out / "training.jsonl", meta=meta) as rows:
        runs[AUTO] = train(corpus, steps, device, lr=lr, arm=AUTO, trace=rows)
    save_curves(runs, lr, math.log(corpus.vocabulary), out / "curves.png")
    tell(*table(runs, corpus.vocabulary), "")
    tell("3. A THRESHOLD FOR OTHER RUNS OF THIS KIND", *paste(runs[AUTO], lr), "")
    fit = fit_smoothness(rows)
    save_smoothness(rows, fit, f"{fit.verdict.name}: the rows of the run with AutoClip", out / "training.png")
    tell("And the run itself, does it show a law? The probe measured smoothness beside it:", *headline(fit))
    tell(f"WHY: {fit.verdict_reason}", "")
    names = ("landscape", "regression", "training")
    files = [*(f"{name}.jsonl" for name in names), *(f"{name}.png" for name in (*names, "curves")), "summary.txt"]
    write_report({name: out / f"{name}.jsonl" for name in names}, out / "report.html")
    files.append("report.html")
    details = [str(clip_rule(fit, lr=lr))]
    for name, found in zip(names, (law, other, fit), strict=True):
        details += ["", f"THE FIT OF {name}.jsonl", found.summary()]
    (out / "summary.txt").write_text("\n".join([*told, *details, ""]), encoding="utf-8")
    seconds = time.perf_counter() - began
    print(f"Written to {one_line(out)}/ in {seconds:.0f} seconds: {', '.join(files)}. Begin with {files[-1]}.")


def table(runs: Mapping[str, Run], vocabulary: int) -> list[str]:
    """Returns the losses of all runs, a line each, and what they do not show."""
    head = f"{'clipping':<44}{f'loss, last {TAIL} steps':>22}{'held-out loss':>16}"
    lines = [head]
    for name, run in runs.items():
        found = f"{name}, which found max_norm = {run.threshold:.3g}" if name == AUTO else name
        lines.append(f"{found:<44}{run.last:>22.3f}{run.held_out:>16.3f}")
    lines.append(f"In nats per character; guessing is {math.log(vocabulary):.2f}.")
    lines.append(
        "One seed at one rate is no evidence: docs/autoclip.md has thirty tasks, and where AutoClip does badly."
    )
    return lines


def paste(run: Run, lr: float) -> list[str]:
    """Returns what AutoClip said, and its threshold as lines of code."""
    lines = run.said.split("\n")
    if not math.isfinite(run.threshold):
        return lines
    value = f"{run.threshold:.3g}"
    return [
        *lines[:2],
        "This run needs nothing more, because AutoClip clips it. A like run by plain SGD without it may clip at:",
        f"  torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm={value})  # at lr={lr:g}",
        f'  TrainingArguments(max_grad_norm={value}, optim="sgd")  # Hugging Face; under its AdamW, none follows',
        f"  Trainer(gradient_clip_val={value})                  # Lightning",
        f"WHY: {lines[2]}",
    ]
