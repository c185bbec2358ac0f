"""Trace: the table between measuring and fitting, on disk safe against crashes and damage."""

from smoothdiag.rows import COLUMNS
from smoothdiag.trace.lines import FORMAT_VERSION
from smoothdiag.trace.trace import Trace

__all__ = ["COLUMNS", "FORMAT_VERSION", "Trace"]
