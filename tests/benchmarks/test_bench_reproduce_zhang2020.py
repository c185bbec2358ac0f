"""benchmarks/reproduce: clipped momentum steps as published, and the page compares its curves as it says."""

import argparse
import importlib
import math
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from places import REPOSITORY
from torch import nn

FOLDER = REPOSITORY / "benchmarks" / "reproduce"
NAMES = ("experiment", "kept", "learning", "clipped_curves", "zhang2020", "batching")


@pytest.fixture(scope="module")
def bench():
    before = list(sys.path)
    sys.path[:0] = [str(folder) for folder in (FOLDER, FOLDER.parent / "autoclip", FOLDER.parent)]
    found = SimpleNamespace(**{name: importlib.import_module(name) for name in NAMES})
    sys.path[:] = before
    return found


class Point(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.tensor([3.0, -4.0], dtype=torch.float64))


def released(x, grads, lr, gamma, momentum, nu, weight_decay):
    """`MixClip` and `SGDClip` as released, on one tensor; without a gamma its `SGD`."""
    m = np.zeros_like(x)
    for grad in grads:
        g = grad + weight_decay * x
        m = momentum * m + (1 - momentum) * g
        if math.isinf(gamma):
            x = x - lr * (m if momentum else g)
        elif nu:
            x = x - lr * nu / (1 + np.linalg.norm(m) / gamma * lr) * m
            x = x - lr * (1 - nu) / (1 + np.linalg.norm(g) / gamma * lr) * g
        else:
            x = x - min(lr, gamma / np.linalg.norm(g)) * g
    return x


@pytest.mark.parametrize("task", ["cifar", "ptb"])
@pytest.mark.parametrize("factor", [1.0, 1 / 3])
def test_settings_take_the_steps_of_the_released_code(bench, task: str, factor: float) -> None:
    grads = np.random.default_rng(0).normal(size=(4, 2))
    for name, setting in bench.zhang2020.SETTINGS[task].items():
        model = Point()
        optimizer = setting.optimizer(model, factor, 0.01)
        for grad in grads:
            model.x.grad = torch.tensor(grad)
            optimizer.step()
        lr, gamma = setting.lr * factor, setting.longest_step * factor
        expected = released(np.array([3.0, -4.0]), grads, lr, gamma, setting.momentum, setting.nu, 0.01)
        torch.testing.assert_close(model.x.detach(), torch.tensor(expected), msg=f"{task}, {name}")


def test_published_settings_are_those_of_the_figure(bench) -> None:
    found = {
        task: [(s.lr, s.longest_step, s.momentum) for name, s in settings.items() if name in bench.zhang2020.METHODS]
        for task, settings in bench.zhang2020.SETTINGS.items()
    }
    inf = math.inf
    assert found["cifar"] == [(1.0, inf, 0.9), (1.0, 1.0, 0.0), (1.5, 0.25, 0.9), (1.0, 1.0, 0.999)]
    assert found["ptb"] == [(5.0, inf, 0.0), (30.0, 7.5, 0.0), (50.0, 2.5, 0.9), (30.0, 5.0, 0.999)]


def test_stairs_fall_at_epochs_80_and_120_of_150(bench) -> None:
    found = [bench.zhang2020.stairs(epoch / 150) for epoch in (0, 79, 80, 119, 120, 149)]
    assert found == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def line(bench, steps=6, every=2):
    """A course on one point: the logits are x and the target is the first class; two batches are held out."""

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x = nn.Parameter(torch.tensor([0.0, 1.0]))

        def forward(self, inputs):
            return self.x.expand(len(inputs), 2)

    batch = torch.zeros(4), torch.zeros(4, dtype=torch.long)
    data = bench.batching.Data(lambda seed: iter([batch] * 100), batch)
    return bench.learning.Course(Logits, lambda: data, steps, every, lambda share: 1.0 - share)


def test_curves_are_those_of_a_slow_twin(bench) -> None:
    seen = iter(range(100))
    curves = bench.learning.train(
        line(bench), lambda model: torch.optim.SGD(model.parameters(), 3.0), 0, observer=lambda m, o: lambda: next(seen)
    )
    x, losses, valid, right = np.array([0.0, 1.0]), [], [], []
    for k in range(6):
        share = 1 / (1 + math.exp(x[1] - x[0]))
        losses.append(-math.log(share))
        x = x + 3.0 * (1 - k / 6) * (1 - share) * np.array([1.0, -1.0])
        valid.append(math.log(1 + math.exp(x[1] - x[0])))
        right.append(float(x[0] > x[1]))
    assert curves["step"] == [2, 4, 6]
    assert curves["train"] == pytest.approx([(losses[i] + losses[i + 1]) / 2 for i in (0, 2, 4)], rel=1e-5)
    assert curves["valid"] == pytest.approx(valid[1::2], rel=1e-5)
    assert curves["right"] == right[1::2]
    assert curves["seen"] == [0.5, 2.5, 4.5]


def test_dry_run_takes_two_steps_of_few_examples(bench, tmp_path) -> None:
    places = [bench.experiment.Place("full", torch.device("cpu"), tmp_path, dry) for dry in (False, True)]
    whole = line(bench)
    assert bench.learning.at(places[0], whole) is whole
    short = bench.learning.at(places[1], whole)
    assert (short.steps, short.every, short.model) == (2, 2, whole.model)
    batches = [next(short.data().batches(0)), short.data().validation]
    assert [[len(part) for part in batch] for batch in batches] == [[2, 2], [2, 2]]


def test_run_that_diverges_has_curves_of_the_same_length(bench) -> None:
    curves = bench.learning.train(line(bench), lambda model: torch.optim.SGD(model.parameters(), math.inf), 0)
    assert curves["step"] == [2, 4, 6]
    assert all(math.isnan(x) for x in curves["valid"])


def test_goal_is_reached_between_two_evaluations(bench) -> None:
    curves = {"step": [10, 20, 30], "valid": [3.0, 2.0, 1.0]}
    reached = bench.learning.reached
    assert [reached(curves, goal) for goal in (3.5, 2.25, 2.0, 1.9)] == pytest.approx([10, 17.5, 20, 21])
    assert math.isnan(reached(curves, 0.5))
    assert bench.learning.smoothed([3.0, 2.0, 1.0, 0.0]) == [3.0, 2.5, 2.0, 1.0]


def test_cifar_is_judged_before_the_first_decay_and_penn_treebank_at_the_end(bench) -> None:
    curves = {"step": list(range(16, 241, 16)), "train": list(range(15)), "valid": list(range(15))}
    assert bench.zhang2020.judged("cifar", curves, 240) == pytest.approx(6.5)  # steps 97 to 128
    assert bench.zhang2020.judged("ptb", curves, 240) == 13
    assert math.isnan(bench.zhang2020.judged("ptb", curves | {"valid": [1e9] * 15}, 240))
    assert math.isnan(bench.zhang2020.judged("ptb", curves | {"valid": [math.nan] * 15}, 240))


def test_gap_is_clear_if_it_exceeds_what_seeds_do(bench) -> None:
    a, b = pd.Series({0: 1.0, 1: 1.1, 2: 1.2}), pd.Series({1: 1.8, 2: 1.9})
    found = bench.clipped_curves.gap(a, b)
    assert (found.mean, found.spread, found.number) == (pytest.approx(-0.7), pytest.approx(0.1), 2)
    assert found.clear
    assert not bench.clipped_curves.gap(a, b - 0.1).clear
    assert str(bench.clipped_curves.gap(a, pd.Series({1: math.nan, 2: 1.5}))) == "no comparison"


@pytest.mark.parametrize("seeds", [2, 3])
def test_two_equal_methods_differ_clearly_at_most_once_in_twenty_times(bench, seeds: int) -> None:
    found = [bench.clipped_curves.by_luck(seeds, ratio) for ratio in (0.0, 0.1, 0.3, 0.5, 1.0)]
    assert found[0] == pytest.approx(0.05, abs=0.0015)
    assert found == sorted(found, reverse=True)


def test_bound_for_two_seeds_is_that_of_a_cauchy_distribution(bench) -> None:
    # Mean and range of two normal numbers are independent, so their ratio is half a Cauchy number.
    assert bench.clipped_curves.NEEDED[2] == pytest.approx(math.tan(0.475 * math.pi) / 2, abs=0.01)


def grid(bench, values):
    zhang = bench.zhang2020
    runs = [
        {"task": "ptb", "method": m, "factor": factor, "seed": zhang.CHOSEN_BY, "judged": value}
        for m in zhang.GRIDS["ptb"]
        for factor, value in zip(zhang.FACTORS["ptb"], values, strict=True)
    ]
    return pd.DataFrame(runs)


def test_one_seed_chooses_the_rate_and_the_others_judge(bench) -> None:
    zhang = bench.zhang2020
    assert zhang.then("quick", pd.DataFrame()) == {}
    runs = zhang.then("quick", grid(bench, (2.0, 1.5, math.nan))).values()
    assert {run.factor for run in runs} == {1.0}
    assert {run.seed for run in runs} == set(zhang.JUDGED_BY)
    assert {run.factor for run in zhang.then("quick", grid(bench, (1.0, 1.5, 0.5))).values()} == {3.0}
    assert zhang.then("quick", grid(bench, (math.nan,) * 3)) == {}
    assert zhang.best_factor(grid(bench, (1.0, 2.0, 3.0)).iloc[1:], "ptb", "SGD") is None


def test_second_stage_follows_from_the_first_and_is_made_once(bench, tmp_path) -> None:
    made = []

    def run(case, place):
        made.append(case)
        return {"value": case}

    work = bench.experiment.Experiment(
        "test",
        lambda size: {"a": 1, "b": 2},
        run,
        tables=lambda rows: {},
        page="",
        then=lambda size, rows: {"c": 10 * int(rows["value"].max())},
    )
    args = argparse.Namespace(
        size="quick", device=torch.device("cpu"), traces=tmp_path, dry_run=False, only=None, results=tmp_path
    )
    for _ in range(2):
        kept = bench.experiment.make(work, args)
        assert [row["value"] for row in kept.rows] == [1, 2, 20]
    assert made == [1, 2, 20]


def test_random_crops_move_images_by_up_to_four_pixels(bench) -> None:
    image = torch.arange(1.0, 65).view(1, 1, 8, 8).expand(32, 3, 8, 8)
    data = bench.batching.Data(lambda seed: iter([(image, torch.arange(32))]), None)
    x, y = next(bench.zhang2020.augmented(data).batches(0))
    assert x.shape == image.shape
    assert torch.equal(y, torch.arange(32))
    corners = set()
    for cut in x[:, 0]:
        turned = [cut, cut.flip(-1)]
        fits = [
            (i, j, k)
            for k, each in enumerate(turned)
            for i in range(-4, 5)
            for j in range(-4, 5)
            if torch.equal(each, shifted(image[0, 0], i, j))
        ]
        assert len(fits) == 1
        corners.add(fits[0])
    assert len(corners) > 20
    assert {k for *_, k in corners} == {0, 1}


def shifted(image, i, j):
    padded = nn.functional.pad(image, (4, 4, 4, 4))
    return padded[4 + i : 12 + i, 4 + j : 12 + j]


def test_page_has_the_tables_of_the_results(bench) -> None:
    experiment = bench.zhang2020.EXPERIMENT
    rows = bench.kept.Kept(FOLDER / "results" / "zhang2020-quick.jsonl").frame()
    page = (REPOSITORY / experiment.page).read_text(encoding="utf-8")
    found = experiment.tables(rows)
    assert page.count("<!-- begin: ") == len(found)
    assert bench.experiment.put(page, "zhang2020.py", found) == page
