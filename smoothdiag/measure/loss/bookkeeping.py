"""Bookkeeping: an object's counters, lists and sums at one moment, so that a repeated loss starts from them again."""

import operator
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

MOST = 1024
"""Largest tensor that is taken for a running sum and copied, and largest dictionary that is searched, in elements."""

_NONE: Mapping[int, Tensor] = {}
_HOLDERS = (dict, list, set, deque, nn.Module)


class Books:
    """What code keeps in the attributes of an object, and of the modules that it holds, at this moment.

    Kept are the attributes themselves, the content of dictionaries, lists, sets and deques in them, the content of
    dictionaries within dictionaries, and the values of small tensors in any of these. Parameters, buffers, torch's own
    modules, other objects, and containers within lists are left alone.

    Args:
        owner: The object.
    """

    def __init__(self, owner: Any) -> None:
        self._owner = owner
        self._kept: dict[int, tuple[Any, Any]] = {}  # containers and their content, by the identity of the container
        self._sums: dict[int, Tensor] = {}  # copies of small tensors, by the identity of those
        self._registered: set[int] = set()
        self._take(owner if isinstance(owner, nn.Module) else vars(owner))

    def __deepcopy__(self, memo: object) -> "Books":
        return self  # books are never written to, and belong to the one object

    @contextmanager
    def reopened(self) -> Iterator[None]:
        """Gives the object the content of that moment inside the block, and its present content back afterwards."""
        now = Books(self._owner)
        now.cover(self)
        self.reopen()
        try:
            yield
        finally:
            now.put_back()

    def cover(self, other: "Books") -> None:
        """Notes the containers of ``other`` too, including those that the object has dropped since."""
        for container, _ in other._kept.values():
            self._take(container)

    def reopen(self) -> None:
        """Takes the object back to that moment, for code that may change it.

        Copies stand in for tensors: the graph of a loss may hold a tensor, which must not change before ``backward``.
        """
        self._refill_all({key: value.clone() for key, value in self._sums.items()})

    def put_back(self) -> None:
        """Leaves the object as it was at that moment, with the same objects in it."""
        self._refill_all(_NONE)

    def _take(self, value: Any) -> None:
        """Notes the content of a container or module, and of the containers and modules within."""
        if id(value) in self._kept or id(value) in self._registered:
            return
        if isinstance(value, dict):
            self._kept[id(value)] = value, dict(value)
            for entry in list(value.values()) if len(value) <= MOST else ():
                if isinstance(entry, _HOLDERS):
                    self._take(entry)
                elif _is_sum(entry):
                    self._sums.setdefault(id(entry), entry.clone())
        elif isinstance(value, list | set | deque):
            self._kept[id(value)] = value, list(value)
            if not isinstance(value, set) and len(value) <= MOST:
                for entry in value:
                    if _is_sum(entry):
                        self._sums.setdefault(id(entry), entry.clone())
        elif isinstance(value, nn.Module):
            self._registered |= {id(value), id(value._parameters), id(value._buffers)}  # put back by the probe
            if type(value).__module__.startswith("torch."):  # its attributes hold nothing that a loss depends on
                for child in value.children():
                    self._take(child)
            else:
                self._take(vars(value))

    def _refill_all(self, copies: Mapping[int, Tensor]) -> None:
        """Gives all containers the noted content, with copies in place of tensors."""
        for container, content in self._kept.values():
            if not container and not content:  # most are empty: every module has a dozen for hooks
                continue
            if isinstance(container, dict):
                if copies and not copies.keys().isdisjoint(map(id, content.values())):
                    content = {key: copies.get(id(entry), entry) for key, entry in content.items()}
                _refill(container, content)
                continue
            if copies and not isinstance(container, set) and not copies.keys().isdisjoint(map(id, content)):
                content = [copies.get(id(entry), entry) for entry in content]
            if not _same(container, content):
                container.clear()
                (container.update if isinstance(container, set) else container.extend)(content)


def _is_sum(value: Any) -> bool:
    if not isinstance(value, Tensor) or isinstance(value, nn.Parameter):
        return False
    return value.numel() <= MOST and not value.requires_grad


def _same(one: Collection[Any], other: Collection[Any]) -> bool:
    """Returns whether both hold the same objects in the same order; ``==`` of tensors is no answer."""
    return len(one) == len(other) and all(map(operator.is_, one, other))


def _refill(value: dict[Any, Any], entries: dict[Any, Any]) -> None:
    if _same(value, entries) and _same(value.values(), entries.values()):
        return
    for key in [key for key in value if key not in entries]:
        del value[key]
    if not _same(value, entries):  # code that takes out the oldest entry depends on the order
        for key in list(value):
            del value[key]
    for key, entry in entries.items():  # one by one, because outputs of models refuse `update`
        if key not in value or value[key] is not entry:
            value[key] = entry
