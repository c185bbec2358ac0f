"""The doctor: finds mistakes around gradient clipping in a running training loop, and the line to change."""

from smoothdiag.doctor.explanations import explain
from smoothdiag.doctor.findings import Fault, Finding, Severity
from smoothdiag.doctor.report import Report
from smoothdiag.doctor.script import run_script
from smoothdiag.doctor.sites import Site
from smoothdiag.doctor.watching import watch

__all__ = ["Fault", "Finding", "Report", "Severity", "Site", "explain", "run_script", "watch"]
