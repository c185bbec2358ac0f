"""benchmarks/stability.py: the table on the page is that of the stored runs, and a run has both limits."""

import json

import pytest
from places import REPOSITORY
from scripts import load

pytest.importorskip("sklearn", reason="the digits are scikit-learn's")

SCRIPT = REPOSITORY / "benchmarks" / "stability.py"


def test_the_table_on_the_page_is_that_of_the_stored_runs(tmp_path) -> None:
    script = load(SCRIPT)
    stored, page = REPOSITORY / "benchmarks" / "stability.json", REPOSITORY / "docs" / "curvature.md"
    copy = tmp_path / "page.md"
    copy.write_text(page.read_text())
    script.write_table(copy, script.table(json.loads(stored.read_text())["runs"]))
    assert copy.read_text() == page.read_text()


def test_without_noise_batch_sharpness_and_mean_curvature_are_one_number() -> None:
    script = load(SCRIPT)
    (setting,) = (s for s in script.SETTINGS if s.batch is None and s.momentum)
    found = script.run(setting, seed=0, num_steps=10)
    assert found["batch_sharpness"] == pytest.approx(found["mean_curvature"], rel=1e-4)
    assert (found["full_limit"], found["small_limit"]) == pytest.approx((3.8 / 0.5, 0.2 / 0.5))
    assert "SGD, momentum 0.9, lr 0.5 | all | 7.6 | 0.4" in script.table([found])
