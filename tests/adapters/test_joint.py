"""adapters: several optimizers are one, and wrappers give what steps for them."""

import copy
import pickle
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from smoothdiag import AutoClip, Probe
from smoothdiag.adapters import Joint, adapter_of, name_of, stepping
from smoothdiag.adapters.turns import Turn


def pair() -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    first, second = (nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    first.grad, second.grad = torch.ones(2, 2), torch.ones(2, 2)
    return torch.optim.SGD([first], lr=0.1), torch.optim.AdamW([second], lr=0.2)


class Recorded(Turn):
    """A turn that writes down when it begins and ends."""

    def __init__(self, optimizer: torch.optim.Optimizer, events: list[str], name: str = "") -> None:
        super().__init__(
            optimizer, lambda args, kwargs: events.append(f"{name}begin"), lambda: events.append(f"{name}end")
        )


@pytest.mark.parametrize("turned", [False, True])
def test_a_step_begins_before_the_first_and_ends_after_the_last(turned: bool) -> None:
    events: list[str] = []
    a, b = reversed(pair()) if turned else pair()
    Recorded(Joint([a, b]), events)
    for _ in range(2):
        for optimizer, name in ((b, "b"), (a, "a")):
            optimizer.step()
            events.append(name)
    assert events == ["begin", "b", "end", "a"] * 2


def test_a_step_without_one_of_them_ends_on_request_or_with_the_next() -> None:
    events: list[str] = []
    a, b = pair()
    joint = Joint([a, b])
    Recorded(joint, events)
    a.step()
    joint.finish()
    joint.finish()
    assert events == ["begin", "end"]
    a.step()
    a.step()
    b.step()
    assert events == ["begin", "end", "begin", "end", "begin", "end"]


def test_a_copy_holds_copies_and_follows_nobody() -> None:
    joint = Joint(pair())
    events: list[str] = []
    Recorded(joint, events)
    for found in (copy.deepcopy(joint), pickle.loads(pickle.dumps(joint))):
        assert [len(group["params"]) for group in found.param_groups] == [1, 1]
        for optimizer in found.optimizers:
            optimizer.step()
        found.finish()
    assert events == []


def test_whoever_came_last_ends_a_step_last() -> None:
    events: list[str] = []
    a, b = pair()
    joint = Joint([a, b])
    probe, _ = Recorded(joint, events, "probe "), Recorded(joint, events, "clip ")
    probe.move_last()
    for act in (b.step, joint.finish):  # whichever way a step ends
        events.clear()
        a.step()
        act()
        assert events == ["probe begin", "clip begin", "clip end", "probe end"]
    events.clear()
    a.step()
    a.step()
    assert events[2:4] == ["clip end", "probe end"]


def test_a_failed_step_begins_again_and_does_not_end() -> None:
    events: list[str] = []
    a, b = pair()
    Recorded(Joint([a, b]), events)

    def fails() -> float:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        a.step(fails)
    a.step()
    b.step()
    assert events == ["begin", "begin", "end"]


@pytest.mark.thorough
@pytest.mark.parametrize("is_scheduled", [False, True])
def test_a_step_that_only_creates_the_state_for_a_checkpoint_is_none(is_scheduled: bool) -> None:
    checkpoint = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    model = nn.Linear(2, 1)
    a, b = torch.optim.SGD([model.weight], lr=0.1), torch.optim.AdamW([model.bias], lr=0.1)
    events: list[str] = []
    Recorded(Joint([a, b]), events)
    steps: list[None] = []
    a.register_step_pre_hook(lambda *given: steps.append(None))
    if is_scheduled:
        for optimizer in (a, b):
            torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    for number in (1, 2):  # SGD keeps no state, so each checkpoint takes a step of it
        checkpoint.get_optimizer_state_dict(model, [a, b])
        assert len(steps) == number
        assert events == []
    model(torch.ones(1, 2)).backward()
    a.step()
    b.step()
    assert events == ["begin", "end"]


def test_nested_steps_count_once_and_nothing_ends_within_a_step() -> None:
    class Nested(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            joint.finish()
            return super().step(closure)

    events: list[str] = []
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    a, b = Nested([parameter], lr=0.1), pair()[1]
    joint = Joint([a, b])
    turn = Recorded(joint, events)
    b.step()
    a.step()
    assert events == ["begin", "end"]
    turn.stop()
    a.step()
    joint.finish()
    assert events == ["begin", "end"]


def test_groups_and_states_are_those_of_the_members() -> None:
    a, b = pair()
    joint = Joint([a, b])
    joint.param_groups[0]["lr"] = 5.0
    assert a.param_groups[0]["lr"] == 5.0
    before = joint.state
    b.step()
    (held,) = (p for group in b.param_groups for p in group["params"])
    assert joint.state is before
    assert joint.state[held] is b.state[held]
    assert list(joint.state) == [held]
    b.load_state_dict(b.state_dict())  # which replaces the state
    assert joint.state is not before
    assert name_of(joint) == "SGD + AdamW"
    with pytest.raises(RuntimeError, match="one by one"):
        joint.step()


def test_each_answers_for_its_own_parameters() -> None:
    a, b = pair()
    a.param_groups[0]["momentum"] = 0.5
    adapter = adapter_of(Joint([a, b]))
    assert adapter.gain(a.param_groups[0]) == 2.0
    assert adapter.gain(b.param_groups[0]) == 1.0
    assert adapter.way == "mixed"
    assert adapter_of(Joint([pair()[0], pair()[0]])).way == "gradients"
    assert not adapter.follows_gradients
    held = [a.param_groups[0]["params"][0], b.param_groups[0]["params"][0]]
    assert adapter.preconditioner(held) is None
    two = Joint([b, pair()[1]])
    for member in two.optimizers:
        member.step()
    held = [two.param_groups[1]["params"][0], two.param_groups[0]["params"][0]]
    found = adapter_of(two).preconditioner(held)
    assert found is not None
    for optimizer, parameter, diagonal in zip(reversed(two.optimizers), held, found, strict=True):
        (expected,) = adapter_of(optimizer).preconditioner([parameter]) or [None]
        assert torch.equal(diagonal, expected)
    rates = Joint([pair()[0], pair()[0]])
    held = [p for group in rates.param_groups for p in group["params"]]
    assert adapter_of(rates).stability_limit(held)[0] == pytest.approx(20.0)
    rates.param_groups[1]["lr"] = 0.2
    assert adapter_of(rates).stability_limit(held)[0] != adapter_of(rates).stability_limit(held)[0]  # NaN


class Wrapper:
    """A schedule of another kind, as in many tutorials: no optimizer itself."""

    def __init__(self, optimizer: Any, name: str = "optimizer") -> None:
        setattr(self, name, optimizer)


class Container(torch.optim.Optimizer):
    """A container as torchtitan 0.2.2 has it: it holds the parameters of all in one group without options."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers, self.model_parts = list(optimizers), [nn.Linear(1, 1)]
        super().__init__([p for o in optimizers for group in o.param_groups for p in group["params"]], {})

    def __iter__(self) -> Iterator[torch.optim.Optimizer]:
        return iter(self.optimizers)

    def __len__(self) -> int:
        return len(self.optimizers)

    def step(self, closure: Any = None) -> None:
        for optimizer in self.optimizers:
            optimizer.step()


class Pair(torch.optim.Optimizer):
    """A container with a name for each, as people write it for one trainer."""

    def __init__(self, first: torch.optim.Optimizer, second: torch.optim.Optimizer) -> None:
        self.first, self.second = first, second
        self.param_groups, self.defaults = first.param_groups + second.param_groups, {}

    def step(self, closure: Any = None) -> None:
        self.first.step()
        self.second.step()


class SharpnessAware(torch.optim.Optimizer):
    def __init__(self, base: torch.optim.Optimizer) -> None:
        super().__init__(base.param_groups, {})
        self.base_optimizer = base

    def first_step(self) -> None: ...


class Lookahead(torch.optim.Optimizer):
    def __init__(self, base: torch.optim.Optimizer) -> None:
        super().__init__(base.param_groups, {})
        self.optimizer = base


def test_wrappers_give_what_steps_for_them() -> None:
    a, b = pair()
    assert stepping(a) is a
    assert stepping([a]) is a
    for one in (Wrapper(a), Wrapper(Wrapper(a)), SharpnessAware(a), Container(a)):
        assert stepping(one) is a, one
    assert stepping(torch.optim.lr_scheduler.LambdaLR(a, lambda step: 1.0)) is a
    lookahead = Lookahead(a)
    assert stepping(lookahead) is lookahead  # it moves the parameters itself
    both = ([a, b], (Wrapper(a), b), Container(a, b), Pair(a, b), Wrapper(Pair(a, b)), [Container(a), Wrapper(b)])
    for several in both:
        found = stepping(several)
        assert isinstance(found, Joint), several
        assert found.optimizers == (a, b)
        assert stepping(found) is found


@pytest.mark.thorough
def test_accelerate_wrapper_gives_the_optimizer() -> None:
    accelerate = pytest.importorskip("accelerate")
    a, b = pair()
    wrapped = accelerate.Accelerator(cpu=True).prepare(a, b)
    assert stepping(wrapped[0]) is a
    found = stepping(wrapped)
    assert isinstance(found, Joint)
    assert found.optimizers == (a, b)


def test_what_cannot_be_followed_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = pair()
    (shared,) = a.param_groups[0]["params"]
    wrong: list[tuple[Any, str]] = [
        (None, "None"),
        ([], r"optimizer = \[\]"),
        ([a, "b"], "a list of them"),
        (Wrapper(None), "Wrapper"),
        (Wrapper(a, "base"), "holds one as its `optimizer`. Found `optimizer = Wrapper`"),
        (type("Lookahead", (Wrapper,), {})(a), "Lookahead"),  # it moves the parameters after the step
        ([a, a], "the same SGD twice"),
        ([a, torch.optim.Adam([shared])], "shape .2, 2. in both SGD and Adam"),
    ]
    for value, said in wrong:
        with pytest.raises(ValueError, match=said):
            stepping(value)
    engine = ModuleType("deepspeed.runtime.zero.stage_1_and_2")
    monkeypatch.setitem(sys.modules, engine.__name__, engine)
    zero = type("DeepSpeedZeroOptimizer", (), {"__module__": engine.__name__, "optimizer": b})()
    for wrapped in (zero, Wrapper(zero), [a, zero]):
        with pytest.raises(ValueError, match="DeepSpeedZeroOptimizer: the engine of DeepSpeed takes the steps"):
            stepping(wrapped)


def test_a_list_with_an_optimizer_that_clipping_would_spoil_is_refused() -> None:
    model = nn.Linear(2, 1)
    optimizers = [torch.optim.SGD([model.weight], lr=0.1), torch.optim.ASGD([model.bias], lr=0.1)]
    probe = Probe(model, optimizers, lambda model, x: model(x).square().mean(), estimators=())
    with pytest.raises(ValueError, match="should keep no copy.*Found ASGD"):
        AutoClip(optimizers, probe)
    AutoClip(optimizers, probe, mode="shadow")


def test_autoclip_wants_the_optimizers_of_the_probe() -> None:
    model = nn.Linear(2, 1)
    a, b = torch.optim.SGD([model.weight], lr=0.1), torch.optim.AdamW([model.bias], lr=0.1)
    probe = Probe(model, [a, b], lambda model, x: model(x).square().mean(), estimators=())
    with pytest.raises(ValueError, match=r"SGD \+ AdamW, and AutoClip was given another SGD"):
        AutoClip(a, probe)
    assert "AutoClip of SGD + AdamW" in repr(AutoClip([b, a], probe))
    assert "Linear and SGD + AdamW" in repr(probe)
