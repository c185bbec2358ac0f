"""docs/debiased.py: the figure shows that halves of a batch have no bias and that different batches are far off."""

import math
from types import ModuleType

import numpy as np
import pytest
from places import REPOSITORY
from scripts import load

pytest.importorskip("sklearn", reason="the digits are scikit-learn's")

pytestmark = pytest.mark.thorough

SCRIPT = REPOSITORY / "docs" / "debiased.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load(SCRIPT)


@pytest.fixture(scope="module")
def draws(script):
    return script.simulate(200)


def test_halves_have_no_bias_where_different_batches_are_far_off(draws, script) -> None:
    assert math.sqrt(draws.debiased_squared.mean()) == pytest.approx(draws.truth, rel=0.03)
    assert draws.debiased.mean() == pytest.approx(draws.truth, rel=0.03)
    assert draws.naive.min() > 10 * draws.truth


def test_one_batch_at_both_ends_is_somewhat_high(draws) -> None:
    standard_error = draws.same.std() / math.sqrt(len(draws.same))
    excess = draws.same.mean() - draws.truth
    assert max(3 * standard_error, 0.03 * draws.truth) < excess < 0.2 * draws.truth


def test_the_squared_gradient_norm_has_no_bias_either(script) -> None:
    # Larger halves, because gradients are noisier than their changes.
    draws = script.simulate(200, half=128)
    assert draws.squared_norm.mean() == pytest.approx(draws.grad_norm**2, rel=0.03)
    assert draws.squared_norm_same.mean() > 1.1 * draws.grad_norm**2


def test_the_figure_shows_every_draw_and_the_truth(draws, script) -> None:
    axes = script.draw_figure(draws).axes
    assert [sum(patch.get_height() for patch in ax.patches) for ax in axes] == [200, 200, 200]
    for ax in axes:
        np.testing.assert_allclose(ax.lines[0].get_xdata(), draws.truth)
    assert axes[-1].get_xlabel().endswith("[loss / parameter²]")
