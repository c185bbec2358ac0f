"""benchmarks/same: the comparison of two commits names every difference, and overlooks only time and text."""

import sys

import pytest
from places import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "benchmarks" / "same"))
from compare import differences, num_entries

RUN = {"rows": [{"step": 0, "smoothness": 1.0, "seconds": 0.1}], "model": {"weight": "(2,) torch.float32 ab"}}


def changed(**entries: object) -> dict[str, object]:
    return {"run": {**RUN, **entries}}


FOUND = {
    "last bit": ({"rows": [{"step": 0, "smoothness": 1.0000000000000002, "seconds": 0.1}]}, "/run/rows[0]/smoothness"),
    "type": ({"rows": [{"step": 0.0, "smoothness": 1.0, "seconds": 0.1}]}, "/run/rows[0]/step"),
    "missing row": ({"rows": []}, "1 entries before, 0 after"),
    "missing entry": ({"rows": [{"step": 0, "seconds": 0.1}]}, "only before"),
    "new entry": ({"error": "ValueError"}, "only after"),
    "digest": ({"model": {"weight": "(2,) torch.float32 ac"}}, "/run/model/weight"),
}


@pytest.mark.parametrize("name", FOUND)
def test_a_difference_is_named(name: str) -> None:
    entries, where = FOUND[name]
    (line,) = differences(changed(), changed(**entries))
    assert where in line


def test_time_and_text_may_differ() -> None:
    other = changed(rows=[{"step": 0, "smoothness": 1.0, "seconds": 9.0}], reason="in other words")
    assert not list(differences(changed(reason="in words"), other))
    assert num_entries(other) == 3
