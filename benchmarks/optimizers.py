"""What a step costs: ClippedMomentum against SGD with clip_grad_norm_ and AdamW, ClippedScion against plain Scion.

No network runs: parameters have the shapes of a GPT and gradients are random. The variants take turns in one process on
the same parameters, in an order that rotates; every ratio is a median over rounds of ratios within a round.
"""

import argparse
import math
from collections.abc import Callable, Iterable

import pandas as pd
import torch
from overhead.clock import take_turns
from torch import Tensor, nn

from smoothdiag.geometry import RMS, Spectral
from smoothdiag.optim import ClippedMomentum, ClippedScion, scion_groups

SIZES = {"10M": (5, 384, 4096, 512), "124M": (12, 768, 50257, 1024)}
"""Layers, width, vocabulary and context; the second is GPT-2."""
SGD, SCION = "SGD + clip_grad_norm_", "plain Scion"
RATE = 1e-3


def gpt(layers: int, width: int, vocabulary: int, context: int) -> nn.Module:
    """Returns the parameters of a GPT whose head is its embedding, each with a gradient; it cannot be called."""
    block = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
    model = nn.Module()
    model.blocks = nn.ModuleList(
        nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width), *(nn.Linear(*sizes) for sizes in block)])
        for _ in range(layers)
    )
    model.tokens, model.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
    model.norm, model.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
    model.head.weight = model.tokens.weight
    return model


class PlainScion:
    """Scion as one would write it down: tensor by tensor, with the momentum as an average and no clipping."""

    def __init__(self, groups: Iterable[dict], lr: float) -> None:
        self.lr = lr
        self.held = [(p, torch.zeros_like(p), g["geometry"], g["radius"]) for g in groups for p in g["params"]]

    @torch.no_grad()
    def step(self) -> None:
        for p, average, geometry, radius in self.held:
            average.lerp_(p.grad, 0.1)
            if isinstance(geometry, Spectral):
                direction, scale = newton_schulz(average), math.sqrt(p.shape[0] / p.shape[1])
            elif isinstance(geometry, RMS):
                direction, scale = average / average.square().mean().sqrt(), 1.0
            else:
                direction, scale = average.sign(), 1 / p.shape[1] if geometry.per_input else 1.0
            p.add_(direction, alpha=-self.lr * radius * scale)


def newton_schulz(matrix: Tensor, steps: int = 5) -> Tensor:
    x = matrix if matrix.device.type == "cpu" else matrix.bfloat16()
    x = x.T if matrix.shape[0] > matrix.shape[1] else x
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.T if matrix.shape[0] > matrix.shape[1] else x).to(matrix.dtype)


def with_clip(optimizer: torch.optim.Optimizer, params: list[Tensor]) -> Callable[[], None]:
    def step() -> None:
        nn.utils.clip_grad_norm_(params, 1.0, foreach=True)
        optimizer.step()

    return step


def vector_variants(model: nn.Module) -> dict[str, Callable[[], None]]:
    params = list(model.parameters())
    sgd = torch.optim.SGD(params, RATE, momentum=0.9, foreach=True)
    adamw = torch.optim.AdamW(params, RATE, foreach=True)
    of = ClippedMomentum
    return {
        SGD: with_clip(sgd, params),
        "AdamW": adamw.step,
        "AdamW + clip_grad_norm_": with_clip(torch.optim.AdamW(params, RATE, foreach=True), params),
        "mom_clip": of.mom_clip(params, RATE, threshold=0.5).step,
        "mom_clip, soft": of.mom_clip(params, RATE, threshold=0.5, clip="soft").step,
        "mom_clip, decay": of.mom_clip(params, RATE, threshold=0.5, weight_decay=0.1).step,
        "mom_clip, corrected": of.mom_clip(params, RATE, threshold=0.5, bias_correction=True).step,
        "sgd_clip": of.sgd_clip(params, RATE, threshold=0.5).step,
        "mix_clip": of.mix_clip(params, RATE, threshold=0.5).step,
    }


def scion_variants(model: nn.Module) -> dict[str, Callable[[], None]]:
    groups = scion_groups(model, radii={"tied": 3000.0, "embedding": 1.0, "hidden": 50.0, "vector": 1.0}, head="head")
    plain = PlainScion(groups, RATE)
    options = {"threshold": 600.0, "radius": 1.0}
    return {
        SCION: plain.step,
        "ClippedScion": ClippedScion(groups, RATE / 600, **options).step,
        "ClippedScion, decay": ClippedScion(groups, RATE / 600, weight_decay=1.0, **options).step,
    }


def table(times: pd.DataFrame, reference: str) -> pd.DataFrame:
    ratios = times.div(times[reference], axis=0)
    spread = ratios.quantile([0.25, 0.5, 0.75])
    return pd.DataFrame(
        {"ms": times.median() * 1e3, "ratio": spread.loc[0.5], "least": spread.loc[0.25], "most": spread.loc[0.75]}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--threads", type=int, default=1, help="more threads than idle cores blur every ratio")
    parser.add_argument("--rounds", type=int, help="for a short look; the steps of Scion take half a minute each")
    parser.add_argument("--quick", action="store_true", help="10M parameters and few rounds: a look in a minute")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.device}, {args.threads} threads, float32")
    for size in ["10M"] if args.quick else args.sizes:
        torch.manual_seed(0)
        model = gpt(*SIZES[size]).to(args.device)
        count = sum(p.numel() for p in model.parameters())
        for p in model.parameters():
            p.grad = torch.randn_like(p) / math.sqrt(count)
        for variants, reference, rounds in ((vector_variants, SGD, 41), (scion_variants, SCION, 7)):
            rounds = args.rounds or (5 if args.quick else 101 if args.device.type == "cuda" else rounds)
            times = take_turns(variants(model), rounds, args.device, warm_up=1)
            print(f"\n{count / 1e6:.1f} million parameters, time over that of {reference}, quartiles")
            print(table(times, reference).to_string(float_format="{:.3g}".format))


if __name__ == "__main__":
    main()
