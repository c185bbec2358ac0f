"""integrations.loggers.wandb: a module with wandb's functions is used by what it has, and by nothing else."""

from types import SimpleNamespace
from typing import Any

import pytest
from logged_runs import assert_same, expected, law

from smoothdiag import Trace
from smoothdiag.integrations.loggers import WandbWriter

LAW = law(range(3))


class Module(SimpleNamespace):
    """The least that counts as such a module: its ``init`` returns nothing, and it has neither axes nor images."""

    __name__ = "least"

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def init(self, **options: Any) -> None:
        self.calls.append(("init", options))

    def log(self, values: dict[str, Any], step: int) -> None:
        self.calls.append(("log", step, values))

    def finish(self) -> None:
        self.calls.append(("finish",))


def test_the_least_module_gets_every_number_with_its_step() -> None:
    module, trace = Module(), Trace()
    trace.extend(LAW)
    WandbWriter(trace, module=module, project="p").close()
    first, *logged, last = module.calls
    assert (first, last) == (("init", {"project": "p"}), ("finish",))
    found = {name: [(step, values[name]) for _, step, values in logged] for name in logged[0][2]}
    assert_same(found, expected(trace))


def test_a_run_that_is_given_is_written_to_and_stays_open() -> None:
    module, trace = Module(), Trace()
    module.Image = lambda pixels: f"image of {pixels.shape}"
    trace.extend(LAW)
    WandbWriter(trace, module, module=module).close()
    assert {call[0] for call in module.calls} == {"log"}
    assert module.calls[-1] == ("log", 2, {"smoothness/figure": "image of (720, 960, 4)"})


def test_options_of_a_run_that_exists_are_refused_by_the_name_of_the_module() -> None:
    module = Module()
    module.run = module
    with pytest.raises(ValueError, match="Found project. Pass these arguments to the `least.init`"):
        WandbWriter(Trace(), module=module, project="p")
