"""Logs of earlier runs, which hold gradient norms and losses alone: read as a trace, and what they can tell."""

from smoothdiag.logs.reading import describe_columns, read_log
from smoothdiag.logs.review import LogReview, review_log

__all__ = ["LogReview", "describe_columns", "read_log", "review_log"]
