"""Report: what the doctor has found, as text and as JSON."""

from __future__ import annotations

from typing import Any

from smoothdiag import machines
from smoothdiag.console import counted
from smoothdiag.doctor.findings import Finding
from smoothdiag.doctor.observer import Observer


class Report:
    """What the doctor has found so far; ``print`` shows a table and explains each finding.

    Args:
        observer: The observer that follows the training loop.

    Attributes:
        exit_code: Exit code of the script that ran under the doctor.
    """

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self.exit_code = 0

    @property
    def steps(self) -> int:
        """Optimizer steps seen; with several optimizers, the steps of the optimizer that took most."""
        return self._observer.steps

    @property
    def headline(self) -> str:
        """The first line of the text."""
        return str(self).splitlines()[0]

    @property
    def findings(self) -> list[Finding]:
        """The findings, worst first."""
        return self._observer.findings()

    def to_dict(self) -> dict[str, Any]:
        """Returns the number of steps and all findings as strings and numbers."""
        return {"steps": self.steps, "findings": [each.to_dict() for each in self.findings]}

    def for_machines(self) -> list[machines.Finding]:
        """Returns the findings as all commands hand them to machines, worst first."""
        return [_for_machines(each) for each in self.findings]

    def __str__(self) -> str:
        return as_text(self.findings, self.steps, self.exit_code, by_hand=self._observer.register.by_hand is not None)


def _for_machines(found: Finding) -> machines.Finding:
    return machines.Finding(
        found.name,
        found.severity,
        found.what,
        found.change,
        found.file,
        found.line,
        found.count,
        found.of,
        found.unit,
        {"code": found.code, "inside": found.site.inside or None, "link": found.link},
    )


def as_text(findings: list[Finding], steps: int, exit_code: int = 0, *, by_hand: bool = False) -> str:
    """Returns a table of the findings, followed by an explanation of each."""
    if not steps and not findings:
        if exit_code:
            return (
                f"smoothdiag doctor: the script ended with exit code {exit_code} before its first optimizer step, so "
                "there was nothing to look at."
            )
        return (
            "smoothdiag doctor: no optimizer step was seen in this process, so there was nothing to check. Either the "
            "script ended before its first step, or it trains where the doctor does not see it: in processes that the "
            "script starts (start the ranks with torchrun and the doctor in each of them), in compiled steps, in "
            "threads that outlive the script, or in updates by hand of gradients that no backward() of a loss made."
        )
    found = counted(len(findings), "finding") if findings else "no findings"
    head = f"smoothdiag doctor: {found} in {counted(steps, 'step')}{' taken by hand' if by_hand else ''}"
    if not findings:
        return f"{head}."
    rows = [("severity", "finding", "seen", "line")]
    rows += [(f.severity, f.name, f.seen, str(f.site)) for f in findings]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join([head, "", *table, *(f"\n{each}" for each in findings)])
