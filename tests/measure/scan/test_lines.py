"""measure.scan.lines: lines lead where their names say, and unknown names are refused."""

import math

import pytest
import torch
from torch import nn

import smoothdiag as sd
from smoothdiag import vectors
from smoothdiag.measure.scan.lines import Targets, direction, named_vector, names_of, reach_of

START = [torch.full((3, 4), 2.0), torch.zeros(5), torch.full((6,), -0.5)]
GRADIENT = [torch.ones(3, 4), torch.ones(5), torch.zeros(6)]
THERE = [torch.ones(3, 4), torch.ones(5), torch.zeros(6)]
TENSORS = {"first": 0, "second": 1, "third": 2}
TARGETS = Targets(TENSORS, {"end": THERE}, update=GRADIENT)


def along(name: str, seed: int = 0) -> list[torch.Tensor]:
    return direction(name, START, GRADIENT, TARGETS, seed=seed)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("gradient up", GRADIENT),
        ("gradient down", [-x for x in GRADIENT]),
        ("update", GRADIENT),
        ("gradient in second", [0 * START[0], GRADIENT[1], 0 * START[2]]),
        ("to end", [b - a for a, b in zip(START, THERE, strict=True)]),
        ("from end", [a - b for a, b in zip(START, THERE, strict=True)]),
    ],
)
def test_a_line_leads_where_its_name_says(name, wanted) -> None:
    length = math.sqrt(sum(float(x.square().sum()) for x in wanted))
    for found, expected in zip(along(name), wanted, strict=True):
        torch.testing.assert_close(found, expected / length)


def test_layers_are_as_long_as_their_tensors_and_random_lines_know_no_layers() -> None:
    sizes = [float(x.norm()) for x in START]
    lengths = [float(x.norm()) for x in along("layers 1")]
    whole = math.sqrt(sum(s**2 for s in sizes))
    assert lengths == pytest.approx([s / whole for s in sizes], rel=1e-6)
    assert float(along("random 1")[1].norm()) > 0


@pytest.mark.parametrize("kind", ["random", "layers"])
def test_numbers_and_seeds_draw_other_lines_and_each_line_is_itself_again(kind) -> None:
    first = along(f"{kind} 1")
    for other in (along(f"{kind} 2"), along(f"{kind} 1", seed=1)):
        assert abs(float(vectors.dot(first, other))) < 0.9
    assert all(torch.equal(a, b) for a, b in zip(first, along(f"{kind} 1"), strict=True))


def test_a_line_in_one_tensor_moves_no_other() -> None:
    found = along("in third")
    assert [bool(x.any()) for x in found] == [False, False, True]
    assert float(found[2].norm()) == pytest.approx(1)
    assert not torch.equal(found[2], along("in third", seed=1)[2])


def test_limits_are_measured_by_what_moves() -> None:
    assert reach_of("in first", START, TARGETS) == reach_of("gradient in first", START, TARGETS)
    assert reach_of("in first", START, TARGETS) == pytest.approx(2 * 12**0.5)
    whole = float(vectors.norm(START))
    assert reach_of("random 1", START, TARGETS) == pytest.approx(whole)
    assert reach_of("in second", START, TARGETS) == pytest.approx(whole)  # its norm is zero


def test_lines_of_all_kinds_come_first_unless_directions_are_given() -> None:
    names = names_of(None, Targets(TENSORS), START)
    assert len(names) == len(set(names))
    assert names[:4] == ["gradient up", "gradient down", "random 1", "layers 1"]
    assert names[4:8] == ["gradient in first", "in first", "gradient in third", "in third"]
    assert names[10:12] == ["layers 2", "random 2"]
    assert names_of(None, TARGETS, START)[2:5] == ["update", "to end", "from end"]


def test_the_only_tensor_has_no_lines_of_its_own() -> None:
    assert names_of(None, Targets({"x": 0}), START[:1])[4:6] == ["layers 2", "random 2"]


@pytest.mark.parametrize(
    ("directions", "message"),
    [
        (["uphill"], "should hold names out of .* Found 'uphill'"),
        (["random 0"], "Found 'random 0'"),
        (["random"], "Found 'random'"),
        (["to start"], "needs a checkpoint of this name in `toward`. Found 'end'"),
        (["in fourth"], "needs a trainable parameter of this name. Found 'first', 'second', 'third'"),
        (["gradient in "], "should hold names out of"),
        (["random 1", "random 1"], "a list of different names"),
        ("random 1", "a list of names"),
        ([], "a list of names"),
        ([3], "should hold names out of"),
    ],
)
def test_unknown_names_are_refused(directions, message) -> None:
    with pytest.raises(ValueError, match=message):
        names_of(directions, TARGETS, START)


def test_an_update_that_was_not_given_is_asked_for() -> None:
    with pytest.raises(ValueError, match="needs the parameter `update`"):
        names_of(["update"], Targets(TENSORS), START)


def test_state_dicts_are_read_by_name_and_in_the_order_of_the_parameters() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    state = {name: torch.full_like(value, float(i)) for i, (name, value) in enumerate(model.state_dict().items())}
    found = named_vector("update", dict(reversed(state.items())), model, list(model.parameters()))
    assert all(torch.equal(x, state[name]) for x, (name, _) in zip(found, model.named_parameters(), strict=True))
    with pytest.raises(ValueError, match=r"shape \(3, 2\) named `0.weight`.*Found nothing"):
        named_vector("update", {}, model, list(model.parameters()))
    with pytest.raises(ValueError, match=r"Found shape \(1,\)"):
        named_vector("update", state | {"0.weight": torch.zeros(1)}, model, list(model.parameters()))
    with pytest.raises(ValueError, match="should be a mapping"):
        named_vector("update", [torch.zeros(1)], model, list(model.parameters()))
    with pytest.raises(ValueError, match=r"`update` should hold finite numbers. Found others in `2.bias`"):
        named_vector("update", state | {"2.bias": torch.tensor([torch.nan])}, model, list(model.parameters()))


def test_a_tied_parameter_is_found_under_either_name() -> None:
    model = nn.ModuleDict({"one": nn.Linear(2, 2, bias=False), "two": nn.Linear(2, 2, bias=False)})
    model["two"].weight = model["one"].weight
    (found,) = named_vector("update", {"two.weight": torch.ones(2, 2)}, model, list(model.parameters()))
    assert torch.equal(found, torch.ones(2, 2))


def test_a_scan_walks_towards_checkpoints_and_along_updates() -> None:
    problem = sd.problems.exponential(dim=2)
    model = problem.as_module(torch.tensor([1.0, 1.0], dtype=torch.float64))
    there = {"x": torch.tensor([1.0, 3.0], dtype=torch.float64)}
    points = []

    def noted(step: sd.Step) -> sd.Estimate:
        points.append(step.start[0].clone())
        return sd.Estimate("own", 1.0, 1.0, 0.0, step.at_start.loss)

    trace = sd.scan(
        model,
        lambda model, batch: model(),
        [None],
        directions=["to there", "from there", "update"],
        toward={"there": there},
        update={"x": torch.tensor([-3.0, 0.0])},
        estimators=[noted],
        points=2,
        progress=False,
    )
    lines = [row["scan"] for row in trace if row["status"] == "ok"]
    for line, y in zip(lines, points, strict=True):
        x, z = y.tolist()
        assert line == "start" or (z == 1.0 and x < 1 if line == "update" else x == 1.0)
        assert line not in ("to there", "from there") or (z > 1) == (line == "to there")
