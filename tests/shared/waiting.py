"""Pages that wait beside their scripts until all runs are made."""

from pathlib import Path

import pytest


def skip_without(page: Path) -> None:
    """Skips the test if the page is not among the documents yet."""
    if not page.is_file():
        pytest.skip(f"docs/reproduce/{page.name} waits in benchmarks/reproduce/pages until its runs are whole")
