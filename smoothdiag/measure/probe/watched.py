"""Watched: a loader that shows its batches as it hands them out, and the methods of a probe that see them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

from smoothdiag.measure.probe.calls import Calls

T = TypeVar("T")


class Watched(Iterator[T], Generic[T]):
    """An iterator over a loader that shows every batch to ``observe``; it can be iterated again in each epoch."""

    def __init__(self, observe: Callable[[T], None], loader: Iterable[T]) -> None:
        self._observe, self._loader = observe, loader
        self._iterator: Iterator[T] | None = None

    def __iter__(self) -> "Watched[T]":
        self._iterator = iter(self._loader)
        return self

    def __next__(self) -> T:
        if self._iterator is None:
            self._iterator = iter(self._loader)
        batch = next(self._iterator)
        self._observe(batch)
        return batch

    def __repr__(self) -> str:
        return f"<Watched {type(self._loader).__name__}>"

    def __len__(self) -> int:
        return len(self._loader)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        # The loader's dataset, sampler and so on. Private names are ours, and missing while unpickling.
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._loader, name)


class Watching(ABC):
    """The part of a probe that meets the batches of the loop."""

    _calls: Calls | None = None
    """The calls of a model that returns its loss, which take the place of batches."""

    _listeners: tuple[Callable[[Callable[[], Any], float | None], None], ...] = ()
    """Who sees the batches besides the probe."""

    def watch(self, loader: Iterable[T]) -> Watched[T]:
        """Returns an iterator over ``loader`` that shows every batch to the probe; ``len`` works as for ``loader``.

        A probe without ``loss_fn`` sees the calls of the model instead, so it only hands the batches on.
        """
        return Watched(self.observe if self._calls is None else lambda batch: None, loader)

    def observe(self, batch: Any, *, weight: float | None = None) -> None:
        """Shows the probe one micro-batch, right before its forward pass.

        Args:
            batch: What ``loss_fn`` takes. The probe keeps it until the optimizer steps, and a copy of the first ones.
            weight: Weight of the batch's loss in the loss of the step; default: as ``reduction`` says.

        Raises:
            ValueError: If the probe has no ``loss_fn``.
        """
        if self._calls is not None:
            raise ValueError(
                "Parameter `loss_fn` is needed to show batches by observe(). Without it, the probe sees the calls of "
                "the model by itself: leave out observe(), or pass loss_fn(model, batch) to the Probe."
            )
        self._meet(lambda: batch, weight)

    def listen(self, listener: Callable[[Callable[[], Any], float | None], None]) -> None:
        """Shows every micro-batch to somebody else, too, right before its forward pass, whether a step is due or not.

        Args:
            listener: Called with a function that makes the micro-batch, and its weight.
        """
        self._listeners = (*self._listeners, listener)

    def _meet(self, make: Callable[[], T], weight: float | None = None) -> T | None:
        """Shows a micro-batch to the listeners and to the probe."""
        for listener in self._listeners:
            listener(make, weight)
        return self._show(make, weight)

    @abstractmethod
    def _show(self, make: Callable[[], T], weight: float | None = None) -> T | None:
        """Makes a micro-batch and adds it if it is needed; returns it if it was added."""
