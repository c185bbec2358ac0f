"""moved: old import paths lead to where the modules are now, and say so."""

import copy
import importlib
import pickle
import sys

import pytest

from smoothdiag import Status, Verdict
from smoothdiag.moved import MOVED


@pytest.mark.parametrize("old", MOVED)
def test_an_old_path_has_the_names_of_the_new_one_and_warns(old: str, monkeypatch) -> None:
    monkeypatch.delitem(sys.modules, old, raising=False)
    with pytest.warns(DeprecationWarning, match=f"`{old}` is now `{MOVED[old]}`") as warned:
        module = importlib.import_module(old)
    assert warned[0].filename != importlib.import_module("smoothdiag.moved").__file__
    public = {name for name in vars(importlib.import_module(MOVED[old])) if not name.startswith("_")}
    assert public <= set(vars(module))
    assert all(getattr(module, name) is getattr(importlib.import_module(MOVED[old]), name) for name in public)


def test_what_is_set_under_an_old_path_is_set_under_the_new_one(monkeypatch) -> None:
    monkeypatch.delitem(sys.modules, "smoothdiag.measure.objective", raising=False)
    with pytest.warns(DeprecationWarning, match="smoothdiag.measure.loss.objective"):
        import smoothdiag.measure.objective as old
    import smoothdiag.measure.loss.objective as new

    monkeypatch.setattr(old, "Objective", None)
    assert new.Objective is None
    assert importlib.import_module("smoothdiag.measure.objective") is new


def test_what_was_pickled_under_an_old_path_is_read(monkeypatch) -> None:
    from smoothdiag.measure.probe.schedule import every

    new = pickle.dumps(every(3), protocol=0)
    old = new.replace(b"smoothdiag.measure.probe.schedule", b"smoothdiag.measure.schedule")
    assert old != new
    monkeypatch.delitem(sys.modules, "smoothdiag.measure.schedule", raising=False)
    with pytest.warns(DeprecationWarning, match="smoothdiag.measure.probe.schedule"):
        assert pickle.loads(old)(3)


@pytest.mark.parametrize("kind", [Status, Verdict])
def test_outcomes_are_pickled_by_name_because_their_texts_change(kind) -> None:
    for outcome in kind:
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            pickled = pickle.dumps(outcome, protocol)
            assert pickle.loads(pickled) is outcome
            assert outcome.value.encode() not in pickled
        assert copy.deepcopy(outcome) is outcome


def test_an_old_path_is_an_attribute_of_its_package(monkeypatch) -> None:
    for old, name in (("smoothdiag.measure", "selftest"), ("smoothdiag.autoclip", "events")):
        package = importlib.import_module(old)
        monkeypatch.delitem(vars(package), name, raising=False)  # `delattr` would ask for it first, and import it
        monkeypatch.delitem(sys.modules, f"{old}.{name}", raising=False)
        with pytest.warns(DeprecationWarning, match=MOVED[f"{old}.{name}"]):
            assert getattr(package, name) is importlib.import_module(MOVED[f"{old}.{name}"])
        with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
            package.nothing  # noqa: B018


def test_other_modules_are_as_missing_as_before() -> None:
    with pytest.raises(ModuleNotFoundError, match="smoothdiag.measure.nothing"):
        importlib.import_module("smoothdiag.measure.nothing")
