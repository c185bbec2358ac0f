"""Trace: the table between measuring and fitting. Its file survives crashes, and damage to the file is noticed."""

from smoothdiag.rows import COLUMNS
from smoothdiag.trace.lines import FORMAT_VERSION
from smoothdiag.trace.trace import Trace

__all__ = ["COLUMNS", "FORMAT_VERSION", "Trace"]
