"""Training steps of Lightning: shows them to a probe, and takes them again to measure."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import MagicMock

from torch import Tensor, nn

from smoothdiag.measure.loss.bookkeeping import Books
from smoothdiag.measure.probe import Probe
from smoothdiag.requirements import installed_by
from smoothdiag.spikes import SpikeGuard

with installed_by("lightning"):
    from torchmetrics import Metric

STRATEGIES = ("SingleDeviceStrategy", "DDPStrategy")
"""Strategies that can be measured. Others shard parameters without showing it to the optimizer, or accumulate by
themselves."""


class TrainingSteps:
    """Replaces the ``training_step`` of a trainer's strategy, which Lightning calls for every micro-batch.

    Args:
        trainer: A trainer, ready to train.
        module: Its LightningModule.
    """

    def __init__(self, trainer: Any, module: nn.Module) -> None:
        self._trainer, self._module = trainer, module
        self._training_step: Callable[..., Any] = trainer.strategy.training_step
        self._probe: Probe | None = None

    def show(self, probe: Probe, guard: SpikeGuard | None = None) -> None:
        """Shows the arguments of every training step to a probe, right before the step is taken for the first time.

        A guard is shown the losses.
        """
        self._probe, loop, shown = probe, self._trainer.fit_loop, -1

        def step(*args: Any) -> Any:
            nonlocal shown
            # A closure may be evaluated repeatedly, and a pass that only updates batch statistics trains nothing.
            if loop.total_batch_idx != shown and not loop._skip_backward:
                keeps = probe.due or guard is not None
                probe.observe((args, Books(self._module) if keeps else None, probe.steps))
            is_first, shown = loop.total_batch_idx != shown, loop.total_batch_idx
            output = self._training_step(*args)
            if guard is not None and is_first and not loop._skip_backward and output is not None:
                guard.observe(_loss_in(output))
            return output

        vars(self._trainer.strategy)["training_step"] = step

    def release(self) -> None:
        """Leaves the strategy as it was."""
        vars(self._trainer.strategy).pop("training_step", None)

    def loss(self, model: nn.Module, shown: tuple[tuple[Any, ...], Books, int]) -> Tensor:
        """Takes a training step again, and returns its share in the loss of the optimizer step."""
        args, books, step = shown
        if self._probe is not None and step != self._probe.steps:
            books = Books(self._module)  # fixed micro-batches of an earlier step are measured as the module is now
        with books.reopened(), _silent(self._module, self._trainer):
            output = self._training_step(*args)  # with the model as the strategy has wrapped it
        loss = _loss_in(output)
        number: int = self._trainer.accumulate_grad_batches  # even if the last step has fewer
        return loss / number


def _loss_in(output: Any) -> Tensor:
    """Returns the loss from the result of a training step."""
    loss: Tensor = output["loss"] if isinstance(output, Mapping) else output
    return loss


def check_run(trainer: Any, module: Any) -> None:
    """Raises a ValueError if the training steps of a run cannot be taken again."""
    if not module.automatic_optimization:
        raise ValueError(
            "Parameter `automatic_optimization` should be True under SmoothnessCallback. Found False in "
            f"{type(module).__name__}: its training_step moves the parameters itself, so it cannot be called again to "
            "measure. Use smoothdiag.Probe in that training_step instead: one with a list of all optimizers that step "
            "on the same loss, and one for each optimizer with a loss of its own."
        )
    if len(trainer.optimizers) != 1:
        raise ValueError(
            "Method `configure_optimizers` should return one optimizer under SmoothnessCallback. Found "
            f"{len(trainer.optimizers)}. One optimizer may have several parameter groups."
        )
    names = [kind.__name__ for kind in type(trainer.strategy).__mro__]
    if not set(STRATEGIES) & set(names) or trainer.strategy.handles_gradient_accumulation:
        raise ValueError(
            f"Parameter `strategy` of the trainer should be one device or DDP. Found {names[0]}. Under other "
            "strategies, use smoothdiag.Probe in a loop of your own, as with Fabric."
        )
    if "dataloader_iter" in inspect.signature(module.training_step).parameters:
        raise ValueError(
            "Method `training_step` should take a batch. Found one that takes `dataloader_iter`: if it were called "
            "again to measure, it would fetch another batch."
        )


@contextmanager
def _silent(module: nn.Module, trainer: Any) -> Iterator[None]:
    """Keeps a module from logging and from adding to metrics in place; the caller restores the module's counters."""
    for metric in (part for part in module.modules() if isinstance(part, Metric)):
        states = {name: getattr(metric, name) for name in metric._defaults}  # tensors of any size
        vars(metric).update({name: x.clone() for name, x in states.items() if isinstance(x, Tensor)})
    vars(module).update(log=_ignore)  # log_dict calls it
    loggers = trainer.loggers
    trainer.loggers = [MagicMock() for _ in loggers]  # mocks accept any call to a logger
    try:
        yield
    finally:
        trainer.loggers = loggers


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Logs nothing."""
