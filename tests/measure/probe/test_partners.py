"""measure.probe.partners: what other optimizers train has the values of the backward pass, uncopied where it rests."""

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from asserts import assert_identical, state_of
from losses import bce, critic_loss, cross_entropy, generator_loss
from networks import mlp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import optimizer as optimizers
from torch.utils._python_dispatch import TorchDispatchMode

from smoothdiag import DirectionalCurvature, Probe, SmoothdiagWarning, every

Loss = Callable[[nn.Module, Any], Tensor]
FINE = {"ok", "saturated", "kink_limited"}


class Copies(TorchDispatchMode):
    """Counts copies of tensors of one shape."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape, self.number = shape, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func._schema.name in ("aten::clone", "aten::copy_", "aten::_to_copy") and result.shape == self.shape:
            self.number += 1
        return result


def length(parameters: Any) -> float:
    return float(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]).norm())


def assert_right(probe: Probe, norms: dict[int, float]) -> None:
    """Compares the gradient norm of every row with the loop's own."""
    rows = [row for row in probe.trace if row["estimator"] == "local"]
    assert [row["step"] for row in rows] == list(norms)
    assert {row["status"] for row in rows} <= FINE
    assert [row["grad_norm"] for row in rows] == pytest.approx(list(norms.values()), rel=1e-12)


def attached(probes: bool, model: Any, optimizer: torch.optim.Optimizer, loss_fn: Loss, **options: Any) -> Any:
    return Probe(model, optimizer, loss_fn, schedule=every(1), data="step", **options) if probes else None


def show(probe: Probe | None, *batches: Any) -> None:
    for batch in batches if probe else ():
        probe.observe(batch)


# Generative adversarial networks


def networks() -> nn.ModuleList:
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4))
    critic = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.LeakyReLU(0.2), nn.Linear(8, 1))
    return nn.ModuleList([generator, critic]).double()


def by_adam(critic: nn.Module) -> Callable[[], None]:
    return torch.optim.Adam(critic.parameters(), lr=0.02).step


def through_data(critic: nn.Module) -> Callable[[], None]:
    def step() -> None:
        for p in critic.parameters():
            if p.grad is not None:
                p.data.sub_(p.grad.sign(), alpha=0.01)

    return step


def play(*, probes: bool, moves: Any = by_adam, toggles: bool = False, late: bool = False) -> dict[str, Any]:
    """Trains as the tutorial of DCGAN does: the batch is shown first, the critic steps, the generator follows."""
    models = generator, critic = networks()
    optimizer = torch.optim.Adam(generator.parameters(), lr=0.02)
    of_critic = torch.optim.Adam(critic.parameters(), lr=0.02)
    step_critic = of_critic.step if moves is by_adam else moves(critic)
    probe = attached(probes, [generator, critic], optimizer, generator_loss)
    other = attached(probes, (generator, critic), of_critic, critic_loss) if moves is by_adam and not late else None
    norms: dict[str, dict[int, float]] = {"generator": {}, "critic": {}}
    critic.requires_grad_(not toggles)
    for k in range(4):
        real, z = torch.randn(8, 4).double(), torch.randn(8, 3).double()
        show(probe, z)
        show(other, (real, z))
        critic.requires_grad_(True)
        critic.zero_grad()
        bce(critic(real), 1.0).backward()
        fake = generator(z)
        bce(critic(fake.detach()), 0.0).backward()
        norms["critic"][k] = length(critic.parameters())
        step_critic()
        critic.requires_grad_(not toggles)
        generator.zero_grad()
        bce(critic(fake), 1.0).backward()
        norms["generator"][k] = length(generator.parameters())
        if late:  # the critic moves between the generator's backward pass and its step
            step_critic()
        optimizer.step()
    for watching, name in ((probe, "generator"), (other, "critic")):
        if watching is not None:
            assert_right(watching, norms[name])
    return state_of(models, optimizer)


@pytest.mark.filterwarnings("error::smoothdiag.SmoothdiagWarning")
@pytest.mark.parametrize(
    "options",
    [{}, {"toggles": True}, {"late": True}, {"moves": through_data}, {"moves": through_data, "late": True}],
    ids=["alternating", "frozen in turn", "late", "by hand", "late and by hand"],
)
def test_both_networks_of_a_gan_have_rows_of_the_losses_that_they_train(options) -> None:
    assert_identical(play(probes=True, **options), play(probes=False, **options))


def test_fixed_batches_meet_the_critic_of_the_step() -> None:
    generator, critic = networks()
    optimizer = torch.optim.SGD(generator.parameters(), lr=0.1)
    of_critic = torch.optim.SGD(critic.parameters(), lr=0.5)
    probe = Probe([generator, critic], optimizer, generator_loss, schedule=every(1))
    first, found = torch.randn(8, 3).double(), []
    for _ in range(4):
        z = torch.randn(8, 3).double() if found else first
        probe.observe(z)
        bce(critic(torch.randn(8, 4).double()), 1.0).backward()
        of_critic.step()
        optimizer.zero_grad()
        generator_loss(nn.ModuleList([generator, critic]), first).backward()
        found.append(length(generator.parameters()))
        optimizer.zero_grad()
        generator_loss(nn.ModuleList([generator, critic]), z).backward()
        of_critic.step()
        optimizer.step()
    rows = [row["grad_norm"] for row in probe.trace if row["estimator"] == "local"]
    assert rows == pytest.approx(found, rel=1e-12)


# Actor and critic


class Agent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.policy, self.value = nn.Linear(5, 16), nn.Linear(16, 3), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.trunk(x).tanh()
        return self.policy(features).log_softmax(-1), self.value(features).squeeze(-1)


def surrogate(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    x, action, before, advantage, _ = batch
    ratio = (model(x)[0].gather(1, action).squeeze(1) - before).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()


def value_loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    return (model(batch[0])[1] - batch[4]).square().mean()


def act(*, probes: bool, unseen: bool) -> dict[str, Any]:
    """Proximal policy optimisation: the policy steps, then the critic, several times on each rollout."""
    torch.manual_seed(0)
    model = Agent().double()
    of_policy = torch.optim.Adam([*model.policy.parameters(), *model.trunk.parameters()], lr=0.02)
    of_value = torch.optim.Adam(model.value.parameters(), lr=0.02)
    parts = [(of_policy, surrogate), (of_value, value_loss)]
    watching = [attached(probes, model, optimizer, loss_fn) for optimizer, loss_fn in parts]
    norms: list[dict[int, float]] = [{}, {}]
    for rollout in range(2):
        x, action, advantage = torch.randn(16, 5).double(), torch.randint(3, (16, 1)), torch.randn(16).double()
        with torch.no_grad():
            before = model(x)[0].gather(1, action).squeeze(1)
        batch = (x, action, before, advantage, torch.randn(16).double())
        for epoch in range(3):
            show(watching[0], batch)
            show(watching[1], batch)
            # Both losses meet the parameters before either step, as where their sum is taken.
            for (optimizer, loss_fn), norm in zip(parts, norms, strict=True):
                held = [p for group in optimizer.param_groups for p in group["params"]]
                # Gradients taken from a copy pass no hook of the model.
                twin = copy.deepcopy(model) if unseen else model
                at = {name for name, p in model.named_parameters() if any(p is q for q in held)}
                of = {name: p for name, p in twin.named_parameters() if name in at}
                for name, g in zip(of, torch.autograd.grad(loss_fn(twin, batch), list(of.values())), strict=True):
                    model.get_parameter(name).grad = g
                norm[3 * rollout + epoch] = length(held)
            of_policy.step()
            of_value.step()
    if probes:
        for probe, norm in zip(watching, norms, strict=True):
            rows = [row for row in probe.trace if row["estimator"] == "local"]
            assert [row["grad_norm"] for row in rows] == pytest.approx(list(norm.values()), rel=1e-12)
    return state_of(model, of_policy)


@pytest.mark.filterwarnings("error::smoothdiag.SmoothdiagWarning")
@pytest.mark.parametrize("unseen", [False, True])
def test_an_actor_and_its_critic_have_rows_of_their_own_losses(unseen) -> None:
    assert_identical(act(probes=True, unseen=unseen), act(probes=False, unseen=unseen))


# One loss, two optimizers


def halves(wide: bool) -> tuple[nn.Sequential, nn.Linear, nn.Linear]:
    torch.manual_seed(0)
    body, head = nn.Linear(6, 64 if wide else 4), nn.Linear(64 if wide else 4, 3)
    return nn.Sequential(body, nn.Tanh(), head).double(), body, head


def batches(number: int) -> Iterator[tuple[Tensor, Tensor]]:
    for _ in range(number):
        x = torch.randn(16, 6).double()
        yield x, x.argmax(1) % 3


@pytest.mark.filterwarnings("error::smoothdiag.SmoothdiagWarning")
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("first", ["body", "head"])
@pytest.mark.parametrize("between", [False, True])
def test_either_of_two_optimizers_can_be_measured_whichever_steps_first(wide, first, between) -> None:
    runs = []
    for probes in (True, False):
        model, body, head = halves(wide)
        pair = torch.optim.AdamW(body.parameters(), lr=0.05), torch.optim.SGD(head.parameters(), lr=0.2)
        # The body moves between the micro-batches, or the two take turns.
        watching = [attached(probes, model, optimizer, cross_entropy) for optimizer in (pair[1:] if between else pair)]
        norms: list[dict[int, float]] = [{}, {}]
        for k in range(3):
            for micro in batches(4):
                for probe in watching:
                    show(probe, micro)
                (cross_entropy(model, micro) / 4).backward()
                if between:
                    pair[0].step()
                    pair[0].zero_grad()
            norms[0][k], norms[1][k] = (0.0 if between else length(body.parameters())), length(head.parameters())
            for optimizer in pair if first == "body" else reversed(pair):
                optimizer.step()
            model.zero_grad()
        for probe, norm in zip(watching, norms[-len(watching) :], strict=True):
            if probe is not None:
                assert_right(probe, norm)
        runs.append(state_of(model, pair[1]))
    assert_identical(*runs)


@pytest.mark.parametrize("backend", ["retained", "rebuilt", "central"])
def test_curvature_sees_every_micro_batch_with_the_head_it_met(backend) -> None:
    model, body, head = halves(wide=False)
    other, own = torch.optim.SGD(head.parameters(), lr=1.0), torch.optim.SGD(body.parameters(), lr=0.1)
    along = DirectionalCurvature(backend=backend)
    probe = Probe(model, own, cross_entropy, schedule=every(1), data="step", estimators=[along])
    x, truth = torch.cat([p.detach().flatten() for p in body.parameters()]), 0.0
    for micro in batches(2):
        now = [p.detach().clone() for p in head.parameters()]

        def loss(x: Tensor, now: list[Tensor] = now, micro: tuple[Tensor, Tensor] = micro) -> Tensor:
            return F.cross_entropy(F.linear((micro[0] @ x[:24].view(4, 6).T + x[24:]).tanh(), *now), micro[1]) / 2

        truth = truth + torch.autograd.functional.hessian(loss, x)
        probe.observe(micro)
        (cross_entropy(model, micro) / 2).backward()
        other.step()
        other.zero_grad()
    g = torch.cat([p.grad.flatten() for p in body.parameters()])
    own.step()
    (row,) = probe.trace
    assert row["smoothness"] == pytest.approx(float(g @ truth @ g / (g @ g)), rel=1e-5)


@pytest.mark.parametrize("is_larger", [False, True])
def test_one_copy_in_a_step_at_most_and_none_where_the_other_steps_later(is_larger) -> None:
    model, body, head = halves(wide=True)
    moved, measured = (body, head) if is_larger else (head, body)
    own, other = (torch.optim.SGD(part.parameters(), lr=0.1) for part in (measured, moved))
    probe = attached(True, model, own, cross_entropy)
    found = []
    for first in ("other", "own", "other", "own"):
        counting = Copies(moved.weight.shape)
        with counting:
            for micro in batches(4):
                probe.observe(micro)
                (cross_entropy(model, micro) / 4).backward()
            if first == "other":
                other.step()
        own.step()
        if first == "own":
            with counting:
                other.step()
        model.zero_grad()
        found.append(counting.number)
    assert found == [1, 0, 1, 0]


def test_what_is_large_and_moved_by_hand_is_lost_once_and_kept_from_then_on() -> None:
    model, body, head = halves(wide=True)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    probe = attached(True, model, optimizer, cross_entropy)
    norms = []
    lost, differs = "changed 2 parameters of the model that the probe's optimizer does not hold", "in another direction"
    with pytest.warns(SmoothdiagWarning, match=lost), pytest.warns(SmoothdiagWarning, match=differs):
        for micro in batches(4):
            model.zero_grad()
            probe.observe(micro)
            cross_entropy(model, micro).backward()
            norms.append(length(head.parameters()))
            for p in body.parameters():
                p.data.add_(p.grad, alpha=-0.5)
            optimizer.step()
    rows = [row for row in probe.trace if row["estimator"] == "local"]
    assert [row["status"] for row in rows] == ["not_reproduced", "ok", "ok", "ok"]
    assert [row["grad_norm"] for row in rows[1:]] == pytest.approx(norms[1:], rel=1e-12)


def test_what_is_moved_by_hand_between_micro_batches_is_lost_once_and_kept_from_then_on() -> None:
    model, body, head = halves(wide=False)
    optimizer = torch.optim.SGD(body.parameters(), lr=0.1)
    probe = attached(True, model, optimizer, cross_entropy)
    norms = []
    with pytest.warns(SmoothdiagWarning, match="changed 2 param"), pytest.warns(SmoothdiagWarning, match="direction"):
        for _ in range(3):
            model.zero_grad()
            for micro in batches(3):
                probe.observe(micro)
                (cross_entropy(model, micro) / 3).backward()
                for p in head.parameters():
                    p.data.mul_(1.5)
            norms.append(length(body.parameters()))
            optimizer.step()
    rows = [row for row in probe.trace if row["estimator"] == "local"]
    assert [row["status"] for row in rows] == ["not_reproduced", "ok", "ok"]
    assert [row["grad_norm"] for row in rows[1:]] == pytest.approx(norms[1:], rel=1e-12)


def test_what_nobody_moves_is_never_copied() -> None:
    model, body, head = halves(wide=True)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)  # the body trains, but nobody moves it
    probe = attached(True, model, optimizer, cross_entropy)
    with Copies(body.weight.shape) as counting:
        for micro in batches(3):
            model.zero_grad()
            probe.observe(micro)
            cross_entropy(model, micro).backward()
            optimizer.step()
    assert counting.number == 0


def test_no_hook_outlives_a_step_or_a_run() -> None:
    hooks = optimizers._global_optimizer_pre_hooks
    before = len(hooks)
    model, body, head = halves(wide=False)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    probe = attached(True, model, optimizer, cross_entropy)
    (micro,) = batches(1)
    probe.observe(micro)
    assert len(hooks) == before + 1
    cross_entropy(model, micro).backward()
    optimizer.step()
    assert len(hooks) == before
    probe.observe(micro)  # and the loop ends here
    ended = weakref.ref(probe)
    del probe, optimizer, model, body, head
    # A garbage collection may come while another optimizer goes through the hooks, so they are not removed then.
    other = torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=0.1)
    handle = optimizers.register_optimizer_step_pre_hook(lambda *given: gc.collect() and None)
    hooks.move_to_end(handle.id, last=False)
    other.step()
    handle.remove()
    assert ended() is None
    model, _, head = halves(wide=False)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    probe = attached(True, model, optimizer, cross_entropy)
    probe.observe(micro)
    assert len(hooks) == before + 1, "its own; the others are gone"
    cross_entropy(model, micro).backward()
    optimizer.step()
    assert len(hooks) == before


# Several modules


def test_rows_of_groups_are_named_by_the_number_of_the_module() -> None:
    generator, critic = networks()
    optimizer = torch.optim.SGD([*generator.parameters(), *critic.parameters()], lr=0.1)
    probe = attached(True, [generator, critic], optimizer, generator_loss, group_by=lambda name: name.split(".")[0])
    generator.eval()
    probe.observe(z := torch.randn(8, 3).double())
    bce(critic(generator(z)), 1.0).backward()
    optimizer.step()
    assert {row["group"] for row in probe.trace} == {"all", "0", "1"}
    assert (generator.training, critic.training) == (False, True)


@pytest.mark.parametrize(
    ("model", "found"),
    [([], r"model = \[\]"), ([nn.Linear(1, 1), "critic"], "critic"), ([mlp(1, 1)] * 2, "the same module twice")],
)
def test_a_list_of_anything_but_different_modules_is_refused(model, found) -> None:
    optimizer = torch.optim.SGD(mlp(1, 1).parameters(), lr=0.1)
    with pytest.raises(ValueError, match=f"Parameter `model` should be .*{found}"):
        Probe(model, optimizer, cross_entropy)
