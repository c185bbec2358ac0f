"""The graph of a loss, as autograd shows it."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor


def nodes_of(loss: Tensor) -> Iterator[Any]:
    """Yields every node of the graph once; autograd does not show the inside of compiled or reentrant parts."""
    seen, open_ends = set(), [loss.grad_fn]
    while open_ends:
        node = open_ends.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            open_ends += [following for following, _ in node.next_functions]


def leaves_of(loss: Tensor) -> Iterator[Tensor]:
    """Yields the tensors that ``backward`` would give a gradient."""
    for node in nodes_of(loss):
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor):
            yield leaf
