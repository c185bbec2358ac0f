"""doctor.watching, doctor.findings: the watch tells cases apart, counts right, and puts everything back."""

import _thread
import contextlib
import copy
import functools
import gc
import itertools
import math
import re
import site
import sys
import sysconfig
import threading
import weakref

import pytest
import torch
from asserts import assert_identical, state_of
from networks import mlp
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, get_total_norm
from torch.optim.optimizer import (
    _global_optimizer_post_hooks,
    _global_optimizer_pre_hooks,
    register_optimizer_step_pre_hook,
)
from torch.utils.checkpoint import checkpoint

import smoothdiag as sd
from smoothdiag.doctor import Fault, Site
from smoothdiag.doctor.findings import finding
from smoothdiag.doctor.gradients import has_entries, is_part
from smoothdiag.doctor.patches import Patches
from smoothdiag.doctor.sites import call_site, caller, code_of, is_library, is_own, is_result_used
from smoothdiag.doctor.watching import StepsDone, watch_all


class Run:
    """A small loop of which tests write the body."""

    def __init__(self, optimizer=torch.optim.SGD, **options) -> None:
        torch.manual_seed(0)
        self.model = mlp(4, 8, 1)
        self.optimizer = optimizer(self.model.parameters(), lr=0.1, **options)

    @property
    def gradients(self):
        return [p.grad for p in self.model.parameters()]

    def backward(self, scale=1.0):
        (self.model(torch.randn(8, 4)).square().mean() * scale).backward()

    def step(self):
        self.optimizer.step()
        self.optimizer.zero_grad()

    def watch(self):
        return sd.doctor.watch(self.model, self.optimizer)


def names(report) -> list[str]:
    return [each.name for each in report.findings]


def test_watch_finds_what_was_imported_before_and_passed_on() -> None:
    run, aliases = Run(), {"clip": clip_grad_norm_}

    def loop(clip=clip_grad_norm_):
        run.backward()
        run.optimizer.step()
        clip(run.model.parameters(), 1.0)
        run.optimizer.zero_grad()
        run.backward()
        run.optimizer.step()
        aliases["clip"](run.model.parameters(), 1.0)
        run.optimizer.zero_grad()

    with run.watch() as report:
        loop()
    first = loop.__code__.co_firstlineno
    assert [(f.name, f.line - first, f.count, f.of) for f in report.findings] == [
        ("clip-after-step", 3, 1, 2),
        ("clip-after-step", 7, 1, 2),
    ]
    assert report.findings[0].file == __file__
    assert report.findings[0].code == "clip(run.model.parameters(), 1.0)"


def test_report_can_be_read_at_any_time() -> None:
    run = Run()
    with run.watch() as report:
        assert "no optimizer step" in str(report)
        run.backward()
        run.step()
        assert str(report) == "smoothdiag doctor: no findings in 1 step."
        clip_grad_norm_(run.model.parameters(), 1.0)
        assert names(report) == ["clip-after-step"]
        assert report.to_dict()["findings"][0]["line"] == report.findings[0].line
    assert names(report) == ["clip-after-step"]


def originals() -> dict:
    functions = (clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, get_total_norm)
    found = {f.__name__: [cell.cell_contents for cell in f.__closure__] for f in functions}
    for owner in (torch.linalg, torch.autograd, torch.amp.GradScaler, torch.optim.Optimizer):
        found[owner.__name__] = dict(vars(owner))
    found["hooks"] = [dict(_global_optimizer_pre_hooks), dict(_global_optimizer_post_hooks)]
    return found | {"foreach": torch._foreach_norm, "jit": dict(torch.jit._builtins._get_builtin_table())}


def test_everything_is_put_back_even_after_an_error() -> None:
    run, before = Run(), originals()

    def fails():
        with run.watch(), run.watch():
            run.backward()
            assert originals() != before
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert originals() == before


def test_a_watch_within_a_watch_sees_the_same() -> None:
    run = Run()
    with run.watch() as outer, run.watch() as inner:
        run.backward()
        clip_grad_norm_(run.model.parameters(), 0.01)
        run.optimizer.step()
        get_total_norm(run.gradients)
        clip_grad_norm_(run.model.parameters(), 0.01)
    assert names(outer) == names(inner) == ["clip-after-step", "norm-after-clipping"]


@pytest.mark.parametrize("first_out", [0, 1])
def test_watches_may_end_in_any_order(first_out) -> None:
    run, before = Run(), originals()
    watches = [run.watch(), run.watch()]
    reports = [each.__enter__() for each in watches]
    watches.pop(first_out).__exit__(None, None, None)
    run.backward()
    run.optimizer.step()
    clip_grad_norm_(run.model.parameters(), 1.0)
    watches.pop().__exit__(None, None, None)
    assert originals() == before
    assert names(reports.pop(first_out)) == []
    assert names(reports.pop()) == ["clip-after-step"]


def test_other_threads_are_left_alone() -> None:
    run, other = Run(), Run()

    def train():
        other.optimizer = torch.optim.SGD(other.model.parameters(), lr=0.1)
        for _ in range(3):
            other.backward()
            other.optimizer.step()
            clip_grad_norm_(other.model.parameters(), math.inf)

    with watch_all() as watcher:
        run.optimizer = torch.optim.SGD(run.model.parameters(), lr=0.1)
        thread = threading.Thread(target=train)
        thread.start()
        thread.join()
        assert (watcher.observer.steps, watcher.observer.passes) == (0, 0)
        run.backward()
        run.optimizer.step()
    assert watcher.observer.steps == 1
    assert watcher.observer.findings() == []


@pytest.mark.parametrize("is_pythons", [False, True])
def test_hooks_in_threads_of_the_autograd_engine_are_seen(is_pythons) -> None:
    run = Run()
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in run.model.parameters()}

    def elsewhere(p):
        done = threading.Event()

        def step():
            optimizers[p].step()
            done.set()

        if is_pythons:
            threading.Thread(target=step).start()
        else:
            _thread.start_new_thread(step, ())  # unknown to threading, as those of the engine are
        done.wait()

    for p in optimizers:
        p.register_post_accumulate_grad_hook(elsewhere)
    with sd.doctor.watch(run.model, *optimizers.values()) as report:
        run.backward()
        clip_grad_norm_(run.model.parameters(), 1.0)
    assert report.steps == (0 if is_pythons else 1)
    assert names(report) == ([] if is_pythons else ["clip-after-optimizer-in-backward"])


def test_backward_passes_within_one_another_are_one() -> None:
    run, seen = Run(), []
    run.model[0].weight.register_post_accumulate_grad_hook(lambda p: seen.append(watcher.observer.in_backward))
    with watch_all() as watcher:
        hidden = run.model[0](torch.ones(2, 4))
        checkpoint(run.model[1:], hidden, use_reentrant=True).sum().backward()
    assert (watcher.observer.passes, watcher.observer.in_backward, seen) == (1, False, [True])


def test_a_step_that_fails_keeps_nothing_alive() -> None:
    class Fails(torch.optim.SGD):
        def step(self, closure=None):
            raise ZeroDivisionError

    run = Run(Fails)

    def loop():
        batch = torch.ones(8, 4)
        with pytest.raises(ZeroDivisionError):
            run.optimizer.step()
        return weakref.ref(batch)

    with run.watch():
        gone = loop()
        gc.collect()
        assert gone() is None


def test_gradients_that_are_never_zeroed_are_not_taken_for_micro_batches() -> None:
    run = Run()
    with run.watch() as report:
        for _ in range(3):
            run.backward()
            run.optimizer.step()
            clip_grad_norm_(run.model.parameters(), 0.01)
            clip_grad_norm_(run.model.parameters(), 0.001)
    assert names(report) == ["clip-after-step", "clip-after-step"]


def test_clip_of_no_gradients_is_too_late_only_if_there_was_no_backward_pass_since_the_step() -> None:
    run, bias = Run(), torch.optim.SGD([unused := nn.Parameter(torch.ones(1))], lr=0.1)
    with watch_all() as watcher:
        run.optimizer, bias = copy.copy(run.optimizer), copy.copy(bias)
        for clips in (False, True):
            run.backward()
            clip_grad_norm_([unused], 1.0)
            run.step()
            bias.step()
            if clips:
                clip_grad_norm_(run.model.parameters(), 1.0)
    assert [(f.name, f.count) for f in watcher.observer.findings()] == [("clip-after-step", 1)]


def test_clips_of_no_gradients_do_not_count_as_never_binding() -> None:
    run, unused = Run(), nn.Parameter(torch.ones(1))
    run.optimizer.add_param_group({"params": [unused]})
    with run.watch() as report:
        for _ in range(31):
            run.backward()
            clip_grad_norm_([unused], 1.0)
            run.step()
    assert names(report) == []


def test_backward_of_others_spoils_no_clipped_gradient() -> None:
    run, other = Run(), Run()
    with run.watch() as report:
        for _ in range(2):
            run.backward()
            clip_grad_norm_(run.model.parameters(), 0.01)
            other.backward()
            run.step()
    assert names(report) == []


def test_micro_batch_is_counted_at_the_step_that_uses_it() -> None:
    run = Run()
    with run.watch() as report:
        run.backward()
        clip_grad_norm_(run.model.parameters(), 0.01)
        run.backward()
        assert names(report) == []
        run.optimizer.step()
        run.backward()
        run.optimizer.step()
    assert [(f.name, f.count, f.of) for f in report.findings] == [("clip-per-micro-batch", 1, 2)]


def test_optimizer_that_stepped_in_earlier_backward_passes_is_no_matter() -> None:
    run = Run()
    first = run.model[0].weight
    early = torch.optim.SGD([first], lr=0.1)
    run.optimizer = torch.optim.SGD(run.model[2].parameters(), lr=0.1)

    def step(p):
        early.step()
        early.zero_grad()

    hook = first.register_post_accumulate_grad_hook(step)
    with sd.doctor.watch(run.model, early, run.optimizer) as report:
        run.backward()
        run.step()
        hook.remove()
        first.requires_grad_(False)
        run.backward()
        clip_grad_norm_([first, *run.model[2].parameters()], 1.0)
        run.step()
    assert names(report) == []


def closure_of(run, optimizer):
    def closure():
        optimizer.zero_grad()
        loss = run.model(torch.ones(2, 4)).square().mean()
        loss.backward()
        return loss

    return closure


class RunsClosure(torch.optim.SGD):
    """Runs the closure by itself and leaves the rest to what it inherits."""

    def step(self, closure=None):
        with torch.enable_grad():
            closure()
        super().step()


@pytest.mark.parametrize("kind", [RunsClosure, torch.optim.LBFGS])
def test_parameters_go_to_the_optimizer_that_steps_them(kind) -> None:
    run = Run()
    second = kind(run.model.parameters(), lr=0.01)
    with sd.doctor.watch(run.model, run.optimizer, second) as report:
        run.backward()
        run.optimizer.step()
        for _ in range(3):
            second.step(closure_of(run, second))
            clip_grad_norm_(run.model.parameters(), 1.0)
    assert [(f.name, f.count, f.of) for f in report.findings] == [("stale-gradients", 3, 3)]


def test_norm_read_after_the_step_by_a_function_further_up_is_right() -> None:
    run = Run(torch.optim.LBFGS, max_iter=2)

    def log():
        return get_total_norm(run.gradients)

    with run.watch() as report:
        for _ in range(3):
            run.optimizer.step(closure_of(run, run.optimizer))
            log()
    assert names(report) == []


def test_norm_of_a_part_of_the_gradient_or_one_that_the_clip_was_given_is_no_norm_after_clipping() -> None:
    run = Run()
    with run.watch() as report:
        run.backward()
        norm = torch.cat([g.flatten() for g in run.gradients]).norm()
        clip_grads_with_norm_(run.model.parameters(), 0.01, norm)
        get_total_norm(run.gradients)
        run.step()
        run.backward()
        clip_grad_norm_(run.model.parameters(), 0.01)
        run.gradients[0][:1].norm()
    assert names(report) == []


def test_part_of_a_dtensor_is_one_that_other_ranks_add_to() -> None:
    from torch import distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        meshes = [init_device_mesh("cpu", shape) for shape in ((2,), (2, 1), (1, 2))]
        cases = {
            (0, Shard(0)): True,
            (0, Replicate()): False,
            (0, Partial()): True,
            (1, Shard(0), Replicate()): True,
            (1, Replicate(), Shard(0)): False,
            (2, Shard(0), Replicate()): False,
            (2, Replicate(), Shard(0)): True,
        }
        for (mesh, *placements), expected in cases.items():
            assert is_part(DTensor.from_local(torch.ones(2), meshes[mesh], placements)) is expected
        assert not is_part(torch.ones(2))

        weight = nn.Parameter(DTensor.from_local(torch.ones(2), meshes[0], [Replicate()]))
        optimizer = torch.optim.SGD([weight], lr=0.1)
        with watch_all() as watcher:
            watcher.own(optimizer)
            weight.grad = weight.detach().clone()
            assert weight.grad.to_local().norm() == math.sqrt(2)
        assert watcher.observer.findings() == []
    finally:
        dist.destroy_process_group()


def test_inherited_attribute_is_taken_off_and_the_latest_original_is_called() -> None:
    class Parent:
        def value(self):
            return 1

    class Child(Parent):
        pass

    for base in (1, 5):
        Parent.value = lambda self, base=base: base
        with Patches() as patches:
            patches.replace(Child, "value", lambda original: lambda child: original(child) + 1)
            assert (Child().value(), Parent().value()) == (base + 1, base)
        assert "value" not in vars(Child)


def test_function_that_cannot_be_watched_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"cannot watch .*test_doctor_watch.names, because this version of PyTorch"):
        Patches().redirect(names, lambda original: original)


def test_run_is_bit_for_bit_the_same() -> None:
    states = []
    for watched in (False, True):
        run = Run(torch.optim.AdamW)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        with run.watch() if watched else contextlib.nullcontext():
            for _ in range(5):
                scaler.scale(run.model(torch.randn(8, 4)).square().mean()).backward()
                scaler.unscale_(run.optimizer)
                norm = clip_grad_norm_(run.model.parameters(), 0.01)
                clip_grad_value_(run.model.parameters(), 0.001)
                rest = sum(p.grad.norm() for p in run.model.parameters())
                scaler.step(run.optimizer)
                scaler.update()
        states.append(state_of(run.model, run.optimizer) | {"norm": norm, "rest": rest, "scale": scaler.get_scale()})
    assert_identical(states[1], states[0])


@pytest.mark.parametrize(("clips", "bound", "expected"), [
    (30, 0, ["clip-never-binds"]), (30, 30, ["clip-always-binds"]), (29, 0, []), (29, 29, []), (30, 1, []),
    (30, 29, []),
])  # fmt: skip
def test_binding_is_counted(clips, bound, expected) -> None:
    run = Run()
    with run.watch() as report:
        for clip in range(clips):
            run.backward()
            norm = math.sqrt(sum(float(g.double().square().sum()) for g in run.gradients))
            clip_grad_norm_(run.model.parameters(), norm * (0.99 if clip < bound else 1.01))
            run.step()
    assert names(report) == expected
    assert all((f.count, f.of, f.unit) == (clips, clips, "clips") for f in report.findings)


def test_clips_that_come_too_late_do_not_count_as_never_binding() -> None:
    run = Run()
    with run.watch() as report:
        for _ in range(40):
            run.backward()
            run.step()
            clip_grad_norm_(run.model.parameters(), 1.0)
    assert [(f.name, f.count, f.of) for f in report.findings] == [("clip-after-step", 40, 40)]


@pytest.mark.parametrize(("number", "first", "expected"), [
    (31, False, ["clip-of-nothing"]), (30, False, []), (40, True, []),
])  # fmt: skip
def test_clip_of_nothing_takes_many_clips_and_none_that_had_a_gradient(number, first, expected) -> None:
    run = Run()
    with run.watch() as report:
        for k in range(number):
            run.backward()
            if k or not first:
                run.optimizer.zero_grad(set_to_none=k % 2 == 0)
            clip_grad_norm_(run.model.parameters(), 1.0)
            run.step()
    assert names(report) == expected
    assert all(
        (f.count, f.of) == (30, 31) and "which were zeroed or removed before the clip" in f.what
        for f in report.findings
    )


@pytest.mark.parametrize("make", [lambda ps: filter(None.__ne__, ps), itertools.chain, lambda ps: (p for p in ps)])
def test_an_iterator_that_comes_again_is_at_its_end(make) -> None:
    run = Run()
    again = make(run.model.parameters())
    with run.watch() as report:
        for _ in range(3):
            run.backward()
            clip_grad_norm_(again, 1e-3)
            run.step()
            clip_grad_norm_(filter(None, []), 1.0)  # a new one each time, of a network without parameters
    assert names(report) == ["clip-of-nothing"]
    assert (report.findings[0].count, report.findings[0].of) == (2, 3)


@pytest.mark.parametrize("clips", [False, True])
def test_clip_without_parameters_is_no_matter_where_another_one_clips(clips) -> None:
    run, other = Run(), Run()
    with run.watch() as report:
        for _ in range(30):
            run.backward()
            clip_grad_norm_([], 1.0)
            clip_grad_norm_(other.model.parameters(), 1.0)
            if clips:
                clip_grad_value_(run.model.parameters(), 1.0)
            run.step()
        run.backward()
        run.step()
    assert names(report) == ([] if clips else ["clip-of-nothing"])
    assert all("it was given no parameters." in f.what for f in report.findings)


def test_what_pytorch_says_of_parameters_that_are_none_is_left_to_it() -> None:
    run = Run()
    with watch_all() as watcher:
        watcher.own(run.optimizer)
        with pytest.raises(AttributeError, match="'tuple' object has no attribute 'grad'"):
            clip_grad_norm_(run.model.named_parameters(), 1.0)


def test_gradients_with_entries_other_than_zero() -> None:
    zero, one = torch.zeros(2), torch.tensor([0.0, 1.0])
    assert has_entries([None, zero, one])
    assert has_entries([torch.tensor(math.nan)])
    assert has_entries([zero.to_sparse()])
    assert has_entries([zero.to("meta")])
    assert not has_entries([None, zero, torch.zeros(0), zero.bfloat16()])
    assert not has_entries([])


@pytest.mark.parametrize(("threshold", "expected"), [(1.8e19, ["clip-never-binds"]), (1.9e19, [])])
def test_threshold_that_no_norm_can_reach_is_there_to_read_the_norm(threshold, expected) -> None:
    run = Run()
    with run.watch() as report:
        for _ in range(30):
            run.backward()
            clip_grad_norm_(run.model.parameters(), threshold)
            run.step()
    assert names(report) == expected


@pytest.mark.parametrize(("passes", "zeroes", "is_said"), [
    (1, None, True), (3, None, True), (1, "to_none", False), (1, "in_place", False), (2, "in_place", False),
    (1, "once", True),
])  # fmt: skip
def test_gradients_that_are_never_zeroed_are_an_error_in_place_of_a_clip_that_always_binds(
    passes, zeroes, is_said
) -> None:
    run, other = Run(), Run()
    with sd.doctor.watch(nn.ModuleList([run.model, other.model]), run.optimizer, other.optimizer) as report:
        for k in range(30):
            if k == 20 if zeroes == "once" else zeroes:
                run.optimizer.zero_grad(set_to_none=zeroes != "in_place")
            for _ in range(passes):
                run.backward()
            clip_grad_norm_(run.model.parameters(), 1e-4)
            run.optimizer.step()
            run.model[0](torch.ones(1, 4)).sum().backward() if zeroes else None  # leaks into what was used
            other.backward()
            other.step()
    (found,) = report.findings
    assert found.name == ("zero-grad-missing" if is_said else "clip-always-binds")


def test_note_is_left_out_where_an_error_names_the_line() -> None:
    run, scaler = Run(), torch.amp.GradScaler("cpu", init_scale=64.0)
    with run.watch() as report:
        for _ in range(30):
            scaler.scale(run.model(torch.randn(8, 4)).square().mean()).backward()
            clip_grad_norm_(run.model.parameters(), 1e-4)
            scaler.step(run.optimizer)
            scaler.update()
            run.optimizer.zero_grad()
    assert names(report) == ["clip-of-scaled-gradients"]


@pytest.mark.parametrize(("fault", "through", "change"), [
    (Fault.CLIP_NEVER_BINDS, "transformers.train", "the setting is max_grad_norm of TrainingArguments."),
    (Fault.CLIP_NEVER_BINDS, "lightning.fit", "the setting is gradient_clip_val of the Trainer."),
    (Fault.CLIP_NEVER_BINDS, "else.fit", "look for the setting that asks for it."),
    (Fault.NORM_AFTER_CLIPPING, "transformers.train", "look for the setting that asks for it."),
    (Fault.CLIP_AS_NORM, "transformers.train", "Set max_grad_norm of TrainingArguments to 1e30, which reads the norm"),
    (Fault.CLIP_PER_MICRO_BATCH, "accelerate.clip_grad_norm_", "under `if accelerator.sync_gradients:`."),
    (Fault.CLIP_PER_MICRO_BATCH, "lightning.clip_gradients", "right before the optimizer's step."),
])  # fmt: skip
def test_setting_of_a_library_is_named_where_it_is_known(fault, through, change) -> None:
    found = finding(fault, Site("train.py", 1, "train", "library.py:1", through), 1, 1)
    assert change in found.change
    assert ("a library's own" in found.change) is ("the setting" in change)


def test_updates_by_hand_end_a_run_after_the_steps_asked_for() -> None:
    run, updates = Run(), []

    def loop():
        for k in range(9):
            run.model.zero_grad()
            run.backward()
            for p in run.model.parameters():
                p.data.add_(p.grad, alpha=-0.1)
            updates.append(k)

    del run.optimizer
    with pytest.raises(StepsDone), watch_all(steps=3) as watcher:
        loop()
    assert (len(updates), watcher.observer.steps) == (3, 3)


def test_updates_by_hand_of_a_watched_model_are_counted_and_those_of_others_are_not() -> None:
    run, other = Run(), Run()
    with sd.doctor.watch(run.model) as report:
        for each, number in ((run, 4), (other, 3)):
            for _ in range(number):
                each.model.zero_grad()
                each.backward()
                for p in each.model.parameters():
                    p.data.add_(p.grad, alpha=-0.1)
    assert report.steps == 4
    assert str(report) == "smoothdiag doctor: no findings in 4 steps taken by hand."


@pytest.mark.parametrize("clip", [clip_grad_norm_, clip_grad_value_])
@pytest.mark.parametrize(("threshold", "does"), [
    (-1.0, "uphill|set every entry to -1"), (0.0, "erased"), (math.nan, "every entry NaN"),
    (-math.inf, "infinite, and every zero NaN|to -inf"), (math.inf, "ever shortened|never changes"),
])  # fmt: skip
def test_threshold_without_meaning_does_what_the_finding_says(clip, threshold, does) -> None:
    run = Run()
    with run.watch() as report:
        run.backward()
        before = [g.clone() for g in run.gradients]
        clip(run.model.parameters(), threshold)
    after, (found,) = run.gradients, report.findings
    assert re.search(does, found.what)
    assert (found.name, found.severity) == ("threshold-without-meaning", "error")
    flat, was = torch.cat([g.flatten() for g in after]), torch.cat([g.flatten() for g in before])
    is_norm = clip is clip_grad_norm_
    if threshold == 0:
        assert not flat.any()
    elif math.isnan(threshold):
        assert flat.isnan().all()
    elif threshold == math.inf:
        assert torch.equal(flat, was)
    elif threshold == -math.inf:
        assert (flat.isinf() | (was == 0)).all() if is_norm else (flat == -math.inf).all()
    else:
        assert ((flat * was) <= 0).all() if is_norm else (flat == -1).all()


@pytest.mark.parametrize("threshold", [None, "one", []])
def test_what_pytorch_says_of_thresholds_that_are_no_numbers_is_left_to_it(threshold) -> None:
    run, said = Run(), []
    run.backward()
    for watch in (contextlib.nullcontext, run.watch):
        with watch(), pytest.raises((TypeError, ValueError)) as error:
            clip_grad_norm_(run.model.parameters(), threshold)
        said.append((error.type, str(error.value)))
    assert said[0] == said[1]


def test_facts_of_a_clip_that_never_binds() -> None:
    run = Run()
    norms = []
    with run.watch() as report:
        for _ in range(30):
            run.backward()
            norms.append(math.sqrt(sum(float(g.double().square().sum()) for g in run.gradients)))
            clip_grads_with_norm_(run.model.parameters(), 100.0, get_total_norm(run.gradients))
            run.step()
    (found,) = report.findings
    assert f"norms from {min(norms):.3g} to {max(norms):.3g}, threshold 100" in found.what


def test_an_infinite_norm_poisons_the_gradients_as_the_finding_says() -> None:
    run = Run()
    with run.watch() as report:
        run.backward()
        run.model[0].bias.grad[0] = math.inf
        norm = clip_grad_norm_(run.model.parameters(), math.inf)
    assert norm == math.inf
    assert names(report) == ["clip-as-norm"]
    assert all(g.isnan().all() for g in run.gradients)


def test_a_clip_at_infinity_reads_the_norm_all_the_same() -> None:
    run, norms = Run(), []
    with run.watch() as report:
        run.backward()
        norms.append(clip_grad_norm_(run.model.parameters(), math.inf))
        clip_grad_norm_(run.model.parameters(), 0.01)
        run.optimizer.step()
        get_total_norm(run.gradients)
        norms.append(clip_grad_norm_(run.model.parameters(), math.inf))
        clip_grad_norm_(run.model.parameters(), 0.01)
    assert names(report) == ["clip-after-step", "clip-as-norm", "clip-as-norm"]


@pytest.mark.parametrize("discard", [True, False])
def test_norm_after_a_clip_is_right_only_if_the_norm_before_was_read(discard) -> None:
    run = Run()
    with run.watch() as report:
        run.backward()
        if discard:
            clip_grad_norm_(run.model.parameters(), 0.01)
        else:
            norm = clip_grad_norm_(run.model.parameters(), 0.01)
            assert norm > 0.01
        run.optimizer.step()
        torch.linalg.vector_norm(run.gradients[0])
    assert names(report) == (["norm-after-clipping"] if discard else [])


class Lars(torch.optim.SGD):
    """Looks at norms within its step, as optimizers with trust ratios do."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad.mul_(0.1 / (1 + p.grad.norm()))
        return super().step(closure)


def test_norms_of_the_optimizers_own_arithmetic_are_not_read_by_anybody() -> None:
    run = Run(Lars)
    with run.watch() as report:
        for _ in range(3):
            run.backward()
            clip_grad_norm_(run.model.parameters(), 0.01)
            run.step()
    assert report.steps == 3
    assert names(report) == []


class Lookahead(torch.optim.Optimizer):
    """Wraps another optimizer, whose hooks fire within its own step."""

    def __init__(self, optimizer) -> None:
        self.optimizer = optimizer
        super().__init__(optimizer.param_groups, {})

    def step(self, closure=None):
        return self.optimizer.step(closure)


def test_optimizer_that_wraps_another_takes_one_step_at_a_time() -> None:
    run = Run()
    run.optimizer = Lookahead(run.optimizer)
    with run.watch() as report:
        for _ in range(3):
            run.backward()
            clip_grad_norm_(run.model.parameters(), 0.01)
            run.optimizer.step()
            get_total_norm(run.gradients)
            run.optimizer.zero_grad()
    assert report.steps == 3
    assert [(f.name, f.count, f.of) for f in report.findings] == [("norm-after-clipping", 3, 3)]


def test_scaler_that_is_switched_off_scales_nothing() -> None:
    run, scaler = Run(), torch.amp.GradScaler("cpu", enabled=False)
    with run.watch() as report:
        for _ in range(3):
            scaler.scale(run.model(torch.randn(8, 4)).square().mean()).backward()
            clip_grad_norm_(run.model.parameters(), 0.01)
            scaler.step(run.optimizer)
            scaler.update()
            run.optimizer.zero_grad()
    assert report.steps == 3
    assert names(report) == []


@pytest.mark.parametrize("wrap", [lambda optimizer: optimizer, Lookahead])
@pytest.mark.parametrize("for_all", [False, True])
def test_norms_read_by_a_hook_of_the_step_are(wrap, for_all) -> None:
    run = Run(Lars)
    register = register_optimizer_step_pre_hook if for_all else run.optimizer.register_step_pre_hook
    inner = run.optimizer
    handle = register(lambda optimizer, *_: print(get_total_norm(run.gradients)) if optimizer is inner else None)
    run.optimizer = wrap(run.optimizer)
    with run.watch() as report:
        run.backward()
        clip_grad_norm_(run.model.parameters(), 0.01)
        run.step()
    handle.remove()
    assert names(report) == ["norm-after-clipping"]


def test_norms_read_by_a_closure_are() -> None:
    run = Run(torch.optim.LBFGS, max_iter=2)

    def closure():
        loss = closure_of(run, run.optimizer)()
        get_total_norm(run.gradients)
        clip_grad_norm_(run.model.parameters(), 0.01)
        return loss

    with run.watch() as report:
        run.optimizer.step(closure)
        get_total_norm(run.gradients)
    assert names(report) == []


def test_hook_of_a_step_with_closure_sees_gradients_of_the_step_before() -> None:
    run = Run(torch.optim.LBFGS, max_iter=2)
    run.optimizer.register_step_pre_hook(lambda *_: print(clip_grad_norm_(run.model.parameters(), 1.0)))

    def closure():
        run.optimizer.zero_grad()
        loss = run.model(torch.ones(2, 4)).square().mean()
        loss.backward()
        return loss

    with run.watch() as report:
        for _ in range(3):
            run.optimizer.step(closure)
    assert [(f.name, f.count, f.of) for f in report.findings] == [("stale-gradients", 2, 3)]


def test_fused_optimizer_is_named_only_with_a_hook() -> None:
    norm_of = str
    for hook in (False, True):
        run = Run(torch.optim.Adam, fused=True)
        if hook:
            run.optimizer.register_step_pre_hook(lambda *_: norm_of() or None)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        with run.watch() as report:
            for unscale in (False, True):
                scaler.scale(run.model(torch.randn(8, 4)).square().mean()).backward()
                if unscale:
                    scaler.unscale_(run.optimizer)
                scaler.step(run.optimizer)
                scaler.update()
        found = [(f.name, f.count, f.of) for f in report.findings]
        assert found == ([("scaled-gradients-in-hook", 1, 2)] if hook else [])
        first = test_fused_optimizer_is_named_only_with_a_hook.__code__.co_firstlineno
        assert not hook or f"pre-hook at {__file__}:{first + 5} saw" in report.findings[0].what


def test_hook_of_a_library_is_left_to_the_library() -> None:
    run, scaler = Run(torch.optim.Adam, fused=True), torch.amp.GradScaler("cpu")
    run.optimizer.register_step_pre_hook(of_library("call = lambda *_: None"))
    with run.watch() as report:
        scaler.scale(run.model(torch.randn(8, 4)).square().mean()).backward()
        scaler.step(run.optimizer)
    assert names(report) == []


def test_loops_without_a_watched_optimizer_are_left_alone() -> None:
    run, other = Run(), Run()
    with run.watch() as report:
        other.backward()
        other.step()
        clip_grad_norm_(other.model.parameters(), 1.0)
        clip_grad_norm_(other.model.parameters(), math.inf)
    assert report.steps == 0
    assert names(report) == []


def test_further_optimizers_of_the_model_are_found() -> None:
    run = Run()
    with sd.doctor.watch(run.model) as report:
        run.backward()
        run.step()
        clip_grad_norm_(run.model.parameters(), 1.0)
    assert names(report) == ["clip-after-step"]


@pytest.mark.parametrize("wrong", [Run().optimizer, "sgd"])
def test_wrong_optimizer_is_refused(wrong) -> None:
    with pytest.raises(
        ValueError, match="`optimizers` should be torch.optim.Optimizers that hold parameters of `model`"
    ):
        sd.doctor.watch(Run().model, wrong).__enter__()


def test_model_and_optimizer_the_wrong_way_round_are_told_apart() -> None:
    run = Run()
    with pytest.raises(ValueError, match=r"`model` should be a torch.nn.Module, and come first.* Found SGD\."):
        sd.doctor.watch(run.optimizer, run.model).__enter__()


def test_nothing_is_kept_alive() -> None:
    with watch_all():
        run = Run()
        run.backward()
        clip_grad_norm_(run.model.parameters(), 0.01)
        get_total_norm(run.gradients)
        run.optimizer.step()
        gone = [weakref.ref(x) for x in (run.model, run.optimizer, run.model[0].weight, run.model[0].weight.grad)]
        del run
        gc.collect()
        assert [each() for each in gone] == [None] * 4


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_copies_and_functional_transforms_work_as_without() -> None:
    run = Run()
    with run.watch():
        run.backward()
        scripted = torch.jit.script(Norms())
        assert scripted(torch.ones(4)) == 8
        assert torch.equal(torch.vmap(torch.linalg.vector_norm)(torch.ones(2, 4)), torch.full((2,), 2.0))
        assert torch.equal(torch.func.grad(torch.norm)(torch.ones(4)), torch.full((4,), 0.5))
        assert torch.fx.symbolic_trace(Norms())(torch.ones(4)) == 8
        compiled = torch.compile(Norms(), backend="eager", fullgraph=True)
        assert compiled(torch.ones(4)) == 8
        copy.deepcopy(run.optimizer).step()
        assert get_total_norm(p.grad for p in run.model.parameters()) == get_total_norm(run.gradients)
        with pytest.raises(TypeError):
            clip_grad_norm_(run.model.parameters())


class Norms(nn.Module):
    def forward(self, x):
        return torch.norm(x) + x.norm() + torch.linalg.vector_norm(x) + torch.linalg.norm(x)


LIBRARY = f"{sysconfig.get_path('purelib')}/library.py"


def of_library(code, file=LIBRARY):
    """Returns the function ``call`` of an installed package with this code."""
    found = {}
    exec(compile(code, file, "exec"), found)
    return found["call"]


def test_code_is_that_of_what_is_called_in_the_end() -> None:
    class Hook:
        def __call__(self):
            pass

        @torch.no_grad()
        def method(self):
            pass

    plain = Hook.method.__wrapped__.__code__
    assert code_of(Hook()) is code_of(functools.partial(Hook())) is Hook.__call__.__code__
    assert code_of(Hook().method) is code_of(functools.partial(functools.partial(Hook().method))) is plain
    assert code_of(print) is None


def test_folders_are_told_apart_by_their_whole_names() -> None:
    purelib = sysconfig.get_path("purelib")
    assert is_library(f"{purelib}/torch/nn/x.py")
    assert is_library(f"{site.getusersitepackages()}/x.py")
    assert not is_library(f"{purelib}-mine/x.py")
    own = of_library("import sys\ncall = lambda: sys._getframe()", f"{sd.__path__[0]}/x.py")
    mine = of_library("import sys\ncall = lambda: sys._getframe()", f"{sd.__path__[0]}_runs/x.py")
    assert is_own(own())
    assert not is_own(mine())
    other = of_library("import sys\ncall = lambda: sys._getframe()", f"{torch.__path__[0]}vision/x.py")
    assert caller(other()).f_code is other.__code__


@pytest.mark.parametrize(("file", "expected"), [
    ("/usr/lib/python3/dist-packages/kit.py", True),
    ("/opt/conda/lib/python3.10/site-packages/kit/fit.py", True),
    ("/opt/conda/lib/python3.10/contextlib.py", True),
    ("C:\\env\\Lib\\site-packages\\kit.py", True),
    ("/env/kit-1.0-py3.11.egg/kit/fit.py", True),
    ("/env/kit.zip/kit/fit.py", True),
    ("/usr/lib/python311.zip/os.py", True),
    ("/home/me/site-packages-demo/train.py", False),
    ("/home/me/lib/python_tools/train.py", False),
    ("/home/me/python3.11/train.py", False),
])  # fmt: skip
def test_library_is_known_by_any_layout_of_installed_packages(file, expected) -> None:
    assert is_library(file) is expected


def test_framework_that_is_installed_in_place_is_a_library_and_a_script_of_it_is_not() -> None:
    fit = of_library("__name__ = 'transformers.trainer'\ndef call(f): return f()", "/home/me/src/trainer.py")
    site = fit(here)
    assert (site.code, site.through, site.framework) == ("site = fit(here)", "transformers.call", "transformers")
    main = of_library("__name__ = '__main__'\ndef call(f): return f()", "/home/me/transformers/run.py")
    assert main(lambda: call_site(sys._getframe(1))).file == "/home/me/transformers/run.py"


def here():
    return call_site(sys._getframe(1))


def test_site_is_the_line_of_the_call() -> None:
    site = here()
    assert (site.file, site.function) == (__file__, "test_site_is_the_line_of_the_call")
    assert (site.code, site.inside) == ("site = here()", "")


def test_site_of_a_call_from_a_library_is_where_that_was_called() -> None:
    call = of_library("call = lambda f: f()")
    site = call(here)
    assert (site.code, site.inside) == ("site = call(here)", f"{LIBRARY}:1")
    fit = of_library("__name__ = 'trainers.fitting'\ndef call(f, g): return f(g)")
    assert (fit(call, here).through, here().through) == ("trainers.call", "")


def test_whether_a_result_is_used() -> None:
    seen = []

    def look():
        seen.append(is_result_used(sys._getframe(1)))
        return 1

    def passes_on():
        return look()

    def discards():
        look()

    decorated = torch.no_grad()(passes_on)
    look()
    passes_on()
    decorated()
    discards()
    assert discards() is None
    assert seen == [False] * 5
    seen.clear()
    assert look()
    one = passes_on()
    many = [look() for _ in range(1)]
    assert many == [one] == [decorated()]
    assert seen == [True] * 4
