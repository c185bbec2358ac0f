"""benchmarks/autoclip: clippers follow their formulas, and a benchmark that was killed goes on where it stopped."""

import importlib
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from places import REPOSITORY
from torch import nn

from smoothdiag import StepRule

pytestmark = pytest.mark.thorough

FOLDER = REPOSITORY / "benchmarks" / "autoclip"

MODULES = ("arms", "clippers", "measured", "regret", "results", "run", "sources", "training", "workloads")


@pytest.fixture(scope="module", autouse=True)
def bench():
    """The modules of the benchmark, which are scripts beside each other and no package."""
    sys.path.insert(0, str(FOLDER))
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    sys.path.remove(str(FOLDER))


def quadratic(bench, kind="sgd", rate=0.1, weight=(3.0, 4.0)):
    """f(x) = a ||x||^2 / 2 over batches a; the validation loss is that of a = 2."""

    class Point(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x = nn.Parameter(torch.tensor(weight))

    def batches(seed):
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield 1 + torch.rand((), generator=generator)

    data = bench.workloads.Data(batches, torch.tensor(2.0))
    return bench.workloads.Workload(
        "quadratic", Point, lambda: data, lambda model, a: a * model.x.square().sum() / 2, kind, safe_rate=rate,
        weight_decay=0.0,
    )  # fmt: skip


def gradients(loop, values):
    for p, value in zip(loop.parameters, values, strict=True):
        p.grad = torch.tensor(value)


# Arithmetic


def runs_of(rows):
    columns = ["workload", "lr", "seed", "steps", "arm", "initial", "final", "diverged"]
    frame = pd.DataFrame(rows, columns=columns)
    return frame.assign(clip_share=0.5, probe_gradients=3, train_gradients=100)


def test_regret_is_the_share_of_the_possible_descent_that_is_missed(bench) -> None:
    runs = runs_of([
        ("w", 1.0, 0, 9, "none", 10.0, 4.0, False),
        ("w", 1.0, 0, 9, "fixed1", 10.0, 2.0, False),
        ("w", 1.0, 0, 9, "autoclip", 10.0, 3.0, False),
        ("w", 1.0, 0, 9, "agc", 10.0, 1.0, False),
        ("w", 1.0, 0, 9, "lost", 10.0, math.nan, True),
        ("w", 1.0, 0, 9, "risen", 10.0, 11.0, True),
    ])  # fmt: skip
    found = bench.regret.with_regret(runs, {"none", "fixed1"}).set_index("arm")["regret"]
    expected = {"none": 2 / 8, "fixed1": 0.0, "autoclip": 1 / 8, "agc": -1 / 8, "lost": 1.0, "risen": 1.0}
    assert found.to_dict() == pytest.approx(expected)


def test_other_losses_count_only_for_runs_that_end_well(bench) -> None:
    runs = runs_of([
        ("w", 1.0, 0, 9, "none", 10.0, 4.0, False),
        ("w", 1.0, 0, 9, "fixed1", 10.0, 20.0, True),
        ("w", 1.0, 0, 9, "late", 10.0, 9.0, False),
    ]).assign(tail=[5.0, 2.0, 11.0])  # fmt: skip
    found = bench.regret.with_regret(runs, {"none", "fixed1"}, "tail").set_index("arm")["regret"]
    assert found.to_dict() == {"none": 0.0, "fixed1": 1.0, "late": 1.0}


def test_oracle_is_that_of_the_same_rate_and_seed(bench) -> None:
    rows = [("w", lr, seed, 9, "none", 10.0, lr + seed, False) for lr in (1.0, 2.0) for seed in (0, 1)]
    rows += [("w", lr, seed, 9, "x", 10.0, lr + seed + 1, False) for lr in (1.0, 2.0) for seed in (0, 1)]
    found = bench.regret.with_regret(runs_of(rows), {"none"})
    x = found[found["arm"] == "x"]
    np.testing.assert_allclose(x["regret"], 1 / (10 - x["lr"] - x["seed"]))


def test_nothing_is_compared_where_the_whole_oracle_diverged(bench) -> None:
    runs = runs_of([("w", 1.0, 0, 9, "none", 10.0, math.nan, True), ("w", 1.0, 0, 9, "x", 10.0, 3.0, False)])
    found = bench.regret.with_regret(runs, {"none"})
    assert found["regret"].isna().all()
    assert bench.regret.summary(found).empty


def test_summary_of_known_regrets(bench) -> None:
    rows = [("w", 1.0, seed, 9, "none", 1.0, 0.0, False) for seed in range(3)]
    rows += [("w", 1.0, seed, 9, "x", 1.0, loss, loss > 1) for seed, loss in enumerate((0.1, 0.5, 7.0))]
    row = bench.regret.summary(bench.regret.with_regret(runs_of(rows), {"none"})).loc["x"]
    expected = {"runs": 3, "median": 0.5, "mean": 1.6 / 3, "worst": 1.0, "diverged": 1, "clipped": 0.5, "probing": 0.03}
    assert row.to_dict() == pytest.approx(expected)


def test_common_cases_have_all_of_the_arms(bench) -> None:
    rows = [("w", lr, 0, 9, arm, 1.0, 0.0, False) for lr in (1.0, 2.0) for arm in ("none", "x", "y")]
    found = bench.regret.common(runs_of(rows[:-1]), ["x", "y"])
    assert found[["lr", "arm"]].to_numpy().tolist() == [[1.0, "none"], [1.0, "x"], [1.0, "y"]]


@pytest.mark.parametrize(
    ("good", "factor"),
    [([0, 0, 0, 0], 0), ([0, 1, 0, 0], 1), ([1, 1, 0, 1], 4), ([1, 0, 1, 1], 4), ([1, 1, 1, 1], 64)],
)
def test_widest_range_of_rates(bench, good, factor) -> None:
    assert bench.regret.widest([0.5, 2.0, 8.0, 32.0], good) == factor


def test_widths_take_the_mean_over_seeds_and_the_best_of_all_arms(bench) -> None:
    losses = {"a": [1.0, 1.04, 1.2], "b": [1.04, 1.06, math.nan]}
    rows = [
        ("w", 4.0**i, seed, 9, arm, 9.0, loss + 0.02 * (2 * seed - 1) if arm == "a" else loss, math.isnan(loss))
        for arm, found in losses.items() for i, loss in enumerate(found) for seed in (0, 1)
    ]  # fmt: skip
    assert bench.regret.widths(runs_of(rows))["w"].to_dict() == {"a": 4.0, "b": 1.0}


def test_one_seed_that_diverges_spoils_a_rate(bench) -> None:
    rows = [("w", 1.0, seed, 9, "a", 9.0, 1.0, seed == 1) for seed in (0, 1)]
    rows += [("w", 1.0, seed, 9, "b", 9.0, 1.0, False) for seed in (0, 1)]
    assert bench.regret.widths(runs_of(rows))["w"].to_dict() == {"a": 0.0, "b": 1.0}


def test_doses_are_read_from_the_names(bench) -> None:
    losses = {"none": 0.0, "m_x3": 0.3, "m_x0.5": 0.1, "m": 0.05}
    rows = [("w", 1.0, 0, 9, arm, 1.0, loss, False) for arm, loss in losses.items()]
    rows += [("w", 4.0, 0, 9, "none", 1.0, 0.0, False), ("w", 4.0, 0, 9, "m", 1.0, 0.9, False)]  # without doses
    found = bench.regret.doses(bench.regret.with_regret(runs_of(rows), {"none"}), "m_x", "m")
    assert found["w"].to_dict() == pytest.approx({0.5: 0.1, 1.0: 0.05, 3.0: 0.3})
    assert bench.regret.doses(bench.regret.with_regret(runs_of(rows), {"none"}), "other_x", "m").empty


def test_over_seeds_the_best_threshold_is_one_for_all(bench) -> None:
    losses = {"none": (1.0, 2.0), "fixed1": (2.0, 0.5), "autoclip": (1.5, 1.5), "lost": (0.1, math.nan), "once": (0.1,)}
    rows = [
        ("w", 1.0, seed, 9, arm, 11.25, loss, math.isnan(loss))
        for arm, found in losses.items() for seed, loss in enumerate(found)
    ]  # fmt: skip
    found = bench.regret.over_seeds(runs_of(rows), {"none", "fixed1"}).set_index("arm")
    assert set(found["reference"]) == {1.25}
    assert found["regret"].to_dict() == pytest.approx({"none": 0.025, "fixed1": 0.0, "autoclip": 0.025, "lost": 1.0})


def test_harm_is_told_where_no_clipping_is_as_good(bench) -> None:
    def rows(lr, none, clipped, best):
        return [
            ("w", lr, seed, 9, arm, 11.0, loss + noise, False)
            for seed, noise in ((0, -0.1), (1, 0.1))
            for arm, loss in {"none": none, "autoclip": clipped, "fixed1": best}.items()
        ]

    runs = runs_of([*rows(1.0, 1.0, 1.2, 1.0), *rows(4.0, 3.0, 1.0, 1.0)])
    found = bench.regret.harmless(bench.regret.with_regret(runs, {"none", "fixed1"}), "autoclip")
    assert list(found.index) == [("w", 1.0)]
    assert found["change"].item() == pytest.approx(0.02)
    assert found["noise"].item() == pytest.approx(np.std([0.9, 1.1], ddof=1) / 10)


# Clippers


def test_cap_shortens_the_sustained_step_to_the_length_given(bench) -> None:
    loop = bench.training.set_up(quadratic(bench), 0.1, 0, bench.training.Arm(bench.arms.nothing), 5)
    cap = bench.clippers.relative_cap(loop, 0.03)  # ||x|| = 5, so 0.15
    gradients(loop, [[6.0, 8.0]])  # at rate 0.1 and momentum 0.9 a step of length 10
    cap.before()
    torch.testing.assert_close(loop.parameters[0].grad, torch.tensor([0.09, 0.12]))
    gradients(loop, [[0.06, 0.08]])
    cap.before()
    torch.testing.assert_close(loop.parameters[0].grad, torch.tensor([0.06, 0.08]))
    assert (cap.clipped, cap.longest_step) == (1, pytest.approx(0.15))


def test_cap_shortens_updates_of_adam(bench) -> None:
    loop = bench.training.set_up(quadratic(bench, "adamw"), 1.0, 0, bench.training.Arm(bench.arms.nothing), 5)
    cap = bench.clippers.relative_cap(loop, 0.03)
    start = loop.parameters[0].detach().clone()
    bench.training.step(loop, cap, torch.tensor(1.0))  # Adam's first step is the rate times the sign: (-1, -1)
    moved = loop.parameters[0].detach() - start
    torch.testing.assert_close(moved, torch.full((2,), -0.15 / math.sqrt(2)))
    assert cap.clipped == 1


def test_percentile_counts_the_present_norm_and_no_nan(bench) -> None:
    clipper = bench.clippers.Percentile(None, 10.0)
    limits = [clipper.limit(norm) for norm in (3.0, 1.0, math.nan, 2.0)]
    np.testing.assert_allclose(limits, [3.0, 1.2, 1.2, 1.2])


def test_zclip_follows_its_formula(bench) -> None:
    clipper = bench.clippers.ZClip(None)
    first = [1.0, 2.0] * 12 + [1.5]
    assert all(clipper.limit(norm) == math.inf for norm in first)
    mean, deviation = np.mean(first), np.std(first)
    z = (10.0 - mean) / deviation
    assert clipper.limit(10.0) == pytest.approx(mean + 2.5**2 / z * deviation, rel=1e-4)
    assert clipper.mean == pytest.approx(0.97 * mean + 0.03 * (mean + 2.5**2 / z * deviation), rel=1e-4)
    assert clipper.limit(1.6) == math.inf


def test_agc_clips_row_by_row(bench) -> None:
    weight = nn.Parameter(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    weight.grad = torch.tensor([[0.3, 0.4], [1e-6, 0.0]])
    clipper = bench.clippers.AdaptiveGradientClipping(SimpleNamespace(parameters=[weight]))
    clipper.before()
    torch.testing.assert_close(weight.grad, torch.tensor([[0.03, 0.04], [1e-6, 0.0]]))
    assert clipper.clipped == 1


def test_agc_clips_filter_by_filter(bench) -> None:
    weight = nn.Parameter(torch.ones(2, 1, 2, 2))
    weight.grad = torch.stack([torch.full((1, 2, 2), 0.5), torch.full((1, 2, 2), 1e-3)])
    bench.clippers.AdaptiveGradientClipping(SimpleNamespace(parameters=[weight])).before()
    torch.testing.assert_close(weight.grad[:, 0, 0, 0], torch.tensor([0.01, 1e-3]))


def test_grid_of_the_oracle_keeps_lengths_across_rates(bench) -> None:
    workload = quadratic(bench)
    typical = bench.training.typical_step(workload)
    for lr in workload.rates[:2]:
        loop = bench.training.set_up(workload, lr, 0, bench.arms.ARMS["fixed1"], 5)
        cap = bench.arms.ARMS["fixed1"].attach(loop)
        gradients(loop, [[60.0, 80.0]])
        cap.before()
        length = loop.steady_rate * float(loop.parameters[0].grad.norm())
        assert length == pytest.approx(typical / 27)


def test_controls_feed_what_they_say(bench) -> None:
    workload = quadratic(bench, weight=(1.0, 1.0))
    loop = bench.training.set_up(workload, 0.01, 3, bench.arms.ARMS["autoclip"], 40)
    watched = bench.measured._watch(workload, 0.01, 3, 40)
    # On a ||x||^2 / 2 every length is ||x|| at its step, whatever a.
    assert all(0 < length <= math.sqrt(2) * 1.01 for length in watched.lengths)
    assert len(watched.lengths) > 5
    clipper = bench.arms.ARMS["control_shuffled"].attach(loop)
    for batch, _ in zip(bench.training.data_of(workload).batches(4), range(40), strict=False):
        bench.training.step(loop, clipper, batch)
    rows = clipper.probe.trace.to_frame()
    np.testing.assert_allclose(np.sort(rows["grad_norm"] / rows["smoothness"]), np.sort(watched.lengths), rtol=1e-3)


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
            clipper.observe = lambda batch: (found.append(float(batch)), before(batch))
            return clipper

        row = bench.training.train(workload, 0.001, 1, bench.training.Arm(observe), 8)
        assert row["initial"] == pytest.approx(25.0)
    assert seen["none"] == seen["autoclip"] == seen["fixed7"]
    assert len(seen["none"]) == 8


def test_weights_follow_the_seed_and_validation_drops_nothing(bench) -> None:
    data = bench.workloads.Data(lambda seed: iter([torch.ones(1, 4)] * 9), torch.ones(64, 4))
    workload = bench.workloads.Workload(
        "dropout", lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 1)), lambda: data,
        lambda model, x: (model(x) + 3).square().mean(), "sgd", safe_rate=0.1,
    )  # fmt: skip

    def initial(seed: int) -> float:
        return bench.training.train(workload, 0.01, seed, bench.arms.ARMS["none"], 2)["initial"]

    torch.manual_seed(7)
    linear = nn.Linear(4, 1).requires_grad_(False)
    assert initial(7) == pytest.approx(float(linear.weight.sum() + linear.bias + 3) ** 2, rel=1e-5)
    assert initial(7) == initial(7) != initial(8)


@pytest.mark.parametrize(("arm", "factor"), [("autoclip", 1.0), ("autoclip_x4", 4.0), ("autoclip_x0.1", 0.1)])
def test_doses_are_in_longest_steps_of_autoclip(bench, arm, factor) -> None:
    workload = quadratic(bench)
    loop = bench.training.set_up(workload, 0.01, 0, bench.arms.ARMS[arm], 5)
    clipper = bench.arms.ARMS[arm].attach(loop)
    bench.training.step(loop, clipper, torch.tensor(1.5))
    row = clipper.probe.trace[0]
    assert row["step_norm"] == pytest.approx(0.05, rel=1e-4), "a hundredth of the length of the parameters"
    assert row["smoothness"] == pytest.approx(1.5, rel=1e-4)
    own = 1.2 * (1.9 / 0.1) ** 0.25 * row["grad_norm"] / row["smoothness"]
    clipper.finish()  # which reads the row
    assert clipper.clip._calibration.longest == pytest.approx(factor * own, rel=1e-4)


def test_the_dose_of_an_update_knows_no_momentum(bench) -> None:
    workload = replace(quadratic(bench), kind="adamw")
    loop = bench.training.set_up(workload, 0.01, 0, bench.arms.ARMS["autoclip_x4"], 5)
    assert bench.arms.ARMS["autoclip_x4"].attach(loop).clip._calibration.rule == StepRule(4.8)


def test_run_without_clipping_is_gradient_descent_with_momentum(bench) -> None:
    workload = quadratic(bench)
    row = bench.training.train(workload, 0.05, 0, bench.arms.ARMS["none"], 20)
    x, v, losses = np.array([3.0, 4.0]), np.zeros(2), []
    for batch, _ in zip(workload.data().batches(1), range(20), strict=False):
        v = 0.9 * v + float(batch) * x
        x = x - 0.05 * v
        losses.append(float(x @ x))
    assert row["final"] == pytest.approx(losses[-1], rel=1e-4)
    assert row["tail"] == pytest.approx(np.mean(losses[-5:]), rel=1e-4)
    assert row["best"] == pytest.approx(min([*losses[1::2], *losses[-5:]]), rel=1e-4)
    assert not row["diverged"]


def test_divergence_ends_a_run_and_is_said(bench) -> None:
    row = bench.training.train(quadratic(bench), 50.0, 0, bench.arms.ARMS["none"], 400)
    assert row["diverged"]
    assert math.isnan(row["final"])
    assert row["train_gradients"] < 100


def test_evaluations_are_spaced(bench) -> None:
    evaluate, tail = bench.training.evaluation_steps(300)
    assert tail == [276, 282, 288, 294, 300]
    assert evaluate == [30, 60, 90, 120, 150, 180, 210, 240, 270, 276, 282, 288, 294, 300]


def test_probing_is_counted_in_gradients(bench) -> None:
    row = bench.training.train(quadratic(bench), 0.01, 0, bench.arms.ARMS["autoclip"], 40)
    # Thirteen rows in the first thirty steps, of two gradients each; the first start is that of the self-test's two.
    assert row["probe_gradients"] == 13 * 2 - 1 + 2
    assert "longest step" in row["reason"]


def test_workload_that_is_set_aside_is_refused(bench) -> None:
    assert bench.workloads.SET_ASIDE == {"gpt-wikitext2", "gpt-wikitext2-adamw"}
    for name in bench.workloads.SET_ASIDE:
        with pytest.raises(ValueError, match="set aside"):
            bench.run.check_workloads([name], final=False)
        bench.run.check_workloads([name], final=True)
        assert name not in bench.run.parser().parse_args(["--out", "x.csv"]).workloads


def test_unknown_names_are_refused(bench) -> None:
    with pytest.raises(ValueError, match="Found `nope`"):
        bench.run.check_workloads(["nope"], final=True)
    with pytest.raises(ValueError, match="Found `nope`"):
        bench.arms.named(["nope"])
    assert bench.arms.named(["oracle", "none", "agc"]) == ["none", *(f"fixed{i}" for i in range(1, 8)), "agc"]


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
    workload = bench.workloads.WORKLOADS["logistic-a9a"]
    cases = list(bench.run.cases([workload.name], ["none", "agc"], [0, 1], 300, [0, 3]))
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


def test_arms_are_for_the_optimizers_they_know(bench) -> None:
    found = list(bench.run.cases(["gpt-shakespeare-adamw"], list(bench.arms.ARMS), [0], 300, [0]))
    assert not {"normalized", "mixclip", "control_path"} & {case.arm for case in found}
    assert "relative_0.01" in {case.arm for case in found}


def test_a_schedule_warms_up_to_the_peak_and_ends_at_zero(bench) -> None:
    workload = replace(quadratic(bench), shape=bench.workloads.warm_up_and_cosine)
    loop = bench.training.set_up(workload, 0.01, 0, bench.arms.ARMS["none"], 20)
    rates = []
    for batch, _ in zip(workload.data().batches(1), range(20), strict=False):
        rates.append(loop.optimizer.param_groups[0]["lr"])
        bench.training.step(loop, bench.arms.nothing(loop), batch)
    assert rates[:2] == pytest.approx([0.005, 0.01])
    assert rates[10] == pytest.approx(0.005, rel=1e-6), "half way down"
    assert rates[-1] == pytest.approx(0.0, abs=1e-12)
