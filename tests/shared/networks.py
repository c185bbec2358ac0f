"""Small models with everything that forward passes change or draw: dropout, batch norm, attention, recurrence."""

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

VOCABULARY = 17


def mlp(*widths: int) -> nn.Sequential:
    """Returns linear layers of these widths, with tanh between them."""
    layers = [layer for pair in itertools.pairwise(widths) for layer in (nn.Linear(*pair), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


class Blocks(nn.Module):
    """Runs blocks one after another, each recomputed in backward if ``reentrant`` is not None.

    Args:
        blocks: The blocks.
        reentrant: Kind of checkpointing; None for none.
    """

    def __init__(self, blocks: list[nn.Module], reentrant: bool | None) -> None:
        super().__init__()
        self.blocks, self.reentrant = nn.ModuleList(blocks), reentrant

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return x


class Convolutional(nn.Module):
    """Images (n, 1, 8, 8) -> logits, with batch norm and dropout."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        layers = [nn.BatchNorm2d(8), nn.SiLU(), nn.Dropout(0.2), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)]
        self.body = Blocks([nn.Sequential(*layers)], reentrant)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)).tanh().mean((2, 3)))


class FusedAttention(nn.Module):
    """Causal self-attention by the fused kernel, with dropout."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class ModuleAttention(nn.MultiheadAttention):
    """Causal self-attention by the module of torch, with dropout."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__(width, heads, dropout=dropout, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        return super().forward(x, x, x, attn_mask=mask, need_weights=False)[0]


class Block(nn.Module):
    def __init__(self, attention: type[nn.Module], width: int) -> None:
        super().__init__()
        self.before, self.attention = nn.LayerNorm(width), attention(width, 2, 0.1)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width), nn.Dropout(0.1)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.before(x))
        return x + self.mlp(x)


class Gpt(nn.Module):
    """Tokens (n, t) -> logits (n, t, VOCABULARY); the output weights are those of the embedding."""

    def __init__(self, reentrant: bool | None = None, attention: type[nn.Module] = FusedAttention) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(VOCABULARY, 16), nn.Parameter(0.1 * torch.randn(32, 16))
        self.body = Blocks([Block(attention, 16) for _ in range(2)], reentrant)
        self.head = nn.Linear(16, VOCABULARY, bias=False)
        self.embed.weight = self.head.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.body(self.embed(tokens) + self.places[: tokens.shape[1]]))


class Recurrent(nn.Module):
    """Tokens (n, t) -> logits (n, t, VOCABULARY) by an LSTM with dropout between its layers."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.embed, self.rnn = nn.Embedding(VOCABULARY, 12), nn.LSTM(12, 16, 2, dropout=0.2, batch_first=True)
        self.body = Blocks([nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Dropout(0.2))], reentrant)
        self.head = nn.Linear(16, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.body(self.rnn(self.embed(tokens))[0]))


class Sparse(nn.Module):
    """Tokens (n, t) -> logits (n, t, VOCABULARY); embeddings alone are trained, by sparse gradients."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.embed, self.again = (nn.Embedding(VOCABULARY, 12, sparse=True) for _ in range(2))
        self.body = Blocks([nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Dropout(0.2))], reentrant)
        self.head = nn.Linear(16, VOCABULARY)
        self.body.requires_grad_(False), self.head.requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.body(self.embed(tokens) + self.again(tokens.roll(1, -1))))


class Frozen(Convolutional):
    """The convolutional network with its first layer frozen."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__(reentrant)
        self.stem.requires_grad_(False)


def images(num: int, size: int) -> list[tuple[Tensor, Tensor]]:
    """Returns batches of images and labels; draws from torch's own generator."""
    return [(torch.randn(size, 1, 8, 8), torch.randint(5, (size,))) for _ in range(num)]


def texts(num: int, size: int) -> list[tuple[Tensor, Tensor]]:
    """Returns batches of tokens and the tokens that follow them; draws from torch's own generator."""
    tokens = [torch.randint(VOCABULARY, (size, 9)) for _ in range(num)]
    return [(t[:, :-1], t[:, 1:]) for t in tokens]


class EmbeddingAndHead(nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.wte = nn.Embedding(11, 4)
        self.block = nn.ModuleDict({"norm": nn.LayerNorm(4), "up": nn.Linear(4, 8), "down": nn.Linear(8, 4)})
        self.lm_head = nn.Linear(4, 11, bias=False)
        if tied:
            self.lm_head.weight = self.wte.weight


class Point(nn.Module):
    """A model that is nothing but its parameter."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = nn.Parameter(x.clone())
