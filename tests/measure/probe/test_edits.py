"""measure.probe: models, optimizers and loops that change in mid-run train as they do without a probe, bit for bit."""

import copy
import math
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from asserts import assert_identical, state_of
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from smoothdiag import AutoClip, Probe, StepRule, every

EDIT_AT, STEPS = 3, 8
NEVER = StepRule(multiple=None, relative=1e12)
"""A rule whose longest step is never reached."""


class Net(nn.Module):
    """A network with what edits are about: statistics, dropout, a teacher, counters, and places for more."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.2)
        self.body = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.extra, self.last = nn.Sequential(), nn.Linear(8, 1)
        self.teacher = nn.Linear(6, 8).requires_grad_(False)
        self.register_buffer("cache", None)
        self.calls, self.seen, self.hidden = 0, [], torch.zeros(8)
        self.recent, self.sums = OrderedDict((key, 1.0) for key in range(3)), [torch.zeros(8)]
        self.uses: set[str] = set()

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = self.drop(torch.tanh(self.norm(self.first(x))))
        if "teacher" in self.uses:
            y = y + 0.1 * self.teacher(x)
        if "ema" in self.uses:
            with torch.no_grad():
                self.teacher.weight.lerp_(self.first.weight, 0.1)
        if "hidden ema" in self.uses:
            self.teacher.weight.data.mul_(0.9).add_(self.first.weight.data, alpha=0.1)
        if "new ema" in self.uses:
            self.teacher.weight.data = 0.9 * self.teacher.weight.data + 0.1 * self.first.weight.data
        if "cache" in self.uses:
            self.cache = torch.zeros(8) if self.cache is None else 0.9 * self.cache + 0.1 * y.detach().mean(0)
            y = y + self.cache
        if "hidden" in self.uses:
            y, self.hidden = y + self.hidden, 0.5 * self.hidden + 0.1 * y.detach().mean(0)
        if "counter" in self.uses:
            y = y / (1 + 0.01 * self.calls)
        if "list" in self.uses:
            self.seen.append(float(y.detach().mean()))
            y = y * (1 + 0.001 * len(self.seen))
        if "recent" in self.uses:
            self.recent.move_to_end(next(iter(self.recent)))
            y = y * (1 + 0.001 * next(iter(self.recent)))
        if "sums" in self.uses:
            self.sums[0].mul_(0.9).add_(1e-5 * y.detach().mean(0))
            y = y + self.sums[0].clone()
        if "modes" in self.uses:
            self.drop.eval()
            y = self.drop(y)
            self.drop.train()
        if "lazy module" in self.uses and len(self.extra) == 0:
            self.extra.append(nn.BatchNorm1d(8, affine=False))
        if "lazy buffer" in self.uses and not hasattr(self, "late"):
            self.register_buffer("late", torch.rand(8), persistent=False)
        if "grow" in self.uses:
            self.memory.resize_(self.memory.numel() + 1).fill_(1.0)
        if "seed" in self.uses:
            y = y + 0.01 * torch.rand(8)
        if "toggle" in self.uses:
            for p in self.teacher.parameters():
                p.requires_grad_(True)
        return self.last(self.body(self.extra(y)) + y)


class Run:
    """A training run that somebody edits."""

    def __init__(self, make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> None:
        torch.manual_seed(0)
        self.model: nn.Module = Net()
        self.optimizer = make([p for p in self.model.parameters() if p.requires_grad])
        self.num_micro, self.clips, self.set_to_none, self.skips = 1, False, True, False
        self.probe: Probe | None = None

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.mse_loss(model(batch[0]), batch[1])


def _replace_norm(run: Any) -> None:
    norm = nn.BatchNorm1d(8)
    norm.weight, norm.bias = run.model.norm.weight, run.model.norm.bias
    run.model.norm = norm


def _use(*names: str) -> Callable[[Any], None]:
    return lambda run: run.model.uses.update(names)


def _grow(run: Any) -> None:
    run.model.register_buffer("memory", torch.zeros(1))
    run.model.uses.add("grow")


def _forget_statistics(run: Any) -> None:
    norm = run.model.norm
    norm.running_mean = norm.running_var = norm.num_batches_tracked = None
    norm.track_running_stats = False


def _join(run: Any) -> None:
    run.model.extra.append(nn.Linear(8, 8))
    run.optimizer.add_param_group({"params": list(run.model.extra.parameters()), "lr": 0.02})


def _leave(run: Any) -> None:
    run.model.body = nn.Identity()


def _leave_optimizer(run: Any) -> None:
    run.optimizer.param_groups[0]["params"].pop()


def _two_groups_then_one(run: Any) -> None:
    _join(run)
    run.optimizer.param_groups.pop()


def _fresh_weights(run: Any) -> None:
    run.model.load_state_dict({k: v + 0.01 for k, v in run.model.state_dict().items()}, strict=False)


def _assigned_weights(run: Any) -> None:
    run.model.load_state_dict({k: v.clone() for k, v in run.model.state_dict().items()}, assign=True)


def _fresh_optimizer_state(run: Any) -> None:
    run.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))


def _new_parameter(run: Any) -> None:
    old = run.model.last.weight
    run.model.last.weight = new = nn.Parameter(old.detach().clone())
    params = run.optimizer.param_groups[0]["params"]
    params[[p is old for p in params].index(True)] = new


def _hook(run: Any) -> None:
    run.model.first.register_forward_hook(lambda module, inputs, output: output * 0.99)


def _grad_hook(run: Any) -> None:
    run.model.first.weight.register_hook(lambda gradient: gradient * 0.5)


def _settings(**values: Any) -> Callable[[Any], None]:
    return lambda run: vars(run).update(values)


def _group(**values: Any) -> Callable[[Any], None]:
    return lambda run: run.optimizer.param_groups[0].update(values)


def _freeze(name: str) -> Callable[[Any], None]:
    return lambda run: run.model.get_submodule(name).requires_grad_(False)


EDITS: dict[str, Callable[[Any], None]] = {
    "norm without weights joins": lambda run: run.model.extra.append(nn.BatchNorm1d(8, affine=False)),
    "frozen norm joins": lambda run: run.model.extra.append(nn.BatchNorm1d(8).requires_grad_(False)),
    "trainable norm joins unseen": lambda run: run.model.extra.append(nn.BatchNorm1d(8)),
    "module joins with its group": _join,
    "group joins and goes": _two_groups_then_one,
    "module goes": _leave,
    "parameter leaves the optimizer": _leave_optimizer,
    "norm is replaced, same weights": _replace_norm,
    "parameter is replaced": _new_parameter,
    "activation is replaced": lambda run: run.model.body.__setitem__(1, nn.ReLU()),
    "statistics go": _forget_statistics,
    "cache is filled late": _use("cache"),
    "buffer grows": _grow,
    "buffer is replaced": lambda run: setattr(run.model.norm, "running_mean", torch.ones(8)),
    "buffer is registered in forward": _use("lazy buffer"),
    "module is made in forward": _use("lazy module"),
    "frozen bias goes": lambda run: setattr(run.model.teacher, "bias", None),
    "bias goes": lambda run: setattr(run.model.last, "bias", None),
    "teacher is used": _use("teacher"),
    "teacher moves": _use("teacher", "ema"),
    "teacher moves unseen": _use("teacher", "hidden ema"),
    "teacher is replaced": _use("teacher", "new ema"),
    "teacher is trainable in forward": _use("teacher", "toggle"),
    "hidden state": _use("hidden"),
    "counter": _use("counter"),
    "list": _use("list"),
    "order of a dictionary": _use("recent"),
    "list of sums": _use("sums"),
    "expanded buffer joins": lambda run: run.model.register_buffer("many", torch.ones(1).expand(8)),
    "view of a parameter joins": lambda run: run.model.register_buffer("seen_weight", run.model.last.weight.detach()),
    "modes within forward": _use("modes"),
    "random numbers in forward": _use("seed"),
    "first is frozen": _freeze("first"),
    "all but last is frozen": lambda run: [_freeze(n)(run) for n in ("first", "norm", "body")],
    "all is frozen but a bias": lambda run: run.model.requires_grad_(False).last.bias.requires_grad_(True),
    "eval mode": lambda run: run.model.eval(),
    "norm in eval mode": lambda run: run.model.norm.eval(),
    "dropout changes": lambda run: setattr(run.model.drop, "p", 0.5),
    "weights are loaded": _fresh_weights,
    "weights are assigned": _assigned_weights,
    "optimizer state is loaded": _fresh_optimizer_state,
    "optimizer state is cleared": lambda run: run.optimizer.state.clear(),
    "spectral norm": lambda run: parametrizations.spectral_norm(run.model.body[0]),
    "weight norm": lambda run: parametrizations.weight_norm(run.model.last),
    "pruning": lambda run: prune.l1_unstructured(run.model.last, "weight", 0.3),
    "forward hook": _hook,
    "gradient hook": _grad_hook,
    "gradient checkpointing of a copy": lambda run: copy.deepcopy(run.model),
    "rate": _group(lr=0.01),
    "rate as a tensor": _group(lr=torch.tensor(0.01)),
    "rate of zero": _group(lr=0.0),
    "decay": _group(weight_decay=0.1),
    "micro-batches": _settings(num_micro=3),
    "clipping": _settings(clips=True),
    "zeros in place": _settings(set_to_none=False),
    "steps are skipped": _settings(skips=True),
    "double precision": lambda run: run.model.double().float(),
    "memory format": lambda run: run.model.to(memory_format=torch.channels_last),
    "shared memory": lambda run: run.model.share_memory(),
}
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=False),
}
TIMES = ("before the batch", "before forward", "before the step")


def train(edit: str, time: str, make: Any, attach: str) -> tuple[dict[str, Any], str]:
    """Returns the state in the end, and the error that ended the run."""
    run: Any = Run(make)
    if attach:
        run.probe = Probe(run.model, run.optimizer, run.loss, schedule=every(1))
        if attach == "AutoClip":
            AutoClip(run.optimizer, run.probe, rule=NEVER)
    error = ""
    generator = torch.Generator().manual_seed(1)
    try:
        for step in range(STEPS):
            run.optimizer.zero_grad(set_to_none=run.set_to_none)
            for index in range(run.num_micro):
                is_first = step == EDIT_AT and index == 0
                if is_first and time == TIMES[0]:
                    EDITS[edit](run)
                batch = torch.randn(8, 6, generator=generator), torch.randn(8, 1, generator=generator)
                if run.probe:
                    run.probe.observe(batch)
                if is_first and time == TIMES[1]:
                    EDITS[edit](run)
                (run.loss(run.model, batch) / run.num_micro).backward()
            if step == EDIT_AT and time == TIMES[2]:
                EDITS[edit](run)
            if run.clips:
                nn.utils.clip_grad_norm_([p for g in run.optimizer.param_groups for p in g["params"]], 0.1)
            if not (run.skips and step % 2):
                run.optimizer.step()
    except Exception as problem:  # whatever torch makes of an edit
        error = f"{type(problem).__name__}: {problem}"
    plain = {k: v for k, v in vars(run.model).items() if k in ("calls", "seen", "hidden")}
    needs_grad = {f"needs grad {n}": p.requires_grad for n, p in run.model.named_parameters()}
    return state_of(run.model) | plain | needs_grad | _optimizer_state(run.optimizer), error


def _optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    held = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        f"optimizer {i} {name}": value.clone() if isinstance(value, Tensor) else value
        for i, p in enumerate(held)
        for name, value in optimizer.state.get(p, {}).items()
    }


def cases() -> list[Any]:
    """Returns every edit at every time, in turn with a probe alone or with an AutoClip too; the other halves are slow.

    AutoClip measures with a probe, so it is attached twice as often.
    """
    return [
        pytest.param(
            edit, time, attach, id=f"{edit}-{time}-{attach}",
            marks=pytest.mark.slow if ((i + j) % 3 == 0) == (attach == "AutoClip") else (),
        )
        for i, edit in enumerate(EDITS) for j, time in enumerate(TIMES) for attach in ("Probe", "AutoClip")
    ]  # fmt: skip


@pytest.mark.thorough
@pytest.mark.parametrize(("edit", "time", "attach"), cases())
def test_an_edit_in_mid_run_leaves_the_run_as_it_is_without(edit, time, attach) -> None:
    make = OPTIMIZERS["adamw" if math.fmod(len(edit), 2) else "sgd"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected, reference = train(edit, time, make, "")
        found, error = train(edit, time, make, attach)
    assert error == reference
    assert_identical(found, expected)
