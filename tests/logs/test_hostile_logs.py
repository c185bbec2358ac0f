"""logs.reading: a hostile log loses an entry or gets an error in the package's own words."""

import contextlib
import gzip
import random

import pytest

from smoothdiag import SmoothdiagWarning, read_log, review_log

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


@pytest.mark.parametrize("line", [b"step 1 loss 2.0\n", b"1,2\n", b"a", b"\0"])
def test_a_bomb_is_refused(tmp_path, line) -> None:
    with gzip.open(tmp_path / "log.csv.gz", "wb") as file:
        for _ in range(70):
            file.write(line * ((1 << 20) // len(line)))
    with pytest.raises(ValueError, match=r"log.csv.gz` should unpack to at most 100 times its size.*as in a bomb"):
        read_log(tmp_path / "log.csv.gz")


def test_a_line_without_end_is_refused(tmp_path) -> None:
    (tmp_path / "log").write_text("step 1 loss 2 " + "x" * (17 << 20))
    with pytest.raises(ValueError, match="should have lines of at most 16 million characters"):
        read_log(tmp_path / "log")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"PAR1\x15\x04", "a Parquet table"),
        (b"PK\x03\x04", "a zip archive"),
        (b":W&B\x00", "export the run as CSV"),
        (b"SQLite format 3\x00", "a database, as MLflow"),
        (bytes(range(1, 32)) * 50, "bytes that are no text"),
        (b"loss " * 100_000, "Found no entry"),
        (b"{[" * 100_000, "Found no entry"),
    ],
)
def test_what_is_no_text_is_refused_by_what_it_is(tmp_path, data, message) -> None:
    (tmp_path / "log").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_log(tmp_path / "log")


def test_zero_bytes_of_a_crash_are_left_out_and_said(tmp_path) -> None:
    (tmp_path / "log").write_bytes(b"step 1 grad_norm 2\n" + b"\0" * 5000 + b"step 2 grad_norm 3\n")
    with pytest.warns(SmoothdiagWarning, match="5000 zero bytes are left out"):
        assert [row["step"] for row in read_log(tmp_path / "log")] == [1, 2]


@pytest.mark.filterwarnings("ignore::smoothdiag.SmoothdiagWarning")
@pytest.mark.parametrize("seed", range(60))
def test_no_text_ends_in_a_bare_exception(tmp_path, seed) -> None:
    rng = random.Random(seed)
    marks = 'step 10 | loss: 2.5 | grad_norm=1.0, {"loss": 2.0, "step": 3}\nepoch 1,lr 1e-3\n\x1b[31m[\u0664;]nan\r'
    path = tmp_path / f"log{rng.choice(['.log', '.csv', '.jsonl', '.json', '', '.tsv'])}"
    path.write_text("".join(rng.choice(marks) for _ in range(rng.randint(1, 400))))
    with contextlib.suppress(ValueError):
        review_log(read_log(path)).summary()
