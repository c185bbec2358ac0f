"""benchmarks/probe_overhead.py: figures are counted right, and pages hold what the file of results holds."""

import json
import math
import sys

import pytest
import torch
from places import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "benchmarks"))
import probe_overhead
from overhead.clock import take_turns
from overhead.counting import peak
from overhead.loops import PATH, SIX_TENSORS, Loop
from overhead.paper import gibibytes
from overhead.table import Row, filled, read, write

CPU = torch.device("cpu")
RESULTS = REPOSITORY / "benchmarks" / "overhead" / "results.json"


def test_the_peak_is_what_is_held_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    def call() -> None:
        one = torch.ones(1000)
        two = one + one
        del one
        two.clone()

    assert peak(call, CPU) == pytest.approx(8000, abs=256)  # memory comes in multiples of 64 bytes


def test_a_row_of_values_holds_its_quartiles_and_a_verdict() -> None:
    row = Row.of("what", 1.0, 3.0, [1.0, 2.0, 3.0, 4.0, 5.0])
    assert (row.least, row.figure, row.most, row.verdict) == (2.0, 3.0, 4.0, "met")
    assert Row("what", 1.0, 2.9, 3.0).verdict == "missed"
    assert Row("what", 1.0, 3.0, math.nan).verdict == Row("what", 1.0, math.nan, 3.0).verdict == ""


def test_rows_come_back_from_their_file(tmp_path) -> None:
    rows = [Row("a", 1.0, math.nan, 2.0, part="copies"), Row.of("b", 1.0, 2.0, [1.0, 3.0])]
    write(tmp_path / "rows.json", rows, {"commit": "abc"})
    found, about = read(tmp_path / "rows.json")
    assert repr(found) == repr(rows)
    assert about == {"commit": "abc"}


def test_turns_rotate() -> None:
    order = list[str]()
    take_turns({name: lambda name=name: order.append(name) for name in "abc"}, 3, CPU, warm_up=1)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"


def test_backward_passes_of_the_probe_are_those_that_its_rows_count() -> None:
    loop = Loop(SIX_TENSORS, CPU, PATH)
    loop.step()
    before = loop.backward_passes
    loop.step()
    assert loop.backward_passes - before == loop.probe.trace[-1]["num_grads"] == 3


def test_another_commit_does_not_mix_with_rows_of_the_file(tmp_path) -> None:
    out = tmp_path / "rows.json"
    probe_overhead.measured(["waits"], CPU, True, out)
    kept = json.loads(out.read_text())
    assert {row["part"] for row in kept["rows"]} == {"waits"}
    kept["environment"]["commit"] = "other"
    out.write_text(json.dumps(kept))
    with pytest.raises(SystemExit, match="measured elsewhere, at other"):
        probe_overhead.measured(["waits"], CPU, True, out)


@pytest.mark.parametrize("page", ["docs/cost.md", "benchmarks/README.md"])
def test_pages_hold_what_the_file_holds(page: str) -> None:
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    assert filled(text, probe_overhead.blocks(RESULTS)) == text
    assert "by probe_overhead.py" in text


def test_every_part_has_a_row_in_a_full_file() -> None:
    rows, about = read(RESULTS)
    parts = {row.part for row in rows}
    assert parts <= set(probe_overhead.PARTS)
    assert about["quick"] or parts == set(probe_overhead.PARTS)


def test_seven_billion_weights_are_arithmetic() -> None:
    assert gibibytes(2.0, 4) == 2 * 7e9 * 4 / 8 / 2**30
