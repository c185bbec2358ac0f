"""logs: logs of runs that nobody measured are read, and what is in them is found."""

import csv
import gzip
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from smoothdiag import SmoothdiagWarning, Status, Trace, fit_smoothness, read_log, review_log
from smoothdiag.cli import main

HISTORY = [
    {"epoch": 0.25, "grad_norm": 0.75, "learning_rate": 4e-05, "loss": 2.5, "step": 2},
    {"epoch": 0.375, "eval_loss": 2.25, "eval_runtime": 0.018, "step": 3},
    {"epoch": 0.5, "grad_norm": 1.5, "learning_rate": 2.5e-05, "loss": 2.0, "step": 4},
    {"epoch": 0.5, "eval_loss": 2.0, "eval_runtime": 0.016, "step": 4},
    {"epoch": 0.5, "train_loss": 2.25, "train_runtime": 1.5, "step": 4},
]

# As lightning.pytorch.loggers.CSVLogger lays out what a module and a LearningRateMonitor log.
METRICS = """\
epoch,grad_2.0_norm/l.bias,grad_2.0_norm_total,lr-SGD,step,train_loss_epoch,train_loss_step,val_loss
,,,0.1,0,,,
,,,0.1,1,,,
0,1.25,0.75,,1,,2.5,
,,,0.1,3,,,
0,0.5,1.5,,3,,2.0,
0,,,,3,,,0.5
0,,,,3,2.25,,
"""


def jsonl(path: Path, entries: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def pairs(trace: Trace) -> list[tuple[int, float, float]]:
    return [(row["step"], row["grad_norm"], row["loss"]) for row in trace]


def logged(tmp_path: Path, norm: np.ndarray, **columns: np.ndarray) -> Trace:
    """A trace from a log of these gradient norms."""
    names = {"step": np.arange(len(norm)), "grad_norm": norm, **columns}
    entries = [dict(zip(names, map(float, row), strict=True)) for row in zip(*names.values(), strict=True)]
    return read_log(jsonl(tmp_path / "log.jsonl", entries))


def test_rows_say_that_nobody_measured_them(tmp_path) -> None:
    trace = read_log(jsonl(tmp_path / "log.jsonl", [{"step": 7, "grad_norm": 2.0, "loss": 3.0, "note": "x"}]))
    (row,) = trace
    assert (row["step"], row["grad_norm"], row["loss"], row["estimator"]) == (7, 2.0, 3.0, "log")
    assert math.isnan(row["smoothness"])
    assert row["status"] == Status.NOT_MEASURED.name.lower()
    assert not Status.NOT_MEASURED.usable
    assert trace.meta == {
        "log": "log.jsonl",
        "step_column": "step",
        "grad_norm_column": "grad_norm",
        "loss_column": "loss",
        "lr_column": None,
        "columns": ["step", "grad_norm", "loss", "note"],
        "notes": trace.meta["notes"],
    }
    assert "before or after clipping" in trace.meta["notes"][0]
    assert "mean or a sum" in trace.meta["notes"][1]


def test_hugging_face_and_lightning_are_recognised(tmp_path) -> None:
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": 4, "log_history": HISTORY}, indent=2))
    assert pairs(read_log(tmp_path / "trainer_state.json")) == [(2, 0.75, 2.5), (4, 1.5, 2.0)]
    (tmp_path / "metrics.csv").write_text(METRICS)
    assert pairs(read_log(tmp_path / "metrics.csv")) == [(1, 0.75, 2.5), (3, 1.5, 2.0)]
    (tmp_path / "history.json").write_text(json.dumps(HISTORY))
    assert pairs(read_log(tmp_path / "history.json")) == [(2, 0.75, 2.5), (4, 1.5, 2.0)]


@pytest.mark.slow
def test_what_the_hugging_face_trainer_writes_is_read_as_it_logged_it(tmp_path) -> None:
    import torch
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    data = [{"input_ids": torch.arange(8), "labels": torch.arange(8)} for _ in range(32)]
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=6, logging_steps=2, save_steps=6, eval_strategy="steps", eval_steps=3, report_to=[],
        use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    trainer = transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data)
    trainer.train()
    wanted = [(e["step"], e["grad_norm"], e["loss"]) for e in trainer.state.log_history if "grad_norm" in e]
    assert [step for step, _, _ in wanted] == [2, 4, 6]
    assert pairs(read_log(tmp_path / "checkpoint-6" / "trainer_state.json")) == wanted


@pytest.mark.slow
def test_what_the_csv_logger_of_lightning_writes_is_read_as_it_was_logged(tmp_path) -> None:
    import lightning
    import torch
    from lightning.pytorch.loggers import CSVLogger
    from lightning.pytorch.utilities import grad_norm

    wanted = []

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(3, 1)

        def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
            self.loss = self.layer(batch).square().mean()
            self.log("train_loss", self.loss, on_step=True, on_epoch=True)
            return self.loss

        def validation_step(self, batch: torch.Tensor, index: int) -> None:
            self.log("val_loss", self.layer(batch).square().mean())

        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            norms = grad_norm(self, norm_type=2)
            self.log_dict(norms)
            wanted.append((self.global_step, float(norms["grad_2.0_norm_total"]), float(self.loss)))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    loader = torch.utils.data.DataLoader(torch.randn(24, 3), batch_size=4)
    trainer = lightning.Trainer(
        max_epochs=2, logger=CSVLogger(tmp_path), log_every_n_steps=2, accelerator="cpu", enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Module(), loader, loader)
    assert len(wanted) == 12
    assert pairs(read_log(Path(trainer.logger.log_dir) / "metrics.csv")) == wanted[1::2]


@pytest.mark.parametrize(
    "names",
    [
        ("step", "grad_norm", "loss"),
        ("global_step", "train/grad_norm", "train/loss"),
        ("_step", "Gradient Norm", "Train Loss"),
        ("trainer/global_step", "train/grad_norm", "loss/train"),
        ("num_updates", "train_gnorm", "train_loss_step"),
        ("Iteration", "total_norm", "training/lm loss"),
    ],
)
def test_usual_names_are_found_among_others(tmp_path, names) -> None:
    others = ["val_loss", "eval/grad_norm", "train_loss_epoch", "grad_norm/layer.0", "test/loss", "lr"]
    entry = dict.fromkeys(others, 9.0) | dict(zip(names, (5, 2.0, 3.0), strict=True))
    assert pairs(read_log(jsonl(tmp_path / "log.jsonl", [entry]))) == [(5, 2.0, 3.0)]
    with (tmp_path / "log.csv").open("w", newline="") as file:
        csv.writer(file).writerows([entry.keys(), entry.values()])
    assert pairs(read_log(tmp_path / "log.csv")) == [(5, 2.0, 3.0)]


def test_the_optimizers_counter_is_preferred_and_no_counter_counts_entries(tmp_path) -> None:
    entries = [{"step": 90 + k, "global_step": 9 + k, "grad_norm": 1.0} for k in range(2)]
    assert [row["step"] for row in read_log(jsonl(tmp_path / "a.jsonl", entries))] == [9, 10]
    assert [row["step"] for row in read_log(jsonl(tmp_path / "a.jsonl", entries), step="step")] == [90, 91]
    bare = [{"grad_norm": 1.0}, {"other": 1.0}, {"grad_norm": 2.0}]
    assert [row["step"] for row in read_log(jsonl(tmp_path / "b.jsonl", bare))] == [0, 2]


def test_columns_that_are_asked_for_are_taken(tmp_path) -> None:
    path = jsonl(tmp_path / "log.jsonl", [{"t": 3, "g": 2.0, "l": 1.0, "grad_norm": 9.0, "loss": 9.0, "step": 9}])
    assert pairs(read_log(path, grad_norm="g", loss="l", step="t")) == [(3, 2.0, 1.0)]


def test_entries_of_one_step_are_put_together_and_the_later_value_counts(tmp_path) -> None:
    entries = [{"step": 1, "loss": 1.0}, {"step": 1, "grad_norm": 2.0}, {"step": 2, "grad_norm": 3.0, "loss": 4.0}]
    assert pairs(read_log(jsonl(tmp_path / "log.jsonl", entries))) == [(1, 2.0, 1.0), (2, 3.0, 4.0)]
    resumed = [{"step": 3, "grad_norm": 6.0}, *entries, {"step": 2, "grad_norm": 5.0, "loss": 4.0}]
    with pytest.warns(
        SmoothdiagWarning, match="1 entry repeats an earlier step with other values, and the later values count"
    ):
        trace = read_log(jsonl(tmp_path / "log.jsonl", resumed))
    assert [row["grad_norm"] for row in trace] == [2.0, 5.0, 6.0]


def test_values_that_are_not_finite_stay_and_have_a_status(tmp_path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("step,grad_norm,loss\n0,1.0,2.0\n1,nan,2.0\n2,inf,2.0\n3,1.0,NaN\n4,,2.0\n")
    trace = read_log(path)
    assert [row["status"] for row in trace] == ["not_measured", *["non_finite"] * 3, "not_measured"]
    assert review_log(trace).non_finite == (1, 2, 3)
    assert review_log(trace).num_norms == 2


def test_what_cannot_be_read_is_left_out_and_said(tmp_path) -> None:
    path = jsonl(tmp_path / "log.jsonl", [{"step": k, "grad_norm": 1.0} for k in range(3)])
    path.write_text("warming up\n" + path.read_text() + '{"step": 3, "grad_norm": "much"}\n{"step": 4, "grad')
    with pytest.warns(SmoothdiagWarning, match="2 lines are left out.*line 1; 1 value is.*'much' in `grad_norm`"):
        assert [row["step"] for row in read_log(path)] == [0, 1, 2]


def test_tables_of_a_spreadsheet_and_with_ragged_rows_are_read(tmp_path) -> None:
    (tmp_path / "log.csv").write_text("step, grad_norm, lr\n0, 1.0, 9\n1\n2, 3.0\n", encoding="utf-8-sig")
    # The first name stands behind the mark that spreadsheets begin files with, the second behind a space.
    trace = read_log(tmp_path / "log.csv", step="step", grad_norm="grad_norm")
    assert [(row["step"], row["grad_norm"]) for row in trace] == [(0, 1.0), (2, 3.0)]
    (tmp_path / "log.csv").write_text("step,grad_norm\n0,1.0,7,8\n1,2.0\n")
    with pytest.warns(
        SmoothdiagWarning, match="1 row has more cells than the table has columns; the extra cells are left out"
    ):
        assert len(read_log(tmp_path / "log.csv")) == 2


@pytest.mark.parametrize(
    ("name", "text", "options", "message"),
    [
        ("a.csv", "step,acc\n1,2\n", {}, "no column has a usual name for .* Found the columns step, acc.$"),
        ("a.csv", "step,grad_norm\n1,2\n", {"loss": "l"}, "column of .*: step, grad_norm. Found `loss = 'l'`"),
        ("a.csv", "train/loss,train_loss,grad_norm\n1,2,3\n", {}, "name one of the columns train/loss, train_loss of"),
        ("a.csv", "epoch,grad_norm\n0.5,2\n", {"step": "epoch"}, "a column of whole numbers. Found 0.5 in `epoch`"),
        ("a.csv", "step,grad_norm\n1,\n", {}, "`grad_norm` should name a column of numbers. Found none in `grad_norm`"),
        ("a.csv", "step,grad_norm\n", {}, "should be a log of named values. Found no entry"),
        ("a.jsonl", "hello\n", {}, "should be a log of named values. Found no entry"),
        ("a.json", "3", {}, "should be a log of named values. Found no entry"),
        ("a.txt", "hello\n", {}, "should be a log of named values. Found no entry"),
        ("a.csv", "Wall time,Step,Value\n1,2,3\n", {}, "One scalar from TensorBoard has no name.*--grad-norm Value"),
        ("a.json", "[[1.5, 2, 3]]", {}, "Found the columns Wall time, Step, Value. One scalar from TensorBoard"),
        ("a.csv", "step,grad_norm\n1,tensor(0.4)\n", {}, "1 value is .* like 0.5 .*'tensor\\(0.4\\)' in `grad_norm`"),
        ("a.csv", "step;grad_norm\n1;1,234\n", {}, "numbers like 0.5 can be read; the first is '1,234' in `grad_norm`"),
        ("a.jsonl", '{"grad_norm": 1' + 400 * "0" + "}", {}, "1 value is left out because only numbers"),
        ("a.csv", "step,grad_norm\n3,1\n5,-0.5\n7,-2\n", {}, "never negative. Found -0.5 at step 5 .*, and 1 more"),
        ("a.csv", "step,loss,acc\n3,,1\n", {}, "`loss` should name a column of numbers. Found none in `loss`"),
        ("a.csv.gz", "step,grad_norm\n1,2\n", {}, "should be a complete gzip file"),
        ("a.csv", "s\0t\0e\0p\0", {}, "should be text in UTF-8. Found zero bytes"),
    ],
)  # fmt: skip
def test_what_is_no_such_log_is_refused(tmp_path, name, text, options, message) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_log(tmp_path / name, **options)


def test_a_missing_file_is_said() -> None:
    with pytest.raises(FileNotFoundError, match=r"There is no log at `nowhere.csv`"):
        read_log("nowhere.csv")


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_a_trace_is_not_taken_for_a_log(tmp_path, suffix) -> None:
    trace = Trace()
    trace.append({"step": 0, "grad_norm": 1.0, "smoothness": 2.0})
    trace.write(tmp_path / f"t{suffix}")
    with pytest.raises(ValueError, match="should be a log. Found a trace, which `Trace.read`"):
        read_log(tmp_path / f"t{suffix}")


def test_fits_refuse_rows_of_a_log_and_say_what_to_do(tmp_path) -> None:
    trace = logged(tmp_path, np.linspace(1, 2, 50))
    with pytest.raises(ValueError, match=r"50 rows, all dropped \(not_measured: 50\).*ttach a Probe"):
        fit_smoothness(trace)
    both = Trace()
    both.extend(trace)
    both.append({"step": 0, "grad_norm": 1.0, "smoothness": 2.0, "estimator": "local"})
    assert fit_smoothness(both).num_points == 1


def test_shares_are_those_of_the_norms_above(tmp_path) -> None:
    norm = np.array([0.5, 0.5, 1.0, 4.0, 8.0, 0.25, 2.0, 3.0])
    review = review_log(logged(tmp_path, norm), thresholds=[3.5])
    found = {use.threshold: use for use in review.thresholds}
    assert (found[1.0].clipped, found[1.0].clipped_late) == (4 / 8, 3 / 4)
    assert (found[3.5].clipped, found[3.5].clipped_late, found[3.5].origin) == (2 / 8, 1 / 4, "given")
    assert (found[1.5].clipped, found[1.5].origin) == (4 / 8, "50th percentile")
    assert all(use.clipped_at_most == use.clipped for use in review.thresholds)
    assert review.percentiles[100] == 8.0
    assert (review.first_step, review.last_step, review.num_norms, review.num_losses) == (0, 7, 8, 0)


def noisy(seed: int, n: int = 600, sigma: float = 0.4) -> np.ndarray:
    """Gradient norms that fall over the run, with noise."""
    rng = np.random.default_rng(seed)
    return np.exp(1.0 - 2.0 * np.arange(n) / n + sigma * rng.standard_normal(n))


def distance(before: np.ndarray, now: float) -> float:
    """How far a value lies above the median, in the larger of two robust standard deviations."""
    q = dict(zip((10, 25, 50, 75, 90), np.percentile(before, [10, 25, 50, 75, 90]), strict=True))
    return max(0.0, now - q[50]) / max((q[75] - q[25]) / 1.349, (q[90] - q[10]) / 2.563)


def distance_in_logs(before: np.ndarray, now: float) -> float:
    """The same of logarithms, without the line through the medians of the older and the newer half."""
    before = np.log(before)
    half = len(before) // 2
    slope = (np.median(before[-half:]) - np.median(before[:half])) / (len(before) - half)
    return distance(before + slope * np.arange(len(before), 0, -1), np.log(now))


def spikes_one_by_one(norm: np.ndarray, loss: np.ndarray) -> dict[str, list[int]]:
    """The rule, row by row."""
    found: dict[str, list[int]] = {"grad_norm": [], "loss": []}
    for k in range(20, len(norm)):
        norms, losses = np.log(norm[max(0, k - 50) : k]), loss[max(0, k - 50) : k]
        away = {"grad_norm": distance(norms, np.log(norm[k])), "loss": distance(losses, loss[k])}
        if min(losses.min(), loss[k]) > 0:
            away["loss"] = min(away["loss"], distance_in_logs(losses, loss[k]))
        large = {"grad_norm": np.log(norm[k]) - np.median(norms) >= np.log(2)}
        large["loss"] = loss[k] - np.median(losses) >= 0.1 * abs(np.median(losses))
        for name, own in away.items():
            if large[name] and np.hypot(*away.values()) > 6 and own >= 3:
                found[name].append(k)
    return found


@pytest.mark.parametrize("seed", range(3))
def test_spikes_are_those_of_the_rule_taken_row_by_row(tmp_path, seed) -> None:
    rng = np.random.default_rng(seed)
    norm, loss = noisy(seed, n=300), 3 + 0.02 * rng.standard_t(2, 300)
    norm[[15, 25, 41, 42, 200]] *= 30
    loss[[60, 299]] += 2
    loss[150:260] = np.exp(rng.standard_normal(110) - 4)  # near zero, over decades
    norm[100], loss[100] = np.exp(np.median(np.log(norm[50:100])) + 4.5 * 0.4), np.median(loss[50:100]) + 1
    review = review_log(logged(tmp_path, norm, loss=loss))
    found = {name: [s.step for s in review.spikes if s.column == name] for name in ("grad_norm", "loss")}
    assert found == spikes_one_by_one(norm, loss)
    assert {25, 41, 100, 200} <= set(found["grad_norm"])  # at 15 there are too few rows before
    assert {60, 100} <= set(found["loss"])
    assert not set(range(205, 260)) & set(found["loss"])
    (spike,) = [s for s in review.spikes if s.step == 200]
    assert spike.value == norm[200]
    assert spike.usual == pytest.approx(np.exp(np.median(np.log(norm[150:200]))), rel=1e-12)


def test_noise_that_falls_over_the_run_is_no_spike_and_no_pile(tmp_path) -> None:
    for seed in range(20):
        norm = noisy(seed)
        review = review_log(logged(tmp_path, norm, loss=np.log(norm)))
        assert not review.spikes, seed
        assert math.isnan(review.pile_up), seed


def clipped(norm: np.ndarray, threshold: float) -> np.ndarray:
    """What `clip_grad_norm_` leaves of these norms, in float32 like the norm of what it has scaled."""
    return (norm * np.minimum(1.0, threshold / (norm + 1e-6))).astype(np.float32).astype(np.float64)


@pytest.mark.thorough
@pytest.mark.parametrize("digits", [16, 6, 3])
@pytest.mark.parametrize("share", [0.12, 0.3, 0.6, 0.95])
@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_norms_after_clipping_are_noticed_and_shares_hold_the_truth(tmp_path, share, digits, scale) -> None:
    norm = scale * noisy(1)
    threshold = float(np.quantile(norm, 1 - share))
    shown = np.array([float(f"{value:.{digits}g}") for value in clipped(norm, threshold)])
    asked = threshold * np.array([0.5, 0.9, 1.1, 3.0])
    review = review_log(logged(tmp_path, shown), thresholds=asked)
    assert review.pile_up == pytest.approx(threshold, rel=5e-3)
    assert review.pile_share == pytest.approx(share, abs=0.01)
    for use in (use for use in review.thresholds if use.origin == "given"):
        truth = float((norm > use.threshold).mean())
        assert use.clipped - 0.005 <= truth <= use.clipped_at_most + 0.005
        assert (use.clipped_at_most > use.clipped) is (use.threshold > threshold)
    assert math.isnan(review.advice)
    assert "as if logged after clipping" in review.summary().replace("\n", " ")


@pytest.mark.thorough
@pytest.mark.parametrize("digits", [1, 2, 3])
def test_rounded_norms_are_no_pile(tmp_path, digits) -> None:
    for seed in range(10):
        norm = np.array([float(f"{value:.{digits}f}") for value in noisy(seed)])
        assert math.isnan(review_log(logged(tmp_path, norm)).pile_up), seed


def test_norms_in_bfloat16_are_no_pile(tmp_path) -> None:
    import torch

    for seed in range(10):
        norm = torch.tensor(noisy(seed)).bfloat16().double().numpy()
        assert math.isnan(review_log(logged(tmp_path, norm)).pile_up), seed


def test_clipping_that_began_late_is_noticed(tmp_path) -> None:
    norm = noisy(2)
    shown = np.concatenate([norm[:200], clipped(norm[200:], 0.8)])
    review = review_log(logged(tmp_path, shown))
    assert review.pile_up == pytest.approx(0.8, rel=1e-3)
    assert review.percentiles[100] > 2


def test_zero_norms_are_counted_and_disturb_nothing(tmp_path) -> None:
    review = review_log(logged(tmp_path, np.concatenate([np.zeros(50), noisy(0)])))
    assert (review.num_norms, review.num_zeros) == (650, 50)
    assert "50 of the norms are 0" in review.summary()
    assert math.isnan(review.pile_up)
    assert [use.clipped for use in review.thresholds if use.threshold == 1.0] == [(noisy(0) > 1).sum() / 650]


@pytest.mark.parametrize("threshold", [0.0, -1.0, math.inf, math.nan])
def test_thresholds_that_are_none_are_refused(tmp_path, threshold) -> None:
    with pytest.raises(ValueError, match="Parameter `thresholds` should hold positive, finite numbers. Found"):
        review_log(logged(tmp_path, np.ones(3)), thresholds=[threshold])


def test_a_measured_trace_is_no_log() -> None:
    trace = Trace()
    trace.append({"step": 0, "grad_norm": 1.0, "smoothness": 2.0, "estimator": "local"})
    with pytest.raises(ValueError, match="should have rows from `read_log`.*1 row, 0 of them from a log"):
        review_log(trace)


def test_the_command_prints_the_review_and_writes_the_trace(tmp_path, capsys) -> None:
    norm = noisy(3, n=200)
    norm[100] *= 50
    path = jsonl(tmp_path / "log.jsonl", [{"step": 10 * k, "gn": g, "loss": 1.0} for k, g in enumerate(norm)])
    out = tmp_path / "trace.jsonl"
    assert main(["import", str(path), "--grad-norm", "gn", "--threshold", "2.5", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert f"{path}: gradient norms from `gn`, losses from `loss`, steps from `step`.\n" in printed
    assert "200 gradient norms in steps 0 to 1990, usually 10 steps apart; 200 losses." in printed
    assert f"{(norm > 2.5).mean():.1%}" in next(line for line in printed.splitlines() if line.endswith("given"))
    assert f"ADVICE BY PERCENTILE, not from a fit: {np.quantile(norm, 0.9):.4g}" in printed
    assert "SPIKES of the gradient norm: 1\n  step 1000:" in printed
    assert "\n\nNOT KNOWN without measuring: L0 and L1" in printed
    assert [row["grad_norm"] for row in Trace.read(out)] == norm.tolist()
    assert main(["fit", str(out)]) == 2
    assert "ttach a Probe" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--out", "t.csv"], "`--out` should end in .jsonl. Found `t.csv`"),
        (["--out", "log.jsonl"], "`--out` should be a new file or an earlier trace. .*should be a smoothdiag trace"),
        (["--out", "log.jsonl/t.jsonl"], "`--out` should be a file that can be written. Found: "),
        (["--grad-norm", "g"], "`grad_norm` should be a column of .*: step, grad_norm. Found `grad_norm = 'g'`"),
        (["--threshold", "-1"], "`thresholds` should hold positive"),
    ],
)
def test_wrong_flags_are_one_line(tmp_path, monkeypatch, capsys, flags, message) -> None:
    monkeypatch.chdir(tmp_path)
    path = jsonl(tmp_path / "log.jsonl", [{"step": 0, "grad_norm": 1.0}])
    before = path.read_bytes()
    assert main(["import", str(path), *flags]) == 2
    assert path.read_bytes() == before
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert error.count("\n") == 1


ROWS = [(0, 0.75, 2.5), (5, 1.5, 2.25), (10, 3.0, 2.0)]
NAMES = ("step", "grad_norm", "loss")
TABLE = "step,grad_norm,loss\n" + "".join(f"{s},{g},{v}\n" for s, g, v in ROWS)
COLUMNS = {name: [row[k] for row in ROWS] for k, name in enumerate(NAMES)}


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.csv", ",step,grad_norm,loss\n" + "".join(f"{k},{s},{g},{v}\n" for k, (s, g, v) in enumerate(ROWS))),
        ("a.CSV", TABLE.replace(",", ";")),
        ("a.csv", TABLE.replace("\n", "\r\n")),
        ("a.tsv", TABLE.replace(",", "\t")),
        ("a.csv", TABLE.replace(",", ", ").rstrip("\n")),
        ("a.csv.gz", gzip.compress(TABLE.encode(), mtime=0)),
        ("a.csv", TABLE.encode("utf-16")),
        ("a.ndjson", "".join(json.dumps({"step": s, "train": {"grad_norm": g, "loss": v}}) + "\n" for s, g, v in ROWS)),
        ("a.json", json.dumps(COLUMNS | {"lr": 0.1})),
        ("a.json", json.dumps({"train": COLUMNS})),
        ("a.json", json.dumps({name: dict(enumerate(values)) for name, values in COLUMNS.items()})),  # pandas' to_json
        ("a.json", json.dumps({"history": [dict(zip(NAMES, row, strict=True)) for row in ROWS]})),
    ],
)
def test_usual_formats_give_the_same_rows(tmp_path, name, data) -> None:
    (tmp_path / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    trace = read_log(tmp_path / name)
    assert pairs(trace) == ROWS
    assert "" not in trace.meta["columns"]


def test_one_scalar_from_tensorboard_is_read_by_its_columns(tmp_path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([[1.7e9 + step, step, norm] for step, norm, _ in ROWS]))
    trace = read_log(tmp_path / "a.json", grad_norm="Value")
    assert [(row["step"], row["grad_norm"]) for row in trace] == [(step, norm) for step, norm, _ in ROWS]


@pytest.mark.thorough
def test_a_folder_of_tensorboard_is_read_whole(tmp_path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    many = 10_050  # more than TensorBoard shows by default
    with SummaryWriter(str(tmp_path / "run")) as writer:
        for step in range(many):
            writer.add_scalar("train/grad_norm", step % 64, step)
        for step in (1, 3):
            writer.add_scalar("train/loss", 0.5 * step, step)
            writer.add_scalar("eval/loss", 9.0, step)
    trace = read_log(tmp_path / "run")
    assert [row["grad_norm"] for row in trace] == [step % 64 for step in range(many)]
    assert [(row["step"], row["loss"]) for row in trace if not math.isnan(row["loss"])] == [(1, 0.5), (3, 1.5)]
    with pytest.raises(ValueError, match=r"Found a folder; pass a log in it, newest first: .*run/events.out.tfevents"):
        read_log(tmp_path)


@pytest.mark.thorough
def test_values_that_tensorboard_has_twice_are_said_and_tensorboard_missing_too(tmp_path, monkeypatch) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        for step, norm in ((0, 1.0), (1, 2.0), (0, 3.0)):
            writer.add_scalar("grad_norm", norm, step)
    with pytest.warns(
        SmoothdiagWarning, match="1 entry repeats an earlier step with other values, and the later values count"
    ):
        assert [row["grad_norm"] for row in read_log(tmp_path)] == [3.0, 2.0]
    monkeypatch.setitem(sys.modules, "tensorboard.backend.event_processing.event_accumulator", None)
    with pytest.raises(ImportError, match=r'pip install "smoothdiag\[tensorboard\]"'):
        read_log(tmp_path)


def test_folders_name_the_logs_in_them(tmp_path) -> None:
    with pytest.raises(ValueError, match="folder of TensorBoard events or of MLflow. Found a folder without"):
        read_log(tmp_path)
    (tmp_path / "out.csv" / "checkpoint-5").mkdir(parents=True)
    (tmp_path / "out.csv" / "checkpoint-5" / "trainer_state.json").write_text("{}")
    with pytest.raises(ValueError, match=r"pass a log in it, newest first: .*checkpoint-5/trainer_state.json"):
        read_log(tmp_path / "out.csv")


@pytest.mark.parametrize(
    ("name", "text", "steps", "message"),
    [
        ("a.csv", TABLE + "200,1.", [0, 5, 10], "the last row was cut off and is left out: `200,1.`"),
        (
            "a.csv",
            "step,grad_norm,loss,loss\n4,1,2,3\n",
            [4],
            "several columns are called loss; only the last of them is read",
        ),
        (
            "a.csv",
            'step,grad_norm,note\n0,1,\n5,2,"open\n10,3,\n',
            [0, 5],
            "1 cell holds several lines, as if a quote",
        ),
        (
            "a.json",
            json.dumps(COLUMNS | {"val_loss": [1]}),
            [0, 5, 10],
            "do not have 3 values like most: val_loss has 1",
        ),
        ("a.json", json.dumps(COLUMNS | {"lr": [1] * 6}), [0, 5, 10], "do not have 3 values like most: lr has 6"),
    ],
)
def test_what_is_left_out_is_said(tmp_path, name, text, steps, message) -> None:
    (tmp_path / name).write_text(text)
    with pytest.warns(SmoothdiagWarning, match=re.escape(message)):
        trace = read_log(tmp_path / name)
    assert [row["step"] for row in trace] == steps


def test_norms_of_minus_one_are_an_overflow_and_not_a_norm(tmp_path) -> None:
    entries = [{"step": k, "grad_norm": -1 if k == 2 else 1.0 + k} for k in range(4)]
    with pytest.warns(SmoothdiagWarning, match="1 gradient norm of -1 read as NaN, because DeepSpeed logs"):
        trace = read_log(jsonl(tmp_path / "log.jsonl", entries))
    assert review_log(trace).non_finite == (2,)
    assert "Inf or NaN at step 2." in review_log(trace).summary()
    assert review_log(trace).num_norms == 3


def test_losses_alone_are_reviewed_for_spikes_and_nothing_else(tmp_path) -> None:
    loss = [2.0 + 0.01 * (-1) ** k for k in range(60)]
    loss[40] = 9.0
    with pytest.warns(SmoothdiagWarning, match="only losses are read, because no column has a usual name for gradient"):
        trace = read_log(jsonl(tmp_path / "log.jsonl", [{"step": k, "loss": v, "g": 1.0} for k, v in enumerate(loss)]))
    review = review_log(trace, thresholds=[1.0])
    assert [(spike.step, spike.column) for spike in review.spikes] == [(40, "loss")]
    assert (review.num_norms, review.num_losses, review.thresholds, review.percentiles) == (0, 60, (), {})
    assert math.isnan(review.advice)
    text = review.summary()
    assert text.startswith("NO GRADIENT NORMS, so no thresholds and no advice. 60 losses in steps 0 to 59.")
    assert "threshold  " not in text
    assert "of the gradient norm" not in text


def test_advice_takes_twenty_norms_above_zero(tmp_path) -> None:
    norm = noisy(0, n=20)
    assert review_log(logged(tmp_path, norm)).advice == pytest.approx(np.quantile(norm, 0.9), rel=1e-12)
    few = review_log(logged(tmp_path, norm[:19]))
    assert math.isnan(few.advice)
    assert "No advice by percentile: it needs at least 20 norms." in few.summary()
    assert "SPIKES of the gradient norm: none, because no row has 20 rows before it" in few.summary()
    zero = review_log(logged(tmp_path, np.zeros(30)))
    assert math.isnan(zero.advice)
    assert "No advice by percentile: the 90th percentile of the norms is 0." in zero.summary()
    assert [use.threshold for use in zero.thresholds] == [1.0]


@pytest.mark.parametrize(
    ("steps", "interval", "said"),
    [
        (range(0, 50, 5), 5, "10 gradient norms in steps 0 to 45, usually 5 steps apart; no"),
        ([1, 10, 20, 30], 10, "usually 10 steps apart"),
        (range(7), 1, "7 gradient norms in steps 0 to 6; no losses."),
        ([3], math.nan, "1 gradient norm in steps 2 to 4; no losses."),
    ],
)
def test_the_interval_is_the_usual_distance_of_norms(tmp_path, steps, interval, said) -> None:
    without = [{"step": k, "grad_norm": math.nan} for k in (2, 4) if k not in steps]
    entries = [{"step": k, "grad_norm": 1.0} for k in steps] + without
    review = review_log(read_log(jsonl(tmp_path / "log.jsonl", entries)))
    assert review.interval == pytest.approx(interval, nan_ok=True)
    assert said in review.summary()


def test_columns_that_nobody_chose_are_named(tmp_path, capsys) -> None:
    path = jsonl(tmp_path / "log.jsonl", [{"grad_norm": 1.0, "objective": 2.0, "tick": k} for k in range(3)])
    assert main(["import", str(path)]) == 0
    assert capsys.readouterr().out.startswith(
        f"{path}: gradient norms from `grad_norm`.\n"
        "No column has a usual name for steps, so entries are counted instead.\n"
        "Other columns can be named (--loss for losses, --step for steps): objective, tick.\n"
    )


def test_an_earlier_trace_is_kept(tmp_path) -> None:
    out = tmp_path / "trace.jsonl"
    for norm in (1.0, 2.0):
        assert main(["import", str(jsonl(tmp_path / "a.jsonl", [{"grad_norm": norm}])), "--out", str(out)]) == 0
    assert [row["grad_norm"] for row in Trace.read(out)] == [2.0]
    assert [row["grad_norm"] for row in Trace.read(tmp_path / "trace.1.jsonl")] == [1.0]
    assert Trace.read(out).meta["log"] == "a.jsonl"


def test_the_review_as_json_holds_what_the_review_holds(tmp_path, capsys) -> None:
    path = jsonl(tmp_path / "log.jsonl", [{"step": k, "grad_norm": g} for k, g in enumerate(noisy(0, n=40))])
    assert main(["import", str(path), "--json", "--threshold", "2", "--out", str(tmp_path / "t.jsonl")]) == 0
    plain = json.loads(capsys.readouterr().out)
    review = review_log(read_log(path), thresholds=[2.0])
    assert (plain["advice"], plain["interval"], plain["pile_up"]) == (review.advice, 1.0, None)
    assert plain["percentiles"]["90"] == review.percentiles[90]
    assert [use["clipped"] for use in plain["thresholds"]] == [use.clipped for use in review.thresholds]
    assert plain["grad_norm_column"] == "grad_norm"
    assert len(Trace.read(tmp_path / "t.jsonl")) == 40


@pytest.mark.filterwarnings("default")
def test_warnings_of_the_command_are_lines(tmp_path, capsys) -> None:
    path = jsonl(tmp_path / "log.jsonl", [{"step": 0, "grad_norm": 1.0}, {"step": 1, "grad_norm": "x"}])
    assert main(["import", str(path)]) == 0
    error = capsys.readouterr().err
    assert error.startswith(f"smoothdiag import: warning: {path}: 1 value is left out")
    assert error.count("\n") == 1
