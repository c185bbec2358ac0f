"""Requirements: names the command that installs a missing framework."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def installed_by(extra: str) -> Iterator[None]:
    """Wraps imports of a framework; if one fails, the error names the command that installs the framework.

    ::

        with installed_by("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

    Args:
        extra: The extra of smoothdiag that installs the framework.

    Raises:
        ImportError: If an import fails; the message names the command.
    """
    try:
        yield
    except ImportError as error:
        message = f'This needs a package that is not installed: {error}. Run: pip install "smoothdiag[{extra}]"'
        raise ImportError(message, name=error.name) from error
