"""Iterates: finds copies of the parameters that an optimizer keeps in its state and moves along with them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from smoothdiag import vectors
from smoothdiag.adapters.wrappers import wrapped_in
from smoothdiag.memory import retried

Pair = tuple[Tensor, Tensor]
"""A tensor of an optimizer's state, and the parameter of the same shape."""

FEW = 64
"""With fewer entries, a state may lie near the parameters by chance, so the test is stricter."""


def equal_to_parameters(optimizer: torch.optim.Optimizer) -> str:
    """Returns the name of an entry of the state that equals the parameters; empty if there is none."""
    for entry, pairs in candidates(optimizer).items():
        if all(torch.equal(s, p) for s, p in pairs) and any(bool(s.any()) for s, _ in pairs):
            return entry
    return ""


def near_parameters(optimizer: torch.optim.Optimizer, moved: float | Tensor) -> str | None:
    """Returns the name of an entry of the state that lies near the parameters, right after a step of the optimizer.

    An iterate is as long as the parameters and points the same way. A moment of the first gradient might by chance,
    as on ||x||^2 / 2, but then it is a multiple of that gradient.

    Args:
        optimizer: The optimizer.
        moved: Length of the step [x].

    Returns:
        The name; empty if there is no such entry; ``None`` if that cannot be told yet.
    """
    is_clear = True
    for name, pairs in candidates(optimizer).items():
        state, parameters = zip(*pairs, strict=True)
        px, xx, ss = (_dot(a, b) for a, b in ((state, parameters), (parameters,) * 2, (state,) * 2))
        if not xx > 0 or not ss > 0:  # zero weights are near to everything small
            is_clear = is_clear and ss == 0
            continue
        share, cosine = px / xx, px / (xx * ss) ** 0.5
        if not (0.5 <= share <= 2 and cosine >= 0.5):
            continue
        apart = max(ss - 2 * px + xx, 0.0) ** 0.5
        if sum(p.numel() for p in parameters) < FEW and apart > max(10 * float(moved), 1e-2 * xx**0.5):
            continue
        with_grad = [(s, p.grad, p) for s, p in pairs if p.grad is not None and p.grad.shape == s.shape]
        if with_grad and _is_parallel(with_grad):
            continue
        return name
    return "" if is_clear else None


def num_entries(optimizer: torch.optim.Optimizer) -> int:
    """Returns how many entries the state of an optimizer has: a new entry may be an iterate."""
    return sum(len(s) if isinstance(s, Mapping) else 1 for s in optimizer.state.values())


def candidates(optimizer: torch.optim.Optimizer) -> dict[str, list[Pair]]:
    """Returns tensors in the shapes of parameters, by name, wherever the optimizer or an inner one keeps them."""
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad and p.numel()]
    own = {vectors.local(p).data_ptr() for p in parameters}
    found: dict[str, list[Pair]] = {}

    def add(name: str, value: Any, p: Tensor) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                add(str(key), inner, p)
        elif isinstance(value, list | tuple):
            for inner in value:
                add(name, inner, p)
        elif isinstance(value, Tensor) and value.is_floating_point() and value.shape == p.shape:
            is_own = vectors.local(value).data_ptr() in own
            found.setdefault(name, []).extend([] if is_own else [(value.detach(), p)])

    def add_all(name: str, value: Any) -> None:
        for entry, values in _in_order(name, value, parameters):
            for inner, p in zip(values, parameters, strict=True):
                add(entry, inner, p)

    for holder in _holders(optimizer):
        for owner, value in holder.state.items():
            if not isinstance(owner, Tensor):
                add_all(str(owner), value)
            elif any(owner is p for p in parameters):
                add("state", value, owner)
        for attribute, value in vars(holder).items():
            if attribute not in ("state", "param_groups", "defaults"):
                add_all(attribute, value)
    return {name: pairs for name, pairs in found.items() if pairs}


def _holders(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    inner = wrapped_in(optimizer).values()
    return [optimizer, *(o for o in inner if o is not optimizer and o.state is not optimizer.state)]


def _in_order(name: str, value: Any, parameters: Sequence[Tensor]) -> Iterator[tuple[str, Sequence[Any]]]:
    """Yields lists with one value per parameter, whether they are kept as a list, by parameter, or as one tensor."""
    if isinstance(value, Mapping):
        if all(any(key is p for key in value) for p in parameters):
            yield name, [next(v for key, v in value.items() if key is p) for p in parameters]
        else:
            for key, inner in value.items():
                if isinstance(key, str):
                    yield from _in_order(key, inner, parameters)
    elif isinstance(value, list | tuple) and len(value) == len(parameters):
        yield name, value
    elif isinstance(value, Tensor) and value.dim() == 1 and not any(map(vectors.is_sharded, parameters)):
        sizes = [p.numel() for p in parameters]
        if value.numel() == sum(sizes) and value.is_floating_point():
            yield name, [part.view(p.shape) for part, p in zip(torch.split(value, sizes), parameters, strict=True)]


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    first = vectors.local(a[0]).device
    products = [retried(lambda x=x, y=y: _product(x, y).to(first)) for x, y in zip(a, b, strict=True)]  # type: ignore[misc]
    return float(vectors.total([(products, b)]))


def _product(a: Tensor, b: Tensor) -> Tensor:
    x, y = (vectors.local(t).reshape(-1) for t in (a, b))
    wide = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    return torch.dot(x.to(y.device, wide), y.to(wide))


def _is_parallel(triples: Sequence[tuple[Tensor, Tensor, Tensor]]) -> bool:
    """Returns whether a state is a multiple of the gradient."""
    state, grads, _ = zip(*triples, strict=True)
    sg, ss, gg = _dot(state, grads), _dot(state, state), _dot(grads, grads)
    size = float((ss * gg) ** 0.5)
    return 0 < 0.99 * size < abs(sg)
