"""docs/edge_of_stability.py: the figure shows sharpness that rises to the limit of stability and stays there."""

from types import ModuleType

import numpy as np
import pytest
from places import REPOSITORY
from scripts import load

pytest.importorskip("sklearn", reason="the digits are scikit-learn's")

pytestmark = pytest.mark.thorough

SCRIPT = REPOSITORY / "docs" / "edge_of_stability.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load(SCRIPT)


def test_sharpness_of_gradient_descent_rises_to_its_limit_and_stays(script) -> None:
    trace = script.simulate("SGD", num_steps=700)
    found = script.in_the_end(trace)
    first = trace[trace["estimator"] == "sharpness"].iloc[0]
    assert first["smoothness"] < 0.75 * first["stability_limit"]
    assert set(found) == {"sharpness", "batch_sharpness", "critical_step"}
    for name, ratio in found.items():
        assert np.median(ratio) == pytest.approx(1, abs=0.06), name


@pytest.mark.slow
def test_table_and_figure_have_every_optimizer_at_its_limit(script) -> None:
    traces = {name: script.simulate(name) for name in script.OPTIMIZERS}
    for name, trace in traces.items():
        assert np.median(script.in_the_end(trace)["sharpness"]) == pytest.approx(1, abs=0.06), name
    lines = script.table(traces).splitlines()[2:]
    assert [line.split(" | ")[1] for line in lines] == ["2/lr = 4", "3.8/lr = 7.6", "38/lr = 3800"]
    panels = script.draw_figure(traces).axes
    assert [ax.get_title() for ax in panels] == list(traces)
