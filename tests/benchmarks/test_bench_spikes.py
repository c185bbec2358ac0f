"""benchmarks/spikes: plants change nothing before they begin, spikes are found by pairs, and rules are as published."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from places import REPOSITORY
from scripts import load, modules
from torch.nn import functional as F

pytestmark = pytest.mark.thorough

FOLDER = REPOSITORY / "benchmarks" / "spikes"


@pytest.fixture(scope="module")
def bench():
    names = ("drawn_logs", "loops", "plants", "pairs", "planted", "rescue", "rules", "store", "texts")
    found = modules(FOLDER, *names)
    found.report = load(FOLDER / "report.py")
    return found


def curve(loss, grad_norm=None):
    loss = np.asarray(loss, dtype=float)
    norm = np.ones(len(loss)) if grad_norm is None else np.asarray(grad_norm, dtype=float)
    return pd.DataFrame({"step": range(len(loss)), "loss": loss, "grad_norm": norm})


# Plants


def test_narrow_layer_changes_nothing_in_float32_and_rounds_or_overflows_in_narrow_dtypes(bench) -> None:
    x, weight = torch.randn(8, 16), torch.randn(4, 16)
    layer = bench.texts.Narrow()
    layer.gain.fill_(1e6)
    layer.dtype = torch.float16
    assert not torch.isfinite(layer(x, weight)).all()
    layer.gain.fill_(1.0)
    layer.shift.fill_(bench.plants.HALFWAY["last"][0])
    layer.dtype = torch.bfloat16
    assert (layer(x, weight) - F.linear(x, weight)).abs().max() > 1
    layer.dtype = torch.float32  # autocast refuses it, and leaves everything as it is
    with pytest.warns(UserWarning, match="autocast"):
        torch.testing.assert_close(layer(x, weight), F.linear(x, weight), rtol=0, atol=2e-3)


@pytest.mark.parametrize("model", ["gpt", "lstm"])
@pytest.mark.parametrize("cause", ["corrupted batch", "wrong mask", "rate x 8", "edge", "stale moment", "numerics"])
def test_plant_changes_nothing_outside_of_its_steps(bench, model: str, cause: str) -> None:
    tokens = torch.arange(40).view(2, 20)
    batch = tokens[:, :-1], tokens[:, 1:]
    for seed in range(12):
        plant = bench.planted.Planted(model, cause, seed).plant
        assert 0 <= plant.begins <= plant.start < plant.end < bench.planted.STEPS
        for step in (plant.begins - 1, plant.end):
            if step >= 0 and cause != "stale moment":
                assert plant.batch(step, batch) is batch
                assert (plant.rate(step), plant.max_norm(step)) == (1.0, None)
        changed = plant.batch(plant.start, batch)
        by_batch = len(changed) == 3 or not all(map(torch.equal, changed, batch))
        assert by_batch == (cause in ("corrupted batch", "wrong mask"))
        run = bench.planted.Planted(model, cause, seed)
        assert run.plant.kind == plant.kind
        assert {each.setting for each in run.attempts} == {run.setting}


def test_stale_moment_is_clipped_until_the_threshold_is_lifted(bench) -> None:
    plant = bench.planted.Planted("gpt", "stale moment", 1).plant
    norms = [plant.max_norm(step) for step in range(plant.start - 1, plant.start + plant.over)]
    assert norms == pytest.approx([plant.small ** (1 - i / plant.over) for i in range(plant.over + 1)])
    assert plant.max_norm(plant.start + plant.over) is None


def test_half_of_the_seeds_of_one_model_are_there_to_think_with(bench) -> None:
    runs = bench.planted.pool(["gpt", "lstm"])
    assert len(runs) == 2 * 6 * 12
    assert {(run.model, run.seed) for run in runs if run.part == "think"} == {("gpt", seed) for seed in range(6)}


# Spikes by pairs


def test_spike_is_far_above_the_pair_and_above_the_past_of_the_run(bench) -> None:
    noise = np.random.default_rng(0).normal(size=300)
    pair = curve(2 + 0.1 * noise)
    run = pair["loss"].copy()
    run[200] += 1.0
    spike = bench.pairs.first_spike(curve(run), pair, 0)
    assert (spike.step, spike.column) == (200, "loss")
    assert spike.size == pytest.approx(10, rel=0.3)
    assert spike.last == 200
    run[202], run[206] = 3.0, 3.0
    assert bench.pairs.first_spike(curve(run), pair, 0).last == 202
    run[[200, 202, 206]] = pair["loss"][[200, 202, 206]]
    assert bench.pairs.first_spike(curve(run), pair, 0) is None
    slow = pair["loss"] + np.linspace(0, 2, 300)  # far above the pair, but never sudden
    assert bench.pairs.first_spike(curve(slow), pair, 0) is None


def test_norm_spikes_by_its_logarithm_and_what_is_not_finite_spikes(bench) -> None:
    norm = np.exp(0.1 * np.random.default_rng(0).normal(size=300))
    loss = np.ones(300) + 0.1 * norm
    high = norm.copy()
    high[150] *= 3
    spike = bench.pairs.first_spike(curve(loss, high), curve(loss, norm), 0)
    assert (spike.step, spike.column) == (150, "grad_norm")
    high[140] = math.nan
    spike = bench.pairs.first_spike(curve(loss, high), curve(loss, norm), 0)
    assert (spike.step, spike.size) == (140, math.inf)


# Published rules, step by step as they were released


def six_sigma_by_step(values: pd.DataFrame) -> list[int]:
    """OLMo-core, `SkipStepOptimizer.get_step_factor`, with its lists."""
    losses, norms, found = [], [], []
    for step, loss, norm in values[["step", "loss", "grad_norm"]].itertuples(index=False):
        for history, latest in ((losses, loss), (norms, norm)):
            history.append(torch.tensor(latest, dtype=torch.float64))
            del history[: -(128 + 1)]
        if len(losses) < 64:
            continue
        bad = False
        for history in (losses, norms):
            std, mean = torch.std_mean(torch.stack(history[:-1]))
            bad |= not bool(history[-1] - mean <= 6 * std)
        if bad:
            found.append(step)
    return found


def test_six_sigma_is_that_of_olmo(bench) -> None:
    random = np.random.default_rng(0)
    values = curve(random.normal(size=400), 1 + random.random(400))
    values.loc[[30, 62, 63, 200, 310], "loss"] += 12
    values.loc[[201, 390], "grad_norm"] += 9
    found = bench.rules.six_sigma(values)
    assert found == six_sigma_by_step(values)
    assert {200, 390} <= set(found)
    assert 30 not in found
    values.loc[250, "loss"] = math.nan
    assert bench.rules.six_sigma(values).count(250) == 1


def test_zclip_is_that_of_its_authors(bench) -> None:
    random = np.random.default_rng(0)
    norms = 1 + 0.1 * random.normal(size=200)
    norms[[60, 61, 150]] += [1, 2, 5]
    mean, var = norms[:25].mean(), norms[:25].var()
    expected = []
    for step in range(25, 200):  # `ZClip.step` with the mode "zscore" and its defaults, without max_grad_norm
        std = var**0.5
        z = (norms[step] - mean) / (std + 1e-6)
        value = norms[step]
        if z > 2.5:
            expected.append(step)
            value = mean + (2.5 * std) / (z / 2.5)
        mean = 0.97 * mean + (1 - 0.97) * value
        var = 0.97 * var + (1 - 0.97) * (value - mean) ** 2
    assert bench.rules.z_clip(curve(norms, norms)) == expected
    assert {60, 61, 150} <= set(expected)


# The report


def test_flags_near_the_first_step_of_a_spike_count_and_those_before_the_plant_do_not(bench) -> None:
    def place(*flagged: int, last: int = 102):
        return bench.report.detecting({"start": 100, "spike": 102, "last": last, "flagged": list(flagged)})

    assert place(40, 99) is None
    assert place(99, 100) == 1
    assert place(107) == 0
    assert place(108) is None
    assert place(108, last=110) == 0


def test_confusion_counts_the_first_answer_and_alarms_count_every_flag(bench, monkeypatch, tmp_path) -> None:
    store = bench.store
    runs, flags = tmp_path / "runs.csv", tmp_path / "flags.csv"
    monkeypatch.setattr(bench.report, "RUNS", runs)
    monkeypatch.setattr(bench.report, "FLAGS", flags)
    planted = {"pool": "planted", "part": "think", "model": "gpt", "start": 100, "spike": 100, "last": 100}
    planted |= {"steps": 300}
    store.append(runs, store.RUN_COLUMNS, planted | {"run": "a", "cause": "edge", "seed": 0})
    store.append(runs, store.RUN_COLUMNS, planted | {"run": "b", "cause": "wrong mask", "seed": 0})
    store.append(runs, store.RUN_COLUMNS, planted | {"run": "c", "cause": "edge", "seed": 1, "spike": ""})
    store.append(runs, store.RUN_COLUMNS, {"run": "d", "pool": "clean", "steps": 2000})
    store.append(
        flags, store.FLAG_COLUMNS, {"run": "a", "rule": "guard", "steps": "7 101 102", "answers": "x edge data"}
    )
    store.append(flags, store.FLAG_COLUMNS, {"run": "b", "rule": "guard", "steps": "150", "answers": "data"})
    store.append(flags, store.FLAG_COLUMNS, {"run": "c", "rule": "guard", "steps": "", "answers": ""})
    store.append(flags, store.FLAG_COLUMNS, {"run": "d", "rule": "guard", "steps": "5", "answers": "edge"})
    found = bench.report.tables(bench.report.joined())
    assert "| edge | 0 | **1** | 0 | 0 | 0 |" in found["think causes"]
    assert "right: 1 of 1" in found["think causes"]
    assert "| all |  | 1 of 2 |" in found["think detection"]
    assert "| tasks that it was built with | 1 | 2,000 | 1 (5.00) |" in found["alarms"]
    assert "| planted runs, before the plant | 3 | 300 | 1 (33.33) |" in found["alarms"]
    assert "| `d` | nan | 1 | 0 | 1 | 0 | 0 | 0 |" in found["alarm runs"]
    page = "<!-- begin: alarms by benchmarks/spikes/report.py -->\nold\n<!-- end -->\n"
    assert "old" not in bench.report.written(page, found)


def test_page_has_all_tables_of_the_stored_runs(bench) -> None:
    path = REPOSITORY / "docs" / "spikes.md"
    page = path.read_text(encoding="utf-8")
    found = bench.report.tables(bench.report.joined())
    names = [name for _, name, _, _ in bench.report.BLOCK.findall(page)]
    assert len(names) == 7
    assert set(names) <= set(found)
    assert bench.report.written(page, found) == page


@pytest.mark.slow
def test_page_has_the_tables_of_the_drawn_logs(bench) -> None:
    page = (REPOSITORY / "docs" / "spikes.md").read_text(encoding="utf-8")
    found = bench.drawn_logs.tables()
    assert {name: block for _, name, block, _ in bench.drawn_logs.BLOCK.findall(page)} == {
        name: f"\n{table}\n\n" for name, table in found.items()
    }


def test_missed_descent_is_one_for_a_run_that_diverged(bench) -> None:
    assert bench.rescue.missed(4.0, 2.5, 2.0) == pytest.approx(0.25)
    assert bench.rescue.missed(4.0, math.nan, 2.0) == bench.rescue.missed(4.0, 9.0, 2.0) == 1.0
