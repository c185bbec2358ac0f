"""Small models to take second derivatives of, in every way that models are run, and the dense Hessian of a plain twin.

The twin is float64, without fused kernels, compilation, checkpointing or autocast, and its Hessian is checked against
differences of its gradient: nothing of it is the library's.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from losses import classification
from networks import Blocks
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from smoothdiag import Objective
from smoothdiag.measure.loss.batches import MicroBatch, RandomState

VOCABULARY, WIDTH = 11, 8
SEED = 3
"""Of the random numbers that the forward pass draws."""


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention written by hand."""
    future = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool, device=q.device).triu(1)
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    return scores.masked_fill(future, -math.inf).softmax(-1) @ v


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention by the kernel that torch chooses."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def forced(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention by the kernel that can be differentiated twice."""
    with sdpa_kernel(SDPBackend.MATH):
        return fused(q, k, v)


class Silu(torch.autograd.Function):
    """x sigmoid(x), by a backward pass that leaves no graph behind."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.silu(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return grad * s * (1 + x * (1 - s))


class Block(nn.Module):
    """A transformer block; its last activation is a function that is given."""

    def __init__(self, attend: Callable[..., Tensor], activation: Callable[[Tensor], Tensor], dropout: float) -> None:
        super().__init__()
        self.attend, self.activation = attend, activation
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp_norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        x = x + self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))
        return x + self.dropout(self.down(self.activation(self.up(self.mlp_norm(x)))))


class Gpt(nn.Module):
    """Tokens (n, t) -> logits (n, t, VOCABULARY)."""

    def __init__(
        self,
        attend: Callable[..., Tensor] = plain,
        *,
        tied: bool = True,
        reentrant: bool | None = None,
        activation: Callable[[Tensor], Tensor] = F.silu,
        dropout: float = 0.0,
        frozen: bool = False,
        unused: bool = False,
    ) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Parameter(0.1 * torch.randn(6, WIDTH))
        self.body = Blocks([Block(attend, activation, dropout) for _ in range(2)], reentrant)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if unused:
            self.unused = nn.Linear(4, 4)
        if tied:
            self.embed.weight = self.head.weight
        if frozen:
            self.body.blocks[0].requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.body(self.embed(tokens) + self.places))


class Recurrent(nn.Module):
    """Tokens (n, t) -> logits (n, t, VOCABULARY)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rnn = nn.Embedding(VOCABULARY, 6), nn.LSTM(6, WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed(tokens))[0])


class Residual(nn.Module):
    """Images (n, 1, 6, 6) -> logits (n, 5), with batch norm."""

    def __init__(self, *, training: bool = True) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.middle, self.middle_norm, self.head = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Linear(6, 5)
        self.norm.train(training), self.middle_norm.train(training)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm(self.stem(x)))
        return self.head((x + F.silu(self.middle_norm(self.middle(x)))).mean((2, 3)))


class Mask(nn.Module):
    """Dropout whose mask is given."""

    def __init__(self, factors: Tensor) -> None:
        super().__init__()
        self.factors = factors

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factors.to(x.dtype)


def under_autocast(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return classification(model, batch)


@lru_cache
def data_of(kind: type[nn.Module]) -> tuple[Tensor, Tensor]:
    """Returns a batch for the models of this kind."""
    source = torch.Generator().manual_seed(1)
    if kind is Residual:
        return torch.randn(12, 1, 6, 6, generator=source), torch.randint(5, (12,), generator=source)
    tokens = torch.randint(VOCABULARY, (5, 7), generator=source)
    return tokens[:, :-1], tokens[:, 1:]


@lru_cache
def trained(twin: "partial[nn.Module]") -> dict[str, Tensor]:
    """Returns the state of a model after some training, so that its spectrum has a shape."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = twin()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(40):
            optimizer.zero_grad()
            classification(model, data_of(twin.func)).backward()
            optimizer.step()
        return model.state_dict()


def coordinates_of(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def objective_of(model: nn.Module, loss_fn: Callable[..., Tensor], *batches: Any, **options: Any) -> Objective:
    """Returns the objective on these batches, with random numbers from SEED."""
    with torch.random.fork_rng([]):
        torch.manual_seed(SEED)
        micro = [MicroBatch(batch, RandomState.capture()) for batch in batches]
    return Objective(model, loss_fn, micro, coordinates_of(model), widen_half=True, **options)


def as_in_float64(model: nn.Module, *inputs: Tensor) -> nn.Module:
    """Turns a plain model into float64, with dropout fixed to the masks that SEED draws in its own precision."""
    masks: dict[nn.Module, Tensor] = {}

    def record(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        kept = (output != 0) | (args[0] == 0)
        masks[module] = kept / (1 - module.p)

    drops = {name: m for name, m in model.named_modules() if isinstance(m, nn.Dropout) and m.p and m.training}
    handles = [m.register_forward_hook(record) for m in drops.values()]
    if drops:
        with torch.random.fork_rng([]), torch.no_grad():
            torch.manual_seed(SEED)
            model(*inputs)
    for handle in handles:
        handle.remove()
    for name, module in drops.items():
        model.set_submodule(name, Mask(masks[module]))
    return model.double()


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.detach().reshape(-1).double() for t in tensors])


def dense_hessian(loss_of: Callable[[], Tensor], parameters: Sequence[Tensor]) -> Tensor:
    """Returns the whole Hessian, row by row; verified by a difference of gradients."""

    def gradient(**options: Any) -> Tensor:
        found = torch.autograd.grad(loss_of(), parameters, allow_unused=True, materialize_grads=True, **options)
        return torch.cat([g.reshape(-1) for g in found])

    g = gradient(create_graph=True)
    assert g.dtype == torch.float64
    rows = []
    for chosen in torch.eye(len(g), dtype=g.dtype).split(64):
        options = {"retain_graph": True, "allow_unused": True, "is_grads_batched": True}
        parts = torch.autograd.grad(g, parameters, chosen, **options)
        zeros = [chosen.new_zeros(len(chosen), p.numel()) for p in parameters]
        pairs = zip(parts, zeros, strict=True)
        rows.append(torch.cat([zero if part is None else part.reshape(zero.shape) for part, zero in pairs], 1))
    hessian = torch.cat(rows)
    torch.testing.assert_close(hessian, hessian.T, rtol=1e-9, atol=1e-11)
    direction = torch.randn(len(g), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    start, sizes, radius = flat(parameters), [p.numel() for p in parameters], 1e-6
    ends = []
    for sign in (1, -1, 0):
        moved = torch.split(start + sign * radius * direction, sizes)
        with torch.no_grad():
            for p, x in zip(parameters, moved, strict=True):
                p.copy_(x.view(p.shape))
        ends.append(gradient().detach())
    found = (ends[0] - ends[1]) / (2 * radius)
    torch.testing.assert_close(hessian @ direction, found, rtol=1e-5, atol=1e-6 * float(found.norm()))
    return hessian
