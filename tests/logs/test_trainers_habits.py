"""logs: habits of trainers that hide the step, the loss or the run from a reader of usual names."""

import json

import pytest

from smoothdiag import SmoothdiagWarning, read_log

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


def test_a_column_that_sums_up_the_run_is_no_second_loss(tmp_path) -> None:
    lines = [f"{n},{norm},{loss},\n" for n, norm, loss in WANTED] + [f"{n + 1},,,\n" for n in range(90, 99)]
    text = "".join(["_step,train/grad_norm,train/loss,train_loss\n", *lines, "99,,,4.5\n"])
    assert rows(tmp_path / "a.csv", text)[: len(WANTED)] == WANTED
    both = text.replace(",\n", ",2.5\n")
    with pytest.raises(ValueError, match="one of the columns train/loss, train_loss"):
        rows(tmp_path / "a.csv", both)


@pytest.mark.parametrize("nothing", ["-1.0000", "0.0"])
def test_the_rank_of_a_pipeline_that_has_the_loss_is_read(tmp_path, nothing) -> None:
    lines = [
        f"[rank{r}]: step: {n} loss: {x} grad_norm: {g}\n"
        for n, g, loss in WANTED
        for r, x in ((0, nothing), (3, loss))
    ]
    with pytest.warns(
        SmoothdiagWarning, match="only rows of rank 3 are read, of 2 ranks, because the losses of rank 0"
    ):
        assert rows(tmp_path / "a.log", "".join(lines)) == WANTED


BARS = {"old": ("[{}>{}]", "[{}={}]", "=", "."), "new": ("\x1b[1m{}{}\x1b[0m", "{}━{}", "━", "━")}


@pytest.mark.parametrize("names_epochs", [True, False])
@pytest.mark.parametrize(("bar", "full", "done", "left"), BARS.values(), ids=BARS.keys())
def test_an_epoch_of_running_means_is_one_row(tmp_path, bar, full, done, left, names_epochs) -> None:
    text = ""
    for epoch in range(1, 9):
        text += f"Epoch {epoch}/8\n" * names_epochs
        for batch in (1, 10, 19):
            text += (
                f"\r{batch:2d}/20 {bar.format(done * batch, left * (19 - batch))} - ETA: 1s - loss: {9 - batch / 9:.2f}"
            )
        text += f"\r20/20 {full.format(done * 19, '')} - 3s 9ms/step - loss: {8 / epoch:.3f} - val_loss: 7.7\n"
    text += f"\r 3/20 {bar.format(done * 3, left * 16)} - ETA: 1s - loss: 0.5"
    with pytest.warns(SmoothdiagWarning, match="are means over its batches so far, so only the last of each is read"):
        found = [row["loss"] for row in read_log(_written(tmp_path / "fit.out", text))]
    assert found == [round(8 / epoch, 3) for epoch in range(1, 9)]


def _written(path, text: str):
    path.write_text(text)
    return path


TABLES = {
    "wide": ("step;grad_norm;loss", lambda n, norm, loss: f"{n};{norm};{loss}"),
    "long": ("key;step;value", lambda n, norm, loss: f"grad_norm;{n};{norm}\nloss;{n};{loss}"),
    "quoted": ("step,grad_norm,loss,note", lambda n, norm, loss: f'{n},"{norm}","{loss}",none'),
    "names": ("step\tgrad_norm\tloss\tsplit", lambda n, norm, loss: f"{n}\t{norm}\t{loss}\ttrain"),
}


@pytest.mark.parametrize(("head", "row"), TABLES.values(), ids=TABLES.keys())
def test_decimal_commas_of_a_table_are_read_and_said(tmp_path, head, row) -> None:
    lines = [row(n, *(f"{value:.3f}".replace(".", ",") for value in rest)) + "\n" for n, *rest in WANTED]
    with pytest.warns(SmoothdiagWarning, match="commas in numbers are read as decimal"):
        found = rows(tmp_path / "a.csv", f"{head}\n" + "".join(lines))
    assert found == [(n, round(norm, 3), round(loss, 3)) for n, norm, loss in WANTED]


def test_points_of_thousands_go_with_decimal_commas(tmp_path) -> None:
    with pytest.warns(SmoothdiagWarning, match="decimal"):
        assert rows(tmp_path / "a.csv", "step;grad_norm;loss\n1;1.024,5;1,234\n") == [(1, 1024.5, 1.234)]


def test_two_runs_row_by_row_without_names_are_refused(tmp_path) -> None:
    pairs = [f"{n},{norm},{loss}\n{n},{norm + 0.25},{loss + 0.1}\n" for n, norm, loss in WANTED]
    with pytest.raises(
        ValueError, match="Found each step of `step` 2 times with other values, as in a table of 2 runs"
    ):
        rows(tmp_path / "a.csv", "step,grad_norm,loss\n" + "".join(pairs))


def test_micro_steps_and_ranks_are_no_runs(tmp_path) -> None:
    counted = [f"{n},{2 * n + k},{norm + k},{loss + k}\n" for n, norm, loss in WANTED for k in (0, 1)]
    with pytest.warns(SmoothdiagWarning, match="repeat an earlier step"):
        assert len(rows(tmp_path / "a.csv", "step,iter,grad_norm,loss\n" + "".join(counted))) == len(WANTED)
    ranks = [f"step {n} loss {loss + k} norm {norm}\n" for n, norm, loss in WANTED for k in (0, 1)]
    with pytest.warns(SmoothdiagWarning, match="repeat an earlier step"):
        assert len(rows(tmp_path / "a.log", "".join(ranks))) == len(WANTED)
