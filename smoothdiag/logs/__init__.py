"""Logs of earlier runs with gradient norms and losses: reads them as a trace and reviews what they can tell."""

from smoothdiag.logs.reading import LogReader, describe_columns, read_log
from smoothdiag.logs.review import LogReview, review_log

__all__ = ["LogReader", "LogReview", "describe_columns", "read_log", "review_log"]
