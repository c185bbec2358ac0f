"""benchmarks/frameworks: in Lightning, automatic thresholds end near the best fixed one."""

import importlib
import math
import sys
from dataclasses import replace

import pytest
from places import REPOSITORY

pytestmark = pytest.mark.thorough

FOLDER = REPOSITORY / "benchmarks" / "frameworks"


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("lightning_run")
    sys.path.remove(str(FOLDER))


@pytest.mark.filterwarnings("ignore")
def test_the_script_judges_what_it_trains(script) -> None:
    task = script.TASKS["digits"]()
    judged = [[part[i] for i in range(64)] for part in (task.training, task.held_out)]
    small = replace(task, training=judged[0], held_out=judged[1], epochs=4)
    for found in script.train(small, 1.0, 1e-9):
        assert found == pytest.approx(math.log(10), rel=0.1), "has learned nothing"
    assert script.train(small, 1.0, None)[0] < math.log(10) - 0.2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_automatic_thresholds_end_within_five_percent_of_the_best_where_one_diverges(script) -> None:
    task = script.characters()
    fixed = {threshold: script.train(task, 16.0, threshold) for threshold in script.THRESHOLDS}
    automatic = script.train(task, 16.0, None)
    for i, found in enumerate(automatic):
        assert fixed[1.0][i] > math.log(96), "diverged: worse than knowing nothing"
        assert found < 1.05 * min(losses[i] for losses in fixed.values())
