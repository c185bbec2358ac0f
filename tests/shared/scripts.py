"""Scripts of the documentation, as modules."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace


def load(path: Path) -> ModuleType:
    """Runs a script under a name of its own, by which worker processes find what they run."""
    spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def modules(folder: Path, *names: str) -> SimpleNamespace:
    """Imports modules of a folder by their own names, as the scripts beside them do."""
    sys.path.insert(0, str(folder))
    found = SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    sys.path.remove(str(folder))
    return found
