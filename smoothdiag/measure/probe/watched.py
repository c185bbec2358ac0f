"""Watched: a loader that shows its batches as it hands them out."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

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
