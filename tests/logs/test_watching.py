"""logs.watching, logs.alarms: a growing log is followed, and everything in it is said once."""

import json
import random

import pytest

from smoothdiag.cli import main
from smoothdiag.growing import changes


def lines(first, last, *, spikes=(), dead=False) -> str:
    rng = random.Random(first)
    norms = [float("nan") if dead else 40.0 if k in spikes else rng.uniform(0.9, 1.1) for k in range(first, last)]
    rows = zip(range(first, last), norms, strict=True)
    return "".join(json.dumps({"step": k, "grad_norm": g, "loss": g}) + "\n" for k, g in rows)


@pytest.fixture
def clock(monkeypatch):
    """Replaces waiting by the next of some acts; the last one stands for Ctrl-C."""

    def set_acts(*acts) -> list[float]:
        waited, left = [], list(acts)

        def sleep(seconds) -> None:
            waited.append(seconds)
            if not left:
                raise KeyboardInterrupt
            left.pop(0)()

        monkeypatch.setattr("smoothdiag.growing.time.sleep", sleep)
        return waited

    return set_acts


def named(text) -> list[tuple[str, int | None]]:
    return [(each["name"], each.get("step")) for each in map(json.loads, text.splitlines())]


def test_each_finding_comes_once_as_soon_as_the_log_shows_it(tmp_path, clock, capsys) -> None:
    log, seen = tmp_path / "log.jsonl", []

    def grow(text) -> None:
        def act() -> None:
            seen.append(named(capsys.readouterr().out))
            with log.open("a") as file:
                file.write(text)

        return act

    last = lines(70, 71)
    waited = clock(
        lambda: None,  # the run has not begun
        grow(lines(0, 40, spikes=[30])),
        grow(last[:9]),  # half a line
        grow(last[9:]),
        grow(lines(71, 75, dead=True)),
        grow(lines(75, 77, dead=True)),
        lambda: seen.append(named(capsys.readouterr().out)),
    )
    assert main(["watch", str(log), "--json", "--every", "7"]) == 0
    assert set(waited) == {7}
    spikes = [("spike-of-norm", 30), ("spike-of-loss", 30)]
    assert seen[:2] == [[], spikes]
    assert seen[2:4] == [[], []]
    assert [("dead-run", 71)] in seen[4:]
    assert sum(len(each) for each in seen) == 3


def test_log_that_is_replaced_is_read_anew(tmp_path, clock, capsys) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text(lines(0, 60, spikes=[30]))
    clock(lambda: log.write_text(lines(0, 40, spikes=[30])), lambda: None)
    assert main(["watch", str(log), "--json"]) == 0
    spikes = [("spike-of-norm", 30), ("spike-of-loss", 30)]
    assert named(capsys.readouterr().out) == [*spikes, ("log-restarted", None), *spikes]


def test_a_bad_finding_ends_it_if_asked(tmp_path, clock, capsys) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text(lines(0, 40, spikes=[30]))
    clock(lambda: log.write_text(lines(0, 40, spikes=[30]) + lines(40, 50, dead=True)))
    with pytest.raises(SystemExit) as end:
        main(["watch", str(log), "--fail-on", "error"])
    assert end.value.code == 10
    out = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in out] == ["NOTE spike-of-norm", "NOTE spike-of-loss", "ERROR dead-run"]


def test_once_and_clip_rate(tmp_path, capsys) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text(lines(0, 40))
    assert main(["watch", str(log), "--once", "--threshold", "0.5", "--threshold", "2"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("NOTE threshold-clips-most: 40 of the last 40 norms are above the threshold 0.5")
    assert main(["watch", str(tmp_path / "none.jsonl"), "--once"]) == 2
    assert "should be a log that exists" in capsys.readouterr().err
    assert main(["watch", str(log), "--every", "0"]) == 2
    assert "`--every` should be positive. Found 0." in capsys.readouterr().err


def test_what_cannot_be_read_yet_is_said_once(tmp_path, clock, capsys) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1}\n')
    clock(lambda: log.write_text('{"step": 1}\n{"step": 2}\n'), lambda: log.write_text(lines(0, 40, spikes=[30])))
    assert main(["watch", str(log)]) == 0
    captured = capsys.readouterr()
    assert captured.err.count("cannot be read yet") == 1
    assert captured.out.count("spike-of") == 2


def test_following_ends_after_its_time(tmp_path, monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr("smoothdiag.growing.time.monotonic", lambda: now[0])
    monkeypatch.setattr("smoothdiag.growing.time.sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    path = tmp_path / "log"
    path.write_text("a")
    assert len(list(changes([path], 10, lasts=25))) == 1
    assert now[0] == 25
