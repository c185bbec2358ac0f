"""logs.lines: what trainers print to a console is read by the words beside the numbers, whoever printed it."""

import json
import math
from collections.abc import Callable

import pytest

from smoothdiag import SmoothdiagWarning, read_log
from smoothdiag.logs import LogReader, describe_columns

STEPS = range(1, 46)


def norm(step: int) -> float:
    return round(2 * math.exp(-step / 40) * (1 + 0.3 * math.sin(1.7 * step)) + 0.1, 4)


def loss(step: int) -> float:
    return round(4 * math.exp(-step / 80) + 1 + 0.02 * math.sin(step), 4)


def printed(step: int) -> str:
    return str({"loss": loss(step), "grad_norm": norm(step), "learning_rate": 1e-5, "epoch": step / 10})


INFO = "2025-05-01 10:00:00,123 - root - INFO - "

# One line for each step, with a loss and a norm.
WITH_NORMS: dict[str, Callable[[int], str]] = {
    "build-nanogpt": lambda n: f"step {n:5d} | loss: {loss(n):.6f} | lr 1.0e-04 | norm: {norm(n):.4f} | dt: 95.20ms",
    "llm.c": lambda n: (
        f"step {n:4d}/19560 | loss {loss(n):.6f} (+1.20z)| norm {norm(n):.4f} "
        f"(+0.30z)| 2000.12 ms | 55% MFU"
    ),
    "llm.c file": lambda n: f"s:{n} trl:{loss(n):.4f} lr:0.000100 norm:{norm(n):.4f}",
    "rank in front": lambda n: f"[rank 0] iter {n}: loss {loss(n)}, gradnorm {norm(n)}, time 1,132.10ms",
    "HF": lambda n: f"{{'step': {n}, {printed(n)[1:]}",
    "HF strings": lambda n: str({"step": str(n), "loss": str(loss(n)), "grad_norm": str(norm(n)), "epoch": "0.1"}),
    "HF numpy": lambda n: (
        f"{{'step': {n}, 'loss': np.float32({loss(n)}), 'grad_norm': tensor({norm(n)}, device='cuda:0')}}"
        f"{{'step': {n}, 'loss': np.float32({loss(n)}), 'grad_norm': tensor({norm(n)}, device='cuda:0')}}"
    ),
    "Megatron": lambda n: (
        f" [2024-05-01 10:00:00] iteration {n:8d}/  500000 | consumed samples: {n:12d} | learning rate: 6.0E-05 | "
        f"lm loss: {loss(n):.6E} | loss scale: 1.0 | grad norm: {norm(n):.4f} | number of skipped iterations:   0 |"
    ),
    "Megatron equals": lambda n: (
        f"[n:0]:\titeration={n:8d}/ 317 | lm_loss={loss(n)} | "
        f"grad_norm={norm(n)} | loss_scale=1.0"
    ),
    "nanotron": lambda n: (
        f"[INFO|DP=0|PP=0|TP=0]: iteration: {n} / 1000 | consumed_tokens: 1.05M | lm_loss: {loss(n)} | lr: 0.0003 | "
        f"grad_norm: {norm(n)} | cuda_memory_allocated: 1.2G"
    ),
    "DeepSpeed": lambda n: (
        f"[INFO] [t.py:3:main] [Rank 0] Step {n}, Loss {loss(n)}, "
        f"global_grad_norm={norm(n)}, lr=[1e-05]"
    ),
    "torchtitan": lambda n: (
        f"[rank0]:[titan] {INFO}\x1b[31mstep: {n:2}  \x1b[32mloss: {loss(n):8.5f}  "
        f"\x1b[38;2;180;60;0mgrad_norm: {norm(n):7.4f}  \x1b[34mmemory:  "
        f"1.20GiB(2.10%)  \x1b[36mtps: 12,345  \x1b[35mmfu: N/A\x1b[39m"
    ),
    "fairseq": lambda n: (
        f"| INFO | train_inner | epoch {n // 20 + 1:03d}:  {n % 20 + 1:5d} / 282 loss={loss(n)}, nll_loss=1.236, "
        f"num_updates={n}, lr=0.0001, gnorm={norm(n)}, loss_scale=32768"
    ),
    "fairseq JSON": lambda n: "[2022][train_inner][INFO] - "
    + json.dumps({"epoch": 1, "loss": str(loss(n)), "num_updates": str(n), "gnorm": str(norm(n))}),
    "NeMo": lambda n: (
        f"[default0]:Training epoch 0, iteration {n}/99 | lr: 2.7e-06 | global_step: {n} | grad_norm: {norm(n)} | "
        f"reduced_train_loss: {loss(n)} | train_step_timing in s: 12.64 | val_loss: 9.9"
    ),
    "mmengine": lambda n: (
        f"05/01 10:00:00 - mmengine - INFO - Iter(train) [{n:4d}/80000]  base_lr: 1.0e-04 lr: 1.0e-06  eta: 1:00  "
        f"grad_norm: {norm(n)}  loss: {loss(n)}  decode.loss_ce: 1.0"
    ),
    "verl": lambda n: f"step:{n} - actor/pg_loss:np.float64({loss(n)}) - actor/grad_norm:{norm(n)} - timing_s/step:2.3",
    "units": lambda n: f"Step={n:,} Loss={loss(n)}nats GradNorm={norm(n):.4e} LR=1.0e-03",
    "Chinese": lambda n: f"训练步数 step: {n}，损失 loss: {loss(n)}，梯度范数 grad_norm: {norm(n)}",
    "JSON": lambda n: json.dumps({"_step": n, "train": {"loss": loss(n), "grad_norm": norm(n)}, "_timestamp": 1.7e9}),
    "JSON behind a time": lambda n: (
        f"2024-05-01 10:00 "
        f"{json.dumps({'step': n, 'loss': loss(n), 'grad_norm': norm(n)})}"
    ),
}  # fmt: skip


@pytest.mark.parametrize("line", WITH_NORMS.values(), ids=WITH_NORMS.keys())
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_steps_losses_and_norms_are_those_of_the_lines(tmp_path, line, end) -> None:
    text = end.join(["loading 3 shards ...", "Model has 124.4M parameters", *map(line, STEPS), "done in 12.3 s", ""])
    (tmp_path / "train").write_bytes(text.encode())
    found = [(row["step"], round(row["grad_norm"], 6), round(row["loss"], 6)) for row in read_log(tmp_path / "train")]
    assert found == [(n, norm(n), loss(n)) for n in STEPS]


# Lines between others that belong to other data, to the whole epoch, or to no step.
BETWEEN = {
    "nanoGPT": ("step {n}: train loss 7.7, val loss 9.9", lambda n: f"iter {n}: loss {loss(n)}, time 12.00ms"),
    "torchtitan": (INFO + "validate step: {n}  loss:  9.9  lr: 1e-3", lambda n: f"{INFO}step: {n}  loss: {loss(n)}"),
    "Megatron": (
        " validation loss at iteration {n} | lm loss value: 9.9E+00 | lm loss PPL: 9.9E+00 |",
        lambda n: f" iteration {n:8d}/ 100 | lm loss: {loss(n)} |",
    ),
    "mmengine": (
        "mmengine - INFO - Epoch(val)  [1][{n}/90]    loss: 9.9",
        lambda n: f"mmengine - INFO - Epoch(train)  [1][{n:4d}/90]  lr: 1.0e-02  loss: {loss(n)}",
    ),
    "fairseq valid": (
        "| INFO | valid | epoch 001 | valid on 'valid' subset | loss 9.9 | num_updates {n}",
        lambda n: f"| INFO | train_inner | epoch 001: {n} / 90 loss={loss(n)}, num_updates={n}",
    ),
    "fairseq epoch": (
        "| INFO | train | epoch 001 | loss 9.9 | num_updates {n} | gnorm 9.9",
        lambda n: f"| INFO | train_inner | epoch 001: {n} / 90 loss={loss(n)}, num_updates={n}",
    ),
    "HF": (str({"eval_loss": 9.9, "epoch": 1.0}), lambda n: f"{{'step': {n}, 'loss': {loss(n)}}}"),
    "MNIST": (
        "Test set: Average loss: 9.9, Accuracy: 98/100",
        lambda n: f"Train Epoch: 1 [{n}/90 (1%)]\tLoss: {loss(n)}",
    ),
    "code": ("        train_loss = 9.9  # step {n}", lambda n: f"step:{n}/90 train_loss:{loss(n)}"),
}  # fmt: skip


@pytest.mark.parametrize(("other", "line"), BETWEEN.values(), ids=BETWEEN.keys())
def test_lines_of_other_data_are_no_rows_of_training(tmp_path, other, line) -> None:
    lines = [part for n in STEPS for part in ([line(n), other.format(n=n)] if "{n}" in other else [line(n), other])]
    (tmp_path / "a.log").write_text("\n".join(lines) + "\n")
    with pytest.warns(SmoothdiagWarning, match="only losses are read"):
        assert [(row["step"], row["loss"]) for row in read_log(tmp_path / "a.log")] == [(n, loss(n)) for n in STEPS]


def test_a_block_of_lines_belongs_to_the_step_above_it(tmp_path) -> None:
    parts = [
        f"INFO\t[step={n}/739328,epoch=0]\n    optim/total_grad_norm={norm(n)}\n    train/CrossEntropyLoss={loss(n)}\n"
        for n in STEPS
    ]
    (tmp_path / "olmo").write_text("".join(parts))
    found = [(row["step"], row["grad_norm"], row["loss"]) for row in read_log(tmp_path / "olmo")]
    assert found == [(n, norm(n), loss(n)) for n in STEPS]


def test_rows_of_the_first_rank_are_read_and_the_others_said(tmp_path) -> None:
    lines = [f"[rank{r}]: step: {n}  loss: {loss(n) + r}  grad_norm: {norm(n)}" for n in STEPS for r in (1, 0)]
    (tmp_path / "a.log").write_text("\n".join(lines))
    with pytest.warns(SmoothdiagWarning, match="only rows of rank 0 are read, of 2 ranks"):
        assert [row["loss"] for row in read_log(tmp_path / "a.log")] == [loss(n) for n in STEPS]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("step 1 loss 0,45\nstep 2 loss 0,5\n", "2 values are left out because only numbers like 0.5 can be read"),
        ("step 1 eval loss 2\n", "should name the column"),
        ("eval step 1 loss 2.0\neval step 2 loss 3.0\n", "should have rows of training. Found 2 rows"),
    ],
)
def test_what_cannot_be_told_is_refused_with_the_reason(tmp_path, text, message) -> None:
    (tmp_path / "a.log").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_log(tmp_path / "a.log")


def test_half_a_line_at_the_end_is_left_out(tmp_path) -> None:
    (tmp_path / "a.log").write_text(
        "".join(f"step {n} loss {loss(n)} grad_norm 1.5 | ok\n" for n in STEPS) + "step 46 loss 1"
    )
    assert len(read_log(tmp_path / "a.log")) == len(STEPS)


def test_what_is_not_said_of_the_numbers_is_named(tmp_path) -> None:
    (tmp_path / "a.log").write_text("epoch 001: 1 / 9 loss=2.0nats, num_updates=1, gnorm=0.5\nnoise\n")
    trace = read_log(tmp_path / "a.log")
    assert trace.meta["notes"][0] == "`gnorm`: of gradients that fairseq has divided by the number of tokens"
    assert "`loss`: the log does not say whether it is a mean or a sum" in trace.meta["notes"][1]
    assert trace.meta["notes"][2] == "`loss` has the unit nats"
    assert "1 of 2 lines hold no value of use." in describe_columns(trace)


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_log_that_grows_is_read_as_the_whole_log(tmp_path, size) -> None:
    for name, head, line in (
        ("a.log", ["start"], WITH_NORMS["Megatron"]),
        ("a.csv", ["step,grad_norm,loss"], lambda n: f"{n},{norm(n)},{loss(n)}"),
        ("log", [], WITH_NORMS["JSON"]),
    ):
        lines = [*head, *map(line, STEPS)]
        (tmp_path / name).write_text("\n".join(lines) + "\n")
        reader = LogReader(name)
        for begin in range(0, len(lines), size):
            reader.feed(lines[begin : begin + size])
            if begin > len(lines) // 2:
                assert len(reader.trace()) > 0
        assert [*reader.trace()] == [*read_log(tmp_path / name)]
