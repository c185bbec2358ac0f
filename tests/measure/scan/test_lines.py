"""measure.scan.lines: lines lead where their names say, and unknown names are refused."""

import math

import pytest
import torch
from torch import nn

import smoothdiag as sd
from smoothdiag import vectors
from smoothdiag.measure.scan.lines import Targets, direction, named_vector, names_of

START = [torch.full((3, 4), 2.0), torch.zeros(5), torch.full((6,), -0.5)]
GRADIENT = [torch.ones(3, 4), torch.ones(5), torch.zeros(6)]
THERE = [torch.ones(3, 4), torch.ones(5), torch.zeros(6)]
TARGETS = Targets({"end": THERE}, update=GRADIENT)


def along(name: str, seed: int = 0) -> list[torch.Tensor]:
    return direction(name, START, GRADIENT, TARGETS, seed=seed)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("gradient up", GRADIENT),
        ("gradient down", [-x for x in GRADIENT]),
        ("update", GRADIENT),
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


def test_eleven_lines_unless_directions_are_given() -> None:
    names = names_of(None, Targets())
    assert len(names) == len(set(names)) == 11
    assert names[:4] == ["gradient up", "gradient down", "random 1", "layers 1"]
    with_targets = names_of(None, TARGETS)
    assert len(with_targets) == 11
    assert with_targets[2:5] == ["update", "to end", "from end"]


@pytest.mark.parametrize(
    ("directions", "message"),
    [
        (["uphill"], "should hold names out of .* Found 'uphill'"),
        (["random 0"], "Found 'random 0'"),
        (["random"], "Found 'random'"),
        (["to start"], "needs a checkpoint of this name in `toward`. Found 'end'"),
        (["random 1", "random 1"], "a list of different names"),
        ("random 1", "a list of names"),
        ([], "a list of names"),
        ([3], "should hold names out of"),
    ],
)
def test_unknown_names_are_refused(directions, message) -> None:
    with pytest.raises(ValueError, match=message):
        names_of(directions, TARGETS)


def test_an_update_that_was_not_given_is_asked_for() -> None:
    with pytest.raises(ValueError, match="needs the parameter `update`"):
        names_of(["update"], Targets())


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
