"""benchmarks/autoclip/slow_rates.py: regret is behind the best of any rate, and the page has the stored tables."""

import math

import pandas as pd
import pytest
from benched import modules
from places import REPOSITORY

pytestmark = pytest.mark.thorough


@pytest.fixture(scope="module")
def bench():
    return modules("slow_rates", "results", "workloads")


def stored(bench, path, losses):
    """Writes runs of a workload: losses by arm and rate [safe rates]. A loss of infinity is a run that diverged."""
    name = "logistic-a9a/adamw/constant"
    safe = bench.workloads.workload(name).safe_rate
    for (arm, rate), loss in losses.items():
        row = dict.fromkeys(bench.results.COLUMNS, 0)
        row |= {"workload": name, "lr": rate * safe, "arm": arm, "steps": 300, "kind": "adamw", "initial": 5.0}
        bench.results.append(path, {**row, "tail": loss, "diverged": loss == math.inf, "reason": ""})
    return bench.slow_rates.compared([path])


BEST = {("none", 1): 2.0, ("none", 4): 1.5, ("none", 16): math.inf, ("autoclip", 16): 1.0, ("autoclip", 64): 1.2}


def test_regret_is_behind_the_best_of_any_rate(bench, tmp_path) -> None:
    slow = {(arm, rate): loss for arm in ("none", "autoclip") for rate, loss in ((1 / 16, 3.0), (1 / 128, 4.0))}
    slow |= {("set_lr", 1 / 16): 0.8, ("set_lr", 1 / 128): 1.4, ("set_lr", 1): 1.8}
    found = stored(bench, tmp_path / "runs.csv", {**BEST, **slow})
    assert dict(zip(zip(found["arm"], found["rate"], strict=True), found["regret"], strict=True)) == pytest.approx(
        {arm: min((loss - 1) / 4, 1.0) for arm, loss in {**BEST, **slow}.items()}
    )
    tables = bench.slow_rates.tables(found)
    assert tables["think"].splitlines()[2:] == [
        "| adamw | no clipping | 62.5 | 62.5 | 75.0 | 62.5 | 2 | 1 |",
        "| adamw | **AutoClip** | 62.5 | 62.5 | 75.0 | 62.5 | 2 | 1 |",
        "| adamw | **`set_lr=True`** | 2.5 | 2.5 | 10.0 | 2.5 | 2 | 1 |",
    ]
    assert tables["fair"].splitlines()[2:] == [
        "| adamw | no clipping | 25.0 | 25.0 | 25.0 | 25.0 | 1 | 1 |",
        "| adamw | **`set_lr=True`** | 20.0 | 20.0 | 20.0 | 20.0 | 1 | 1 |",
    ]
    assert set(tables) == {"think", "fair"}, "nothing was raised in other ways"


def test_workloads_without_the_whole_comparison_are_left_out(bench, tmp_path) -> None:
    found = stored(bench, tmp_path / "runs.csv", {("none", 1 / 16): 3.0, **dict(list(BEST.items())[1:])})
    assert found.empty


def test_a_slow_run_does_not_set_the_best(bench, tmp_path) -> None:
    found = stored(bench, tmp_path / "runs.csv", {**BEST, ("autoclip", 1 / 16): 0.5})
    assert found["regret"].min() == pytest.approx((0.5 - 1) / 4)


def test_the_runs_are_those_of_the_best_and_of_each_arm_at_each_rate(bench) -> None:
    of = bench.slow_rates.names(["think"], bench.slow_rates.OPTIMIZERS, ["logistic-a9a", "mixer-cifar"])
    assert of == [f"logistic-a9a/{optimizer}/constant" for optimizer in ("momentum", "plain", "adamw")]
    found = pd.DataFrame(bench.slow_rates.wanted(of[:1], ["set_lr", "none"], [1 / 16, 1]))
    safe = bench.workloads.workload(of[0]).safe_rate
    pairs = sorted(zip(found["arm"], found["lr"] / safe, strict=True))
    assert pairs == sorted([*BEST, *((arm, rate) for arm in ("set_lr", "none") for rate in (1 / 16, 1))])


def test_tables_on_the_page_are_those_of_the_stored_runs(bench) -> None:
    script = bench.slow_rates
    page = (REPOSITORY / "docs" / "autoclip.md").read_text(encoding="utf-8")
    found = script.tables(script.compared([script.STORED, script.OTHERS]))
    assert {name for _, name, _, _ in script.BLOCK.findall(page)} == {"think", "choose", "ways", "fair"}
    assert script.written(page, found) == page
