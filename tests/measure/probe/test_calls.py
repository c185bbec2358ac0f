"""measure.probe.calls: a probe without loss_fn watches a model that returns its loss."""

import copy
import gc
import io
import math
import pickle
import warnings
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from asserts import NoSync, assert_identical, state_of, without_cost
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from smoothdiag import AutoClip, LocalSmoothness, Probe, SmoothdiagWarning, every

LOCAL = LocalSmoothness(radius=1e-3)


class Net(nn.Module):
    """A network with batch statistics and dropout, which returns logits and loss as nanoGPT does, or in other ways."""

    def __init__(self, returns: str = "tuple", reentrant: bool | None = None, dropout: float = 0.2) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(4, 8, dtype=torch.float64), nn.BatchNorm1d(8, dtype=torch.float64)
        self.middle, self.head = nn.Linear(8, 8, dtype=torch.float64), nn.Linear(8, 3, dtype=torch.float64)
        self.dropout, self.returns, self.reentrant = nn.Dropout(dropout), returns, reentrant

    def _block(self, h: Tensor) -> Tensor:
        return self.dropout(torch.tanh(self.middle(h)))

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Any:
        h = torch.tanh(self.norm(self.first(x)))
        h = self._block(h) if self.reentrant is None else checkpoint(self._block, h, use_reentrant=self.reentrant)
        logits = self.head(h)
        loss = None if targets is None else F.cross_entropy(logits, targets)
        return {"tuple": (logits, loss), "mapping": {"loss": loss, "logits": logits}, "loss": loss}[self.returns]


class Wrapper(nn.Module):
    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base(*args, **kwargs)


def loss_of(found: Any) -> Tensor:
    if isinstance(found, Mapping):
        return found["loss"]
    return found[1] if isinstance(found, tuple) else found


def batches(num: int, size: int = 6) -> list[tuple[Tensor, Tensor]]:
    source = torch.Generator().manual_seed(3)
    return [
        (torch.randn(size, 4, generator=source, dtype=torch.float64), torch.randint(3, (size,), generator=source))
        for _ in range(num)
    ]


def rows_of(probe: Probe) -> str:
    return str([without_cost(row) for row in probe.trace])  # NaN differs from itself, but not its text


def statuses(probe: Probe) -> set[str]:
    return {row["status"] for row in probe.trace}


def gradient_norm(model: nn.Module) -> float:
    return math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None))


def train(
    shows: str,
    make: Callable[[], nn.Module] = Net,
    *,
    wrap: Callable[[nn.Module], nn.Module] = lambda model: model,
    inner: bool = False,
    accumulation: int = 1,
    scale: float | None = None,
    **options: Any,
) -> tuple[dict[str, Any], Probe | None]:
    """Trains for three steps; a probe sees the calls of the model, or the batches, or there is none."""
    torch.manual_seed(0)
    original = make()
    model = wrap(original)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    probe = None
    if shows == "calls":
        probe = Probe(original if inner else model, optimizer, schedule=every(2), **options)
    elif shows == "batches":
        probe = Probe(model, optimizer, lambda model, b: loss_of(model(*b)), schedule=every(2), **options)
    for number, (x, targets) in enumerate(batches(3 * accumulation)):
        if probe is not None and shows == "batches":
            probe.observe((x, targets))
        scaler.scale(loss_of(model(x, targets=targets)) / accumulation).backward()
        if number % accumulation == accumulation - 1:
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    return state_of(model, optimizer), probe


RUNS: dict[str, dict[str, Any]] = {
    "accumulated": {"accumulation": 3},
    "accumulated five times": {"accumulation": 5},
    "on fixed batches": {"accumulation": 3, "data": "fixed"},
    "scaled": {"accumulation": 3, "scale": 512.0},
    "scaled on fixed batches": {"scale": 512.0, "data": "fixed"},
    "mapping": {"make": lambda: Net("mapping")},
    "loss alone": {"make": lambda: Net("loss")},
    "checkpoint": {"make": lambda: Net(reentrant=False), "accumulation": 2},
    "reentrant": {"make": lambda: Net(reentrant=True), "accumulation": 2},
    "wrapped": {"wrap": Wrapper},
    "within a wrapper": {"wrap": Wrapper, "inner": True},
}


@pytest.mark.parametrize("name", RUNS)
def test_calls_give_the_rows_of_batches_and_leave_the_run_alone(name) -> None:
    options = {"data": "step", "estimators": [LOCAL], **RUNS[name]}
    bare, _ = train("nothing", **options)
    state, calls = train("calls", **options)
    _, shown = train("batches", **options)
    assert_identical(state, bare)
    assert statuses(calls) == {"ok"}
    assert rows_of(calls) == rows_of(shown)


def one(
    pass_: Callable[[nn.Module, list[tuple[Tensor, Tensor]]], Any], model: nn.Module | None = None, **options: Any
) -> tuple[Probe, float]:
    """Takes one measured step, and returns the probe and the norm of the loop's gradient."""
    torch.manual_seed(0)
    model = Net(dropout=0.0) if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = Probe(model, optimizer, **{"estimators": [LOCAL], "data": "step", **options})
    pass_(model, batches(3))
    norm = gradient_norm(model)
    optimizer.step()
    return probe, norm


def losses(model: nn.Module, given: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    return [loss_of(model(*batch)) for batch in given]


def after_another(empty: Callable[[nn.Module], None]) -> Callable[..., Any]:
    def passes(model: nn.Module, given: list[tuple[Tensor, Tensor]]) -> None:
        losses(model, given)[0].backward()
        empty(model)
        losses(model, given)[1].backward()

    return passes


def passes_of_a_graph(model: nn.Module, given: list[tuple[Tensor, Tensor]]) -> None:
    loss = loss_of(model(*given[0]))
    loss.backward(retain_graph=True)
    (loss / 4).backward()


def looked_at(model: nn.Module, given: list[tuple[Tensor, Tensor]]) -> None:
    loss = loss_of(model(*given[0]))
    torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    loss.backward()


def divided(model: nn.Module, given: list[tuple[Tensor, Tensor]]) -> None:
    for loss in losses(model, given):
        loss.backward()
    for p in model.parameters():
        p.grad /= len(given)


def unscaled(model: nn.Module, given: list[tuple[Tensor, Tensor]]) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(loss_of(model(*given[0]))).backward()
    scaler.unscale_(torch.optim.SGD(model.parameters()))


def over_tokens(model: nn.Module, given: list[tuple[Tensor, Tensor]]) -> None:
    for size, batch in enumerate(given, start=4):
        (loss_of(model(*(t[:size] for t in batch))) * size / 15).backward()


PASSES: dict[str, Callable[..., Any]] = {
    "several calls": lambda m, b: (lambda x, y, z: 0.5 * x + y * 3 - z / 7)(*losses(m, b)).backward(),
    "a sum of passes": lambda m, b: [loss.backward() for loss in losses(m, b)],
    "token weights": over_tokens,
    "divided in place": lambda m, b: losses(m, b)[0].div_(4).backward(),
    "one graph twice": passes_of_a_graph,
    "a gradient looked at": looked_at,
    "gradients divided": divided,
    "unscaled by hand": unscaled,
    "calls without labels and without backward": lambda m, b: (m(b[0][0]), m(*b[1]), m(*b[2])[1].backward()),
    "an abandoned pass": after_another(nn.Module.zero_grad),
    "an abandoned pass and zeros": after_another(lambda m: m.zero_grad(set_to_none=False)),
}


@pytest.mark.parametrize("name", PASSES)
def test_each_loss_counts_as_in_the_gradient_of_the_loop(name) -> None:
    probe, norm = one(PASSES[name])
    (row,) = probe.trace
    assert row["status"] == "ok"
    assert row["grad_norm"] == pytest.approx(norm, rel=1e-12)


def test_a_call_of_a_function_of_the_model_twice_is_two_micro_batches() -> None:
    probe, _ = one(lambda m, b: [loss_of(m(*batch)).div(3).backward() for batch in (b[0], b[0], b[1])])
    (row,) = probe.trace
    assert math.isfinite(row["grad_variance"])


def test_divided_and_clipped_gradients_are_doubted() -> None:
    def clipped(model: nn.Module, given: list[tuple[Tensor, Tensor]]) -> None:
        divided(model, given)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)

    with pytest.warns(SmoothdiagWarning, match="count 3 times in all.* divide the loss instead of the gradients"):
        one(clipped)


def test_a_skipped_step_leaves_nothing_behind() -> None:
    torch.manual_seed(0)
    model = Net(dropout=0.0).float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = Probe(model, optimizer, estimators=[LOCAL], schedule=every(1), data="step")
    scaler, norms = torch.amp.GradScaler("cpu", init_scale=1024.0), []
    for number, (x, targets) in enumerate(batches(3)):
        x = x.float() / (number > 0)  # infinite at first
        scaler.scale(loss_of(model(x, targets)) * 3).backward()
        scaler.unscale_(optimizer)
        norms.append(gradient_norm(model))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert [row["grad_norm"] for row in probe.trace] == pytest.approx(norms[1:], rel=1e-5)


def test_only_the_first_evaluation_of_a_closure_counts() -> None:
    def train_by_closure(*, probed: bool) -> tuple[dict[str, Any], list[float], Probe | None]:
        torch.manual_seed(0)
        model = Net()
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
        probe = Probe(model, optimizer, estimators=[LOCAL], schedule=every(1), data="step") if probed else None
        norms: list[float] = []

        def evaluate(batch: tuple[Tensor, Tensor]) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model(*batch))
            loss.backward()
            norms.append(gradient_norm(model))
            return loss

        firsts = []
        for batch in batches(2):
            firsts.append(len(norms))
            optimizer.step(partial(evaluate, batch))
        assert len(norms) > 2
        return state_of(model), [norms[first] for first in firsts], probe

    bare, _, _ = train_by_closure(probed=False)
    state, norms, probe = train_by_closure(probed=True)
    assert_identical(state, bare)
    assert [row["grad_norm"] for row in probe.trace] == pytest.approx(norms, rel=1e-12)


def test_autoclip_acts_alike() -> None:
    found = []
    for loss_fn in (None, lambda model, b: loss_of(model(*b))):
        torch.manual_seed(0)
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
        probe = Probe(model, optimizer, loss_fn, estimators=(), schedule=every(4))
        clipper = AutoClip(optimizer, probe)
        for batch in batches(20):
            if loss_fn is not None:
                probe.observe(batch)
            loss_of(model(*batch)).backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append({"longest": clipper.longest_step, "rows": rows_of(probe)} | state_of(model))
    assert len(probe.trace)
    assert_identical(*found)


class Mean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, dtype=torch.float64))

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        return (x @ self.weight).mean()


@pytest.mark.parametrize(
    ("pass_", "model", "found"),
    [
        (lambda m, b: F.cross_entropy(m(b[0][0])[0], b[0][1]).backward(), Net(), r"tuple\(a Tensor of shape \(6, 3\)"),
        (lambda m, b: (m(*b[0]) - 3).pow(2).backward(), Mean(), "PowBackward0 lies in between"),
        (lambda m, b: m(*b[0]).clamp(max=99).backward(), Mean(), "ClampBackward1 lies in between"),
        (lambda m, b: (m(b[0][0][:1]) - 3).pow(2).sum().backward(), nn.Linear(4, 1).double(), "PowBackward0"),
    ],
)
def test_what_is_not_the_loss_is_refused_at_the_first_step(pass_, model, found) -> None:
    with pytest.raises(ValueError, match=f"Parameter `loss_fn` is needed, because .*{found}"):
        one(pass_, model)


def test_a_refusal_later_costs_a_row_and_no_step() -> None:
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = Probe(model, optimizer, estimators=[LOCAL], schedule=every(1), data="step")
    first, second, _ = batches(3)
    loss_of(model(*first)).backward()
    optimizer.step()
    before = state_of(model)
    loss_of(model(*second)).square().backward()
    with pytest.warns(SmoothdiagWarning, match="Step 1 was not measured: .*`loss_fn` is needed"):
        optimizer.step()
    assert [row["status"] for row in probe.trace] == ["ok", "failed"]
    assert not torch.equal(state_of(model)["parameter head.weight"], before["parameter head.weight"])


@pytest.mark.parametrize("name", ["regularised", "another output"])
def test_a_loss_that_is_only_a_part_is_not_reproduced(name) -> None:
    def regularised(model: nn.Module, given: list[tuple[Tensor, Tensor]]) -> None:
        (loss_of(model(*given[0])) + 0.1 * sum(p.square().sum() for p in model.parameters())).backward()

    def another(model: nn.Module, given: list[tuple[Tensor, Tensor]]) -> None:
        logits, loss = model(*given[0])
        (loss + 0.1 * logits.square().mean()).backward()

    with pytest.warns(SmoothdiagWarning, match="Here loss_fn is what the model returned"):
        probe, _ = one(regularised if name == "regularised" else another)
    assert statuses(probe) == {"not_reproduced"}


def test_a_step_without_a_call_names_the_cause() -> None:
    for pass_ in (
        lambda m, b: loss_of(m.forward(*b[0])).backward(),
        lambda m, b: (m(*b[0]), loss_of(m.forward(*b[0])).backward()),
        lambda m, b: loss_of(torch.compile(m, backend="eager", fullgraph=True)(*b[0])).backward(),
    ):
        with pytest.warns(SmoothdiagWarning, match="has seen no call of `model.*`model.forward.*torch.compile"):
            probe, _ = one(pass_)
        assert not len(probe.trace)


def test_an_abandoned_loss_does_not_stand_in_for_another_one() -> None:
    def abandoned(model: nn.Module, given: list[tuple[Tensor, Tensor]]) -> None:
        losses(model, given)[0].backward()
        model.zero_grad(set_to_none=False)
        model.head.weight.square().sum().backward()

    with pytest.warns(SmoothdiagWarning, match="has seen no call of `model"):
        probe, _ = one(abandoned)
    assert not len(probe.trace)


def test_arguments_that_the_loop_writes_to_are_noticed() -> None:
    def written(model: nn.Module, given: list[tuple[Tensor, Tensor]]) -> None:
        loss_of(model(given[0][0], targets=given[0][1])).backward()
        given[0][1].zero_()

    with pytest.warns(SmoothdiagWarning, match="a tensor of the batch was overwritten"):
        probe, _ = one(written)
    assert statuses(probe) == {"data_changed"}
    probe, norm = one(written, data="fixed")  # which copies
    assert [row["grad_norm"] for row in probe.trace] == pytest.approx([norm], rel=1e-12)


def test_held_out_batches_become_arguments() -> None:
    (x, targets), second, _ = batches(3)
    probe, _ = one(
        lambda m, b: loss_of(m(*b[2])).backward(),
        probe_batches=[{"targets": targets, "x": x}, second],
        data="fixed",
    )
    again, _ = one(
        lambda m, b: loss_of(m(*b[2])).backward(),
        loss_fn=lambda model, b: loss_of(model(*b)),
        probe_batches=[(x, targets), second],
        data="fixed",
    )
    assert statuses(probe) == {"ok"}
    assert rows_of(probe) == rows_of(again)


def test_batches_are_handed_on_but_cannot_be_shown() -> None:
    model = Net()
    probe = Probe(model, torch.optim.SGD(model.parameters(), lr=0.1))
    given = batches(2)
    assert len(probe.watch(given)) == 2
    assert all(a is b for a, b in zip(probe.watch(given), given, strict=True))
    with pytest.raises(ValueError, match=r"Parameter `loss_fn` is needed to show batches .* leave out observe\(\)"):
        probe.observe(given[0])
    with pytest.raises(ValueError, match="Parameter `loss_fn` is needed, because a ModuleList cannot be called"):
        Probe(nn.ModuleList([model]), torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize("compiles", [False, True])
def test_hooks_stay_with_the_model_until_close(compiles) -> None:
    model = Net(dropout=0.0)
    if compiles:
        model.compile(backend="eager", fullgraph=True)
    call = model._compiled_call_impl
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = Probe(model, optimizer, estimators=[LOCAL], schedule=every(1), data="step")
    other = Probe(model, optimizer, estimators=[LOCAL], schedule=every(1), data="step")
    batch = batches(1)[0]
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert b"smoothdiag" not in pickle.dumps(nn.Sequential(model)).replace(b"smoothdiag.measure.probe.test", b"")
    for twin in (copy.deepcopy(model), loaded, copy.copy(model)):
        loss_of(twin(*batch)).backward()
        assert not probe._accumulation.has_observed
        optimizer.zero_grad()
    twin = torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True)
    assert torch.equal(loss_of(twin(*batch)), loss_of(model(*batch)))
    model(*batch)[1].backward()
    optimizer.step()
    assert rows_of(probe) == rows_of(other)
    assert len(probe.trace) == 1
    with torch.compiler.set_stance("force_eager"):  # then hooks within a compiled model run
        model(*batch)
    assert len(probe._accumulation._observed) == 1
    probe.close()
    other.close()
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert model._compiled_call_impl is call
    gone = weakref.ref(probe)
    del probe, other
    gc.collect()
    assert gone() is None


@pytest.mark.slow
def test_a_compiled_model_is_not_compiled_anew() -> None:
    for wrap in (
        lambda model: torch.compile(model, backend="aot_eager", fullgraph=True),
        lambda model: model.compile(backend="aot_eager", fullgraph=True) or model,
    ):
        found = []
        for shows in ("nothing", "calls"):
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            state, probe = train(shows, wrap=wrap, estimators=[LOCAL], data="step")
            found.append({"graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"]} | state)
        assert found[0]["graphs"] == 1
        assert_identical(*found)
        assert statuses(probe) == {"ok"}
        _, shown = train("batches", wrap=wrap, estimators=[LOCAL], data="step")
        assert rows_of(probe) == rows_of(shown)


def test_steps_that_are_not_due_wait_for_nothing_and_keep_nothing() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=True)
    probe = Probe(model, optimizer, estimators=[LOCAL], schedule=lambda step: False)
    with NoSync():
        loss = loss_of(model(*batches(1)[0]))
        loss.backward()
        optimizer.step()
    assert not loss._backward_hooks
    assert not probe._accumulation.has_observed


def test_no_call_is_kept_without_gradients_or_while_another_probe_measures() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = Probe(model, optimizer, estimators=[LOCAL], schedule=every(1), data="step")
    other = Probe(model, optimizer, lambda model, b: loss_of(model(*b)), estimators=[LOCAL], data="step")
    batch = batches(1)[0]
    with torch.no_grad():
        model(*batch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        torch.jit.trace(model, batch, check_trace=False, strict=False)
    assert not probe._accumulation.has_observed
    other.observe(batch)
    loss_of(checkpoint(model, *batch, use_reentrant=False)).backward()  # calls the model again in backward
    assert len(probe._accumulation._observed) == 1
    optimizer.step()
    assert rows_of(probe) == rows_of(other)


@pytest.mark.slow
def test_a_model_of_transformers_with_labels_that_the_loop_takes_out() -> None:
    transformers = pytest.importorskip("transformers")
    options = {"vocab_size": 17, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
    config = transformers.GPT2Config(**options, bos_token_id=0, eos_token_id=0)
    for data, autocast, returns_mapping in (("step", False, True), ("fixed", True, True), ("step", True, False)):
        states, probes = [], []
        for shows in ("nothing", "calls", "batches"):
            torch.manual_seed(0)
            model = transformers.GPT2LMHeadModel(config).train()
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
            source, probe = torch.Generator().manual_seed(1), None

            def loss_fn(model: nn.Module, batch: dict[str, Tensor], autocast: bool = autocast) -> Tensor:
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    return model(**batch).loss

            if shows != "nothing":
                given = None if shows == "calls" else loss_fn
                probe = Probe(model, optimizer, given, estimators=[LOCAL], schedule=every(1), data=data)
            for _ in range(2):
                for _ in range(2):
                    ids = torch.randint(17, (3, 8), generator=source)
                    batch = transformers.BatchEncoding({"input_ids": ids, "labels": ids.clone()})
                    if shows == "batches":
                        probe.observe(dict(batch))
                    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                        found = model(**batch, return_dict=returns_mapping)
                    batch.pop("labels")
                    ((found.loss if returns_mapping else found[0]) / 2).backward()
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
            states.append(state_of(model, optimizer))
            probes.append(probe)
        assert_identical(states[1], states[0])
        assert statuses(probes[1]) <= {"ok", "saturated"}
        assert rows_of(probes[1]) == rows_of(probes[2])
    model = transformers.GPT2LMHeadModel(config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Probe(model, optimizer)
    model(input_ids=ids).logits.square().mean().backward()
    with pytest.raises(
        ValueError, match=r"Found CausalLMOutputWithCrossAttentions\(logits: a Tensor of shape \(3, 8, 17\)"
    ):
        optimizer.step()
