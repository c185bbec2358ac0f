"""integrations: loops in the style of well-known ones take a probe in few lines, and stay the same bit for bit."""

import functools
import inspect
import math
import os
import textwrap
import warnings
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import foreign_loops
import pytest
import torch
from asserts import assert_identical, state_of
from foreign_loops import LOOPS, STEPS
from places import REPOSITORY
from torch.utils import _pytree as pytree

import smoothdiag as sd

pytestmark = [pytest.mark.thorough, pytest.mark.filterwarnings("ignore")]

PAGE = REPOSITORY / "docs" / "loops.md"
MARKS = PROBE, CLIP, CLIP_D = "  # smoothdiag", "  # clip", "  # clip D"
RETURNS_LOSS = {"nanoGPT", "minGPT", "GPT with Muon and AdamW", "Accelerate", "x-transformers"}
AUTOCLIP = [name for name in LOOPS if name != "LBFGS"]
USABLE = {"ok", "rounding_limited", "saturated"}
"""Statuses of the rows. How many rows have which one may depend on the processor."""


def source(name: str) -> list[str]:
    return inspect.getsource(LOOPS[name][0]).splitlines()


def added(name: str, *marks: str) -> int:
    return sum(line.endswith(marks) for line in source(name))


def own_norm(name: str) -> float:
    """Returns the norm at which the loop itself clips; infinity if it does not clip."""
    found = inspect.signature(LOOPS[name][0]).parameters.get("max_norm")
    return math.inf if found is None else found.default


def run(name: str, lr: float, *marks: str, clips: bool = True, every: int = 1, **options: Any) -> Any:
    """Runs a loop with the lines of these marks alone.

    Args:
        name: Name of the loop.
        lr: Its learning rate.
        *marks: The marks of the lines that stay.
        clips: Whether the loop's own clipping is on, if it has any.
        every: Steps from one measurement of the probe to the next.
        **options: For AutoClip, beside what the loop gives.
    """
    function = LOOPS[name][0]
    kept = [line for line in source(name) if not line.endswith(MARKS) or line.endswith(marks or ("no mark",))]
    autoclip = functools.partial(sd.AutoClip, **options)
    library = SimpleNamespace(Probe=sd.Probe, every=lambda n: sd.every(n * every), AutoClip=autoclip)
    names = vars(foreign_loops) | {"sd": library}
    exec(textwrap.dedent("\n".join(kept)), names)
    torch.manual_seed(0)
    return names[function.__name__](lr, **({} if clips or math.isinf(own_norm(name)) else {"max_norm": math.inf}))


def left(found: Any) -> dict[str, Any]:
    """Returns all that a loop leaves, but for what smoothdiag has added."""
    things = {name: each for name, each in vars(found).items() if not name.startswith(("probe", "clipper"))}
    things |= {f"optimizers {k}": each for k, each in enumerate(things.get("optimizers", ()))}
    logged = {name: things[name] for name in ("losses", "losses_g", "norms") if name in things}
    states = {n: t.state_dict() for n, t in things.items() if hasattr(t, "state_dict") and not inspect.isclass(t)}
    leaves, _ = pytree.tree_flatten_with_path(logged | states)
    return state_of(found.model) | {pytree.keystr(path): leaf for path, leaf in leaves}


def said(caught: Sequence[warnings.WarningMessage]) -> list[str]:
    return [str(each.message) for each in caught if issubclass(each.category, sd.SmoothdiagWarning)]


def section(name: str, lines: Sequence[str] | None = None) -> list[str]:
    """Returns the lines of a section of the page; replaces them first, if asked to."""
    head, begin, rest = PAGE.read_text(encoding="utf-8").partition(f"<!-- begin: {name} -->\n")
    body, end, tail = rest.partition("<!-- end -->\n")
    if lines is not None and os.environ.get("SMOOTHDIAG_WRITE"):
        body = "".join(f"{line}\n" for line in lines)
        PAGE.write_text(head + begin + body + end + tail, encoding="utf-8")
    return body.splitlines()


def row(table: str, *cells: str) -> list[str]:
    """Returns the cells of a loop in a table of the page; replaces them first, if asked to."""
    rows = {line.split("|")[1].strip(): line for line in section(table)}
    found = section(table, list((rows | {cells[0]: f"| {' | '.join(cells)} |"}).values()))
    (line,) = (line for line in found if line.startswith(f"| {cells[0]} |"))
    return [cell.strip() for cell in line.split("|")[1:-1]]


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_takes_a_probe_and_stays_the_same(name: str) -> None:
    lr = LOOPS[name][1]
    expected = run(name, lr)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        probed = run(name, lr, PROBE)
    assert_identical(left(probed), left(expected))
    assert not said(caught)
    if math.isfinite(own_norm(name)):
        assert max(probed.norms) > own_norm(name)  # its own clipping has acted
    rows = probed.probe.trace.to_frame().query("estimator == 'path'")
    assert len(rows) == STEPS
    assert rows.grad_norm.tolist() == pytest.approx(probed.norms, rel=1e-5)
    statuses = rows.status.value_counts().sort_index()
    assert set(statuses.index) <= USABLE
    lines = added(name, PROBE)
    assert (lines == 1) == (name in RETURNS_LOSS)
    shown = ", ".join(f"{number} `{status}`" for status, number in statuses.items())
    page = row("probe", name, str(lines), shown)
    assert page[:2] == [name, str(lines)]


@pytest.mark.parametrize("name", AUTOCLIP)
def test_autoclip_in_shadow_mode_leaves_a_loop_the_same(name: str) -> None:
    lr = LOOPS[name][1]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        shadow = run(name, lr, *MARKS, mode="shadow")
    assert_identical(left(shadow), left(run(name, lr)))
    # It notices where the loop clips by itself.
    assert len(said(caught)) == math.isfinite(own_norm(name))
    assert all("Something else seems to clip first" in text for text in said(caught))


@pytest.mark.parametrize("name", AUTOCLIP)
def test_autoclip_by_its_default_rule_holds_a_loop_at_a_large_rate(name: str) -> None:
    lr, large = LOOPS[name][1:]
    fair, without = run(name, lr).losses[-1], run(name, large).losses[-1]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        clipped = run(name, large, *MARKS, clips=False, every=STEPS)
    held = clipped.losses[-1]
    assert not without < 4 * held  # a NaN is no success either
    assert held < 1.05 * fair
    assert min(clipped.norms) > 0.05  # it is not stuck either
    clippers = [each for each in vars(clipped).values() if isinstance(each, sd.AutoClip)]
    assert [each.clip_fraction for each in clippers] == [1] * (2 if name == "DCGAN" else 1)
    assert not said(caught)
    norm, lines = own_norm(name), added(name, CLIP, CLIP_D)
    assert lines == (7 if name == "DCGAN" else 1)
    exact = [name, f"{norm:g}" if math.isfinite(norm) else "no", str(lines), f"{lr:g}", f"{large:g}"]
    page = row("AutoClip", *exact, *(f"{loss:.3g}" for loss in (fair, without, held)))
    assert page[:5] == exact
    # A run that diverges may end elsewhere on another processor.
    assert [float(page[5]), float(page[7])] == pytest.approx([fair, held], rel=0.05)
    assert float(page[6]) > 4 * float(page[7])


def test_each_optimizer_of_a_gan_needs_its_autoclip_at_a_large_rate() -> None:
    large = LOOPS["DCGAN"][2]
    generator_alone = run("DCGAN", large, PROBE, CLIP, every=STEPS)
    assert generator_alone.losses[-1] > 100
    discriminator_alone = run("DCGAN", large, PROBE, CLIP_D, every=STEPS)
    assert discriminator_alone.losses[-1] < 2
    assert max(discriminator_alone.norms[1:]) < 1e-3  # of the generator, which is stuck where its outputs are -1 or 1


def test_autoclip_refuses_an_optimizer_that_searches_along_a_line() -> None:
    with pytest.raises(ValueError, match="evaluate its closure once"):
        run("LBFGS", LOOPS["LBFGS"][1], *MARKS)


@pytest.mark.parametrize("name", ["nanoGPT", "DCGAN"])
def test_the_page_shows_a_loop_as_it_runs(name: str) -> None:
    lines = [f"+{line.rpartition('  #')[0]}" if line.endswith(MARKS) else f" {line}".rstrip() for line in source(name)]
    expected = ["```diff", *lines, "```"]
    assert section(name, expected) == expected
