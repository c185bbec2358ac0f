"""adapters: what each family says of an optimizer, against the steps that the optimizer really takes."""

import copy
import inspect
import math
import warnings

import pytest
import torch
from asserts import assert_identical
from third_party_optimizers import ROWS, Row
from torch import nn
from torch.utils._pytree import tree_flatten_with_path

from smoothdiag import GGNC, ClippedMomentum, ClippedScion, Euclidean, GradientDescent
from smoothdiag.adapters import FAMILIES, Adapter, adapter_of
from smoothdiag.adapters.updates import Stretch
from smoothdiag.geometry import Sign
from smoothdiag.optim import Smoothed

pytestmark = pytest.mark.thorough  # a package of optimizers imports transformers

OWN = {
    "clipped momentum": lambda p: ClippedMomentum(p, 0.5, threshold=1e9),
    "clipped mixture": lambda p: ClippedMomentum(p, 0.5, threshold=1e9, nu=0.7, momentum=0.95),
    "ggnc": lambda p: GGNC(p, 0.5, longest_step=1e9, geometry=Euclidean()),
    "sign": lambda p: GGNC(p, 0.5, longest_step=1e9, geometry=Sign()),
    "scion": lambda p: ClippedScion(p, 0.5, threshold=1e9, radius=1.0),
    "descent": lambda p: GradientDescent(p, Smoothed(1.0, 1.0)),
}
FOLLOWS = {"clipped momentum", "clipped mixture", "ggnc", "descent", *(name for name in ROWS if name.startswith("sgd"))}


def made(row: Row) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    return model, row.make(model)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, row: Row, number: int = 3) -> list[torch.Tensor]:
    """Takes some steps; returns the parameters before the last of them."""
    before: list[torch.Tensor] = []

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(torch.randn(8, 6).double()).square().mean()
        loss.backward()
        return loss

    if hasattr(optimizer, "train"):
        optimizer.train()
    for _ in range(number):
        before = [p.detach().clone() for p in model.parameters()]
        if row.loop == "plain":
            closure()
            optimizer.step()
        else:
            closure()
            optimizer.step(closure)
    return before


WATCHED = {name: row for name, row in ROWS.items() if not row.unwatched and row.loop != "two steps"}
FOLLOWING = {
    *("adam", "adam amsgrad", "adam fused", "adam tensor rate", "adamw", "adamw foreach", "adamw groups"),
    *("adamw closure", "adagrad", "nadam", "nadam decoupled", "rmsprop", "rmsprop centered"),
}
"""Rows whose last update follows from state, gradient and group. Nobody asks for updates of SGD, which follow too."""


@pytest.fixture(params=WATCHED)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def taken(name: str):
    row = WATCHED[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, optimizer = made(row)
        before = steps(model, optimizer, row)
    return model, optimizer, before


def updates(optimizer: torch.optim.Optimizer) -> list[torch.Tensor | None]:
    """Returns the last update of every parameter."""
    found: list[torch.Tensor | None] = []
    for group in optimizer.param_groups:
        formula = adapter_of(optimizer).update(group)
        for p in group["params"]:
            update = formula.last(Stretch([p], [optimizer.state[p]])) if formula else None
            found.append((update.direction * update.factor).view_as(p) if update else None)
    return found


def test_an_update_follows_from_the_state_or_is_not_told(name: str) -> None:
    model, optimizer, before = taken(name)
    found = updates(optimizer)
    assert (found[0] is not None) is (name in FOLLOWING)
    if name not in FOLLOWING:
        assert found == [None] * len(found)
        return
    digits = 1e-6 if name == "adam tensor rate" else 1e-9  # torch divides a float32 rate in float32
    for update, p, x in zip(found, model.parameters(), before, strict=True):
        torch.testing.assert_close(update, p.detach() - x, rtol=digits, atol=1e-14)


OPTIONS = {
    "adam": lambda p: torch.optim.Adam(p, 0.1, weight_decay=0.3, maximize=True),
    "adam decoupled": lambda p: torch.optim.Adam(p, 0.1, weight_decay=0.3, decoupled_weight_decay=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.3, amsgrad=True, maximize=True),
    "a rate of zero": lambda p: torch.optim.AdamW(p, 0.0, weight_decay=0.3),
    "decay of twice the parameter": lambda p: torch.optim.AdamW(p, 0.1, weight_decay=20.0),
    "a tensor of one rate": lambda p: torch.optim.Adam(p, torch.full((1,), 0.1, dtype=torch.float64)),
    "nadam": lambda p: torch.optim.NAdam(p, 0.1, maximize=True, momentum_decay=0.1, foreach=True),
    "nadam decoupled": lambda p: torch.optim.NAdam(p, 0.1, weight_decay=0.3, decoupled_weight_decay=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.1, maximize=True, foreach=True),
    "rmsprop momentum": lambda p: torch.optim.RMSprop(p, 0.1, momentum=0.9, weight_decay=0.3, maximize=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.1, lr_decay=0.5, maximize=True),
}


@pytest.mark.parametrize("options", OPTIONS)
def test_an_update_follows_whatever_the_options(options: str) -> None:
    row = Row(lambda m: OPTIONS[options](m.parameters()))
    model, optimizer = made(row)
    before = steps(model, optimizer, row)
    for update, p, x in zip(updates(optimizer), model.parameters(), before, strict=True):
        torch.testing.assert_close(update, p.detach() - x, rtol=1e-9, atol=1e-14)


HIDDEN = {
    "adamw": lambda p: torch.optim.AdamW(p, 0.1, weight_decay=10.0),
    "nadam": lambda p: torch.optim.NAdam(p, 0.1, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.1, weight_decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.1, weight_decay=0.1),
    "differentiable": lambda p: torch.optim.Adam(p, 0.1, differentiable=True),
    "sgd": lambda p: torch.optim.SGD(p, 0.1),
}
"""Rows that hide where a step began, or that nobody asks."""


@pytest.mark.parametrize("hidden", HIDDEN)
def test_an_update_that_does_not_follow_is_not_told(hidden: str) -> None:
    optimizer = HIDDEN[hidden](list(made(ROWS["sgd"])[0].parameters()))
    assert adapter_of(optimizer).update(optimizer.param_groups[0]) is None


def test_a_subclass_of_sgd_may_lack_its_options() -> None:
    class Bare(torch.optim.SGD):
        def __init__(self, params, lr: float, **options: float) -> None:
            torch.optim.Optimizer.__init__(self, params, {"lr": lr, **options})

    for options, gain in (({}, 1.0), ({"momentum": 0.5}, 2.0)):
        optimizer = Bare([nn.Parameter(torch.ones(2))], 0.1, **options)
        adapter, group = adapter_of(optimizer), optimizer.param_groups[0]
        assert (adapter.momentum(group), adapter.gain(group)) == (options.get("momentum", 0.0), gain)
        assert 0 < adapter.shortening(group) <= 1


class Lookahead_Adam(torch.optim.Adam):
    """Named like a family, made of Adam."""


def test_an_optimizer_of_a_refused_family_divides_as_its_parent_does() -> None:
    p = nn.Parameter(torch.ones(2))
    named, plain = Lookahead_Adam([p], 0.1), torch.optim.Adam([p], 0.1)
    with_rate = type("Estimating", (torch.optim.Adam,), {})([p], 0.1)
    with_rate.param_groups[0]["d"] = 1.0
    p.grad = torch.tensor([3.0, 4.0])
    for optimizer in (plain, named, with_rate):
        optimizer.step()
        expected = adapter_of(plain).preconditioner([p])
        assert_identical({"": adapter_of(optimizer).preconditioner([p])[0]}, {"": expected[0]})
        assert adapter_of(optimizer).stability_limit([p]) == adapter_of(plain).stability_limit([p])
        assert bool(adapter_of(optimizer).refusal()) is (optimizer is not plain)


def test_no_update_is_told_of_a_subclass_with_a_step_of_its_own() -> None:
    class Signed(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    class Slow(torch.optim.AdamW):
        def step(self, closure=None):
            return super().step(closure)

    for kind in (Signed, Slow):
        row = Row(lambda m, kind=kind: kind(m.parameters(), lr=0.1))
        model, optimizer = made(row)
        steps(model, optimizer, row)
        assert updates(optimizer) == [None] * 4
        assert not adapter_of(optimizer).follows_gradients


def test_asking_changes_nothing(name: str) -> None:
    model, optimizer, _ = taken(name)
    held = list(model.parameters())
    before = copy.deepcopy(everything(optimizer, held))
    adapter = adapter_of(optimizer)
    for group in optimizer.param_groups:
        assert all(math.isfinite(ask(group)) for ask in (adapter.momentum, adapter.gain, adapter.shortening))
    updates(optimizer)
    for p in held:
        assert adapter.evaluated(p).shape == p.shape
    adapter.preconditioner(held), adapter.stability_limit(held), adapter.refusal(), adapter.late_refusal(0.1)
    assert isinstance(adapter.stepping(), torch.optim.Optimizer)
    assert_identical(everything(optimizer, held), before)


def everything(optimizer: torch.optim.Optimizer, held: list[nn.Parameter]) -> dict[str, object]:
    """Returns parameters, gradients and all that the optimizer keeps, by name."""
    leaves, _ = tree_flatten_with_path([optimizer.state_dict(), [p.detach() for p in held], [p.grad for p in held]])
    return {str(path): leaf for path, leaf in leaves}


class Delegating(torch.optim.Optimizer):
    """A wrapper that passes what it does not know on to what it wraps."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner
        super().__init__(inner.param_groups, {"lr": 0.1})

    def __getattr__(self, name: str):
        return getattr(self.__dict__["inner"], name)


def test_a_wrapper_does_not_answer_as_what_it_wraps() -> None:
    wrapper = Delegating(ClippedMomentum([nn.Parameter(torch.ones(2))], 0.1, threshold=1.0))
    assert wrapper.way == "cap"
    assert adapter_of(wrapper) is not wrapper
    assert adapter_of(wrapper).way == "updates"


def test_an_attribute_in_the_place_of_an_answer_is_named() -> None:
    optimizer = ClippedMomentum([nn.Parameter(torch.ones(2))], 0.1, threshold=1.0)
    optimizer.momentum = 0.9
    with pytest.raises(ValueError, match=r"keep its method `momentum`.*Found `momentum = 0\.9` in ClippedMomentum"):
        adapter_of(optimizer)


def test_an_optimizer_may_have_no_groups_yet() -> None:
    optimizer = type("Later", (torch.optim.Optimizer,), {})([nn.Parameter(torch.ones(2))], {"lr": 0.1})
    optimizer.param_groups.clear()
    assert adapter_of(optimizer).way == "updates"


def with_wrapper(name: str, base):
    package = pytest.importorskip(name)
    p = nn.Parameter(torch.ones(3).double())
    optimizer = package.ScheduleFreeWrapper(base([p]), momentum=0.7)
    return p, optimizer


def with_class(name: str):
    p = nn.Parameter(torch.ones(3).double())
    return p, getattr(pytest.importorskip("schedulefree"), name)([p], lr=0.1)


AVERAGING = {
    "wrapped sgd": lambda: with_wrapper("schedulefree", lambda p: torch.optim.SGD(p, 0.1)),
    "wrapped momentum": lambda: with_wrapper("schedulefree", lambda p: torch.optim.SGD(p, 0.1, momentum=0.5)),
    "kozistr wrapped adam": lambda: with_wrapper("pytorch_optimizer", lambda p: torch.optim.Adam(p, 0.1)),
    "radam": lambda: with_class("RAdamScheduleFree"),
    "reference": lambda: with_class("AdamWScheduleFreeReference"),
    "closure": lambda: with_class("AdamWScheduleFreeClosure"),
    "sgd closure": lambda: with_class("SGDScheduleFreeClosure"),
}


@pytest.mark.parametrize("averaging", AVERAGING)
def test_variants_of_schedule_free_are_evaluated_where_they_put_the_iterate(averaging: str) -> None:
    p, optimizer = AVERAGING[averaging]()
    switches = [getattr(optimizer, name, lambda: None) for name in ("train", "eval")]

    def closure() -> torch.Tensor:
        p.grad = 3 * p.detach() + torch.randn(3).double()
        return p.square().sum()

    switches[0]()
    for _ in range(9):
        closure()
        optimizer.step(closure)
    expected = adapter_of(optimizer).evaluated(p).detach().clone()
    switches[1]()
    torch.testing.assert_close(p.detach(), expected)
    torch.testing.assert_close(adapter_of(optimizer).evaluated(p).detach(), expected)


@pytest.mark.parametrize("averaging", ["schedulefree sgd", "schedulefree adamw", "kozistr schedulefree"])
def test_the_evaluated_iterate_is_where_the_optimizer_puts_it(averaging: str) -> None:
    model, optimizer, _ = taken(averaging)
    expected = {str(i): adapter_of(optimizer).evaluated(p).detach().clone() for i, p in enumerate(model.parameters())}
    assert not torch.equal(expected["0"], next(model.parameters()))
    optimizer.eval()
    for i, p in enumerate(model.parameters()):
        torch.testing.assert_close(p.detach(), expected[str(i)])
    again = {str(i): adapter_of(optimizer).evaluated(p).detach() for i, p in enumerate(model.parameters())}
    assert_identical(again, {str(i): p.detach() for i, p in enumerate(model.parameters())})


def test_the_average_of_asgd_is_what_is_evaluated() -> None:
    model, optimizer, _ = taken("asgd")
    weight = next(model.parameters())
    assert adapter_of(optimizer).evaluated(weight) is optimizer.state[weight]["ax"]


@pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in OWN.items()])
def test_our_own_optimizers_answer_themselves(make) -> None:
    optimizer = make([nn.Parameter(torch.ones(3, 3))])
    assert isinstance(optimizer, Adapter)
    assert adapter_of(optimizer) is optimizer


@pytest.mark.parametrize("kind", [pytest.param(kind, id=kind.__name__) for kind in FAMILIES])
def test_every_family_keeps_to_the_protocol(kind) -> None:
    asked = {name for name in vars(Adapter) if not name.startswith("_")}
    assert asked <= set(dir(kind))
    for name in asked - {"way", "follows_gradients"}:
        expected, found = (inspect.signature(getattr(owner, name)) for owner in (Adapter, kind))
        assert list(found.parameters) == list(expected.parameters), name


def test_a_subclass_of_ours_with_a_step_of_its_own_follows_nothing() -> None:
    class Signed(ClippedMomentum):
        def step(self, closure=None):
            return super().step(closure)

    class Same(ClippedMomentum):
        """Does as its parent does."""

    class Other(GradientDescent):
        def _update(self, buckets):
            super()._update(buckets)

    held = [nn.Parameter(torch.ones(3))]
    assert not adapter_of(Signed(held, 0.1, threshold=1.0)).follows_gradients
    assert adapter_of(Same(held, 0.1, threshold=1.0)).follows_gradients
    assert not adapter_of(Other(held, Smoothed(1.0, 1.0))).follows_gradients


def test_who_follows_gradients() -> None:
    own = {name: make([nn.Parameter(torch.ones(3, 3))]) for name, make in OWN.items()}
    others = {name: made(row)[1] for name, row in ROWS.items() if not row.unwatched}
    assert {name for name, o in {**own, **others}.items() if adapter_of(o).follows_gradients} == FOLLOWS


@pytest.mark.parametrize(
    "options", [{}, {"momentum": 0.9}, {"momentum": 0.8, "dampening": 0.5}, {"momentum": 0.9, "nesterov": True}]
)
def test_gain_is_how_long_steps_become_under_a_constant_gradient(options) -> None:
    x = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = torch.optim.SGD([x], lr=0.1, **options)
    for _ in range(500):
        before, x.grad = x.detach().clone(), torch.tensor([3.0, 4.0], dtype=torch.float64)
        optimizer.step()
    length = float((x.detach() - before).norm())
    assert adapter_of(optimizer).gain(optimizer.param_groups[0]) * 0.1 * 5 == pytest.approx(length)


@pytest.mark.parametrize("make", [OWN["clipped momentum"], lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9)])
def test_shortening_is_how_long_steps_are_where_gradients_have_nothing_in_common(make) -> None:
    x = nn.Parameter(torch.zeros(20000, dtype=torch.float64))
    optimizer, group = make([x]), None
    group = optimizer.param_groups[0]
    for _ in range(200):
        before, x.grad = x.detach().clone(), torch.randn(20000).double()
        optimizer.step()
    adapter, length = adapter_of(optimizer), float((x.detach() - before).norm())
    equal = 0.5 * adapter.gain(group) * math.sqrt(20000)
    assert length == pytest.approx(adapter.shortening(group) * equal, rel=0.02)


def test_a_wrapper_that_holds_another_optimizer_is_not_the_one_that_steps() -> None:
    inner = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    wrapper = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    wrapper.optimizer = inner
    assert adapter_of(wrapper).stepping() is inner
    pytest.importorskip("pytorch_optimizer")
    _, sam = made(ROWS["kozistr sam"])
    assert adapter_of(sam).stepping() is sam.base_optimizer
