"""The doctor: finds mistakes around gradient clipping in a running training loop, and names the line to change.

Examples:
    >>> model = nn.Linear(2, 1)
    >>> with sd.doctor.watch(model, torch.optim.SGD(model.parameters(), lr=0.1)) as report:
    ...     model(torch.ones(2)).backward()
    ...     norm = nn.utils.clip_grad_norm_(model.parameters(), float("inf"))
    >>> print(report.findings[0].what)
    max_norm=inf was used to read the gradient norm. That call also writes: ...
"""

from smoothdiag.doctor.explanations import explain
from smoothdiag.doctor.findings import Fault, Finding, Severity
from smoothdiag.doctor.report import Report
from smoothdiag.doctor.script import run_script
from smoothdiag.doctor.sites import Site
from smoothdiag.doctor.watching import watch

__all__ = ["Fault", "Finding", "Report", "Severity", "Site", "explain", "run_script", "watch"]
