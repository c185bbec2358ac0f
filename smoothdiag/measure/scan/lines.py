"""Lines: the directions out of x that a scan follows, by name."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor, nn

from smoothdiag import arguments, vectors
from smoothdiag.vectors import Vector

NUM_LINES: Final = 14
"""Lines that a scan follows at a time unless directions are given. Few long lines find laws as often, but name more
wrong ones (benchmarks/scan_power.py)."""

NAMES: Final = (
    '"gradient up", "gradient down", "random 1", "random 2", ..., "layers 1", "layers 2", ..., "in PARAMETER", '
    '"gradient in PARAMETER", "update", "descent", "to NAME" or "from NAME"'
)

_WITHIN: Final = ("gradient in ", "in ")

_NUMBERED = re.compile(r"(random|layers) ([1-9][0-9]*)")


@dataclass(frozen=True)
class Targets:
    """What lines may lead along.

    Attributes:
        tensors: The place of each parameter in x, by name.
        points: Other checkpoints by name.
        update: The optimizer's update.
    """

    tensors: Mapping[str, int]
    points: Mapping[str, Vector] = field(default_factory=dict)
    update: Vector | None = None


def names_of(directions: Sequence[str] | None, targets: Targets, start: Vector) -> list[str]:
    """Returns the names of the lines to follow from ``start``.

    Raises:
        ValueError: If a name is unknown, comes twice, or needs something that was not given.
    """
    if directions is None:
        return list(_defaults(targets, start))
    if isinstance(directions, str) or not isinstance(directions, Sequence) or not directions:
        raise arguments.wrong("directions", f"a list of names out of {NAMES}", directions)
    for name in directions:
        _check(name, targets)
    if len(set(directions)) < len(directions):
        raise arguments.wrong("directions", "a list of different names", list(directions))
    return list(directions)


def _defaults(targets: Targets, start: Vector) -> Iterator[str]:
    """Yields the lines in order of preference: first one of each kind, large tensors before small ones."""
    yield from ("gradient up", "gradient down")
    if targets.update is not None:
        yield "update"
    yield from (f"{way} {name}" for name in targets.points for way in ("to", "from"))
    yield from ("random 1", "layers 1")
    # A line within the only tensor would be a line of another kind under another name.
    largest = sorted(targets.tensors, key=lambda name: -start[targets.tensors[name]].numel())
    if len(largest) > 1:
        yield from (f"{way}{name}" for name in largest for way in _WITHIN)
    for number in range(2, NUM_LINES):
        yield from (f"layers {number}", f"random {number}")


def _check(name: str, targets: Targets) -> None:
    if name in ("gradient up", "gradient down", "descent") or (isinstance(name, str) and _NUMBERED.fullmatch(name)):
        return
    if name == "update":
        if targets.update is None:
            raise ValueError('The direction "update" needs the parameter `update`. Found `update = None`.')
        return
    way, target = _parted(name) if isinstance(name, str) else ("", "")
    known = targets.tensors if way in _WITHIN else targets.points
    if not way:
        raise ValueError(f"Parameter `directions` should hold names out of {NAMES}. Found {name!r}.")
    if target not in known:
        what = "a trainable parameter of this name" if way in _WITHIN else "a checkpoint of this name in `toward`"
        found = ", ".join(map(repr, known)) or "no checkpoints"
        raise ValueError(f"The direction {name!r} needs {what}. Found {found}.")


def _parted(name: str) -> tuple[str, str]:
    """Returns the way of a line and what it leads along; nothing for an unknown way."""
    way = next((way for way in (*_WITHIN, "to ", "from ") if name.startswith(way) and len(name) > len(way)), "")
    return way, name.removeprefix(way)


def reach_of(name: str, start: Vector, targets: Targets) -> float:
    """Returns the length that the limits of a line are measured by: ||x||, or the norm of the one tensor that moves.

    Far beyond the norm of a tensor a network is in another regime: attention that points at one place, say.
    """
    way, target = _parted(name)
    moved = [start[targets.tensors[target]]] if way in _WITHIN else start
    return float(vectors.norm(moved)) or float(vectors.norm(start)) or 1.0


def direction(name: str, start: Vector, gradient: Vector, targets: Targets, *, seed: int) -> list[Tensor]:
    """Returns the direction of a line, of length 1, or of length 0 if the line leads nowhere."""
    way, target = _parted(name)
    if name in ("gradient up", "gradient down"):
        found = [g if name == "gradient up" else -g for g in gradient]
    elif name == "update":
        assert targets.update is not None
        found = list(targets.update)
    elif way in _WITHIN:
        place = targets.tensors[target]
        found = [0 * x for x in start]
        drawn = vectors.random_like([start[place]], seed=_seed(seed, f"in {place}"))
        found[place] = gradient[place] if way == "gradient in " else drawn[0]
    elif way:
        away = vectors.sub(targets.points[target], start)
        found = away if way == "to " else [-x for x in away]
    else:
        found = vectors.random_like(start, seed=_seed(seed, name))
        if name.startswith("layers"):
            sizes = zip(vectors.norms(start).tolist(), vectors.norms(found).tolist(), strict=True)
            found = [z * (a / b) if b else z for z, (a, b) in zip(found, sizes, strict=True)]
    length = float(vectors.norm(found))
    return [x / length for x in found] if length and math.isfinite(length) else [0 * x for x in found]


def _seed(seed: int, name: str) -> int:
    """Returns a seed for each line, so that the random lines of a scan differ and further lines change none."""
    way, _, number = name.partition(" ")
    return (seed * 1_000_003 + 3 * int(number) + ("random", "layers", "in").index(way)) % 2**62


def named_vector(what: str, given: object, model: nn.Module, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Returns the tensors of a state dict that belong to the parameters, in their order.

    Args:
        what: Name of the argument, for the message.
        given: Tensors by the names of the model's parameters.
        model: The model.
        parameters: The coordinates x.

    Raises:
        ValueError: If a tensor is missing, has another shape or holds numbers that are not finite.
    """
    if not isinstance(given, Mapping):
        raise arguments.wrong(what, "a mapping from names of parameters to tensors, such as a state dict", given)
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    found = []
    for parameter in parameters:
        names = aliases[id(parameter)]
        tensor = next((given[name] for name in names if name in given), None)
        if not isinstance(tensor, Tensor) or tensor.shape != parameter.shape:
            shape = "nothing" if tensor is None else getattr(tensor, "shape", type(tensor).__name__)
            shape = f"shape {tuple(shape)}" if isinstance(shape, torch.Size) else shape
            raise ValueError(
                f"Parameter `{what}` should hold a tensor of shape {tuple(parameter.shape)} named `{names[0]}`, as the "
                f"state dict of this model does. Found {shape}."
            )
        if not tensor.isfinite().all():
            raise ValueError(f"Parameter `{what}` should hold finite numbers. Found others in `{names[0]}`.")
        found.append(tensor.detach().to(parameter.device, vectors.widened(parameter.detach()[:0]).dtype))
    return found
