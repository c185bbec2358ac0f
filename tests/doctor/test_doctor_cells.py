"""doctor: a table of frameworks, faults and places; each cell is a script that the doctor judges."""

import pytest
from asserts import assert_identical, state_of
from cells import FRAMEWORKS, cells


@pytest.mark.filterwarnings("ignore:.*is an empty generator")
@pytest.mark.parametrize("cell", [
    pytest.param(each, id=each.title, marks=[pytest.mark.slow] if each.path.stem in FRAMEWORKS else [])
    for each in cells()
])  # fmt: skip
def test_planted_faults_are_found_and_nothing_else_and_the_run_stays_the_same(cell) -> None:
    found, names = cell.judge()
    assert cell.complaint(found) == ""
    if not cell.planted:
        assert_identical(state_of(names["model"]), state_of(cell.run()["model"]))


def test_table_has_forty_scripts_of_each_kind() -> None:
    faulty = sum(bool(each.planted) for each in cells())
    assert faulty >= 40
    assert len(list(cells())) - faulty >= 40
