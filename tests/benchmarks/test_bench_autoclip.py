"""benchmarks/autoclip: runs follow their seeds, parts stay apart, and a benchmark that was killed goes on."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from benched import modules, quadratic, set_up
from torch import nn

from smoothdiag import StepRule

pytestmark = pytest.mark.thorough

PARTS = ("think", "choose", "final", "further")


@pytest.fixture(scope="module")
def bench():
    return modules()


# The pool


def test_a_kind_belongs_to_one_part(bench) -> None:
    tasks = bench.tasks.TASKS.values()
    parts = {kind: {task.part for task in tasks if task.kind == kind} for kind in {task.kind for task in tasks}}
    assert all(len(found) == 1 for found in parts.values())
    assert len(tasks) >= 16
    assert len(parts) >= 8
    assert sum(task.part == "final" for task in tasks) >= 8


def test_each_task_has_three_cells_at_two_rates(bench) -> None:
    cells = {name: {} for name in bench.tasks.TASKS}
    for part in PARTS:
        for name, rate in bench.workloads.pool(part):
            workload = bench.workloads.workload(name)
            assert workload.task.part == part
            assert workload.safe_rate > 0
            assert rate in bench.workloads.RATES
            cells[workload.task.name].setdefault(name, set()).add(rate)
    assert all([len(rates) for rates in found.values()] == [2, 2, 2] for found in cells.values())
    seen = {tuple(name.split("/")[1:]) for found in cells.values() for name in found}
    assert {optimizer for optimizer, _ in seen} == set(bench.workloads.OPTIMIZERS)
    assert {schedule for _, schedule in seen} == set(bench.workloads.SCHEDULES)


def test_the_final_part_is_refused_unless_asked_for(bench) -> None:
    with pytest.raises(ValueError, match="set aside"):
        bench.run.chosen(["final"], [], [], final=False)
    with pytest.raises(ValueError, match="set aside"):
        bench.run.chosen([], ["poisson/adamw/cosine"], [16], final=False)
    assert bench.run.chosen(["final"], [], [], final=True) == bench.workloads.pool("final")
    assert bench.run.parser().parse_args(["--out", "x.csv"]).parts == ["think"]


def test_unknown_names_are_refused(bench) -> None:
    for name in ("nope", "lstm-ptb/nope/constant", "lstm-ptb/adamw/constant/nope"):
        with pytest.raises(ValueError, match=f"Found `{name}`"):
            bench.run.chosen([], [name], [1], final=True)
    with pytest.raises(ValueError, match="Found `nope`"):
        bench.arms.named(["nope"])
    assert bench.arms.named(["oracle", "none", "agc"]) == ["none", *(f"fixed{i}" for i in range(1, 8)), "agc"]


def test_arms_are_for_the_optimizers_they_know(bench) -> None:
    def arms(name) -> set[str]:
        return {case.arm for case in bench.run.cases([(name, 1)], list(bench.arms.ARMS), [0], 300)}

    assert not {"normalized", "mixclip", "control_path"} & arms("gpt-shakespeare/adamw/constant")
    assert {"relative_0.01", "stable_adamw", "spectral"} <= arms("gpt-shakespeare/adamw/constant")
    assert "stable_adamw" not in arms("gpt-shakespeare/momentum/constant")


# AutoClip and its controls


def test_controls_feed_what_they_say(bench) -> None:
    workload = quadratic(bench, weight=(1.0, 1.0))
    watched = bench.measured._watch(workload, 0.01, 3, 40)
    # On a ||x||^2 / 2 every length is ||x|| at its step, whatever a.
    assert all(0 < length <= math.sqrt(2) * 1.01 for length in watched.lengths)
    assert len(watched.lengths) > 5
    loop, clipper = set_up(bench, workload, 0.01, "control_shuffled", 40, seed=3)
    for batch, _ in zip(bench.training.data_of(workload).batches(4), range(40), strict=False):
        bench.training.step(loop, clipper, batch)
    rows = clipper.probe.trace.to_frame()
    np.testing.assert_allclose(np.sort(rows["grad_norm"] / rows["smoothness"]), np.sort(watched.lengths), rtol=1e-3)


@pytest.mark.parametrize(("arm", "factor"), [("autoclip", 1.0), ("autoclip_x4", 4.0), ("autoclip_x0.1", 0.1)])
def test_doses_are_in_longest_steps_of_autoclip(bench, arm, factor) -> None:
    loop, clipper = set_up(bench, quadratic(bench), 0.01, arm)
    bench.training.step(loop, clipper, torch.tensor([1.0, 1.0, 2.0, 4.0]))
    row = clipper.probe.trace[0]
    assert row["step_norm"] == pytest.approx(0.05, rel=1e-4), "a hundredth of the length of the parameters"
    assert row["smoothness"] == pytest.approx(2.0, rel=1e-4)
    assert row["signal"] == pytest.approx(1 * 3 / 2**2, rel=1e-4), "the halves of the batch have means 1 and 3"
    own = 1.2 * (1.9 / 0.1) ** 0.25 * row["grad_norm"] / row["smoothness"] * (0.75 / 0.5) ** 0.5
    clipper.finish()  # which reads the row
    calibration = clipper.clip._calibration
    assert calibration.longest == pytest.approx(factor * own, rel=1e-4)


def test_the_dose_of_an_update_knows_no_momentum(bench) -> None:
    _, clipper = set_up(bench, quadratic(bench, "adamw"), 0.01, "autoclip_x4")
    assert clipper.clip._calibration.rule == StepRule(4.8)


def test_probing_is_counted_in_gradients(bench) -> None:
    row = bench.training.train(quadratic(bench), 0.01, 0, bench.arms.ARMS["autoclip"], 40)
    # Thirteen rows in the first thirty steps, of a gradient and one on halves; the start of the eleventh after the
    # self-test's two is evaluated as well.
    assert row["probe_gradients"] == 13 * 2 + 1 + 2
    assert "longest step" in row["reason"]


# Runs


def test_arms_share_weights_and_data(bench) -> None:
    workload = quadratic(bench)
    seen = {}
    for name in ("none", "autoclip", "fixed7"):
        seen[name] = []
        arm = bench.arms.ARMS[name]

        def observe(loop, arm=arm, found=seen[name]):
            clipper = arm.attach(loop)
            before = clipper.observe
            clipper.observe = lambda batch: (found.append(batch.tolist()), before(batch))
            return clipper

        row = bench.training.train(workload, 0.001, 1, bench.training.Arm(observe), 8)
        assert row["initial"] == pytest.approx(25.0)
    assert seen["none"] == seen["autoclip"] == seen["fixed7"]
    assert len(seen["none"]) == 8


def test_weights_follow_the_seed_and_validation_drops_nothing(bench) -> None:
    data = bench.tasks.Data(lambda seed: iter([torch.ones(1, 4)] * 9), torch.ones(64, 4))
    task = bench.tasks.Task(
        "dropout", "dropout", "think", lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 1)), lambda: data,
        lambda model, x: (model(x) + 3).square().mean(),
    )  # fmt: skip
    workload = bench.workloads.Workload("dropout/plain/constant", task, "plain", "constant")

    def initial(seed: int) -> float:
        return bench.training.train(workload, 0.01, seed, bench.arms.ARMS["none"], 2)["initial"]

    torch.manual_seed(7)
    linear = nn.Linear(4, 1).requires_grad_(False)
    assert initial(7) == pytest.approx(float(linear.weight.sum() + linear.bias + 3) ** 2, rel=1e-5)
    assert initial(7) == initial(7) != initial(8)


def test_run_without_clipping_is_gradient_descent_with_momentum(bench) -> None:
    workload = quadratic(bench)
    row = bench.training.train(workload, 0.05, 0, bench.arms.ARMS["none"], 20)
    x, v, losses = np.array([3.0, 4.0]), np.zeros(2), []
    for batch, _ in zip(workload.task.data().batches(1), range(20), strict=False):
        v = 0.9 * v + float(batch.mean()) * x
        x = x - 0.05 * v
        losses.append(float(x @ x))
    assert row["final"] == pytest.approx(losses[-1], rel=1e-4)
    assert row["tail"] == pytest.approx(np.mean(losses[-5:]), rel=1e-4)
    assert row["best"] == pytest.approx(min([*losses[1::2], *losses[-5:]]), rel=1e-4)
    assert not row["diverged"]


def test_muon_takes_matrices_and_adamw_the_rest(bench) -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3))
    workload = quadratic(bench, "muon")
    muon, adamw = workload.optimizers(model, 0.1)
    (matrices,), (others,) = muon.param_groups, adamw.param_groups
    assert [p.shape for p in matrices["params"]] == [(3, 4)]
    assert {p.shape for p in others["params"]} == {(5, 4), (3,)}
    assert (matrices["lr"], others["lr"]) == (0.1, pytest.approx(0.02))


def test_divergence_ends_a_run_and_is_said(bench) -> None:
    row = bench.training.train(quadratic(bench), 50.0, 0, bench.arms.ARMS["none"], 400)
    assert row["diverged"]
    assert math.isnan(row["final"])
    assert row["train_gradients"] < 100


def test_evaluations_are_spaced(bench) -> None:
    evaluate, tail = bench.training.evaluation_steps(300)
    assert tail == [276, 282, 288, 294, 300]
    assert evaluate == [30, 60, 90, 120, 150, 180, 210, 240, 270, 276, 282, 288, 294, 300]


def rates(bench, schedule) -> list[float]:
    loop, clipper = set_up(bench, quadratic(bench, schedule=schedule), 0.01, steps=20)
    found = []
    for batch, _ in zip(loop.workload.task.data().batches(1), range(20), strict=False):
        found.append(loop.optimizers[0].param_groups[0]["lr"])
        bench.training.step(loop, clipper, batch)
    return found


def test_a_schedule_warms_up_to_the_peak_and_ends_at_zero(bench) -> None:
    found = rates(bench, "cosine")
    assert found[:2] == pytest.approx([0.005, 0.01])
    assert found[10] == pytest.approx(0.005, rel=1e-6), "half way down"
    assert found[-1] == pytest.approx(0.0, abs=1e-12)


def test_one_cycle_peaks_at_the_rate(bench) -> None:
    found = rates(bench, "onecycle")
    assert max(found) == pytest.approx(0.01)
    assert found[0] == pytest.approx(0.01 / 25)
    assert found[-1] == pytest.approx(0.01 / 25 / 1e4)


# Data


def test_missing_data_says_which_and_where_to_get_it(bench, tmp_path, monkeypatch) -> None:
    monkeypatch.delenv(bench.sources.VARIABLE, raising=False)
    with pytest.raises(FileNotFoundError, match=r"SMOOTHDIAG_DATA.*`libsvm/a9a.gz`.*libsvmtools"):
        bench.sources.path_of("libsvm/a9a.gz")
    monkeypatch.setenv(bench.sources.VARIABLE, str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"ptb.train.txt.gz.*wojzaremba"):
        bench.sources.path_of("ptb/ptb.train.txt.gz")


def test_sparse_rows_become_a_table(bench) -> None:
    x, y = bench.sources._sparse("-1 1:1 3:0.5\n+1 2:1\n", 3)
    torch.testing.assert_close(x, torch.tensor([[1.0, 0.0, 0.5], [0.0, 1.0, 0.0]]))
    torch.testing.assert_close(y, torch.tensor([0.0, 1.0]))


# Resuming


def row_of(bench, case):
    values = dict.fromkeys(bench.results.COLUMNS, 0.0)
    return {**values, **case._asdict(), "kind": "sgd", "diverged": False, "reason": "one,\ntwo"}


def test_runs_that_are_there_are_not_run_again(bench, tmp_path) -> None:
    path = tmp_path / "results.csv"
    workloads = [("logistic-a9a/momentum/constant", 1), ("logistic-a9a/momentum/constant", 64)]
    cases = list(bench.run.cases(workloads, ["none", "agc"], [0, 1], 300))
    assert len(cases) == 8
    for case in cases[:3]:
        bench.results.append(path, row_of(bench, case))
    assert bench.results.remaining(cases, bench.results.done(path)) == cases[3:]
    assert len(pd.read_csv(path)) == 3


@pytest.mark.parametrize("kept", [1, 40, -1])
def test_line_that_was_cut_short_is_run_again(bench, tmp_path, kept) -> None:
    path = tmp_path / "results.csv"
    first, second = (bench.results.Case("w", 0.1, seed, "none", 300) for seed in (0, 1))
    bench.results.append(path, row_of(bench, first))
    whole = path.read_bytes()
    bench.results.append(path, row_of(bench, second))
    cut = path.read_bytes()[len(whole) :][:kept]
    path.write_bytes(whole + cut)
    assert bench.results.done(path) == {first}
    assert path.read_bytes() == whole + cut
    bench.results.mend(path)
    bench.results.append(path, row_of(bench, second))
    assert bench.results.done(path) == {first, second}
    assert list(pd.read_csv(path)["seed"]) == [0, 1]


def test_file_of_something_else_is_refused(bench, tmp_path) -> None:
    path = tmp_path / "results.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="other columns"):
        bench.results.done(path)
