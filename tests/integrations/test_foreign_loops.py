"""integrations: loops in the style of well-known ones take a probe in few lines, and stay the same bit for bit."""

import inspect
import math
import os
import textwrap
from typing import Any

import foreign_loops
import pytest
import torch
from asserts import assert_identical, state_of
from foreign_loops import LOOPS, STEPS
from places import REPOSITORY

from smoothdiag import StepRule

pytestmark = pytest.mark.thorough

PAGE = REPOSITORY / "docs" / "loops.md"
BEGIN, END = "<!-- begin: table by tests/integrations/test_foreign_loops.py -->", "<!-- end -->"
RETURNS_LOSS = {"nanoGPT", "minGPT", "GPT with Muon and AdamW", "Accelerate", "x-transformers"}


def run(name: str, lr: float, *marks: str, **clip: Any) -> Any:
    """Runs a loop with the lines of these marks alone."""
    function = LOOPS[name][0]
    kept = [
        line
        for line in textwrap.dedent(inspect.getsource(function)).splitlines()
        if not line.endswith(("# smoothdiag", "# clip")) or line.endswith(marks or ("no mark",))
    ]
    names = dict(vars(foreign_loops))
    exec("\n".join(kept), names)
    torch.manual_seed(0)
    return names[function.__name__](lr, clip)


def left(found: Any) -> dict[str, Any]:
    optimizers = getattr(found, "optimizers", None) or [found.optimizer]
    state = state_of(found.model) | {f"loss {k}": loss for k, loss in enumerate(found.losses)}
    for k, optimizer in enumerate(optimizers):
        for i, kept in enumerate(getattr(optimizer, "optimizer", optimizer).state.values()):
            plain = {n: v for n, v in kept.items() if not isinstance(v, list)}  # of LBFGS, the last steps as lists
            state |= {f"{k} {i} {n}": v.clone() if isinstance(v, torch.Tensor) else v for n, v in plain.items()}
    return state | {f"norm {k}": norm for k, norm in enumerate(found.norms)}


def measured(name: str) -> str:
    """Runs one loop in all ways, and returns its line of the table."""
    lr, large = LOOPS[name][1:]
    expected = left(run(name, lr))
    probed = run(name, lr, "# smoothdiag")
    assert_identical(left(probed), expected)
    rows = probed.probe.trace.to_frame().query("estimator == 'path'")
    assert len(rows) == STEPS
    assert rows.grad_norm.tolist() == pytest.approx(probed.norms, rel=1e-5)
    statuses = rows.status.value_counts().sort_index()
    shown = ", ".join(f"{number} `{status}`" for status, number in statuses.items())
    source = inspect.getsource(LOOPS[name][0]).splitlines()
    lines = sum(line.endswith("# smoothdiag") for line in source)
    if name in RETURNS_LOSS:
        assert lines == 1
    if name == "LBFGS":
        with pytest.raises(ValueError, match="evaluate its closure once"):
            run(name, lr, "# smoothdiag", "# clip")
        return f"| {name} | {lines} | {shown} | refused: LBFGS searches along a line |"
    shadow = run(name, lr, "# smoothdiag", "# clip", mode="shadow")
    assert_identical(left(shadow), expected)
    clipped = run(name, large, "# smoothdiag", "# clip", rule=StepRule(None, 0.02))
    share = clipped.clipper.clip_fraction
    assert share > 0
    assert math.isfinite(clipped.losses[-1])
    return f"| {name} | {lines} | {shown} | shadow: the same bits; at {large:g}: {share:.0%} of steps clipped |"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_takes_a_probe_and_stays_the_same(name: str) -> None:
    line = measured(name)
    page = PAGE.read_text(encoding="utf-8")
    if os.environ.get("SMOOTHDIAG_WRITE"):
        before = page.partition(BEGIN)[2].partition(END)[0]
        others = [each for each in before.splitlines() if each and not each.startswith(f"| {name} |")]
        page = page.replace(before, "\n".join(["", *others, line, ""]))
        PAGE.write_text(page, encoding="utf-8")
    assert line in page.splitlines()
