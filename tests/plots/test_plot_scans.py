"""plots: figures of a scan name lines and distance where those of a run name steps."""

import numpy as np
import pytest
from scans import linear, scanned

import smoothdiag as sd

pytestmark = pytest.mark.usefixtures("no_figure_left_open")


@pytest.fixture(scope="module")
def fit() -> sd.SmoothnessFit:
    return sd.fit_smoothness(scanned(linear), num_boot=60)


def test_points_have_the_colour_of_their_distance(fit: sd.SmoothnessFit) -> None:
    frame = scanned(linear)
    ax = sd.plot_smoothness(frame, fit=fit)
    shades = np.sort(np.concatenate([c.get_array() for c in ax.collections if c.get_array() is not None]))
    assert np.allclose(shades[-3:], np.sort(frame["distance"])[-3:])
    (bar,) = [one for one in ax.child_axes if one.get_ylabel()]
    assert bar.get_ylabel() == "distance from the start [parameter]"
    assert ax.get_legend().get_title().get_text() == "L0L1: L0 and L1 can be used"


def test_rivals_are_scored_on_lines_left_out(fit: sd.SmoothnessFit) -> None:
    panels = sd.plot_fit(fit, scanned(linear))
    assert panels[3].get_xlabel().startswith("skill on lines left out")
    assert [label.get_text() for label in panels[3].get_yticklabels()][-2:] == ["distance", "loss gap"]


def test_a_single_descent_is_drawn(fit: sd.SmoothnessFit) -> None:
    frame = scanned(linear, names=("descent",))
    found = sd.fit_smoothness(frame)
    panels = sd.plot_fit(found, frame)
    assert "not scored" in {text.get_text() for text in panels[3].texts}
    sd.plot_smoothness(frame, fit=found)
