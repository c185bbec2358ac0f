"""logs: habits of trainers that hide the step, the loss or the run from a reader of usual names."""

import json

import pytest

from smoothdiag import read_log

STEPS = range(4, 80, 4)


def rows(path, text: str, **options: str) -> list[tuple[int, float, float]]:
    path.write_text(text)
    return [(row["step"], row["grad_norm"], row["loss"]) for row in read_log(path, **options)]


WANTED = [(n, n / 8, 9 - n / 16) for n in STEPS]


@pytest.mark.parametrize("other", ["train/Z loss", "train/load balancing loss", "train/router/aux loss"])
def test_the_loss_of_a_block_is_no_loss_beside_it(tmp_path, other) -> None:
    blocks = [
        f"INFO [step={n}/900]\n    grad norm={norm}\n    train/CE loss={loss}\n    {other}=0.002\n"
        for n, norm, loss in WANTED
    ]
    assert rows(tmp_path / "a.log", "".join(blocks)) == WANTED


@pytest.mark.parametrize("name", ["global_step/max_steps", "step", "current_steps"])
def test_a_counter_with_its_total_as_text_is_a_step(tmp_path, name) -> None:
    lines = [json.dumps({name: f"{n}/900", "grad_norm": norm, "loss": loss}) + "\n" for n, norm, loss in WANTED]
    assert rows(tmp_path / "a.jsonl", "".join(lines)) == WANTED
    cells = [f"{n}/900,{norm},{loss}\n" for n, norm, loss in WANTED]
    assert rows(tmp_path / "a.csv", "".join([f"{name},grad_norm,loss\n", *cells])) == WANTED


def test_the_unit_of_a_rate_is_no_counter(tmp_path) -> None:
    lines = [
        f"Train: [{n}/900 ( 9%)]  Loss: {loss} (7.5)  norm: {norm}  97.1/s  (0.4s, 99.5/s)\n"
        for n, norm, loss in WANTED
    ]
    assert rows(tmp_path / "a.log", "".join(lines)) == WANTED


def bar(step: int, total: int = 900) -> str:
    return f"\r {step // 9}%|##   | {step}/{total} [00:07<01:20,  3.1it/s]"


def test_the_bar_above_a_dictionary_is_its_step(tmp_path) -> None:
    lines = [
        f"{bar(n - 1)}{bar(n)}\r     \r{{'loss': {loss}, 'grad_norm': {norm}, 'epoch': 0.5}}\n{bar(n)}"
        + (f"\n{bar(20, 20)}\r{{'eval_loss': 3.5}}\n" if n % 5 == 0 else "")
        for n, norm, loss in WANTED
    ]
    assert rows(tmp_path / "a.log", "".join(lines)) == WANTED


def test_a_bar_that_lags_behind_its_dictionaries_is_no_step(tmp_path) -> None:
    lines = [f"{bar(n - 4 * (n == 40))}\n{{'loss': {loss}, 'grad_norm': {norm}}}\n" for n, norm, loss in WANTED]
    assert len(rows(tmp_path / "a.log", "".join(lines))) == len(WANTED)
