"""Small tasks beyond those of the benchmark of AutoClip: texts, tasks that are learnt by heart, and other losses."""

from collections.abc import Callable
from functools import partial

import on_path  # noqa: F401
import sources
import torch
from batching import Batch, drawn, table, text
from images import Plain, ResNet, VisionTransformer, layers
from nets import GPT, Recurrent
from others import Logistic
from tasks import Task, binary_loss, class_loss, small, squared_loss
from texts import WORDS, TextGPT, TextLSTM
from torch import Tensor, nn
from torch.nn import functional as F

TEXT_TASKS = (
    Task(
        "small-gpt",
        kind="pre-norm",
        part="choose",
        model=lambda: TextGPT(65, 32, width=32),
        data=partial(text, sources.tiny_shakespeare, length=32, size=8, held_out=8),
        loss_fn=class_loss,
    ),
    Task(
        "small-lstm",
        kind="recurrent",
        part="choose",
        model=lambda: TextLSTM(WORDS, width=32),
        data=partial(text, partial(sources.penn_treebank, WORDS), length=20, size=8, held_out=8),
        loss_fn=class_loss,
    ),
)
"""Smaller than the planted ones, and with other rates."""


LATER_TASKS = (
    Task(
        "overfit-gpt",
        kind="pre-norm",
        part="final",
        model=lambda: GPT(65, 32),
        data=partial(
            text, lambda: [codes[:4000] for codes in sources.tiny_shakespeare()], length=32, size=16, held_out=8
        ),
        loss_fn=class_loss,
    ),
    Task(
        "overfit-lenet-cifar",
        kind="plain convolutions",
        part="final",
        model=lambda: Plain(3),
        data=partial(table, lambda: small(partial(sources.cifar10, 28), 500), size=32, held_out=100),
        loss_fn=class_loss,
    ),
    Task(
        "gru-wikitext",
        kind="recurrent",
        part="final",
        model=lambda: Recurrent(65, nn.GRU, 64),
        data=partial(text, sources.wikitext_characters, length=32, size=16, held_out=8),
        loss_fn=class_loss,
    ),
    Task(
        "perceptron-a9a",
        kind="perceptron",
        part="final",
        model=lambda: nn.Sequential(nn.Linear(123, 64), nn.GELU(), nn.Linear(64, 1), nn.Flatten(0)),
        data=partial(table, sources.a9a, size=64, held_out=100),
        loss_fn=binary_loss,
    ),
)
"""Written when the guard was fixed; two of them reach losses near zero."""


def sorted_digits(number: int, seed: int, digits: int = 10, length: int = 8) -> tuple[Tensor, Tensor]:
    """Returns drawn digits, then the same in order; what should be said is ordered digits, after the drawn ones."""
    drawn = torch.randint(digits, (number, length), generator=_seeded(seed))
    whole = torch.cat([drawn, drawn.sort(1).values], dim=1)
    return whole[:, :-1], torch.where(torch.arange(2 * length - 1) < length - 1, -100, whole[:, 1:])


def sums(number: int, seed: int, modulus: int = 31) -> tuple[Tensor, Tensor]:
    """Returns two numbers and a sign for "equals", shape (number, 3), and their sum by a modulus."""
    terms = torch.randint(modulus, (number, 2), generator=_seeded(seed))
    return F.pad(terms, (0, 1), value=modulus), terms.sum(1) % modulus


def mistaken(share: float, read: Callable[[], tuple[Batch, Batch]]) -> tuple[Batch, Batch]:
    """Gives a share of the training examples a drawn class."""
    (x, y), valid = read()
    is_wrong = torch.rand(len(y), generator=_seeded(0)) < share
    return (x, torch.where(is_wrong, torch.randint(10, y.shape, generator=_seeded(1)), y)), valid


def unequal(read: Callable[[], tuple[Batch, Batch]]) -> tuple[Batch, Batch]:
    """Leaves one in fifty of the examples with label 1."""
    (x, y), valid = read()
    keeps = (y == 0) | (torch.rand(len(y), generator=_seeded(0)) < 0.02)
    return (x[keeps], y[keeps]), valid


def taught(number: int, seed: int) -> tuple[Tensor, Tensor]:
    """Returns inputs and what a fixed network of tanh units makes of them."""
    x, fixed = torch.randn(number, 10, generator=_seeded(seed)), _seeded(7)
    first, second = torch.randn(10, 20, generator=fixed), torch.randn(20, generator=fixed)
    return x, (x @ first / 10**0.5).tanh() @ second / 20**0.5


def counted(number: int, seed: int) -> tuple[Tensor, Tensor]:
    """Returns inputs and counts whose mean is the exponential of a linear function."""
    x = torch.randn(number, 12, generator=_seeded(seed))
    mean = (x @ torch.linspace(-0.4, 0.4, 12) + 1).exp()
    return x, torch.poisson(mean, generator=_seeded(seed + 1))


def waves(number: int, seed: int) -> tuple[Tensor, Tensor]:
    """Returns places and values of a wave whose noise grows to one side."""
    x = 2 * torch.rand(number, 1, generator=_seeded(seed)) - 1
    return x, ((6 * x).sin() + (0.05 + 0.2 * (x + 1)) * torch.randn(number, 1, generator=_seeded(seed + 1))).squeeze(1)


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Last(nn.Sequential):
    """A network whose output at the last place counts."""

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens)[:, -1]


def count_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Negative log-likelihood of counts, without the constant; it can be negative."""
    return F.poisson_nll_loss(model(batch[0]).squeeze(-1), batch[1])


def normal_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Negative log-likelihood under a normal distribution whose variance is learnt; it can be negative."""
    mean, log_variance = model(batch[0]).unbind(-1)
    return F.gaussian_nll_loss(mean, batch[1], log_variance.exp())


def hinge_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Hinge loss of labels 0 and 1; it is zero for examples beyond the margin."""
    return F.relu(1 - (2 * batch[1] - 1) * model(batch[0])).mean()


def margin_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Hinge loss of many classes."""
    return F.multi_margin_loss(model(batch[0]), batch[1])


def perceptron(*widths: int, dropout: float = 0.0, activation: type[nn.Module] = nn.ReLU) -> nn.Module:
    first, *rest = layers(*widths, activation=activation)
    return nn.Sequential(nn.Flatten(), first, nn.Dropout(dropout), *rest)


PENN = partial(text, partial(sources.penn_treebank, WORDS), length=20, size=16, held_out=8)
WIKITEXT = partial(text, sources.wikitext_characters, length=32, size=16, held_out=8)
MNIST = partial(table, sources.mnist, size=32, held_out=100)

NEW_TASKS = (
    Task("sort-gpt", "algorithm", "final", lambda: GPT(10, 15), partial(drawn, sorted_digits, 32, 8), class_loss),
    Task(
        "sort-gru",
        "algorithm",
        "final",
        lambda: Recurrent(10, nn.GRU),
        partial(drawn, sorted_digits, 32, 8),
        class_loss,
    ),
    Task("sums-gpt", "algorithm", "final", lambda: Last(GPT(32, 3)), partial(drawn, sums, 64, 8), class_loss),
    Task(
        "mistakes-mnist",
        kind="wrong labels",
        part="final",
        model=Plain,
        data=partial(table, partial(mistaken, 0.03, sources.mnist), size=32, held_out=100),
        loss_fn=class_loss,
    ),
    Task(
        "overfit-vit-cifar",
        kind="few examples",
        part="final",
        model=VisionTransformer,
        data=partial(table, partial(small, sources.cifar10, 500), size=32, held_out=100),
        loss_fn=class_loss,
    ),
    Task(
        "overfit-lstm-ptb",
        kind="few examples",
        part="final",
        model=lambda: Recurrent(WORDS),
        data=partial(
            text, lambda: [codes[:2000] for codes in sources.penn_treebank(WORDS)], length=20, size=16, held_out=8
        ),
        loss_fn=class_loss,
    ),
    Task(
        "unequal-a9a",
        kind="rare class",
        part="final",
        model=lambda: nn.Sequential(perceptron(123, 32, 1), nn.Flatten(0)),
        data=partial(table, partial(unequal, sources.a9a), size=64, held_out=100),
        loss_fn=binary_loss,
    ),
    Task(
        "hinge-a9a",
        "hinge",
        "final",
        lambda: Logistic(123),
        partial(table, sources.a9a, size=64, held_out=100),
        hinge_loss,
    ),
    Task("margin-mnist", "hinge", "final", lambda: perceptron(784, 64, 10), MNIST, margin_loss),
    Task("dropout-mnist", "dropout", "final", lambda: perceptron(784, 128, 10, dropout=0.5), MNIST, class_loss),
    Task(
        "student", "distillation", "final", lambda: perceptron(10, 32, 1), partial(drawn, taught, 64, 8), squared_loss
    ),
    Task("counts", "counts", "final", lambda: perceptron(12, 32, 1), partial(drawn, counted, 64, 8), count_loss),
    Task(
        "variance-waves",
        kind="learnt variance",
        part="final",
        model=lambda: perceptron(1, 64, 64, 2, activation=nn.Tanh),
        data=partial(drawn, waves, 64, 8),
        loss_fn=normal_loss,
    ),
    Task("gru-ptb", "recurrent words", "final", lambda: Recurrent(WORDS, nn.GRU), PENN, class_loss),
    Task("postnorm-ptb", "post-norm words", "final", lambda: GPT(WORDS, 20, norm="post"), PENN, class_loss),
    Task("rms-wikitext", "gated characters", "final", lambda: GPT(65, 32, norm="rms"), WIKITEXT, class_loss),
    Task("deep-gpt-wikitext", "deep", "final", lambda: GPT(65, 32, width=32, layers=6), WIKITEXT, class_loss),
    Task(
        "single-gpt",
        "tiny batches",
        "final",
        lambda: GPT(65, 32),
        partial(text, sources.tiny_shakespeare, 32, 1, 8),
        class_loss,
    ),
    Task(
        "deep-resnet-cifar",
        kind="deep",
        part="final",
        model=lambda: ResNet(8, blocks=3),
        data=partial(table, sources.cifar10, size=32, held_out=100),
        loss_fn=class_loss,
    ),
    Task(
        "lenet-cifar",
        "plain colours",
        "final",
        lambda: Plain(3),
        partial(table, partial(sources.cifar10, 28), 32, 100),
        class_loss,
    ),
)
"""Written before the guard in its present form saw any of them; six come near a loss of zero."""
