"""Networks and data of the part of the pool that judges a rule after the final part has been seen."""

import math

import sources
import torch
from images import layers
from nets import Block
from torch import Tensor, nn
from torch.nn import functional as F


class Factors(nn.Module):
    """Ratings as products of features of users and items, with an offset for each. Source: Koren et al. 2009."""

    def __init__(self, users: int, items: int, width: int = 16) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(users, width), nn.Embedding(items, width)
        self.offsets = nn.ModuleList([nn.Embedding(users, 1), nn.Embedding(items, 1)])
        for table in (self.users, self.items, *self.offsets):
            nn.init.normal_(table.weight, std=0.1)

    def forward(self, batch: Tensor) -> Tensor:
        user, item = batch.unbind(1)
        product = (self.users(user) * self.items(item)).sum(1, keepdim=True)
        return product + self.offsets[0](user) + self.offsets[1](item)


class Masked(nn.Module):
    """Says which words were hidden; the output is the loss over these. Source: Devlin et al. 2019, masked words."""

    def __init__(self, vocabulary: int, length: int, width: int = 48) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(vocabulary + 1, width), nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.Sequential(*(Block(width, 4, causal=False) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)
        nn.init.normal_(self.words.weight, std=0.02)

    def forward(self, batch: Tensor) -> Tensor:
        shown, words = batch.unbind(1)
        hidden = shown != words
        found = self.head(self.norm(self.blocks(self.words(shown) + self.places)))
        return F.cross_entropy(found[hidden], words[hidden])


class Reader(nn.Module):
    """Convolutions of three widths over characters, and the largest of each. Source: Kim 2014."""

    def __init__(self, symbols: int, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(symbols, width)
        self.parts = nn.ModuleList(nn.Conv1d(width, width, size) for size in (3, 4, 5))
        self.head = nn.Linear(3 * width, 1)

    def forward(self, text: Tensor) -> Tensor:
        x = self.embed(text).transpose(1, 2)
        return self.head(torch.cat([F.relu(part(x)).amax(2) for part in self.parts], dim=1)).squeeze(1)


class Outline(nn.Module):
    """Marks pixels, by convolutions down and up again with a shortcut. Source: Ronneberger et al. 2015, one level."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.middle = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.up, self.last = nn.ConvTranspose2d(2 * width, width, 2, stride=2), nn.Conv2d(2 * width, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        fine = F.relu(self.first(x))
        coarse = F.relu(self.middle(F.max_pool2d(fine, 2)))
        return self.last(torch.cat([fine, self.up(coarse)], dim=1))


class Policy(nn.Module):
    """Chooses one of some actions; the output is minus the expected reward. The gradient of that is the policy's."""

    def __init__(self, features: int, actions: int, width: int = 64) -> None:
        super().__init__()
        self.body = nn.Sequential(*layers(features, width, actions, activation=nn.Tanh))

    def forward(self, batch: Tensor) -> Tensor:
        """Weights the rewards of drawn actions by how likely they are now and were when drawn, without a baseline."""
        state, action, reward = batch[:, :-2], batch[:, -2].long(), batch[:, -1]
        log_share = self.body(state).log_softmax(1).gather(1, action[:, None]).squeeze(1)
        return -(reward * (log_share + math.log(ACTIONS)).exp()).mean()


ACTIONS = 6


def ratings(number: int, seed: int, users: int = 400, items: int = 200) -> tuple[Tensor, Tensor]:
    """Returns pairs of a user and an item, shape (number, 2), and noisy ratings of rank 4; some are rated often."""
    fixed = torch.Generator().manual_seed(0)
    tastes, kinds = torch.randn(users, 4, generator=fixed), torch.randn(items, 4, generator=fixed)
    generator = torch.Generator().manual_seed(seed)
    user = (users * torch.rand(number, generator=generator).square()).long()
    item = (items * torch.rand(number, generator=generator).square()).long()
    rating = (tastes[user] * kinds[item]).sum(1) / 2 + 0.5 * torch.randn(number, generator=generator)
    return torch.stack([user, item], dim=1), rating


def hidden_words(words: Tensor, number: int, seed: int, vocabulary: int, length: int) -> Tensor:
    """Returns windows of a text with 15% of the words replaced by the code ``vocabulary``, before the windows."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(words) - length, (number,), generator=generator)
    found = words[starts[:, None] + torch.arange(length)]
    hidden = torch.rand(found.shape, generator=generator) < 0.15
    hidden[:, 0] |= ~hidden.any(1)
    return torch.stack([found.masked_fill(hidden, vocabulary), found], dim=1)


def authors(number: int, seed: int, length: int = 40) -> tuple[Tensor, Tensor]:
    """Returns windows of Shakespeare (1) and of WikiText-2 (0) as characters; seed 1 takes them from other parts."""
    place = 1 if seed == 1 else 0
    texts = [read()[place] for read in (sources.wikitext_characters, sources.tiny_shakespeare)]
    generator = torch.Generator().manual_seed(seed)
    author = torch.randint(2, (number,), generator=generator)
    share = torch.rand(number, generator=generator)
    starts = [(share * (len(text) - length)).long() for text in texts]
    windows = [text[start[:, None] + torch.arange(length)] for text, start in zip(texts, starts, strict=True)]
    return torch.where(author[:, None] == 1, windows[1], windows[0]), author.float()


def discs(number: int, seed: int, pixels: int = 24) -> tuple[Tensor, Tensor]:
    """Returns noisy images of three discs, shape (number, 1, pixels, pixels), and where the brightest of them is."""
    generator = torch.Generator().manual_seed(seed)
    axis = torch.arange(pixels, dtype=torch.float32)
    centre = pixels * torch.rand(number, 3, 2, 1, 1, generator=generator)
    radius = pixels * (0.1 + 0.1 * torch.rand(number, 3, 1, 1, generator=generator))
    inside = ((axis[:, None] - centre[:, :, 0]).square() + (axis - centre[:, :, 1]).square()).sqrt() < radius
    light = torch.tensor([0.4, 0.7, 1.0]).view(3, 1, 1) * inside
    images = light.amax(1, keepdim=True) + 0.2 * torch.randn(number, 1, pixels, pixels, generator=generator)
    return images, inside[:, 2:].float()


def games(number: int, seed: int, features: int = 8) -> Tensor:
    """Returns states, actions that were drawn alike, and rewards: 1 for the best action, with noise."""
    fixed = torch.randn(features, ACTIONS, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    state = torch.randn(number, features, generator=generator)
    action = torch.randint(ACTIONS, (number,), generator=generator)
    reward = ((state @ fixed).argmax(1) == action).float() + 0.5 * torch.randn(number, generator=generator)
    return torch.cat([state, action[:, None].float(), reward[:, None]], dim=1)
