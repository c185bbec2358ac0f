"""Cost of a product with the Hessian, by each way that torch offers, for one vector and for eight at once.

- ``retained``, ``rebuilt``, ``central``, ``one_sided``: smoothdiag's backends, through ``hvp``. ``each`` multiplies
  eight vectors by ``Hessian.each`` in blocks of four.
- ``forward over reverse``: ``torch.func.jvp`` of ``torch.func.grad``. ``dual numbers``: ``autograd.grad`` of a loss
  whose parameters are dual numbers. ``reverse over reverse``: ``torch.func.vjp`` of ``grad``. All start anew each time.
- ``linearised``: ``torch.func.linearize`` of ``grad``, whose trace holds one point and serves no other.
- ``compiled``: the same by torch.compile with a C++ compiler (``--compile``; minutes for each network).
- ``batched``: eight vectors at once, by ``is_grads_batched`` on the retained graph, or by ``vmap``.

``product`` is the time for one vector in gradients of training. ``cold`` is what the first product takes beyond the
later ones, in seconds of the process and of the compilers that it starts. ``error`` is the relative distance from the
product in float64. ``memory`` is the peak of one call beyond what was there before, in peaks of a gradient. The ways
take turns in one process, each round begins with another one, and the table shows medians. For products attention is
written out and recurrence is not fused, because fused kernels lack the derivatives.

    OMP_NUM_THREADS=1 python benchmarks/products.py [--models GPT LSTM] [--rounds 5] [--compile] [--memory]
"""

import argparse
import copy
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pandas as pd
import torch
import torch.autograd.forward_ad as forward
from curvature_cases import Case, clock_of
from models import CLASSES, GPT, LEARNABLE, Block, Task, _flat, _learnable_images, _learnable_tokens, labelled_loss
from overhead.counting import peak
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, linearize, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from smoothdiag.measure.curvature import hvp
from smoothdiag.measure.curvature.guards import twice_differentiable

AT_ONCE = 8


class ViT(nn.Module):
    """Patches of 4 x 4 pixels through the blocks of the GPT; the mean over patches goes to the classes."""

    def __init__(self, layers: int = 4, width: int = 128, heads: int = 4) -> None:
        super().__init__()
        self.patches, self.places = nn.Conv2d(3, width, 4, 4), nn.Parameter(0.02 * torch.randn(64, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = self.patches(x).flatten(2).transpose(1, 2) + self.places
        return self.head(self.norm(self.blocks(y)).mean(1))


def mlp(*widths: int) -> nn.Module:
    layers = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.GELU())]
    return nn.Sequential(nn.Flatten(), *layers[:-1])


TASKS = LEARNABLE | {
    "ViT": Task(ViT, labelled_loss, _learnable_images(16), lr=0.01),
    "MLP of 4M": Task(lambda: mlp(3072, 1024, 1024, 10), labelled_loss, _learnable_images(64), lr=0.01),
    "MLP of 4M, 4 images": Task(lambda: mlp(3072, 1024, 1024, 10), labelled_loss, _learnable_images(4), lr=0.01),
    "MLP of 17k": Task(lambda: mlp(192, 64, 64, 10), labelled_loss, _learnable_images(64, 8), lr=0.01),
    "GPT of 29k": Task(lambda: _flat(GPT(2, 32, 4, 32)), labelled_loss, _learnable_tokens(8, 32), lr=0.01),
    "GPT of 10M, 32 tokens": Task(lambda: _flat(GPT(6, 384, 6, 32)), labelled_loss, _learnable_tokens(1, 32), lr=0.01),
}

Vectors = Sequence[Sequence[Tensor]]


@dataclass(frozen=True)
class Way:
    """A way to multiply ``number`` vectors in one call, by a function that ``prepare`` returns."""

    name: str
    number: int
    prepare: Callable[[], Callable[[Vectors], Vectors]]


class Loss(nn.Module):
    """The loss as a module of its own, so that parameters can be put in its place."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.model, self.case = case.model, case
        self.names = [name for name, _ in self.named_parameters()]

    def forward(self) -> Tensor:
        return self.case.task.loss_fn(self.model, self.case.batch)

    def at(self, *parameters: Tensor) -> Tensor:
        return functional_call(self, dict(zip(self.names, parameters, strict=True)), ())


def dual_product(loss: Loss, point: Sequence[Tensor], v: Sequence[Tensor]) -> list[Tensor]:
    with forward.dual_level():
        duals = [forward.make_dual(p, x) for p, x in zip(point, v, strict=True)]
        found = torch.autograd.grad(loss.at(*duals), duals)
        return [forward.unpack_dual(x).tangent for x in found]


def first(found: Iterator[list[Tensor]]) -> Vectors:
    """Returns the first product alone, and makes the others."""
    kept = next(found)
    for _ in found:
        pass
    return [kept]


def compiled_from(call: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a compiled function that runs compiled although products are otherwise made without compilers."""
    made = torch.compile(call)

    def run(*args: Any) -> Any:
        with torch.compiler.set_stance("default"):
            return made(*args)

    return run


def stacked(vs: Vectors) -> tuple[Tensor, ...]:
    return tuple(torch.stack(parts) for parts in zip(*vs, strict=True))


def unstacked(found: Sequence[Tensor]) -> Vectors:
    return list(zip(*(x.unbind() for x in found), strict=True))


def ways_of(case: Case, stack: ExitStack, *, compiled: bool) -> list[Way]:
    """Returns all ways; contexts that stay open while they are measured go to ``stack``."""
    stack.enter_context(twice_differentiable(case.model))
    loss = Loss(case)
    leaves = tuple(case.model.parameters())
    point = tuple(p.detach() for p in leaves)
    slope = grad(loss.at, argnums=tuple(range(len(point))))

    def backend(name: str) -> Callable[[], Callable[[Vectors], Vectors]]:
        def prepare() -> Callable[[Vectors], Vectors]:
            hessian = stack.enter_context(hvp(case.objective(), backend=name))
            # One product at a time stays in memory, as in a trace; ways that make eight at once keep eight.
            return lambda vs: first(hessian.each(vs))

        return prepare

    def retained() -> list[Tensor]:
        return list(torch.autograd.grad(loss(), leaves, create_graph=True))

    def batched(vs: Vectors, kept: list[Tensor]) -> Vectors:
        found = torch.autograd.grad(kept, leaves, stacked(vs), retain_graph=True, is_grads_batched=True)
        return unstacked(found)

    def forward_over_reverse(point: tuple[Tensor, ...], v: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return jvp(slope, point, v)[1]

    def reverse_over_reverse(point: tuple[Tensor, ...], v: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return vjp(slope, *point)[1](v)

    def many(point: tuple[Tensor, ...], vs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return vmap(lambda *v: forward_over_reverse(point, v))(*vs)

    def anew(call: Callable[..., Any]) -> Callable[[], Callable[[Vectors], Vectors]]:
        return lambda: lambda vs: [call(point, tuple(v)) for v in vs]

    def linear(*, compiled: bool) -> Callable[[], Callable[[Vectors], Vectors]]:
        def prepare() -> Callable[[Vectors], Vectors]:
            multiply = linearize(slope, *point)[1]
            call = compiled_from(lambda *v: multiply(*v)) if compiled else multiply
            return lambda vs: [call(*v) for v in vs]

        return prepare

    def linear_batched() -> Callable[[Vectors], Vectors]:
        multiply = linearize(slope, *point)[1]
        return lambda vs: unstacked(vmap(lambda *v: multiply(*v))(*stacked(vs)))

    def kept_batched() -> Callable[[Vectors], Vectors]:
        kept = retained()
        return lambda vs: batched(vs, kept)

    ways = [Way(name, 1, backend(name)) for name in ("retained", "rebuilt", "central", "one_sided")]
    ways += [
        Way("rebuilt, each", AT_ONCE, backend("rebuilt")),
        Way("forward over reverse", 1, anew(forward_over_reverse)),
        Way("dual numbers", 1, lambda: lambda vs: [dual_product(loss, leaves, v) for v in vs]),
        Way("reverse over reverse", 1, anew(reverse_over_reverse)),
        Way("retained, batched", AT_ONCE, kept_batched),
        Way("forward over reverse, batched", AT_ONCE, lambda: lambda vs: unstacked(many(point, stacked(vs)))),
        Way("linearised", 1, linear(compiled=False)),
        Way("linearised, batched", AT_ONCE, linear_batched),
    ]
    if compiled:
        fast, whole = compiled_from(forward_over_reverse), compiled_from(many)
        ways += [
            Way("forward over reverse, compiled", 1, anew(fast)),
            Way("reverse over reverse, compiled", 1, anew(compiled_from(reverse_over_reverse))),
            Way("linearised, compiled", 1, linear(compiled=True)),
            Way(
                "forward over reverse, compiled, batched",
                AT_ONCE,
                lambda: lambda vs: unstacked(whole(point, stacked(vs))),
            ),
        ]
    return ways


def training(case: Case) -> None:
    """Takes the gradient with the fused operations that training uses."""
    every = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(every), torch.backends.mkldnn.flags(enabled=True), torch.backends.cudnn.flags(enabled=True):
        case.gradient()


def in_float64(case: Case, v: Sequence[Tensor]) -> list[Tensor]:
    model = copy.deepcopy(case.model).double()
    inputs, labels = case.batch
    twin = Case(model, (inputs.double() if inputs.is_floating_point() else inputs, labels), case.task)
    with twice_differentiable(model), hvp(twin.objective(), backend="retained") as hessian:
        return hessian([x.double() for x in v])


def distance(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    off = sum(float((x.double() - y).square().sum()) for x, y in zip(found, wanted, strict=True))
    return (off / sum(float(y.square().sum()) for y in wanted)) ** 0.5


def with_children() -> float:
    """Returns the seconds that this process and the compilers it has waited for have worked."""
    return sum(os.times()[:4])


def measured(task: Task, args: argparse.Namespace) -> pd.DataFrame:
    torch.manual_seed(0)
    model = task.build().to(args.device).eval()
    case = Case(model, task.batch(args.device), task)
    vs = [[torch.randn_like(p) for p in model.parameters()] for _ in range(AT_ONCE)]
    wanted, clock = in_float64(case, vs[0]), clock_of(args.device)

    def took(call: Callable[[], Any]) -> float:
        start = clock()
        call()
        if args.device.type == "cuda":
            torch.cuda.synchronize()
        return clock() - start

    ready, rows = dict[str, tuple[Way, Callable[[Vectors], Vectors]]](), dict[str, dict[str, Any]]()
    times: dict[str, list[float]] = {}
    units = list[float]()
    training(case)
    with ExitStack() as stack:
        chosen = [w for w in ways_of(case, stack, compiled=args.compile) if any(part in w.name for part in args.ways)]
        for way in tqdm(chosen, file=sys.stderr):
            start = with_children()
            try:
                call = way.prepare()
                found = call(vs[: way.number])
            except Exception as problem:
                rows[way.name] = {"note": f"{type(problem).__name__}: {str(problem).strip().splitlines()[0][:60]}"}
                continue
            rows[way.name] = {"cold": with_children() - start, "error": distance(found[0], wanted)}
            ready[way.name], times[way.name] = (way, call), []
            del found
        for turn in range(args.rounds):
            units.append(took(lambda: training(case)))
            order = list(ready.values())
            for way, call in order[turn % len(order) :] + order[: turn % len(order)]:
                times[way.name].append(took(lambda: call(vs[: way.number])) / way.number)  # noqa: B023
        if args.memory:
            unit = peak(lambda: training(case), args.device)
            for way, call in ready.values():
                rows[way.name]["memory"] = peak(lambda: call(vs[: way.number]), args.device) / unit  # noqa: B023
        ready.clear()
    unit = statistics.median(units)
    for name, spent in times.items():
        each = statistics.median(spent)
        rows[name] |= {"product": each / unit, "cold": max(rows[name]["cold"] - each, 0.0)}
    table = pd.DataFrame(rows).T
    table.attrs["unit"] = unit
    return table[[c for c in ("product", "cold", "error", "memory", "note") if c in table]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--models", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--ways", nargs="+", default=[""], help="parts of names of ways; default: all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="also by torch.compile, which takes minutes")
    parser.add_argument("--memory", action="store_true", help="also the peak of each way, by torch's profiler")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {args.device}, one thread")
    # A compiler that runs beside this process would disturb it, and a warm cache would hide what it costs.
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        for name in args.models:
            start = time.perf_counter()
            table = measured(TASKS[name], args)
            print(f"\n{name}: gradient {1e3 * table.attrs['unit']:.3g} ms ({time.perf_counter() - start:.0f} s)")
            print(table.fillna("").to_string(float_format="{:.3g}".format), flush=True)


if __name__ == "__main__":
    main()
