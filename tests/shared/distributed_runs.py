"""Training runs that one process takes alone or two take together, under DDP or sharded (FSDP2)."""

from dataclasses import dataclass
from typing import Any

import torch
from asserts import state_of
from losses import cross_entropy
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional as F

from smoothdiag import DebiasedSmoothness, LocalSmoothness, PathSmoothness, Probe, by_module, every

WORLD = 2
RADIUS = 1e-2


class Mlp(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, width), nn.Linear(width, width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(6, 12, batch_first=True), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0].mean(dim=1))


class Attention(nn.Module):
    def __init__(self, activation: str = "relu") -> None:
        super().__init__()
        self.embed = nn.Linear(6, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, activation, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(x)).mean(dim=1))


class Smooth(Attention):
    def __init__(self) -> None:
        super().__init__("gelu")


class Tied(nn.Module):
    """Embedding and head share a weight; the last parameter of three is one row, which two ranks cannot share."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.middle = nn.Embedding(7, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 7, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        tokens = (x[:, 0].abs() * 100).long() % 7
        return self.scale * self.head(torch.tanh(self.middle(self.embed(tokens))))[:, :3]


class Uneven(nn.Module):
    """First dimensions of 3 and 1, a frozen layer, and in turn layers of which one is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.frozen, self.head = nn.Linear(6, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.unused, self.narrow = nn.Linear(3, 3), nn.Linear(3, 1)
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.frozen(torch.tanh(self.first(x)))
        return self.head(x) * torch.tanh(self.narrow(x))


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(self.first(x))))


class Dropped(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.dropout(x, 0.3, self.training))


MODELS = {kind.__name__.lower(): kind for kind in (Mlp, Lstm, Attention, Smooth, Tied, Uneven, Normed, Dropped)}
SEQUENCES = ("lstm", "attention", "smooth")
OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
}


@dataclass(frozen=True)
class Case:
    """One training run; ``wrap`` is what its model is wrapped in where there are several ranks."""

    model: str = "mlp"
    optimizer: str = "momentum"
    wrap: str = "fsdp2"
    micro_batches: int = 1
    steps: int = 2
    evaluates: bool = False


CASES = [
    *(Case("mlp", "adamw", w, 2) for w in ("ddp", "fsdp2")),
    Case("lstm", "momentum", "ddp_view"),
    Case("attention", "momentum", "fsdp2"),
    *(Case(m, "adamw", w, evaluates=m == "tied") for m in ("tied", "uneven") for w in ("ddp_unused", "fsdp2")),
    *(Case("normed", "momentum", "ddp", k) for k in (1, 2)),
    *(Case("dropped", "momentum", w, 2) for w in ("ddp_view", "fsdp2")),
    Case("attention", "adamw", "fsdp2_bf16"),
]
ALL_CASES = [
    Case(m, o, w, k, steps=3)
    for m in ("mlp", "lstm", "attention") for o in OPTIMIZERS for w in ("ddp", "ddp_view", "fsdp2") for k in (1, 2)
]  # fmt: skip


def data_of(case: Case, count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Returns whole batches, of which each rank takes its share."""
    source = torch.Generator().manual_seed(seed)
    shape = (16, 5, 6) if case.model in SEQUENCES else (16, 6)
    return [(torch.randn(shape, generator=source), torch.randint(3, (16,), generator=source)) for _ in range(count)]


def shares(batch: tuple[Tensor, Tensor], case: Case, rank: int | None) -> list[tuple[Tensor, Tensor]]:
    """Returns the micro-batches of a rank, or without one those that all ranks together take."""
    ranks = [[t.chunk(WORLD)[r].chunk(case.micro_batches) for t in batch] for r in range(WORLD)]
    if rank is not None:
        return list(zip(*ranks[rank], strict=True))
    parts = [list(zip(*one, strict=True)) for one in ranks]
    if case.model == "normed":  # each rank has statistics of its own
        return [part for both in zip(*parts, strict=True) for part in both]
    return [tuple(map(torch.cat, zip(*both, strict=True))) for both in zip(*parts, strict=True)]


def wrapped(model: nn.Module, wrap: str) -> nn.Module:
    if wrap == "alone":
        return model
    if wrap.startswith("ddp"):
        return nn.parallel.DistributedDataParallel(
            model, gradient_as_bucket_view=wrap == "ddp_view", find_unused_parameters=wrap == "ddp_unused"
        )
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if wrap == "fsdp2_bf16" else MixedPrecisionPolicy()
    for child in model.children():
        # A weight that two modules share has to be sharded by the module above both.
        if not isinstance(model, Tied) or child is model.middle:
            fully_shard(child, mp_policy=policy)
    return fully_shard(model, mp_policy=policy)


def train(case: Case, rank: int | None, *, probed: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Trains, and returns the state after it and the rows of probes on fixed, held-out and the step's own batches."""
    torch.manual_seed(0)
    model = wrapped(MODELS[case.model](), "alone" if rank is None else case.wrap)
    optimizer = OPTIMIZERS[case.optimizer]([p for p in model.parameters() if p.requires_grad])
    torch.manual_seed(1 + (rank or 0))
    probes = []
    if probed:
        directions = [
            *(LocalSmoothness(direction=d) for d in ("gradient", "update")),
            LocalSmoothness(radius=RADIUS, direction="random"),
        ]
        held_out = [part for batch in data_of(case, 2, seed=5) for part in shares(batch, case, rank)]
        probes = [
            Probe(model, optimizer, cross_entropy, estimators=[PathSmoothness(points=(0.5, 1.0)), *directions],
                  schedule=every(1), group_by=by_module()),
            Probe(model, optimizer, cross_entropy, estimators=[DebiasedSmoothness()], schedule=every(1),
                  probe_batches=held_out),
            Probe(model, optimizer, cross_entropy, estimators=[LocalSmoothness(radius=RADIUS)], schedule=every(1),
                  data="step"),
        ]  # fmt: skip
    for batch in data_of(case, case.steps, seed=3):
        optimizer.zero_grad()
        if case.evaluates:  # leaves gathered weights in place of sharded ones
            with torch.no_grad():
                cross_entropy(model, shares(batch, case, rank)[0])
        parts = shares(batch, case, rank)
        for part in parts:
            for probe in probes:
                probe.observe(part)
            (cross_entropy(model, part) / len(parts)).backward()
        optimizer.step()
    return state_of(model, optimizer), [row for probe in probes for row in probe.trace]
