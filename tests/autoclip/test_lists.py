"""autoclip: one length for the step that several optimizers take together, each shortened in its own way."""

from collections.abc import Callable
from statistics import median

import pytest
import torch
from asserts import assert_identical, state_of
from losses import cross_entropy
from networks import mlp
from torch import Tensor, nn

from smoothdiag import AutoClip, ClippedMomentum, Probe, StepRule
from smoothdiag.autoclip.calibration import Calibration

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
KINDS: dict[str, tuple[Make, Make]] = {
    "gradients": (lambda p: torch.optim.SGD(p, lr=3.0, momentum=0.9), lambda p: torch.optim.SGD(p, lr=1.0)),
    "updates": (lambda p: torch.optim.Muon(p, lr=0.5), lambda p: torch.optim.AdamW(p, lr=0.3)),
    "mixed": (lambda p: torch.optim.SGD(p, lr=3.0, momentum=0.9), lambda p: torch.optim.AdamW(p, lr=0.3)),
    "followed": (lambda p: torch.optim.AdamW(p, lr=0.3), lambda p: torch.optim.RMSprop(p, lr=0.3)),
}


def parts(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    held = list(model.parameters())
    return [p for p in held if p.ndim == 2], [p for p in held if p.ndim != 2]


class Run:
    """Some steps of a small classifier.

    Args:
        optimizers: Makes the optimizers of matrices and of the rest; or one for both.
        options: Options of AutoClip; ``None`` for a run without it.
        turned: Whether the second optimizer steps first.
    """

    def __init__(self, *optimizers: Make, options: dict | None, turned: bool = False) -> None:
        torch.manual_seed(0)
        self.model = mlp(6, 16, 16, 3)
        held = parts(self.model) if len(optimizers) > 1 else [[{"params": p} for p in parts(self.model)]]
        self.optimizers = [make(p) for make, p in zip(optimizers, held, strict=True)]
        self.turned, self.options = turned, options
        self.lengths: list[float] = []
        self.caps: list[float] = []
        self.attach()

    def attach(self) -> None:
        self.probe = self.clipper = None
        if self.options is not None:
            self.probe = Probe(self.model, self.optimizers, cross_entropy, estimators=())
            self.clipper = AutoClip(self.optimizers, self.probe, **self.options)

    def over(self, steps: int) -> "Run":
        for _ in range(steps):
            batch = torch.randn(32, 6), torch.randint(3, (32,))
            if self.probe is not None:
                self.probe.observe(batch)
            cross_entropy(self.model, batch).backward()
            start = [p.detach().clone() for p in self.model.parameters()]
            for optimizer in self.optimizers[:: -1 if self.turned else 1]:
                optimizer.step()
            moved = [(p.detach() - x).flatten() for p, x in zip(self.model.parameters(), start, strict=True)]
            self.lengths.append(float(torch.cat(moved).double().norm()))
            if self.clipper is not None:
                self.caps.append(float(self.clipper._books.longest()))
            for optimizer in self.optimizers:
                optimizer.zero_grad()
        return self

    def state(self) -> dict[str, Tensor]:
        kept = [
            f"{k} {i} {n}" for k, o in enumerate(self.optimizers) for i, s in enumerate(o.state.values()) for n in s
        ]
        values = [v for o in self.optimizers for s in o.state.values() for v in s.values()]
        return state_of(self.model) | {
            name: v.clone() if isinstance(v, Tensor) else v for name, v in zip(kept, values, strict=True)
        }


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_no_step_of_both_together_is_longer_than_allowed(kind: str, turned: bool) -> None:
    rule = {"rule": StepRule(None, 0.02)}
    run = Run(*KINDS[kind], options=rule, turned=turned).over(8)
    # SGD with momentum averages clipped gradients, so only the first step is bound by itself.
    bound = 1 if kind == "gradients" else 8
    assert all(found <= (1 + 1e-4) * cap for found, cap in zip(run.lengths[:bound], run.caps, strict=False))
    free = Run(*KINDS[kind], options=None, turned=turned).over(1)
    assert free.lengths[0] > 2 * run.caps[0]
    assert run.clipper.clip_fraction == 1.0
    lr = max(group["lr"] for optimizer in run.optimizers for group in optimizer.param_groups)
    assert (run.clipper.history["lr"] == lr).all(), "the largest of all groups, as its name says"


@pytest.mark.parametrize("kind", KINDS)
def test_a_cap_that_never_binds_and_the_shadow_change_no_bit(kind: str) -> None:
    expected = Run(*KINDS[kind], options=None).over(6).state()
    for options in ({"rule": StepRule(None, 1e6)}, {"rule": StepRule(None, 0.02), "mode": "shadow"}):
        run = Run(*KINDS[kind], options=options).over(6)
        assert_identical(run.state(), expected)
    assert run.clipper.clip_fraction == 1.0  # what the shadow would have done


@pytest.mark.parametrize(
    ("make", "rounding"),
    [
        (lambda p: torch.optim.SGD(p, lr=3.0, momentum=0.9), 0.0),
        (lambda p: torch.optim.AdamW(p, lr=0.3), 1e-4),  # lists keep copies, one optimizer alone mostly needs none
    ],
)
def test_two_optimizers_of_a_kind_step_as_one_with_two_groups(make: Make, rounding: float) -> None:
    two, one = Run(make, make, options={}).over(20), Run(make, options={}).over(20)
    for p, q in zip(two.model.parameters(), one.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=rounding, atol=rounding)
    assert two.clipper.longest_step == pytest.approx(one.clipper.longest_step, rel=rounding)
    assert two.clipper.clip_fraction == one.clipper.clip_fraction > 0


def test_neither_kind_stops_the_other() -> None:
    plain = lambda p: torch.optim.SGD(p, lr=3.0)  # noqa: E731
    run = Run(plain, KINDS["mixed"][1], options={"rule": StepRule(None, 0.02)})
    matrices, others = parts(run.model)
    for held in (matrices, others):
        start = [p.detach().clone() for p in held]
        run.over(1)
        moved = torch.cat([(p.detach() - x).flatten() for p, x in zip(held, start, strict=True)]).norm()
        assert moved >= 0.5 * run.caps[-1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_goes_on_exactly(kind: str) -> None:
    expected = Run(*KINDS[kind], options={}).over(24)
    run = Run(*KINDS[kind], options={}).over(12)
    states = run.probe.state_dict(), run.clipper.state_dict()
    kept = [o.state_dict() for o in run.optimizers]
    run.probe.close(), run.clipper.detach()
    for optimizer, state in zip(run.optimizers, kept, strict=True):
        optimizer.load_state_dict(state)
    run.attach()
    run.probe.load_state_dict(states[0]), run.clipper.load_state_dict(states[1])
    run.over(12)
    assert_identical(run.state(), expected.state())
    assert run.clipper.longest_step == expected.clipper.longest_step


@pytest.mark.parametrize("left_out", [0, 1])
@pytest.mark.parametrize("kind", ["updates", "mixed", "followed"])
def test_an_optimizer_that_is_left_out_rests_and_the_step_ends_at_the_next_batch(kind: str, left_out: int) -> None:
    run = Run(*KINDS[kind], options={"rule": StepRule(None, 0.02)}).over(4)
    both, resting = run.optimizers, parts(run.model)[left_out]
    run.optimizers = [both[1 - left_out]]
    start, still = ([p.detach().clone() for p in held] for held in (run.model.parameters(), resting))
    run.over(1)
    run.model.zero_grad()
    run.probe.observe((torch.randn(8, 6), torch.randint(3, (8,))))
    moved = [(p.detach() - x).flatten() for p, x in zip(run.model.parameters(), start, strict=True)]
    assert 0 < float(torch.cat(moved).norm()) <= (1 + 1e-4) * run.caps[-1]
    assert all(map(torch.equal, resting, still))


def test_a_parameter_that_two_of_them_move_counts_once() -> None:
    """Lists that share one are refused, but groups may be added later."""
    run = Run(*KINDS["updates"], options={"rule": StepRule(None, 0.02)}).over(2)
    run.optimizers[1].add_param_group({"params": [run.model[0].weight]})
    run.over(2)
    assert all(found <= (1 + 1e-4) * cap for found, cap in zip(run.lengths, run.caps, strict=True))


@pytest.mark.parametrize("ask", ["probe", "clipper", "detach"])
def test_a_step_without_one_of_them_ends_before_it_is_saved(ask: str) -> None:
    run = Run(*KINDS["updates"], options={"rule": StepRule(None, 0.02)})
    run.optimizers = run.optimizers[:1]
    start = [p.detach().clone() for p in run.model.parameters()]
    run.over(1)
    if ask == "detach":
        run.clipper.detach()
    else:
        assert getattr(run, ask).state_dict()["steps"] == 1
    moved = [(p.detach() - x).flatten() for p, x in zip(run.model.parameters(), start, strict=True)]
    assert float(torch.cat(moved).norm()) == pytest.approx(run.caps[0], rel=1e-4)


def test_a_step_that_still_waits_for_one_of_them_is_not_counted_yet() -> None:
    run = Run(*KINDS["gradients"], options={"rule": StepRule(None, 1e-3)}).over(2)
    run.optimizers = run.optimizers[:1]
    run.over(1)
    assert run.clipper.clip_fraction == 1.0
    assert "; 100% of steps clipped so far" in run.clipper.reason


def test_a_run_resumed_with_the_list_in_another_order_goes_on() -> None:
    expected = Run(*KINDS["updates"], options={}).over(12)
    run = Run(*KINDS["updates"], options={}).over(6)
    states = run.probe.state_dict(), run.clipper.state_dict()
    run.probe.close(), run.clipper.detach()
    run.optimizers = run.optimizers[::-1]
    run.attach()
    run.probe.load_state_dict(states[0]), run.clipper.load_state_dict(states[1])
    run.turned = True
    run.over(6)
    for p, q in zip(run.model.parameters(), expected.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-4)
    assert run.clipper.longest_step == pytest.approx(expected.clipper.longest_step, rel=1e-4)
    assert "rate rose" not in set(run.clipper.history["event"])


def test_what_clips_by_itself_is_refused_in_a_list() -> None:
    model = mlp(6, 3)
    optimizers = [ClippedMomentum([model[0].weight], 0.1, threshold=1.0), torch.optim.SGD([model[0].bias], lr=0.1)]
    probe = Probe(model, optimizers, cross_entropy, estimators=())
    for mode in ("clip", "set", "shadow"):
        with pytest.raises(
            ValueError, match=r"one optimizer alone if that clips by itself. Found ClippedMomentum \+ SGD"
        ):
            AutoClip(optimizers, probe, mode=mode)


@pytest.mark.parametrize("unscales", [False, True])
def test_gradients_that_are_still_scaled_are_refused(unscales: bool) -> None:
    """A GradScaler unscales the gradients of each optimizer in its own step, if nobody has asked for it before."""

    def norms(*, scaled: bool) -> list[float]:
        torch.manual_seed(0)
        model = mlp(6, 3)
        optimizers = [torch.optim.SGD([p], lr=1.0) for p in model.parameters()]
        probe = Probe(model, optimizers, cross_entropy, estimators=())
        AutoClip(optimizers, probe, rule=StepRule(None, 0.02))
        scaler = torch.amp.GradScaler("cpu", enabled=scaled)
        found = []
        for _ in range(3):
            batch = torch.randn(8, 6), torch.randint(3, (8,))
            probe.observe(batch)
            start = [p.detach().clone() for p in model.parameters()]
            scaler.scale(cross_entropy(model, batch)).backward()
            for optimizer in optimizers if unscales else ():
                scaler.unscale_(optimizer)
            for optimizer in optimizers:
                scaler.step(optimizer)
            scaler.update()
            moved = [(p.detach() - x).flatten() for p, x in zip(model.parameters(), start, strict=True)]
            found.append(float(torch.cat(moved).norm()))
            model.zero_grad()
        return found

    if unscales:
        assert norms(scaled=True) == pytest.approx(norms(scaled=False), rel=1e-5)
    else:
        with pytest.raises(RuntimeError, match=r"Found those of SGD still scaled: call `scaler.unscale_"):
            norms(scaled=True)


@pytest.mark.parametrize("second", [lambda p: torch.optim.AdamW(p, lr=0.01), lambda p: torch.optim.SGD(p, lr=0.01)])
def test_a_rate_that_is_too_small_is_raised_for_all_together(second: Make) -> None:
    """It is the rate at which the updates that were seen would have been as long as S, at the median."""
    run = Run(lambda p: torch.optim.Muon(p, lr=0.005), second, options={"set_lr": True}).over(6)
    first, last = (optimizer.param_groups[0]["lr"] for optimizer in run.optimizers)
    early = run.clipper._calibration.early[:5]
    assert [m.step for m in early] == [0, 1, 2, 3, 4]
    assert last == pytest.approx(2 * first)
    known = Calibration(run.clipper._calibration.rule, early)
    rates = [0.01 * m.length / run.lengths[m.step] for m in early]
    expected = known.factor * min(median(rates), *rates[-2:])
    assert last == pytest.approx(min(expected, 4 * 0.01), rel=1e-3)
