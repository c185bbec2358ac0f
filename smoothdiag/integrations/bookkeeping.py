"""Bookkeeping: the counters, lists and sums of an object, put back after a loss was evaluated again."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

MOST = 1024
"""Elements of a tensor up to which it is taken for a running sum, and copied; and of a dictionary that is searched."""


@contextmanager
def unrecorded(owner: object) -> Iterator[None]:
    """Within it, what code keeps in the attributes of ``owner``, and of modules that it holds, is put back at the end.

    That is the attributes themselves, the entries of dictionaries, sets and deques in them, what is appended to lists,
    and small tensors that are added to in place: copies stand in for them, as the graph of a loss may hold on to such a
    tensor, and must not see it change before ``backward``. Parameters, buffers and the modules of torch are left alone,
    and so are other objects, and what is written over within a list.
    """
    books = _Books()
    try:
        books.open(owner if isinstance(owner, nn.Module) else vars(owner))
        yield
    finally:
        books.restore()


class _Books:
    """What containers hold, with copies in the place of the small tensors among it."""

    def __init__(self) -> None:
        self._seen: set[int] = set()
        self._copies: dict[int, Tensor] = {}
        self._put_back: list[Callable[[], object]] = []

    def open(self, value: Any) -> None:
        """Takes down the content of a container or module, and of those within."""
        if id(value) in self._seen:
            return
        self._seen.add(id(value))
        if isinstance(value, dict):
            self._open_dict(value)
        elif isinstance(value, list):
            self._put_back.append(partial(value.__delitem__, slice(len(value), None)))
        elif isinstance(value, set | deque):
            self._put_back.append(partial(_replace, value, list(value)))
        elif isinstance(value, nn.Module):
            self._open_module(value)

    def restore(self) -> None:
        """Puts everything back."""
        for put_back in self._put_back:
            put_back()

    def _open_dict(self, value: dict[Any, Any]) -> None:
        entries = dict(value)
        self._put_back.append(partial(_refill, value, entries))
        for key, entry in entries.items() if len(entries) <= MOST else ():
            if _is_sum(entry):
                value[key] = self._copies.setdefault(id(entry), entry.clone())
            else:
                self.open(entry)

    def _open_module(self, module: nn.Module) -> None:
        if type(module).__module__.startswith("torch."):  # which keep nothing that a loss depends on
            for child in module.children():
                self.open(child)
        else:
            self._seen |= {id(module._parameters), id(module._buffers)}  # of which the probe takes care
            self.open(vars(module))


def _is_sum(value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and not isinstance(value, nn.Parameter)
        and value.numel() <= MOST
        and not value.requires_grad
    )


def _refill(value: dict[Any, Any], entries: dict[Any, Any]) -> None:
    for key in [key for key in value if key not in entries]:
        del value[key]
    for key, entry in entries.items():  # and no others: outputs of models refuse to be updated
        if key not in value or value[key] is not entry:
            value[key] = entry


def _replace(value: Any, content: list[Any]) -> None:
    value.clear()
    (value.update if isinstance(value, set) else value.extend)(content)
