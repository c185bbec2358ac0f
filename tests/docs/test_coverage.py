"""docs/coverage.py: intervals hold the truth as often as they claim where resampling single rows fails."""

import pytest
from places import REPOSITORY
from scripts import load

pytestmark = pytest.mark.thorough

SCRIPT = REPOSITORY / "docs" / "coverage.py"
LEAST, MOST = 0.82, 0.97  # Around a level of .9.


@pytest.fixture(scope="module")
def study():
    return load(SCRIPT)


def hits(study, case, repetitions=20, num_boot=60):
    ends = [study.trial(case, num_boot, seed) for seed in range(repetitions)]
    truth = (*case.truth, float(study.safe_threshold(*case.truth, study.rate(case))))
    return [[sum(one[way][k][0] <= truth[k] <= one[way][k][1] for one in ends) for k in range(3)] for way in (0, 1)]


def test_persistent_noise_is_covered_by_blocks_and_missed_by_rows_one_by_one(study):
    plain, fitted = hits(study, study.Case(200, 0.8))
    assert min(fitted) >= 15  # 90% of 20 is 18; intervals half as wide hold L1 14 times.
    assert max(plain) < 15


def test_independent_noise_is_covered(study):
    assert min(hits(study, study.Case(200))[1]) >= 15


@pytest.mark.slow
@pytest.mark.parametrize("num_steps", [200, 1000])
@pytest.mark.parametrize("noise", [0.0, 0.8])
def test_coverage_is_that_of_the_page(study, num_steps, noise):
    table = study.coverage(study.Case(num_steps, noise), 300)
    held = table.loc["as fitted", [f"{name} held" for name in study.NAMES]]
    assert ((held >= LEAST) & (held <= MOST)).all(), held
    if noise:
        assert (table.loc["rows one by one", ["L0 held", "L1 held"]] < LEAST).all()
