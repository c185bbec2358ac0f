"""requirements: a missing framework is named with the command that installs it."""

import pytest

from smoothdiag.requirements import installed_by


def test_missing_framework_is_named_with_the_command_that_installs_it() -> None:
    message = r"No module named 'no_such_framework'.*pip install \"smoothdiag\[tensorboard\]\""
    with pytest.raises(ImportError, match=message) as caught, installed_by("tensorboard"):
        import no_such_framework  # noqa: F401
    assert caught.value.name == "no_such_framework"
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_imports_that_work_pass() -> None:
    with installed_by("hf"):
        import math
    assert math.pi > 3
