"""benchmarks/autoclip: regrets and means over tasks are those of worked examples, and a page has the stored tables."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from benched import FOLDER, modules
from places import REPOSITORY

pytestmark = pytest.mark.thorough


@pytest.fixture(scope="module")
def bench():
    return modules("regret", "report", "tables", "workloads")


def runs_of(rows, task="t"):
    columns = ["workload", "lr", "seed", "steps", "arm", "initial", "tail", "diverged"]
    frame = pd.DataFrame(rows, columns=columns)
    return frame.assign(clip_share=0.5, probe_gradients=3, train_gradients=100, task=task)


def regrets(values):
    """Runs with known regrets: rows (task, rate, arm, regret)."""
    frame = pd.DataFrame(values, columns=["task", "lr", "arm", "regret"])
    same = {"seed": 0, "steps": 9, "rescued": True, "kind": "sgd", "diverged": frame["regret"] == 1}
    return frame.assign(workload=frame["task"], clip_share=0.5, probe_gradients=3, train_gradients=100, **same)


# Regret


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
    ]).assign(best=[5.0, 2.0, 11.0])  # fmt: skip
    found = bench.regret.with_regret(runs, {"none", "fixed1"}, "best").set_index("arm")["regret"]
    assert found.to_dict() == {"none": 0.0, "fixed1": 1.0, "late": 1.0}


def test_oracle_is_that_of_the_same_rate_and_seed(bench) -> None:
    rows = [("w", lr, seed, 9, "none", 10.0, lr + seed, False) for lr in (1.0, 2.0) for seed in (0, 1)]
    rows += [("w", lr, seed, 9, "x", 10.0, lr + seed + 1, False) for lr in (1.0, 2.0) for seed in (0, 1)]
    found = bench.regret.with_regret(runs_of(rows), {"none"})
    x = found[found["arm"] == "x"]
    np.testing.assert_allclose(x["regret"], 1 / (10 - x["lr"] - x["seed"]))
    best = bench.regret.with_regret(runs_of(rows), {"none", "x"}, same=bench.regret.ANY_RATE)
    np.testing.assert_allclose(best["reference"], 1 + best["seed"])


def test_nothing_is_compared_where_the_whole_oracle_diverged(bench) -> None:
    runs = runs_of([("w", 1.0, 0, 9, "none", 10.0, math.nan, True), ("w", 1.0, 0, 9, "x", 10.0, 3.0, False)])
    found = bench.regret.with_regret(runs, {"none"})
    assert found["regret"].isna().all()
    assert bench.regret.summary(found).empty


def test_common_cases_have_all_of_the_arms(bench) -> None:
    rows = [("w", lr, 0, 9, arm, 1.0, 0.0, False) for lr in (1.0, 2.0) for arm in ("none", "x", "y")]
    found = bench.regret.common(runs_of(rows[:-1]), ["x", "y"])
    assert found[["lr", "arm"]].to_numpy().tolist() == [[1.0, "none"], [1.0, "x"], [1.0, "y"]]


def test_doses_are_read_from_the_names(bench) -> None:
    losses = {"none": 0.0, "m_x3": 0.3, "m_x0.5": 0.1, "m": 0.05}
    rows = [("w", 1.0, 0, 9, arm, 1.0, loss, False) for arm, loss in losses.items()]
    rows += [("w", 4.0, 0, 9, "none", 1.0, 0.0, False), ("w", 4.0, 0, 9, "m", 1.0, 0.9, False)]  # without doses
    found = bench.regret.doses(bench.regret.with_regret(runs_of(rows), {"none"}), "m_x", "m")
    assert found["t"].to_dict() == pytest.approx({0.5: 0.1, 1.0: 0.05, 3.0: 0.3})
    assert bench.regret.doses(bench.regret.with_regret(runs_of(rows), {"none"}), "other_x", "m").empty


def test_the_best_of_the_oracle_is_counted_once_a_case(bench) -> None:
    rows = [("w", lr, 0, 9, arm, 9.0, loss, False) for lr in (1.0, 2.0) for arm, loss in (("none", lr), ("f", 1.5))]
    found = bench.regret.at_edge(bench.regret.with_regret(runs_of(rows), {"none", "f"}), ["none", "f", "g"])
    assert found.to_dict() == {"none": 1, "f": 1, "g": 0}


# Over tasks


def test_cases_of_one_task_are_one_fact(bench) -> None:
    runs = regrets([("a", 1, "x", 0.1), ("a", 2, "x", 0.3), ("a", 3, "x", 0.2), ("b", 1, "x", 1.0)])
    row = bench.regret.summary(runs).loc["x"]
    expected = {"cases": 4, "tasks": 2, "median": 0.25, "mean": 0.4, "worst": 1.0, "diverged": 1, "mean_task": 0.6}
    assert row[list(expected)].to_dict() == pytest.approx(expected)
    assert row[["low", "high"]].tolist() == pytest.approx([0.2, 1.0]), "a quarter of the draws is one task twice"
    assert row[["clipped", "probing"]].tolist() == pytest.approx([0.5, 0.03])


def test_interval_is_that_of_all_draws(bench) -> None:
    values = [0.3, -1.0, 2.5, 0.7, 4.1]
    means = [np.mean(drawn) for drawn in itertools.product(values, repeat=5)]
    np.testing.assert_allclose(bench.regret.interval(values), np.quantile(means, [0.05, 0.95]), atol=0.06)
    assert bench.regret.interval(values) == bench.regret.interval(values)
    assert all(map(math.isnan, bench.regret.interval([1.0]))), "one task says nothing of others"


def test_a_rival_is_compared_in_the_cases_that_both_were_run_in(bench) -> None:
    runs = regrets([
        ("a", 1, "autoclip", 0.1), ("a", 2, "autoclip", 0.9), ("a", 1, "agc", 0.2),
        ("b", 1, "autoclip", 0.5), ("b", 1, "agc", 0.2), ("c", 1, "autoclip", 0.0), ("d", 1, "agc", 0.0),
    ])  # fmt: skip
    assert bench.regret.paired(runs, "autoclip", "agc").to_dict() == pytest.approx({"a": -0.1, "b": 0.3})
    assert "| AGC | 10.0 (-10.0 to 30.0) | 1 of 2 |" in bench.tables.pairs_table(runs)


def test_the_best_rivals_are_those_for_every_optimizer(bench) -> None:
    levels = {"autoclip": 0.1, "agc": 0.4, "zclip": 0.2, "spectral": 0.3, "adagc": 0.5, "stable_adamw": 0.0}
    runs = regrets([(task, 1, arm, level) for arm, level in levels.items() for task in "ab"])
    assert bench.tables.best_rivals(runs) == ["zclip", "spectral", "agc"]


# Tables and pages


def stored(bench, path, arms):
    """Writes a run of each arm in every case of the part to think on; the loss tells arm and workload."""
    cases = [(*case, arm) for case, arm in itertools.product(bench.workloads.pool("think"), arms)]
    rows = []
    for number, (name, rate, arm) in enumerate(cases):
        workload = bench.workloads.workload(name)
        key = {"workload": name, "lr": rate * workload.safe_rate, "seed": 0, "arm": arm, "steps": 300}
        loss = 1 + arms.index(arm) / 10 + (number % 7) / 100
        rest = {"kind": workload.kind, "initial": 3.0, "tail": loss, "diverged": False, "clip_share": 0.1}
        rows.append({**key, **rest, "probe_gradients": 1, "train_gradients": 300})
    pd.DataFrame(rows).to_csv(path, index=False)
    return bench.report.read(path)


def test_tables_by_part(bench, tmp_path) -> None:
    arms = ["fixed1", "autoclip", "max_norm_1", "agc", "none", "prodigy"]
    found = bench.report.tables(stored(bench, tmp_path / "runs.csv", arms), "tail", bench.report.PARTS)
    assert list(found) == ["think arms", "think tasks", "think cells", "think pairs", "think free"]
    assert [line.split(" | ")[0] for line in found["think arms"].splitlines()[2:]] == [
        "| **AutoClip**", "| max_norm = 1", "| AGC", "| no clipping",
    ]  # fmt: skip
    assert len(found["think tasks"].splitlines()) == 2 + 8
    rows = [line.split(" | ")[0] for line in found["think cells"].splitlines()[2:]]
    assert rows[:7] == [f"| {name}" for name in (*bench.workloads.SCHEDULES, *bench.workloads.OPTIMIZERS)]
    assert rows[7:] == ["| 1 x safe", "| 4 x safe", "| 16 x safe", "| 64 x safe"]
    assert "| Prodigy |" in found["think free"]
    assert "Prodigy" not in found["think arms"]


def test_the_law_is_compared_by_verdict_and_by_what_was_done(bench) -> None:
    runs = regrets([
        ("a", 1, "law_scan", 0.1), ("a", 1, "autoclip", 0.2), ("a", 1, "none", 0.3),
        ("b", 1, "law_scan", 0.5), ("b", 1, "autoclip", 0.4), ("b", 1, "none", 1.0),
        ("b", 2, "law_scan", 0.0), ("b", 2, "autoclip", 0.1), ("b", 2, "none", 0.7),
        ("c", 1, "law_scan", 0.9), ("c", 1, "autoclip", 0.9),
    ])  # fmt: skip
    reasons = ["L0L1: threshold 2 from step 0", "L0L1: threshold 3", "CONSTANT: rate at most 2", "L0L1: threshold 1"]
    runs["reason"] = None
    runs.loc[runs["arm"] == "law_scan", "reason"] = reasons
    assert bench.tables.law_table(runs).splitlines()[2:] == [
        "| the law, from a scan | `CONSTANT` | rate of 1/L0 at most | 0.0 / 0.0 | 10.0 / 10.0 | 70.0 / 70.0 | 1 | 1 |",
        "| the law, from a scan | `L0L1` | threshold | 30.0 / 50.0 | 30.0 / 40.0 | 65.0 / 100.0 | 2 | 2 |",
    ]


def test_free_optimizers_are_behind_the_best_of_any_rate(bench) -> None:
    rows = [("t/adamw/constant", 1.0, 0, 9, "fixed1", 5.0, 1.0, False)]
    rows += [
        ("t/plain/cosine", 4.0, 0, 9, arm, 5.0, loss, False) for arm, loss in (("autoclip", 2.0), ("prodigy", 3.0))
    ]
    rows += [("u/plain/cosine", 4.0, 0, 9, "autoclip", 5.0, 2.0, False)]
    runs = runs_of(rows).assign(task=["t", "t", "t", "u"])
    shown = bench.tables.free_table(runs, "tail").splitlines()[2:]
    assert [line.split(" | ")[:2] for line in shown] == [["| **AutoClip**", "25.0"], ["| Prodigy", "50.0"]]


def test_cases_with_half_an_oracle_are_left_out(bench, tmp_path) -> None:
    runs = stored(bench, tmp_path / "runs.csv", ["fixed1", "fixed2", "autoclip"])
    first = runs.index[runs["arm"] == "fixed2"][0]
    cases = bench.report.compared(runs.drop(index=first), "tail")
    assert (cases["arm"] == "autoclip").sum() == (runs["arm"] == "autoclip").sum() - 1
    said = bench.report.notes(runs.drop(index=first), "tail")
    assert f"whole oracle: {len(cases) // 3} of {len(runs) // 3}" in said
    assert "shortened 10.0% of the steps; its probe took 0.3% more" in said


def test_a_page_gets_the_tables_that_it_has_places_for(bench) -> None:
    page = (
        "a\n<!-- begin: think arms by report.py -->\nold\n<!-- end -->\nb\n<!-- begin: x by y.py -->\nc\n<!-- end -->"
    )
    assert bench.report.blocks(page) == ["think arms"]
    assert bench.report.written(page, {"think arms": "new", "final arms": "no"}) == page.replace("old", "new")
    assert bench.report.written(page, {}) == page


def test_the_script_reads_runs_of_one_length_and_writes_the_page(bench, tmp_path, monkeypatch, capsys) -> None:
    path, page = tmp_path / "runs.csv", tmp_path / "page.md"
    found = bench.report.tables(stored(bench, path, ["fixed1", "autoclip", "agc", "none"]), "tail", ["think"])
    page.write_text("<!-- begin: think pairs by report.py -->\n<!-- end -->\n", encoding="utf-8")
    longer = pd.read_csv(path).assign(steps=2000, tail=2.9)
    longer.to_csv(path, mode="a", header=False, index=False)
    monkeypatch.setattr("sys.argv", ["report.py", str(path), "--write", str(page)])
    bench.report.main()
    assert found["think pairs"] in page.read_text(encoding="utf-8")
    assert found["think arms"] in capsys.readouterr().out


def test_results_of_another_pool_are_refused(bench, tmp_path, monkeypatch) -> None:
    path = tmp_path / "runs.csv"
    runs_of([("lstm-ptb", 1.0, 0, 300, "none", 10.0, 4.0, False)]).to_csv(path, index=False)
    monkeypatch.setattr("sys.argv", ["report.py", str(path)])
    with pytest.raises(SystemExit, match="Found `lstm-ptb`"):
        bench.report.main()


@pytest.mark.filterwarnings("ignore:vert")
def test_a_figure_has_a_panel_for_each_part(bench, tmp_path) -> None:
    runs = bench.report.compared(stored(bench, tmp_path / "runs.csv", ["fixed1", "autoclip", "autoclip_x4"]), "tail")
    path = tmp_path / "figure.png"
    bench.report.figure({"think": runs, "choose": runs}, path)
    assert path.stat().st_size > 10_000


def test_tables_on_the_page_are_those_of_the_stored_runs(bench) -> None:
    page = (REPOSITORY / "docs" / "autoclip.md").read_text(encoding="utf-8")
    names = bench.report.blocks(page)
    found = bench.report.tables(bench.report.read(FOLDER / "results.csv"), "tail", bench.report.PARTS)
    assert set(names) <= set(found)
    assert bench.report.written(page, found) == page
