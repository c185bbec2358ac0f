"""ModuleState: what a forward pass may change in a model beside the coordinates."""

from collections.abc import Sequence

from torch import Tensor, nn

from smoothdiag import vectors
from smoothdiag.vectors import Vector

Place = tuple[dict[str, Tensor | None], str]


class ModuleState:
    """Buffers, and those parameters outside x that forward passes are seen to change (a teacher, a key encoder).

    Entries are known by the place they have in their module, not by the tensor: forward passes may put new tensors
    there.

    Args:
        model: The model.
        coordinates: The parameters x, which are not part of the state.
    """

    def __init__(self, model: nn.Module, coordinates: Sequence[Tensor]) -> None:
        seen = {id(p) for p in coordinates}
        self._moving: list[Place] = []
        self._still: list[Place] = []
        for module in model.modules():
            for store, places in ((module._buffers, self._moving), (module._parameters, self._still)):
                for name, tensor in store.items():
                    if tensor is not None and id(tensor) not in seen:
                        seen.add(id(tensor))
                        places.append((store, name))  # type: ignore[arg-type]
        self._marks = self._mark()

    def tensors(self) -> list[Tensor]:
        """Returns the tensors that are in place now."""
        return [_at(place) for place in self._moving]

    def values(self) -> list[Tensor]:
        """Returns copies of the tensors in place now."""
        return vectors.clone(self.tensors())

    def assign(self, values: Vector) -> None:
        """Copies earlier ``values`` into the tensors in place now; entries that have joined since stay as they are."""
        tensors = self.tensors()[: len(values)]
        vectors.assign_(tensors, values)

    def put_back(self, tensors: Sequence[Tensor], values: Vector) -> None:
        """Puts tensors back where they were, with the values they had."""
        for (store, name), tensor in zip(self._moving, tensors, strict=True):
            store[name] = tensor
        self.assign(values)

    def mark(self) -> None:
        """Remembers which tensors are in place outside the state, and how often they have been written to."""
        self._marks = self._mark()

    def notice(self) -> bool:
        """Takes into the state what was replaced or written to since ``mark``; returns whether there was anything."""
        now = self._mark()
        changed = [place for place, a, b in zip(self._still, self._marks, now, strict=True) if a != b]
        self._still = [place for place, a, b in zip(self._still, self._marks, now, strict=True) if a == b]
        self._moving += changed
        self.mark()
        return bool(changed)

    def _mark(self) -> list[tuple[int, int]]:
        return [(id(_at(place)), _at(place)._version) for place in self._still]


def _at(place: Place) -> Tensor:
    store, name = place
    tensor = store[name]
    assert tensor is not None
    return tensor
