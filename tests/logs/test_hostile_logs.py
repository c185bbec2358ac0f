"""logs.reading: a hostile log loses an entry or gets an error in the package's own words."""

import pytest

from smoothdiag import SmoothdiagWarning, read_log

HEAD = "step,grad_norm\n1,0.5\n"
LEFT_OUT = {
    "a step of 20 digits": ("log.csv", f"{HEAD}{10**20 - 1},0.6\n", "1 value is left out.*step 1e.20 in `step`"),
    "brackets without end": (
        "log.jsonl",
        '{"step": 1, "grad_norm": 0.5}\n' + "[" * 100_000 + "\n",
        "1 line is left out",
    ),
    "a terminal's escape": ("log.csv", f"{HEAD}2,\x1b[2J\n", r"the first is '\\x1b\[2J' in `grad_norm`"),
}


@pytest.mark.parametrize(("name", "text", "match"), LEFT_OUT.values(), ids=LEFT_OUT.keys())
def test_one_absurd_entry_costs_no_other(tmp_path, name, text, match) -> None:
    (tmp_path / name).write_text(text)
    with pytest.warns(SmoothdiagWarning, match=match):
        assert [row["step"] for row in read_log(tmp_path / name)] == [1]


REFUSED = {
    "brackets alone": ("log.json", "[" * 100_000),
    "names without end": ("log.json", '{"a": ' * 900 + "1" + "}" * 900),
    "a cell without end": ("log.csv", "a" * 200_000 + "\n"),
}


@pytest.mark.parametrize(("name", "text"), REFUSED.values(), ids=REFUSED.keys())
def test_a_log_of_nothing_else_is_refused_by_name(tmp_path, name, text) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=name):
        read_log(tmp_path / name)


@pytest.mark.parametrize("end", ["\r", "\r\n", "\n"])
def test_any_line_end_will_do(tmp_path, end) -> None:
    (tmp_path / "log.csv").write_bytes((HEAD + "2,0.6\n").replace("\n", end).encode())
    assert [row["step"] for row in read_log(tmp_path / "log.csv")] == [1, 2]
