"""The parts of the GPU check that are no tests: each prints what it finds, one line a finding."""

import argparse
import gc
import json
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from datetime import date
from functools import partial
from typing import Any
from unittest import mock

import torch
from curvature_peers import PEERS, Recorder, twice_differentiable
from models import GPT, ResNet50, Task, autocast_loss, labelled_loss
from overhead.clock import take_turns
from overhead.counting import Waits, line_of_library, peak
from overhead.loops import DEFAULT, HAS_OFFLOAD, NEVER, PATH, SIX_TENSORS, Loop
from overhead.table import environment
from torch import nn

from smoothdiag import AutoClip, CriticalStep, HessianNorm, SmoothdiagWarning, StepRule, every, objective, vectors
from smoothdiag.measure.curvature import hvp, lanczos
from smoothdiag.optim import ClippedMomentum, ClippedScion, scion_groups

FUSED = {"AdamW, foreach": {"foreach": True}, "AdamW, fused": {"fused": True}}
RELATIVE = {"rule": StepRule(multiple=None)}
PRODUCTS = 10


def say(**finding: Any) -> None:
    print("FOUND " + json.dumps(finding), flush=True)


class CudaWaits:
    """Counts waits of a GPU by the line of the library, as CUDA's own check of synchronisation names them."""

    def __init__(self) -> None:
        self.reads, self.synchronized, self._stack = Counter[str](), 0, ExitStack()

    @property
    def number(self) -> int:
        return self.reads.total()

    def __enter__(self) -> "CudaWaits":
        synchronize = vectors.synchronize

        def synchronizing(a: vectors.Vector) -> None:
            self.synchronized += 1
            synchronize(a)

        def shown(message: Any, *_: Any, **__: Any) -> None:
            if "synchroniz" in str(message):
                self.reads[line_of_library() or "outside of the library"] += 1

        torch.cuda.synchronize()
        self._stack.enter_context(mock.patch.object(vectors, "synchronize", synchronizing))
        self._stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("always")
        warnings.showwarning = shown
        torch.cuda.set_sync_debug_mode("warn")
        return self

    def __exit__(self, *error: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")
        self._stack.close()


def adamw(parameters: Any, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-4, **options)


def where(device: torch.device, tiny: bool) -> None:
    """Says where the check runs, and which peers are installed."""
    say(
        **environment(device),
        day=date.today().isoformat(),
        cudnn=torch.backends.cudnn.version() if device.type == "cuda" else None,
        peers={name: None if peer.missing else peer.version for name, peer in PEERS.items()},
    )


def waits(device: torch.device, tiny: bool) -> None:
    """Counts waits of the third due step, and of steps that are not due."""
    groups = {"group_by": lambda name: name}
    cases: dict[str, tuple[Any, Any, dict[str, Any], dict[str, Any] | None]] = {
        "path row": (PATH, every(1), {}, None),
        "default rows": (DEFAULT, every(1), {}, None),
        "default rows, 6 groups": (DEFAULT, every(1), groups, None),
        "`HessianNorm`": ([HessianNorm()], every(1), {}, None),
        "`CriticalStep`": ([CriticalStep()], every(1), {}, None),
        "AutoClip's row": ((), every(NEVER), {}, {}),
        "not due": (DEFAULT, every(NEVER), {}, None),
        "AutoClip, not due": ((), every(NEVER), {}, RELATIVE),
    }
    ways = {"SGD": None, **{name: partial(adamw, **options) for name, options in FUSED.items()}}
    for way, optimizer in ways.items():
        for name, (estimators, schedule, options, clip) in cases.items():
            loop = Loop(SIX_TENSORS, device, estimators, schedule, optimizer=optimizer, **options)
            if clip is not None:
                if clip:  # so late that no step of the three is one that AutoClip may measure
                    loop.probe.load_state_dict({"version": 1, "steps": 32, "next": None})
                AutoClip(loop.optimizer, loop.probe, **clip)
            say(case=name, optimizer=way, **waits_of(loop.step, device))
    optimizers = {
        "ClippedMomentum": lambda model: ClippedMomentum(model.parameters(), lr=0.05, threshold=1.0),
        "ClippedScion": lambda model: ClippedScion(scion_groups(model), lr=0.01, threshold=1.0, radius=1.0),
    }
    for name, make in optimizers.items():
        loop = Loop(SIX_TENSORS, device)
        loop.optimizer = make(loop.model)
        say(case="step", optimizer=name, **waits_of(loop.step, device))


def waits_of(step: Callable[[], None], device: torch.device) -> dict[str, Any]:
    """Returns the waits of the third call, in all and by line."""
    step()
    step()
    with CudaWaits() if device.type == "cuda" else Waits() as found:
        step()
    return {"waits": found.number, "synchronized": found.synchronized, "lines": dict(found.reads.most_common(12))}


def gpt(tokens: int, tiny: bool) -> Task:
    """Returns GPT-2 with 124 million weights, or a dwarf, on so many tokens of noise, in bfloat16 autocast."""
    sizes = (1, 16, 2, 16, 50) if tiny else (12, 768, 12, 1024, 50304)
    length, vocabulary, batch = sizes[3], sizes[4], 2 if tiny else tokens // sizes[3]

    def draw(device: torch.device) -> Any:
        x = torch.randint(vocabulary, (batch, length + 1), device=device)
        return x[:, :-1].contiguous(), x[:, 1:].flatten()

    return Task(lambda: nn.Sequential(GPT(*sizes), nn.Flatten(0, 1)), autocast_loss, draw, lr=0.1)


def built_there(task: Task, device: torch.device) -> Task:
    """Returns the task with a model that is made on its device, because random numbers of a CPU take seconds."""

    def build() -> nn.Module:
        with device:
            return task.build()

    return Task(build, task.loss_fn, task.batch, task.lr)


def rows(device: torch.device, tiny: bool, tokens: int) -> None:
    """Measures due steps in gradients, interleaved with plain ones, for AdamW as a list and fused."""
    task = built_there(gpt(tokens, tiny), device)
    for way, options in FUSED.items():
        make = partial(adamw, **options)
        plain = Loop(task, device, optimizer=make)
        loops = {
            "path row": Loop(task, device, PATH, optimizer=make),
            "default rows": Loop(task, device, DEFAULT, optimizer=make),
            "not due": Loop(task, device, PATH, every(NEVER), optimizer=make),
            "AutoClip, not due": Loop(task, device, (), every(NEVER), optimizer=make),
        }
        AutoClip(loops["AutoClip, not due"].optimizer, loops["AutoClip, not due"].probe, **RELATIVE)
        calls = {"gradient": plain.gradient, "plain": plain.step, **{name: loop.step for name, loop in loops.items()}}
        times = take_turns(calls, 3 if tiny else 9, device)
        for name, loop in loops.items():
            extra = (times[name] - times["plain"]) / times["gradient"]
            found = [row for row in loop.probe.trace if row["step"] == loop.probe.steps - 1]
            counted = sum(row["num_grads"] for row in found)
            say(
                case=name,
                optimizer=way,
                tokens=plain.batch[0].numel(),
                gradient_ms=1e3 * float(times["gradient"].median()),
                gradients_taken=[float(extra.quantile(q)) for q in (0.25, 0.5, 0.75)],
                gradients_counted=counted,
                ratio=float(extra.median()) / counted if counted else None,
                in_plain_steps=float((times[name] / times["plain"]).median()),
            )


def memory(device: torch.device, tiny: bool) -> None:
    """Measures copies of x at the peak of a due step beyond a plain one, with offload and without."""
    task = built_there(gpt(1024, tiny), device)
    kinds: dict[str, tuple[Any, dict[str, Any]]] = {
        "plain": (None, {}),
        "path row": (PATH, {}),
        "default rows": (DEFAULT, {}),
        "`HessianNorm`": ([HessianNorm()], {}),
    }
    if HAS_OFFLOAD:
        offload = {"offload": "cpu"}
        kinds |= {"path row, offloaded": (PATH, offload), "default rows, offloaded": (DEFAULT, offload)}
    for way, more in FUSED.items():
        base = 0.0
        for name, (estimators, options) in kinds.items():
            loop = Loop(task, device, estimators, optimizer=partial(adamw, **more), **options)
            for _ in range(3):
                loop.step()
            held = peak(loop.step, device) / loop.size
            base = held if estimators is None else base
            say(
                case=name,
                optimizer=way,
                copies=held - base if estimators else held,
                beyond_a_plain_step=bool(estimators),
            )
            del loop
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()


def curvature(device: torch.device, tiny: bool, task: Task) -> None:
    """Measures a product in gradients and a search of ten products, by each way and by the peers."""
    torch.manual_seed(0)
    model, batch = built_there(task, device).build().to(device), task.batch(device)
    model.eval()
    unit = median_of(lambda: torch.autograd.grad(task.loss_fn(model, batch), list(model.parameters())), device)
    say(case="gradient", ms=1e3 * unit, weights=sum(p.numel() for p in model.parameters()))
    for backend in ("central", "one_sided", "retained", "rebuilt"):
        try:
            with hvp(objective(model, task.loss_fn, [batch]), backend=backend) as product:
                start = product.gradient
                one = median_of(partial(product, start), device)
                found: list[Any] = []
                most = {"tol": 1e-9, "max_products": PRODUCTS}
                took = median_of(lambda: found.append(lanczos(product, start, **most)), device, 1)  # noqa: B023
            value, number = found[-1].pairs[0].value, found[-1].num_products
            say(case=f"smoothdiag, {backend}", product=one / unit, search=took / unit, products=number, value=value)
        except (RuntimeError, NotImplementedError) as problem:
            say(case=f"smoothdiag, {backend}", failed=str(problem).splitlines()[0][:200])
        model.zero_grad()
    for name, peer in PEERS.items():
        if peer.missing:
            say(case=name, failed="not installed")
            continue
        try:
            record, values = Recorder(), list[float]()
            with twice_differentiable(model, peer.fused):
                took = median_of(lambda: values.append(peer.solve(model, batch, 0, PRODUCTS, record)), device, 1)  # noqa: B023
            number = record.num_products // len(values)
            say(case=name, search=took / unit, products=number, product=took / unit / number, value=values[-1])
        except Exception as problem:  # whatever another library raises
            say(case=name, failed=str(problem).strip().splitlines()[0][:200])
        model.zero_grad()


def median_of(call: Callable[[], object], device: torch.device, rounds: int = 5) -> float:
    """Returns the median time of a call after a first one."""
    return float(take_turns({"call": call}, rounds, device, warm_up=1)["call"].median())


def resnet(tiny: bool) -> Task:
    size, number, classes = (32, 2, 10) if tiny else (224, 32, 1000)
    build = (lambda: ResNet50(4, (1, 1, 1, 1), classes)) if tiny else ResNet50

    def draw(device: torch.device) -> Any:
        return torch.randn(number, 3, size, size, device=device), torch.randint(classes, (number,), device=device)

    return Task(build, labelled_loss, draw, lr=0.1)


def in_float32(task: Task) -> Task:
    return Task(task.build, labelled_loss, task.batch, task.lr)


PARTS: dict[str, Callable[[torch.device, bool], None]] = {
    "environment": where,
    "waits": waits,
    "rows_1k": partial(rows, tokens=1024),
    "rows_8k": partial(rows, tokens=8192),
    "memory": memory,
    "curvature_resnet": lambda device, tiny: curvature(device, tiny, resnet(tiny)),
    "curvature_gpt": lambda device, tiny: curvature(device, tiny, in_float32(gpt(1024, tiny))),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    warnings.simplefilter("ignore", SmoothdiagWarning)
    PARTS[args.part](args.device, args.tiny)


if __name__ == "__main__":
    main()
