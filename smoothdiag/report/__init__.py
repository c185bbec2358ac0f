"""Report: one page that stands alone and says what a trace means for a run. Importing it loads no matplotlib."""

from smoothdiag.report.page import write_report

__all__ = ["write_report"]
