"""Old import paths: they work for one more version and warn where the module is now."""

import importlib
import sys
import warnings
from collections.abc import Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import ModuleType

_ROOMS: Mapping[str, tuple[str, ...]] = {
    "measure.loss": (
        *("agreement", "batches", "beside", "bookkeeping", "coordinates", "faults", "fixed", "graph", "isolation"),
        *("objective", "replicas", "selftest", "state"),
    ),
    "measure.probe": (
        *("accumulation", "arguments", "backward", "closures", "measuring", "others", "ranks", "schedule"),
        *("sharded", "unsupported", "watched"),
    ),
}

MOVED: Mapping[str, str] = {
    **{
        f"smoothdiag.{room.partition('.')[0]}.{name}": f"smoothdiag.{room}.{name}"
        for room, names in _ROOMS.items()
        for name in names
    },
    "smoothdiag.autoclip.arguments": "smoothdiag.autoclip.checks",
    "smoothdiag.autoclip.counts": "smoothdiag.autoclip.history",
    "smoothdiag.autoclip.events": "smoothdiag.autoclip.history",
    "smoothdiag.autoclip.free_rate": "smoothdiag.autoclip.rates",
    "smoothdiag.autoclip.iterates": "smoothdiag.adapters.iterates",
    "smoothdiag.autoclip.resuming": "smoothdiag.autoclip.checks",
    "smoothdiag.measure.probe.recording": "smoothdiag.measure.recording",
    "smoothdiag.measure.preconditioner": "smoothdiag.adapters",
    "smoothdiag.measure.stability": "smoothdiag.adapters",
}
"""The old path of each module, and its new path. The last two were functions, and are methods of an `Adapter` now."""


class _Alias(Loader):
    """Puts the module of the new path in the place of the old one, so that what is set in one is set in both."""

    def __init__(self, new: str) -> None:
        self._new = new

    def create_module(self, spec: ModuleSpec) -> None:
        """Leaves the module's creation to Python."""

    def exec_module(self, module: ModuleType) -> None:
        """Finds the new module, with a warning."""
        warnings.warn(
            f"`{module.__name__}` is now `{self._new}`. The old path works for one more version: change the import.",
            DeprecationWarning,
            stacklevel=2,
        )
        sys.modules[module.__name__] = importlib.import_module(self._new)


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Returns a specification for a path that has moved, and None for others."""
        return spec_from_loader(fullname, _Alias(MOVED[fullname])) if fullname in MOVED else None


def moved_module(path: str) -> ModuleType:
    """Returns the module of an old path, for packages that are asked for it as an attribute.

    Raises:
        AttributeError: If there was no module of this path.
    """
    package, _, name = path.rpartition(".")
    if path not in MOVED:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    return importlib.import_module(path)


def keep_old_paths() -> None:
    """Makes Python look here for modules of this package that it finds nowhere else."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
