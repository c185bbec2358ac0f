"""Networks for text: recurrent ones, transformers with the normalisation in three places, and a state-space model."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Norm = Literal["pre", "post", "rms"]


class Recurrent(nn.Module):
    """One layer of LSTM, GRU or plain tanh units, with the same matrix at both ends."""

    def __init__(self, vocabulary: int, cell: type[nn.RNNBase] = nn.LSTM, width: int = 64, layers: int = 1) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.cells = cell(width, width, num_layers=layers, batch_first=True)
        self.bias = nn.Parameter(torch.zeros(vocabulary))
        nn.init.uniform_(self.embed.weight, -0.1, 0.1)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(self.cells(self.embed(tokens))[0], self.embed.weight, self.bias)


class Block(nn.Module):
    """Attention and a layer of hidden units beside shortcuts; the normalisation stands before them or after."""

    def __init__(self, width: int, heads: int, norm: Norm = "pre", *, causal: bool = True) -> None:
        super().__init__()
        self.causal, self.heads, self.norm = causal, heads, norm
        make = nn.RMSNorm if norm == "rms" else nn.LayerNorm
        self.first, self.second = make(width), make(width)
        self.mix, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.gate = nn.Linear(width, 4 * width) if norm == "rms" else None

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.mix(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        if self.norm == "rms":
            q, k = rotated(q), rotated(k)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2))

    def think(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)) if self.gate is None else F.silu(self.gate(x)) * self.up(x))

    def forward(self, x: Tensor) -> Tensor:
        if self.norm == "post":
            x = self.first(x + self.attend(x))
            return self.second(x + self.think(x))
        x = x + self.attend(self.first(x))
        return x + self.think(self.second(x))


def rotated(x: Tensor) -> Tensor:
    """Turns pairs of features by an angle that grows with the place. Source: Su et al. 2021, RoFormer."""
    half = x.shape[-1] // 2
    speeds = 10_000 ** -(torch.arange(half, device=x.device) / half)
    angles = torch.arange(x.shape[-2], device=x.device)[:, None] * speeds
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], dim=-1)


class GPT(nn.Module):
    """A small transformer that predicts the next token."""

    def __init__(
        self, vocabulary: int, context: int, width: int = 64, layers: int = 2, heads: int = 4, norm: Norm = "pre"
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.places = None if norm == "rms" else nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads, norm) for _ in range(layers)))
        self.norm = {"pre": nn.LayerNorm, "rms": nn.RMSNorm, "post": lambda width: nn.Identity()}[norm](width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        if self.places is not None:
            x = x + self.places(torch.arange(tokens.shape[1], device=tokens.device))
        return self.head(self.norm(self.blocks(x)))


class Translator(nn.Module):
    """Encoder and decoder: torch's own transformer, normalised after each part, as it was published."""

    def __init__(self, symbols: int, length: int, width: int = 32) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(symbols + 1, width), nn.Embedding(length, width)
        self.body = nn.Transformer(width, 4, 1, 1, 4 * width, dropout=0.1, batch_first=True)
        self.head = nn.Linear(width, symbols)

    def forward(self, pair: Tensor) -> Tensor:
        source, target = pair.chunk(2, dim=1)
        shifted = F.pad(target[:, :-1] + 1, (1, 0))  # 0 begins
        places = self.places(torch.arange(source.shape[1], device=pair.device))
        mask = nn.Transformer.generate_square_subsequent_mask(shifted.shape[1], device=pair.device)
        return self.head(
            self.body(self.embed(source + 1) + places, self.embed(shifted) + places, tgt_mask=mask, tgt_is_causal=True)
        )


class StateSpace(nn.Module):
    """Two layers of linear recurrences whose decay depends on the input, each beside a shortcut and before a gate.

    Source: Feng et al. 2024, "Were RNNs all we needed?", minimal gated units.
    """

    def __init__(self, vocabulary: int, width: int = 64, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(layers + 1))
        self.mixes = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(layers))
        self.outs = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for norm, mix, out in zip(self.norms, self.mixes, self.outs, strict=False):
            update, candidate, gate = mix(norm(x)).chunk(3, dim=-1)
            keep, state, states = torch.sigmoid(update), torch.zeros_like(candidate[:, 0]), []
            for place in range(x.shape[1]):
                state = state + keep[:, place] * (candidate[:, place] - state)
                states.append(state)
            x = x + out(torch.stack(states, dim=1) * F.silu(gate))
        return self.head(self.norms[-1](x))
