"""Requirements: what to install where a framework is missing."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def installed_by(extra: str) -> Iterator[None]:
    """Around imports of a framework: says which installation is missing where one of them fails.

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
        message = f'What was asked for needs what is not installed: {error}. Run: pip install "smoothdiag[{extra}]"'
        raise ImportError(message, name=error.name) from error
