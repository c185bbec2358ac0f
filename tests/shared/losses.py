"""Losses of a model on a batch of inputs and targets."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def regression(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def classification(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Returns the mean cross-entropy of the logits, of every token where there are tokens, in float32 or wider."""
    logits = model(batch[0])
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    return F.cross_entropy(logits.flatten(0, -2), batch[1].flatten())


def bce(y: Tensor, target: float) -> Tensor:
    """Returns the mean cross-entropy of logits that should all say ``target``."""
    return F.binary_cross_entropy_with_logits(y, torch.full_like(y, target))


def generator_loss(models: nn.Module, z: Tensor) -> Tensor:
    """The loss of a generator beside its critic: the critic should take what it makes for real."""
    generator, critic = models
    return bce(critic(generator(z)), 1.0)


def critic_loss(models: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The loss of a critic on real examples and on what the generator makes."""
    generator, critic = models
    return bce(critic(batch[0]), 1.0) + bce(critic(generator(batch[1]).detach()), 0.0)
