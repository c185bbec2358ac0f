"""Tasks: a network, its data and its loss, sorted by kind into four parts of which the last two are run once."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal

import further
import others
import sources
import torch
from batching import Batch, Data, drawn, masked, pairs, table, text
from images import (
    Autoencoder,
    Contrast,
    Denoiser,
    Mixer,
    Plain,
    ResNet,
    Variational,
    VisionTransformer,
    groups_of,
)
from nets import GPT, Recurrent, StateSpace, Translator
from others import Field, Flow, Graph, Logistic, Pairs, Poisson
from torch import Tensor, nn
from torch.nn import functional as F

Part = Literal["think", "choose", "final", "further"]


@dataclass(frozen=True)
class Task:
    """What is to be learnt.

    Attributes:
        name: Name in the results.
        kind: Kind of network or of data; all tasks of a kind belong to one part.
        part: ``"think"``: rules are made up on it; ``"choose"``: parts of rules are kept or dropped by it; ``"final"``:
            run once, with the rule as it was; ``"further"``: run once, with the rule as it is since.
        model: Makes the network; initial weights come from torch's global generator.
        data: Reads or draws the data.
        loss_fn: Mean loss of a batch.
    """

    name: str
    kind: str
    part: Part
    model: Callable[[], nn.Module]
    data: Callable[[], Data]
    loss_fn: Callable[[nn.Module, Any], Tensor]


def class_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy [nats] of classes or of next tokens."""
    return F.cross_entropy(model(batch[0]).flatten(0, -2), batch[1].flatten())


def binary_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean logistic loss [nats]."""
    return F.binary_cross_entropy_with_logits(model(batch[0]), batch[1])


def squared_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean squared error."""
    return F.mse_loss(model(batch[0]).squeeze(-1), batch[1])


def rebuilt_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy [nats] of the pixels of an image that went through a narrow middle."""
    pixels = batch[0].flatten(1)
    return F.binary_cross_entropy_with_logits(model(pixels), pixels)


def own_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The loss that the network returns for its inputs."""
    return model(batch[0])


def field() -> tuple[Batch, Batch]:
    """Returns places in [-1, 1]^2 and colours of one photograph; every pixel serves for training and validation."""
    image = sources.cifar10(32)[0][0][7]
    axis = torch.linspace(-1, 1, 32)
    places = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), dim=-1).flatten(0, 1)
    whole = places, image.flatten(1).T
    return whole, whole


def noisy() -> tuple[Batch, Batch]:
    """Returns 4,000 training examples with heavy-tailed noise, and 1,000 others without noise."""
    return others.heavy_tailed(4000, seed=0, noise=0.3), others.heavy_tailed(1000, seed=1, noise=0.0)


@cache
def _pretrained() -> dict[str, Tensor]:
    """Returns the weights of a character GPT after 400 steps of AdamW on WikiText-2."""
    state = torch.get_rng_state()
    torch.manual_seed(0)
    model = GPT(65, 32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batches = text(sources.wikitext_characters, 32, 16, 1).batches(0)
    for batch in itertools.islice(batches, 400):
        class_loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.set_rng_state(state)
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def pretrained() -> nn.Module:
    """A character GPT that knows English but not Shakespeare."""
    model = GPT(65, 32)
    model.load_state_dict(_pretrained())
    return model


def small(read: Callable[[], tuple[Batch, Batch]], number: int) -> tuple[Batch, Batch]:
    """Leaves the first examples alone to train on."""
    train, valid = read()
    return tuple(x[:number] for x in train), valid


def regressor(features: int) -> nn.Module:
    return nn.Sequential(nn.Linear(features, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))


WORDS = 2000
"""Vocabulary of the word models; with a full vocabulary, the last layer would take most of the time."""

SHAKESPEARE = partial(text, sources.tiny_shakespeare, length=32, size=16, held_out=256)
PENN = partial(text, partial(sources.penn_treebank, WORDS), length=25, size=16, held_out=128)
WIKITEXT = partial(text, partial(sources.wikitext2, WORDS), length=32, size=16, held_out=128)
CIFAR = partial(table, sources.cifar10, size=32, held_out=500)
MNIST = partial(table, sources.mnist, size=64, held_out=1000)

_ALL = (
    Task("lstm-ptb", "recurrent", "think", lambda: Recurrent(WORDS), PENN, class_loss),
    Task("rnn-shakespeare", "recurrent", "think", lambda: Recurrent(65, nn.RNN, 96), SHAKESPEARE, class_loss),
    Task("gpt-shakespeare", "pre-norm", "think", lambda: GPT(65, 32), SHAKESPEARE, class_loss),
    Task("rope-wikitext2", "pre-norm", "think", lambda: GPT(WORDS, 32, width=48, norm="rms"), WIKITEXT, class_loss),
    Task("postnorm-shakespeare", "post-norm", "think", lambda: GPT(65, 32, norm="post"), SHAKESPEARE, class_loss),
    Task("resnet-cifar", "BatchNorm", "think", lambda: ResNet(), CIFAR, class_loss),
    Task("vit-cifar", "vision transformer", "think", VisionTransformer, CIFAR, class_loss),
    Task(
        "logistic-a9a",
        kind="linear",
        part="think",
        model=lambda: Logistic(123),
        data=partial(table, sources.a9a, size=256, held_out=4000),
        loss_fn=binary_loss,
    ),
    Task("groupnorm-cifar", "GroupNorm", "choose", lambda: ResNet(norm=groups_of), CIFAR, class_loss),
    Task("vae-mnist", "variational", "choose", Variational, MNIST, own_loss),
    Task(
        "heavy-tails",
        kind="heavy-tailed noise",
        part="choose",
        model=lambda: regressor(20),
        data=partial(table, noisy, size=64, held_out=1000),
        loss_fn=squared_loss,
    ),
    Task("finetune-shakespeare", "fine-tuning", "choose", pretrained, SHAKESPEARE, class_loss),
    Task("lenet-mnist", "plain convolutions", "choose", Plain, MNIST, class_loss),
    Task("mixer-cifar", "mixer", "choose", Mixer, CIFAR, class_loss),
    Task(
        "translator-words",
        kind="encoder and decoder",
        part="choose",
        model=lambda: Translator(12, 10),
        data=partial(drawn, others.reversed_words, size=32, held_out=512),
        loss_fn=class_loss,
    ),
    Task("statespace-shakespeare", "state space", "final", lambda: StateSpace(65), SHAKESPEARE, class_loss),
    Task("contrast-cifar", "contrastive", "final", lambda: Contrast(8), CIFAR, own_loss),
    Task("denoiser-mnist", "diffusion", "final", Denoiser, MNIST, own_loss),
    Task(
        "field-photograph",
        kind="implicit field",
        part="final",
        model=Field,
        data=partial(table, field, size=256, held_out=1024),
        loss_fn=squared_loss,
    ),
    Task(
        "autoencoder-mnist",
        kind="autoencoder",
        part="final",
        model=lambda: nn.Sequential(*Autoencoder()),
        data=MNIST,
        loss_fn=rebuilt_loss,
    ),
    Task("skipgram-ptb", "word vectors", "final", lambda: Pairs(WORDS), partial(pairs, WORDS), own_loss),
    Task(
        "poisson",
        kind="physics-informed",
        part="final",
        model=Poisson,
        data=partial(drawn, lambda n, seed: torch.rand(n, 1, generator=_seeded(seed)), size=64, held_out=500),
        loss_fn=own_loss,
    ),
    Task(
        "flow-moons",
        kind="normalising flow",
        part="final",
        model=Flow,
        data=partial(drawn, others.moons, size=128, held_out=2000),
        loss_fn=own_loss,
    ),
    Task(
        "graph-communities",
        kind="graph",
        part="final",
        model=lambda: Graph(16, 4),
        data=partial(drawn, others.communities, size=16, held_out=100),
        loss_fn=class_loss,
    ),
    Task(
        "overfit-mlp-mnist",
        kind="few examples",
        part="final",
        model=lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10)),
        data=partial(table, partial(small, sources.mnist, 512), size=32, held_out=1000),
        loss_fn=class_loss,
    ),
    Task(
        "factors-ratings",
        kind="recommender",
        part="further",
        model=lambda: further.Factors(400, 200),
        data=partial(drawn, further.ratings, size=256, held_out=2000),
        loss_fn=squared_loss,
    ),
    Task(
        "masked-ptb",
        kind="masked words",
        part="further",
        model=lambda: further.Masked(WORDS, 24),
        data=partial(masked, WORDS, 24),
        loss_fn=own_loss,
    ),
    Task(
        "authors-characters",
        kind="convolutions over text",
        part="further",
        model=lambda: further.Reader(65),
        data=partial(drawn, further.authors, size=64, held_out=1000),
        loss_fn=binary_loss,
    ),
    Task(
        "outline-discs",
        kind="segmentation",
        part="further",
        model=further.Outline,
        data=partial(drawn, further.discs, size=16, held_out=200),
        loss_fn=binary_loss,
    ),
    Task(
        "policy-games",
        kind="policy gradient",
        part="further",
        model=lambda: further.Policy(8, further.ACTIONS),
        data=partial(drawn, further.games, size=128, held_out=5000),
        loss_fn=own_loss,
    ),
)

TASKS = {task.name: task for task in _ALL}
"""Small networks of the kinds that people train."""


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
